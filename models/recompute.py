"""`--recompute`: of a unit only the input is kept, and the backward runs its forward again."""

from contextlib import nullcontext

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
    if torch.compiler.is_compiling():  # there BatchNorm moves its statistics once in any case
        return checkpoint(unit, x, use_reentrant=False)
    contexts = nullcontext(), RunningStatisticsStay(unit)
    return checkpoint(unit, x, use_reentrant=False, context_fn=lambda: contexts)


class RunningStatisticsStay:
    """A context in which a unit's forward moves no running statistics.

    A BatchNorm momentum of 0 moves nothing, and leaves what autograd saves as it was the first
    time. It may be entered again for another backward.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.norms = [m for m in unit.modules() if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self) -> None:
        self.kept = [(bn.momentum, bn.num_batches_tracked) for bn in self.norms]
        for bn in self.norms:
            bn.momentum, bn.num_batches_tracked = 0.0, None

    def __exit__(self, *exception: object) -> None:
        for bn, (momentum, count) in zip(self.norms, self.kept, strict=True):
            bn.momentum, bn.num_batches_tracked = momentum, count
