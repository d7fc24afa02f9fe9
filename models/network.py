"""A network as a list of local modules, each trained on its own loss."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import losses
from configs import DATASETS, Cut
from models.auxiliary import Decoder
from models.context import ContextMode, Contexts, ContextSupply
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

    def loss(self, h_out: Tensor, targets: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Local loss and the head's output (README, equations 6 to 9).

        Args:
            h_out: (N, C, S, S), this module's features, before the next cut's context.
            targets: (N,) class indices.
            pixels: (N, 3, H, W) un-normalised images in [0, 1]; used by a decoder.
        Returns:
            0-d loss and (N, D) head output.
        """
        output = self.head(h_out)
        loss = self.task.function(output, targets)
        if self.decoder is not None:
            decoded = self.decoder(h_out, pixels.shape[-2:])
            lx, ly = self.loss_weights
            loss = lx * losses.reconstruction(decoded, pixels) + ly * loss
        return loss, output


class LocalStep(NamedTuple):
    """What one local module leaves of a training step; all detached."""

    module: LocalModule
    output: Tensor
    loss: Tensor


class ContSupNetwork(nn.Module):
    """K local modules with no gradient across the K-1 cuts and context supplied at each.

    `network(images)` gives the logits of the last module's head.
    """

    def __init__(self, modules: list[LocalModule], mode: ContextMode, dataset: str) -> None:
        super().__init__()
        self.local_modules = nn.ModuleList(modules)
        for index, module in enumerate(modules):
            module.index = index
        self.mode = mode
        self.dataset = dataset

    def features(self, images: Tensor) -> Iterator[tuple[LocalModule, Tensor]]:
        """Each local module with its output (N, C, S, S): the one forward path of every use.

        What enters a module is detached: a backward from its output ends at its own input.

        Args:
            images: (N, 3, H, W), normalised.
        """
        contexts = Contexts(self.mode, images)
        h = images
        for index, module in enumerate(self.local_modules):
            if index:
                h = module.context(h, contexts.named())
                contexts.push(h.detach())
            h = module(h)
            yield module, h
            h = h.detach()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised -> logits (N, num_classes) of the last module."""
        for module, h_out in self.features(images):  # noqa: B007
            pass
        return module.head(h_out)

    def local_steps(self, images: Tensor, targets: Tensor) -> Iterator[LocalStep]:
        """Train step, module by module: forward, its loss, backward, then on to the next.

        Each item comes as soon as the module's gradients are there (they add to what `.grad`
        holds), so that the caller can step and free them before the next module runs. Let go of
        the item as well: then nothing of a module is alive in the next one's turn but its
        features and what the window holds.

        Args:
            images: (N, 3, H, W), normalised, N >= 2.
            targets: (N,) class indices.
        """
        pixels = self.pixels(images)
        for module, h_out in self.features(images):
            loss, output = module.loss(h_out, targets, pixels)
            loss.backward()
            step = [LocalStep(module, output.detach(), loss.detach())]
            del h_out, loss, output
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
        if all(module.decoder is None for module in self.local_modules):
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
