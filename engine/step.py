"""An epoch of training and an evaluation, over batches that are on the device already."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.memory import PeakMemory
from models import ContSupNetwork, LocalModule


def learning_rate(epoch: int, epochs: int, lr: float, warmup_epochs: int, cosine: bool) -> float:
    """Learning rate of epoch 1 .. epochs (README, equation 11).

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

    The sums stay on the device: adding to them does not wait for it, reading them does. The first
    loss that is not finite is remembered there too: a sum that has become NaN or infinite stays so,
    and the steps of each module before that are counted.

    Attributes:
        modules: those that the network holds, where no others are said.
        samples, steps: in the sums.
        seconds: that the steps took, for who measures it.
        full: size of the largest batch among them.
    """

    def __init__(
        self,
        network: ContSupNetwork,
        device: torch.device,
        modules: list[LocalModule] | None = None,
    ) -> None:
        self.modules = modules or network.held
        self.samples = self.steps = self.full = 0
        self.seconds = 0.0
        self._losses = torch.zeros(len(self.modules), dtype=torch.float64, device=device)
        self._wrong = torch.zeros(len(self.modules), dtype=torch.float64, device=device)
        self._finite_steps = torch.zeros(len(self.modules), dtype=torch.int64, device=device)

    def add(self, module: LocalModule, loss: Tensor, output: Tensor, targets: Tensor) -> None:
        """The module had this mean loss and head output (N, D) on targets (N,)."""
        place = module.index - self.modules[0].index
        self._losses[place] += loss * len(targets)
        if module.task.classifies:
            self._wrong[place] += (output.argmax(dim=1) != targets).sum()

    def count(self, samples: int) -> None:
        """A step of so many samples is done."""
        self._finite_steps += self._losses.isfinite()
        self.samples += samples
        self.steps += 1
        self.full = max(self.full, samples)

    def losses(self) -> list[float]:
        """Mean loss of each module."""
        return (self._losses / self.samples).tolist()

    def errors(self) -> list[float | None]:
        """Error rate of each module's head in percent; None where it does not classify."""
        errors = (100 * self._wrong / self.samples).tolist()
        return [e if m.task.classifies else None for e, m in zip(errors, self.modules, strict=True)]

    def first_not_finite(self) -> tuple[int, int] | None:
        """Module and step, from 1, of the first loss that was NaN or infinite, if one was."""
        finite = self._finite_steps.tolist()
        fewest = min(finite)
        if fewest == self.steps:
            return None
        return self.modules[finite.index(fewest)].index, fewest + 1

    def state(self) -> dict[str, Tensor | int]:
        """All of it, to go on from with `load`."""
        return {
            "losses": self._losses, "wrong": self._wrong, "finite_steps": self._finite_steps,
            "samples": self.samples, "steps": self.steps, "full": self.full,
            "seconds": self.seconds,
        }  # fmt: skip

    def load(self, state: dict[str, Tensor | int]) -> None:
        """Go on from a `state`; ValueError if it is not one of a network with as many modules."""
        if state.keys() != self.state().keys():
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


class LocalSGD(torch.optim.SGD):
    """A module's SGD (README, equation 10); the learning rate is set epoch by epoch.

    Fused: all of a module's tensors in one kernel, with no temporaries.

    Attributes:
        scaler: scales the module's loss where gradients are float16; else it does nothing.
    """

    def __init__(self, module: LocalModule, scale: bool) -> None:
        super().__init__(
            module.parameters(), lr=0, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
        )
        for parameter in module.parameters():  # else a first step that overflows leaves it random
            momentum = torch.zeros_like(parameter, requires_grad=False)
            self.state[parameter]["momentum_buffer"] = momentum
        device = next(module.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)

    def step_and_free(self) -> None:
        """Step, but for gradients that overflowed in float16; then free the gradients."""
        self.scaler.step(self)
        self.scaler.update()
        self.zero_grad(set_to_none=True)


def make_optimizers(network: ContSupNetwork) -> list[LocalSGD]:
    """One a module that the network holds; it is on its device."""
    scale = network.narrow is torch.float16
    return [LocalSGD(module, scale) for module in network.held]


