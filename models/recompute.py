"""`--recompute`: of a unit only the input is kept, and the backward runs its forward again."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def keep_input_only(unit: nn.Module, x: Tensor) -> Tensor:
    """`unit(x)`; its backward makes everything between x and the output again.

    The second forward has the dropout and the autocast of the first (torch.utils.checkpoint sees
    to that) and leaves BatchNorm's running statistics where the first put them.
    """
    if not torch.is_grad_enabled():
        return unit(x)
    contexts = nullcontext(), _running_statistics_stay(unit)
    return checkpoint(unit, x, use_reentrant=False, context_fn=lambda: contexts)


@contextmanager
def _running_statistics_stay(unit: nn.Module) -> Iterator[None]:
    """A momentum of 0 moves nothing, and all that autograd saves is what it was the first time."""
    norms = [m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(bn.momentum, bn.num_batches_tracked) for bn in norms]
    for bn in norms:
        bn.momentum, bn.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for bn, (momentum, count) in zip(norms, kept, strict=True):
            bn.momentum, bn.num_batches_tracked = momentum, count
