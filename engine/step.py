"""The training step of a batch, an evaluation, and the learning rate."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from models import ContSupNetwork, LocalModule


def learning_rate(epoch: int, epochs: int, lr: float, warmup_epochs: int, cosine: bool) -> float:
    """Return the learning rate of epoch 1 .. epochs (README, equation 11).

    A warm-up from 0.01 (from `lr` if that is less), then a cosine that is 0 at the last epoch, or
    steps to a tenth after half and after three quarters of the epochs.
    """
    if cosine:
        rate = 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))
    else:
        rate = lr * 0.1 ** ((epoch >= epochs / 2) + (epoch >= epochs * 3 / 4))
    if epoch <= warmup_epochs:
        done = (epoch - 1) / warmup_epochs
        rate = rate * done + min(0.01, lr) * (1 - done)
    return rate


class Totals:
    """Each module's loss and wrong answers, summed over an epoch.

    The sums stay on the device: adding to them does not wait for it, reading them does. A sum that
    has become NaN or infinite stays so, and the steps of each module before that are counted.

    Attributes:
        modules: the network's stage, unless others are given.
        samples, steps: counted in the sums.
        seconds: that the steps took; the training loop sets it.
    """

    def __init__(
        self,
        network: ContSupNetwork,
        device: torch.device,
        modules: list[LocalModule] | None = None,
    ) -> None:
        self.modules = modules or network.stage
        self.samples = self.steps = 0
        self.seconds = 0.0
        self._losses = torch.zeros(len(self.modules), dtype=torch.float64, device=device)
        self._wrong = torch.zeros(len(self.modules), dtype=torch.float64, device=device)
        self._finite_steps = torch.zeros(len(self.modules), dtype=torch.int64, device=device)

    def add(self, module: LocalModule, loss: Tensor, output: Tensor, targets: Tensor) -> None:
        """Add a module's 0-d mean loss and head output (N, D) on targets (N,)."""
        place = module.index - self.modules[0].index
        self._losses[place] += loss * len(targets)
        if module.classifies:
            self._wrong[place] += (output.argmax(dim=1) != targets).sum()

    def count(self, samples: int) -> None:
        """Count a step of so many samples."""
        self._finite_steps += self._losses.isfinite()
        self.samples += samples
        self.steps += 1

    def losses(self) -> list[float | None]:
        """Return the mean loss of each module; None where it has none of its own."""
        losses = (self._losses / self.samples).tolist()
        return [None if m.head is None else x for x, m in zip(losses, self.modules, strict=True)]

    def errors(self) -> list[float | None]:
        """Return each head's error rate in percent; None where it does not classify."""
        errors = (100 * self._wrong / self.samples).tolist()
        return [e if m.classifies else None for e, m in zip(errors, self.modules, strict=True)]

    def first_not_finite(self) -> tuple[int, int] | None:
        """Return module and step, from 1, of the first loss that was NaN or infinite, if any."""
        finite = self._finite_steps.tolist()
        fewest = min(finite)
        if fewest == self.steps:
            return None
        return self.modules[finite.index(fewest)].index, fewest + 1

    def state(self) -> dict[str, Tensor | int]:
        """Return all of it, for `load` to continue from."""
        return {
            "losses": self._losses, "wrong": self._wrong, "finite_steps": self._finite_steps,
            "samples": self.samples, "steps": self.steps, "seconds": self.seconds,
        }  # fmt: skip

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Continue from a `state`; raise ValueError unless it has the same modules and types."""
        if not state.keys() >= self.state().keys():
            raise ValueError(f"it has {', '.join(map(str, state)) or 'nothing'}")
        for name, own in self.state().items():
            value = state[name]
            if type(value) is not type(own):
                raise ValueError(f"its {name} are a {type(value).__name__}")
            if not isinstance(own, Tensor):
                setattr(self, name, value)
            elif value.shape != own.shape or value.dtype != own.dtype:
                raise ValueError(f"its {name} are {value.dtype} of shape {list(value.shape)}")
            else:
                own.copy_(value)


SMALLEST_SCALE = 1e-3
"""Loss scale below which a module counts as diverged.

