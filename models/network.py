"""A network as a list of local modules, each trained on its own loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import losses
from configs import DATASETS, Cut
from models.auxiliary import Decoder
from models.context import ContextMode, Contexts, ContextSupply, Encoder
from models.grouped import Functions, encode, encode_backward
from models.norm_relu import wide
from models.recompute import keep_input_only


class LocalModule(nn.Module):
    """The part of a network between two cuts, with all that trains on its loss.

    `index` is its place in the network, from 0.

    Args:
        context: what is added to the features that enter.
        units: [stage, block] -> backbone unit, in order.
        head: real head (last module) or auxiliary head, (N, C, S, S) -> (N, D).
        task: what the head trains on.
        decoder: reconstructs the image from the module's output, or None.
        loss_weights: (lx, ly) of reconstruction and task loss; they count only with a decoder.
        recompute: of all units but the last keep only the input for the backward.
    """

    def __init__(
        self,
        context: ContextSupply,
        units: dict[Cut, nn.Module],
        head: nn.Module,
        task: losses.TaskLoss,
        decoder: Decoder | None = None,
        loss_weights: tuple[float, float] = (0.0, 1.0),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.index = 0
        self.unit_names = list(units)
        self.context = context
        self.units = nn.Sequential(*units.values())
        self.head = head
        self.task = task
        self.decoder = decoder
        self.loss_weights = loss_weights
        self.recompute = recompute

    def forward(self, h_in: Tensor) -> Tensor:
        """Features with context (N, C, S, S) -> h_out of the last unit."""
        *units, last = self.units
        h = h_in
        for unit in units:
            h = keep_input_only(unit, h) if self.recompute else unit(h)
        return last(h)  # its backward comes next: made again, its maps would exist twice

    def forward_and_losses(
        self, h_in: Tensor, targets: Tensor, pixels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """h_out and head's output, both detached, then the loss parts: what `--compile` compiles.

        In one piece, so that the compiled backward takes its ReLU masks from the output. The
        weights of the losses, which differ from module to module, are left out of it.
        """
        h_out = self(h_in)
        output, task, reconstruction = self.loss_parts(h_out, targets, pixels)
        return h_out.detach(), output.detach(), task, reconstruction

    def loss(self, h_out: Tensor, targets: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Local loss and the head's output (README, equations 6 to 9).

        Args:
            h_out: (N, C, S, S), this module's features, before the next cut's context.
            targets: (N,) class indices.
            pixels: (N, 3, H, W) un-normalised images in [0, 1]; used by a decoder.
        Returns:
            0-d loss and (N, D) head output.
        """
        output, *parts = self.loss_parts(h_out, targets, pixels)
        return self.weighed(*parts), output

    def loss_parts(
        self, h_out: Tensor, targets: Tensor, pixels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Head's output (N, D), task loss and reconstruction loss, the latter None or 0-d.

        Under autocast head and decoder are narrow, and the losses of their outputs float32.
        """
        output = wide(self.head(h_out))
        decoded = self.decoder and wide(self.decoder(h_out, pixels.shape[-2:]))
        with torch.autocast(h_out.device.type, enabled=False):
            task = self.task.function(output, targets)
            return output, task, self.decoder and losses.reconstruction(decoded, pixels)

    def weighed(self, task: Tensor, reconstruction: Tensor | None) -> Tensor:
        """Local loss (README, equation 6)."""
        if reconstruction is None:
            return task
        lx, ly = self.loss_weights
        return lx * reconstruction + ly * task


class LocalStep(NamedTuple):
    """What one local module leaves of a training step; all detached."""

    module: LocalModule
    output: Tensor
    loss: Tensor


class Ends:
    """How features come to the first module that a network holds, and leave the last: here, where
    it holds all of them, from the images and to nowhere.
    """

    def enter(self, mode: ContextMode, images: Tensor) -> tuple[Tensor, Contexts[Tensor]]:
        """What enters the first module held, before context, and the contexts on offer there."""
        return images, Contexts(mode, images)

    def leave(self, h: Tensor, contexts: Contexts[Tensor]) -> None:
        """The last module held has this output, detached; its backward is yet to come."""

    def in_flight(self) -> Sequence[Tensor]:
        """What is in memory between two steps because of it."""
        return ()


class ContSupNetwork(nn.Module):
    """K local modules with no gradient across the K-1 cuts and context supplied at each.

    `network(images)` gives the logits of the last module's head.

    Args:
        modules: first to last.
        mode: which contexts are supplied.
        dataset: whose mean and std a decoder's target is un-normalised with.
        narrow: dtype that autocast runs convs and matrix products in; None for no autocast.
    Attributes:
        held: the modules that run here, one after the other; all of them but for `hold`.
        ends: how features get to them and away.
    """

    def __init__(
        self,
        modules: list[LocalModule],
        mode: ContextMode,
        dataset: str,
        narrow: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.local_modules = nn.ModuleList(modules)
        for index, module in enumerate(modules):
            module.index = index
        self.mode = mode
        self.dataset = dataset
        self.narrow = narrow
        self.compiled = False
        self.held, self.ends = list(self.local_modules), Ends()

    def hold(self, held: range, ends: Ends) -> None:
        """From now on run these modules alone, which go on from others elsewhere.

        Of the others only names and shapes stay. Call it before the network is put on its device.
        """
        self.turn_to(held, ends)
        for module in self.local_modules:
            if module.index not in held:
                module.to("meta")

    def turn_to(self, held: range, ends: Ends) -> None:
        """Run these modules alone, as `hold` says; the others stay as they are, for another turn.

        Under FakeTensorMode, where no module can be moved, it takes the place of `hold`.
        """
        self.held = [module for module in self.local_modules if module.index in held]
        self.ends = ends

    def eagerly(self) -> AbstractContextManager:
        """For a batch size that comes up rarely, and for evaluation: nothing is compiled here."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The precision of everything but the losses."""
        return torch.autocast(device.type, self.narrow) if self.narrow else nullcontext()

    def compile_steps(self, backend: str = "inductor") -> None:
        """From now on train modules held and encoders compiled; identical ones share their code.

        A graph break is an error. An encoder's forward and backward are compiled apart: seen as a
        whole, the maps that its backward makes again would be found to be those of its forward,
        and kept. Each batch size has code of its own: see `eagerly`.
        """
        self.compiled = True
        kinds = sum(1 + len(module.context) for module in self.held)  # at most
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 2 * kinds)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * kinds)
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        step, plain = compiled(LocalModule.forward_and_losses), compiled(Encoder.forward)
        encoding = Functions(compiled(encode), compiled(encode_backward))
        for module in self.held:
            module.forward_and_losses = partial(step, module)
            for encoder in module.context.values():
                encoder.functions = encoding
                if not module.context.group:
                    encoder.forward = partial(plain, encoder)

    def in_turn(
        self, images: Tensor, run: Callable[[LocalModule, Tensor], tuple[Tensor, ...]]
    ) -> Iterator[tuple]:
        """Each module held, and what `run` gives for it: the one forward path of every use.

        What enters a module is detached: a backward from its output ends at its own input.

        Args:
            images: (N, 3, H, W), normalised.
            run: a module and its h_in -> its output (N, C, S, S), and what else is asked for.
        """
        h, contexts = self.ends.enter(self.mode, images)
        for module in self.held:
            with self.autocast(images.device):
                if module.index:
                    h = module.context(h, contexts.named())
                    contexts.push(h.detach())
                given = [run(module, h)]
            h = given[0][0].detach()
            if module is self.held[-1]:
                self.ends.leave(h, contexts)
            yield module, *given.pop()  # handed over: a local variable would keep it

    def features(self, images: Tensor) -> Iterator[tuple[LocalModule, Tensor]]:
        """Each module held with its output (N, C, S, S), from images (N, 3, H, W), normalised."""
        return self.in_turn(images, lambda module, h_in: (module(h_in),))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised -> logits (N, num_classes) of the last module."""
        for module, h_out in self.features(images):  # noqa: B007
            pass
        return self.head_output(module, h_out)

    def head_output(self, module: LocalModule, h_out: Tensor) -> Tensor:
        """A module's h_out (N, C, S, S) -> its head's output (N, D), float32 under autocast."""
        with self.autocast(h_out.device):
            return wide(module.head(h_out))

    def reconstruction(self, module: LocalModule, h_out: Tensor, size: tuple[int, int]) -> Tensor:
        """What a module's decoder makes of h_out (N, C, S, S): images (N, 3, *size) in [0, 1]."""
        with self.autocast(h_out.device):
            return wide(module.decoder(h_out, size)).sigmoid()

    def local_steps(
        self,
        images: Tensor,
        targets: Tensor,
        scaled: Callable[[LocalModule, Tensor], Tensor] = lambda module, loss: loss,
        begin: Callable[[LocalModule], None] = lambda module: None,
    ) -> Iterator[LocalStep]:
        """Train step, module by module: forward, its loss, backward, then on to the next.

        Each item comes as soon as the module's gradients are there (they add to what `.grad`
        holds), so that the caller can step and free them before the next module runs. Let go of
        the item as well: then nothing of a module is alive in the next one's turn but its
        features and what the window holds.

        Args:
            images: (N, 3, H, W), normalised, N >= 2.
            targets: (N,) class indices.
            scaled: gives the 0-d tensor to go backward from for a module and its loss.
            begin: called with each module before its forward.
        """
        pixels = self.pixels(images)

        def run(module: LocalModule, h_in: Tensor) -> tuple[Tensor | None, ...]:
            begin(module)
            return module.forward_and_losses(h_in, targets, pixels)

        for module, _, output, *parts in self.in_turn(images, run):
            loss = module.weighed(*parts)
            del _, parts
            scaled(module, loss).backward()
            step = [LocalStep(module, output, loss.detach())]
            del loss, output
            yield step.pop()  # handed over: a local variable would keep it for another module

    def local_step(
        self,
        images: Tensor,
        targets: Tensor,
        after_backward: Callable[[LocalModule], object] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Every module's forward and backward, first to last.

        Args:
            images: (N, 3, H, W), normalised, N >= 2.
            targets: (N,) class indices.
            after_backward: called with a module as soon as its gradients are there.
        Returns:
            Logits (N, num_classes) of the last module and the K losses, 0-d; all detached.
        """
        local_losses = []
        for step in self.local_steps(images, targets):
            local_losses.append(step.loss)
            if after_backward is not None:
                after_backward(step.module)
            logits = step.output
            del step
        return logits, local_losses

    def pixels(self, images: Tensor) -> Tensor | None:
        """Un-normalised images in [0, 1], the decoders' target; None where nothing decodes."""
        if all(module.decoder is None for module in self.held):
            return None
        data = DATASETS[self.dataset]
        channels = [
            images[:, c] * (data.std[c] / 255) + data.mean[c] / 255 for c in range(images.shape[1])
        ]
        return torch.stack(channels, dim=1).clamp_(0, 1)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the backbone (real head included), context encoders and auxiliary nets."""
        counts = {"backbone": 0, "context": 0, "auxiliary": 0}
        last = self.local_modules[-1]
        for module in self.local_modules:
            counts["backbone"] += _count(module.units)
            counts["context"] += _count(module.context)
            counts["backbone" if module is last else "auxiliary"] += _count(module.head)
            counts["auxiliary"] += _count(module.decoder)
        return counts


def _count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
