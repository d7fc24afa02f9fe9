"""A network as a list of local modules, each trained on its own loss.

The paper's step is `ContSupNetwork.module_step`: context (equation 1), forward, local loss
(equation 6) and backward of one module. Numbers of equations are those of the README.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
from torch import Tensor, nn

from configs import DATASETS, Cut, InputError
from models.auxiliary import Decoder, Head, PatchDecoder
from models.checkpointing import checkpoint_unit
from models.context import ContextMode, Contexts, ContextSupply
from models.layers import to_float32
from models.momentum import MomentumBlock
from models.torch_internals import COMPILES_CHECKPOINTS, raise_recompile_limits
from models.windows import OpenWindow, compile_windows, window_step


class LocalModule(nn.Module):
    """The part of a network between two cuts, with encoders, head and decoder of its own.

    Args:
        context: encoders of the contexts that are added to the features that enter.
        units: backbone units by [stage, block], in order.
        head: real head (last module) or auxiliary head, (N, C, S, S) -> (N, D), with its loss. None
            for the first module of windows, which trains on the next one's loss alone.
        decoder: reconstructs the image from the module's output, or None.
        loss_weights: (lx, ly) of reconstruction and task loss; they count only with a decoder.
        recompute: activation checkpointing of all units but the last.
        momentum: what the module's output goes through before head and decoder, or None.
        own_head: the head of the module's own loss where `head` has that of a window, or None.
    Attributes:
        index: place in the network, from 0; the network's `stage` sets it.
        frozen: whether it stays as it is (see `freeze`).
    """

    def __init__(
        self,
        context: ContextSupply,
        units: dict[Cut, nn.Module],
        head: Head | None,
        decoder: Decoder | PatchDecoder | None = None,
        loss_weights: tuple[float, float] = (0.0, 1.0),
        recompute: bool = False,
        momentum: MomentumBlock | None = None,
        own_head: Head | None = None,
    ) -> None:
        super().__init__()
        self.index, self.frozen = 0, False
        self.unit_names = list(units)
        self.context = context
        self.units = nn.Sequential(*units.values())
        self.momentum = momentum
        self.head = head
        self.own_head = own_head
        self.decoder = decoder
        self.loss_weights = loss_weights
        self.recompute = recompute

    @property
    def classifies(self) -> bool:
        """Whether there is a head, and its output is a logit per class."""
        return self.head is not None and self.head.classifies

    def freeze(self) -> None:
        """Keep all parameters and BatchNorm statistics as they are, in training too."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LocalModule":
        """Set training or evaluation mode, as nn.Module does; a frozen module only evaluates."""
        return super().train(mode and not self.frozen)

    def forward(self, h_in: Tensor) -> Tensor:
        """Return h_out (N, C', S', S') of the last unit for h_in (N, C, S, S)."""
        *units, last = self.units
        h = h_in
        for unit in units:
            h = checkpoint_unit(unit, h) if self.recompute else unit(h)
        return last(h)  # its backward runs first, so to recompute it would save no memory

    def forward_and_losses(
        self, h_in: Tensor, targets: Tensor, pixels: Tensor | None, *before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return detached h_out and head output, then the two losses: what `--compile` compiles.

        It is one graph, so that the compiled backward takes its ReLU masks from the output. The
        weights of the losses are left out, since they differ from module to module.
        """
        h_out = self(h_in)
        output, task_loss, reconstruction_loss = self.losses(h_out, targets, pixels, *before)
        return h_out.detach(), output.detach(), task_loss, reconstruction_loss

    def losses(
        self, h_out: Tensor, targets: Tensor, pixels: Tensor | None, *before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the head's output and the two losses, the second None without a decoder.

        Under autocast head and decoder run in the narrow type, and their losses in float32.

        Args:
            h_out: (N, C, S, S), this module's features, before the next cut's context.
            targets: (N,) class indices.
            pixels: (N, 3, H, W) un-normalised images in [0, 1], for a decoder.
            before: for a task that `follows`, the prediction (N, D) of the module before.
        Returns:
            (N, D) head output, 0-d task loss (equation 8) and 0-d reconstruction loss (9).
        """
        features = self.head_input(h_out)
        task_loss, output = self.head.loss(features, targets, *before)
        if self.decoder is None:
            return output, task_loss, None
        decoded = to_float32(self.decoder(features, pixels.shape[-2:]))
        with torch.autocast(h_out.device.type, enabled=False):
            return output, task_loss, self.decoder.loss(decoded, pixels)

    def own_loss(self, h_out: Tensor, targets: Tensor) -> Tensor:
        """Return the 0-d loss of the module's own head, where `head` has that of a window."""
        head = self.head if self.own_head is None else self.own_head
        return head.loss(self.head_input(h_out), targets)[0]

    def head_input(self, h_out: Tensor) -> Tensor:
        """Return the features that head and decoder see: h_out, or what `momentum` makes of it."""
        return h_out if self.momentum is None else self.momentum(h_out)

    def local_loss(self, task_loss: Tensor, reconstruction_loss: Tensor | None) -> Tensor:
        """Return the local loss (equation 6), 0-d."""
        if reconstruction_loss is None:
            return task_loss
        lx, ly = self.loss_weights
        return lx * reconstruction_loss + ly * task_loss


class ForwardState:
    """What one module hands to the next: detached features, contexts, and a prediction.

    Attributes:
        h: (N, C, S, S) features that the last module gave out, detached; the images at first.
        contexts: on offer at the next cut.
        prediction: for tasks that `follow`, the last module's probabilities (N, classes), detached.
        finished: modules whose gradients have become complete.
        window: the module that waits for gradients from the next one (models/windows.py).
    """

    def __init__(
        self, h: Tensor, contexts: Contexts[Tensor], prediction: Tensor | None = None
    ) -> None:
        self.h: Tensor | None = h
        self.contexts = contexts
        self.prediction = prediction
        self.finished: list[LocalModule] = []
        self.window: OpenWindow | None = None

    def pop_finished(self) -> list["LocalModule"]:
        """Return the modules whose gradients have become complete since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def tensors(self) -> list[Tensor]:
        """Return all that another process needs, to make `received` of it."""
        predictions = [] if self.prediction is None else [self.prediction]
        return [self.h, *self.contexts.pushed(), *predictions]

    @classmethod
    def received(
        cls, mode: ContextMode, images: Tensor, tensors: Sequence[Tensor]
    ) -> "ForwardState":
        """Return the state of which `tensors` gave these, for the same images."""
        h, *pushed = tensors
        prediction = pushed.pop() if pushed and pushed[-1].dim() == 2 else None
        return cls(h, Contexts.received(mode, images, pushed), prediction)


class StageIO:
    """Receives the features for this process's modules, and sends their output.

    Here the process has all modules: features begin as the images and go nowhere.
    """

    def receive(self, mode: ContextMode, images: Tensor) -> ForwardState:
        """Return the state before the first module: features and contexts."""
        return ForwardState(images, Contexts(mode, images))

    def send(self, state: ForwardState) -> None:
        """Pass on the last module's output; its backward is yet to come."""

    def send_back(self, block: nn.Module) -> None:
        """Give the process before the weights of this stage's first block, for its average."""

    def receive_back(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights, of these shapes, that the next process gave to its `send_back`."""
        raise NotImplementedError("no process has the next module")

    def in_flight(self) -> Sequence[Tensor]:
        """Return the tensors that are in memory between two steps because of transfers."""
        return ()


class ContSupNetwork(nn.Module):
    """K local modules with no gradient across the K-1 cuts and context supplied at each.

    `network(images)` gives the logits of the last module's head.

    Args:
        modules: first to last.
        mode: which contexts are supplied.
        dataset: whose mean and std a decoder's target is un-normalised with.
        autocast_dtype: what autocast runs convs and matrix products in; None for no autocast but
            the caller's own.
        overlap_weight: of the loss of a window of two modules, 1 minus which a module's own loss
            has (`--overlap 1`); None trains each module on its own loss alone.
        num_classes: outputs of the last module's head.
    Attributes:
        local_modules: an nn.ModuleList. A LocalModule put in the place of another is run, trained
            and saved from then on; make an optimizer for it.
        io: how features reach the stage and leave it.
        average_gradients: called with each module of a window whose gradients are complete, where
            other processes have some too.
    """

    def __init__(
        self,
        modules: list[LocalModule],
        mode: ContextMode,
        dataset: str,
        autocast_dtype: torch.dtype | None = None,
        overlap_weight: float | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.local_modules = nn.ModuleList(modules)
        for index, module in enumerate(modules):
            module.index = index
        self.mode = mode
        self.dataset = dataset
        self.autocast_dtype = autocast_dtype
        self.overlap_weight = overlap_weight
        self.num_classes = num_classes
        self.average_gradients: Callable[[LocalModule], None] | None = None
        self.compiled = False
        self._own_modules: range | None = None
        self.io = StageIO()

    @property
    def stage(self) -> list[LocalModule]:
        """The modules that this process runs, one after the other: all, but for `set_stage`."""
        for index, module in enumerate(self.local_modules):
            if module.index != index:  # it has just come from elsewhere
                module.index = index
        modules, own = list(self.local_modules), self._own_modules
        return modules if own is None else modules[own.start : own.stop]

    def set_stage(self, indices: range, io: StageIO) -> None:
        """Run only the modules with these indices from now on; others run elsewhere.

        Args:
            indices: of the modules, without gaps.
            io: how features reach them and leave them.
        """
        self._own_modules, self.io = indices, io

    def eagerly(self) -> AbstractContextManager:
        """Return a context without compiling, for evaluation and for rare batch sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context that all but the losses run in.

        Inside a caller's own autocast, its cache would keep the weights of the first step.
        """
        if self.autocast_dtype is not None:
            return torch.autocast(device.type, self.autocast_dtype, cache_enabled=False)
        if torch.is_autocast_enabled(device.type):
            return torch.autocast(device.type, cache_enabled=False)
        return nullcontext()

    def compile_steps(self, backend: str = "inductor") -> None:
        """Compile the training steps of the stage's modules and their encoders.

        Identical ones share their code. A graph break is an error. Each batch size has code of its
        own: see `eagerly`. Raises InputError where this version of PyTorch can't.
        """
        groups = any(module.context.group for module in self.stage if len(module.context))
        if not COMPILES_CHECKPOINTS and (groups or any(m.recompute for m in self.stage)):
            raise InputError(
                "--compile needs PyTorch 2.9 or later where layers are recomputed, and this is "
                f"{torch.__version__}: leave it out, or give --context_group 0 and no --recompute"
            )
        self.compiled = True
        kinds = sum(1 + len(module.context) for module in self.stage)  # at most
        raise_recompile_limits(kinds)
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        step = compiled(LocalModule.forward_and_losses)
        encode = cache(lambda kind: compiled(kind.forward))
        for module in self.stage:
            module.forward_and_losses = partial(step, module)
            for encoder in module.context.values():
                encoder.forward = partial(encode(type(encoder)), encoder)
        if self.overlap_weight is not None:
            compile_windows(self.stage, LocalModule, compiled)

    def features(self, images: Tensor) -> Iterator[tuple[LocalModule, Tensor]]:
        """Yield each module of the stage with its h_out (N, C, S, S), first to last.

        Args:
            images: (N, 3, H, W), normalised.
        """
        state = self._receive(images)
        for module in self.stage:
            with self.autocast(images.device):
                h_out = module(self.supplied(module, state))
            self.pass_on(module, state, h_out.detach())
            yield module, h_out

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of the last module for images (N, 3, H, W), normalised."""
        for module, h_out in self.features(images):  # noqa: B007
            pass
        return self.head_output(module, h_out)

    def head_output(self, module: LocalModule, h_out: Tensor) -> Tensor:
        """Return a module's head output (N, D), float32 under autocast, for its h_out."""
        with self.autocast(h_out.device):
            return to_float32(module.head(module.head_input(h_out)))

    def decode(self, module: LocalModule, h_out: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the images (N, 3, *size) in [0, 1] that a module's decoder makes of h_out."""
        with self.autocast(h_out.device):
            return to_float32(module.decoder(module.head_input(h_out), size)).sigmoid()

    def local_step(
        self,
        images: Tensor,
        targets: Tensor,
        after_backward: Callable[[LocalModule], object] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every module's forward and backward, first to last, for a loop of your own.

        train.py uses `engine.step.train_step`, which also steps optimizers, counts errors, and
        scales the losses of float16; here they are not scaled.

        A module without a parameter that requires a gradient runs forward only.

        Gradients add to what `.grad` holds. An `after_backward` that steps the module's optimizer
        and frees the gradients keeps those of one module in memory at a time.

        Args:
            images: (N, 3, H, W), normalised, N >= 2.
            targets: (N,) class indices.
            after_backward: called with a module as soon as its gradients are there; with one that
                runs forward only, too.
        Returns:
            Logits (N, num_classes) of the last module and the losses, 0-d; all detached. There are
            K losses, and K-1 with windows, whose first module has none.
        """
        state, pixels = self.begin(images)
        local_losses = []
        for module in self.stage:
            result = self.module_step(module, state, targets, pixels)
            if result is not None:
                local_losses.append(result[0])
            for finished in state.pop_finished():
                if after_backward is not None:
                    after_backward(finished)
        return result[1], local_losses

    def begin(self, images: Tensor) -> tuple[ForwardState, Tensor | None]:
        """Return the state before the first module, and the decoders' target, for `module_step`."""
        pixels = self.pixels(images)  # first: features may be under way from another process
        if self._sends_back:
            self.io.send_back(self.stage[0].units[0])
        return self._receive(images), pixels

    @property
    def _sends_back(self) -> bool:
        """Whether a module in another process averages the weights of this stage's first block."""
        first = self._own[0]
        return first > 0 and self._averages_next(self.local_modules[first - 1])

    @property
    def bytes_back(self) -> int:
        """The bytes that go back to the process before, once a step (`--momentum_aux`)."""
        weights = self.stage[0].units[0].parameters() if self._sends_back else ()
        return sum(p.nbytes for p in weights)

    def _receive(self, images: Tensor) -> ForwardState:
        state = self.io.receive(self.mode, images)
        if (
            self.local_modules[-1].head.task.follows and state.prediction is None
        ):  # no module before has predicted
            shape = len(images), self.num_classes
            state.prediction = images.new_full(shape, 1 / self.num_classes)
        return state

    def module_step(
        self,
        module: LocalModule,
        state: ForwardState,
        targets: Tensor,
        pixels: Tensor | None,
        scale_loss: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Run one module's context, forward, loss and backward (equations 1 to 9).

        Gradients add to what `.grad` has, and `state` gets the detached output for the next module.
        The features that enter are detached, so the backward ends at this module's own input, and
        frees its graph. A module without a parameter that requires a gradient runs forward only,
        and keeps no graph.

        Args:
            state: the pass over the batch, after the module before this one.
            targets: (N,) class indices.
            pixels: (N, 3, H, W) target of a decoder, from `pixels`; None where nothing decodes.
            scale_loss: gives the 0-d tensor to go backward from, for a loss scaler.
        Returns:
            0-d loss and head output (N, D), detached. None from a module without a loss of its own,
            which is the first one of windows (models/windows.py).
        """
        if self.overlap_weight is not None:
            return window_step(self, module, state, targets, pixels, scale_loss)
        learns = any(parameter.requires_grad for parameter in module.parameters())
        follows = module.head.task.follows
        before = [state.prediction] if follows else []
        with nullcontext() if learns else torch.no_grad(), self.autocast(targets.device):
            h_in = self.supplied(module, state)
            h_out, output, *losses = module.forward_and_losses(h_in, targets, pixels, *before)
        del h_in  # from here on only autograd keeps it
        if follows:
            state.prediction = output.softmax(dim=1)
        self.pass_on(module, state, h_out)
        loss = module.local_loss(*losses)
        if learns:
            with self.without_autocast(targets.device):
                (loss if scale_loss is None else scale_loss(loss)).backward()
        if self._averages_next(module):
            module.momentum.update(self._next_weights(module))
        state.finished.append(module)
        return loss.detach(), output

    def supplied(self, module: LocalModule, state: ForwardState) -> Tensor:
        """Return the module's h_in (N, C, S, S) (equation 1), and push it to the contexts."""
        h, state.h = state.h, None  # so that the context can take the place of the features
        if module.index:
            h = module.context(h, state.contexts.named())
            state.contexts.push(h.detach())
        return h

    def pass_on(self, module: LocalModule, state: ForwardState, h_out: Tensor) -> None:
        """Keep a module's detached output for the next one, in this process or another."""
        state.h = h_out
        if module.index == self._own[-1]:
            self.io.send(state)

    @property
    def _own(self) -> range:
        return self._own_modules or range(len(self.local_modules))

    def _averages_next(self, module: LocalModule) -> bool:
        momentum = module.momentum  # as a module that trains, which this process may not run
        return momentum is not None and next(momentum.local.parameters()).requires_grad

    def _next_weights(self, module: LocalModule) -> list[Tensor]:
        """Return the weights of the next module's first block, before its step on this batch."""
        following = module.index + 1
        if following in self._own:
            return list(self.local_modules[following].units[0].parameters())
        return self.io.receive_back(list(module.momentum.average.parameters()))

    def without_autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a backward, which is not in a caller's autocast."""
        if torch.is_autocast_enabled(device.type):
            return torch.autocast(device.type, enabled=False)
        return nullcontext()

    def pixels(self, images: Tensor) -> Tensor | None:
        """Return un-normalised images in [0, 1], the decoders' target; None without decoders."""
        if all(module.decoder is None for module in self.stage):
            return None
        data = DATASETS[self.dataset]  # by Python's floats, to the precision of the images
        channels = [
            images[:, c] * (data.std[c] / 255) + data.mean[c] / 255 for c in range(images.shape[1])
        ]
        return torch.stack(channels, dim=1).clamp_(0, 1)

    def parameter_counts(self) -> dict[str, int]:
        """Return the parameters of backbone (with the real head), context and auxiliary nets."""
        counts = {"backbone": 0, "context": 0, "auxiliary": 0}
        last = self.local_modules[-1]
        for module in self.local_modules:
            counts["backbone"] += _count(module.units)
            counts["context"] += _count(module.context)
            counts["backbone" if module is last else "auxiliary"] += _count(module.head)
            for part in (module.decoder, module.momentum, module.own_head):
                counts["auxiliary"] += _count(part)
        return counts


def _count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