torch.amp.GradScaler starts with 65536, halves the scale and skips the step where gradients are not
finite, and doubles it after 2000 others. With a smaller scale than this, gradients of up to 6e7 fit
into float16.
"""


class LocalSGD(torch.optim.SGD):
    """A module's SGD (README, equation 10); the learning rate is set epoch by epoch.

    It has the parameters that require a gradient now: none of a frozen module. Fused: all of a
    module's tensors in one kernel, with no temporaries.

    Attributes:
        scaler: scales the module's loss where gradients are float16; else it does nothing.
    """

    def __init__(self, module: LocalModule, scale: bool) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        super().__init__(  # SGD refuses an empty list, but not a group without parameters
            [{"params": trained}], lr=0, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
        )
        for parameter in trained:  # else a first step that overflows leaves it random
            momentum = torch.zeros_like(parameter, requires_grad=False)
            self.state[parameter]["momentum_buffer"] = momentum
        device = next(module.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)

    def step_and_free(self) -> None:
        """Step, unless gradients overflowed in float16; then free the gradients."""
        if all(p.grad is None for p in self.param_groups[0]["params"]):
            return  # the module is frozen, which a scaler takes for an error
        self.scaler.step(self)
        self.scaler.update()
        self.zero_grad(set_to_none=True)


def make_optimizers(network: ContSupNetwork) -> list[LocalSGD]:
    """Return one optimizer for each module of the network's stage, which is on its device."""
    scale = network.autocast_dtype is torch.float16
    return [LocalSGD(module, scale) for module in network.stage]


def train_step(
    network: ContSupNetwork,
    optimizers: list[LocalSGD],
    images: Tensor,
    targets: Tensor,
    totals: Totals,
    *,
    before_module: Callable[[LocalModule], object] | None = None,
    after_module: Callable[[LocalModule], object] | None = None,
) -> None:
    """Train each module of the stage on one batch, first to last (README, equation 10).

    A module's optimizer steps right after its backward, and its gradients are freed before the
    next module runs. With `--overlap` the next module runs first, since its loss counts too.

    Args:
        optimizers: one for each module of the stage.
        images: (N, 3, H, W), normalised.
        targets: (N,) class indices.
        totals: to which each module's loss and wrong answers are added.
        before_module: called with each module before its forward.
        after_module: called with each module when it has run, and what can be freed is.
    """
    state, pixels = network.begin(images)
    first = network.stage[0].index
    for module, optimizer in zip(network.stage, optimizers, strict=True):
        if before_module is not None:
            before_module(module)
        result = network.module_step(module, state, targets, pixels, optimizer.scaler.scale)
        for finished in state.pop_finished():
            optimizers[finished.index - first].step_and_free()
        if result is not None:  # a window's first module has no loss
            totals.add(module, *result, targets)
        del result  # else it would stay for the next module
        if after_module is not None:
            after_module(module)
    totals.count(len(targets))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of this device.

    torch.manual_seed would take 0.1 ms to seed all devices.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@torch.no_grad()
def evaluate(
    network: ContSupNetwork, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Totals:
    """Return cross entropy and error of every head that classifies; the real head is the last.

    Args:
        batches: of images (N, 3, H, W), normalised, and targets (N,).
    """
    network.eval()
    totals = Totals(network, device)
    with network.eagerly():
        for images, targets in batches:
            for module, h_out in network.features(images):
                if module.classifies:
                    output = network.head_output(module, h_out)
                    totals.add(module, F.cross_entropy(output, targets), output, targets)
            totals.count(len(targets))
    return totals


@torch.no_grad()
def reconstructions(network: ContSupNetwork, images: Tensor) -> dict[str, Tensor]:
    """Return the images, and those that the decoder at each cut makes of the features there.

    Args:
        images: (N, 3, H, W), normalised.
    Returns:
        `image`, then `cut [stage, block]` from first to last -> (N, 3, H, W) in [0, 1], of the cuts
        after the stage's modules; empty for a network without decoders.
    """
    if all(module.decoder is None for module in network.local_modules):
        return {}
    network.eval()
    pixels = network.pixels(images)
    rows = {} if pixels is None else {"image": pixels}
    with network.eagerly():
        for module, h_out in network.features(images):
            if module.decoder is not None:
                name = f"cut {list(module.unit_names[-1])}"
                rows[name] = network.decode(module, h_out, images.shape[-2:])
    return rows


def tensors_alive(
    network: ContSupNetwork, optimizers: list[LocalSGD], *batch: Tensor
) -> list[Tensor]:
    """Return all tensors before a step: weights, statistics, momentum, batch, and transfers."""
    return [*state_of(network.stage, optimizers), *batch, *network.io.in_flight()]


def state_of(modules: Iterable[LocalModule], optimizers: Iterable[LocalSGD]) -> list[Tensor]:
    """Return weights, BatchNorm statistics and momentum."""
    own = [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
    momentum = [t for o in optimizers for state in o.state.values() for t in state.values()]
    return [tensor for tensor in (*own, *momentum) if isinstance(tensor, Tensor)]
