"""Momentum heads (`--momentum_aux`): a look at the next module's first block (MAN, MAN++).

Arrangement and order of the updates: docs/methods.md.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.checkpointing import checkpoint_unit
from models.layers import to_float32


class MomentumBlock(nn.Module):
    """Two blocks like the next module's first one, between a module's output and its head.

    One trains on the module's loss. The other is an exponential moving average (EMA) of the next
    module's block: the loss gives its weights no gradient, but reaches the features through it. The
    output is local(h) + average(h), or s local(h) + (2 - s) average(h) with a trained s that starts
    at 1.

    Args:
        local, average: blocks (N, C, S, S) -> (N, C', S', S'); `average` keeps its own start.
        decay: m of the average, in [0, 1].
        learned_mix: train s.
        recompute: activation checkpointing of both blocks.
    """

    def __init__(
        self, local: nn.Module, average: nn.Module, decay: float, learned_mix: bool, recompute: bool
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(())) if learned_mix else None
        self.local = local
        self.average = average.requires_grad_(False)
        self.decay, self.recompute = decay, recompute

    def forward(self, h: Tensor) -> Tensor:
        local, average = (
            checkpoint_unit(block, h) if self.recompute else block(h)
            for block in (self.local, self.average)
        )
        if self.scale is None:
            return local + average
        # In float32: around 1 bfloat16 has steps of 1/128, and s moves by less.
        mixed = self.scale * to_float32(local) + (2 - self.scale) * to_float32(average)
        return mixed.to(local.dtype)

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor]) -> None:
        """Set average = m average + (1 - m) next, parameter by parameter.

        The average has BatchNorm statistics of its own, and keeps them.

        Args:
            weights: of the next module's first block, in the order of its `parameters()`.
        """
        for own, other in zip(self.average.parameters(), weights, strict=True):
            own.lerp_(other.to(own.dtype), 1 - self.decay)