def train_step(
    network: ContSupNetwork,
    optimizers: list[LocalSGD],
    images: Tensor,
    targets: Tensor,
    totals: Totals,
    begin: Callable[[LocalModule], None] = lambda module: None,
) -> Iterator[LocalModule]:
    """Each module's forward, backward and optimizer step; then its gradients are freed.

    Gives each module when that is done, first to last.

    Args:
        images: (N, 3, H, W), normalised.
        targets: (N,) class indices.
        totals: to which the module's loss and wrong answers are added.
        begin: called with each module before its forward.
    """
    own = dict(zip(network.held, optimizers, strict=True))

    def scaled(module: LocalModule, loss: Tensor) -> Tensor:
        return own[module].scaler.scale(loss)

    for local in network.local_steps(images, targets, scaled, begin):
        module = local.module
        own[module].step_and_free()
        totals.add(module, local.loss, local.output, targets)
        del local
        yield module
    totals.count(len(targets))


def train_one_epoch(
    network: ContSupNetwork,
    optimizers: list[LocalSGD],
    batches: Iterable[tuple[Tensor, Tensor]],
    peak: PeakMemory,
    report: Callable[[int, Totals], None],
    totals: Totals | None = None,
    seed_of: Callable[[int, int], int] | None = None,
) -> Totals:
    """One pass over `batches` of images (N, 3, H, W) and targets (N,), or the rest of one.

    Args:
        report: `report(step, totals)` is called after each step, from 1.
        totals: of the steps of this epoch that were taken before, whose batches are left out.
        seed_of: seed of torch's generators for (step, module), so that dropout draws the same
            wherever an epoch is taken up again, and wherever the module runs; without it they run
            on.
    """
    network.train()
    totals = totals or Totals(network, peak.device)
    for step, (images, targets) in enumerate(batches, start=totals.steps + 1):

        def begin(module: LocalModule, step: int = step) -> None:
            if seed_of is not None:
                seed_generators(seed_of(step, module.index), peak.device)

        alive = partial(tensors_alive, network, optimizers, images, targets)
        # The last batch of an epoch may be smaller: code of its own would cost more than it saves.
        rare = network.eagerly() if len(targets) < totals.full else nullcontext()
        with rare, peak.step(len(targets), alive):
            for _ in train_step(network, optimizers, images, targets, totals, begin):
                pass
        report(step, totals)
    return totals


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what steps on a device draw from; torch.manual_seed takes 0.1 ms for all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@torch.no_grad()
def evaluate(
    network: ContSupNetwork, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Totals:
    """Cross entropy and error of every head held that classifies; the network's own are the last.

    `batches` are of images (N, 3, H, W) and targets (N,).
    """
    network.eval()
    totals = Totals(network, device)
    with network.eagerly():
        for images, targets in batches:
            for module, h_out in network.features(images):
                if module.task.classifies:
                    output = network.head_output(module, h_out)
                    totals.add(module, F.cross_entropy(output, targets), output, targets)
            totals.count(len(targets))
    return totals


@torch.no_grad()
def reconstructions(network: ContSupNetwork, images: Tensor) -> dict[str, Tensor]:
    """The images, and what the decoder at each cut makes of the features there.

    Args:
        images: (N, 3, H, W), normalised.
    Returns:
        `image`, then `cut [stage, block]` from first to last -> (N, 3, H, W) in [0, 1], of the cuts
        after modules held; empty for a network without decoders.
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
                rows[name] = network.reconstruction(module, h_out, images.shape[-2:])
    return rows


def tensors_alive(
    network: ContSupNetwork, optimizers: list[LocalSGD], *batch: Tensor
) -> list[Tensor]:
    """What exists before a step: weights, statistics, momentum, batch, and what is in flight."""
    return [*state_of(network.held, optimizers), *batch, *network.ends.in_flight()]


def state_of(modules: Iterable[LocalModule], optimizers: Iterable[LocalSGD]) -> list[Tensor]:
    """Weights, statistics and momentum."""
    own = [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
    momentum = [t for o in optimizers for state in o.state.values() for t in state.values()]
    return [tensor for tensor in (*own, *momentum) if isinstance(tensor, Tensor)]
