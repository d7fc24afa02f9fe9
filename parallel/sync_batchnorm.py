"""BatchNorm that takes its statistics over the batches of all ranks (`--sync_bn`).

torch.nn.SyncBatchNorm runs on CUDA alone. This one is made of differentiable operations, so it runs
wherever torch.distributed does, and the tests compare it with one process on the CPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import InputError
from models.cpu_batch_norm import update_running_statistics


class _SyncBatchNorm:
    """BatchNorm over the ranks of the default group, which run the same layers in training.

    The ranks' parts of a batch may differ in size. Each channel is computed by itself, so encoders
    can run it in groups of channels: `channelwise` says so.
    """

    channelwise = True

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, C) or (N, C, H, W) normalised. Statistics are float32 or wider."""
        if not self.training:
            return super().forward(x)
        promoted = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = _batch_statistics(promoted)
        update_running_statistics(self, mean, var, count)
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        of_channel = (-1, *(1 for _ in x.shape[2:]))
        return torch.addcmul(shift.view(of_channel), promoted, scale.view(of_channel)).to(x.dtype)


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d over the ranks."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d over the ranks."""


SYNCED = {nn.BatchNorm1d: SyncBatchNorm1d, nn.BatchNorm2d: SyncBatchNorm2d}


def synchronise(module: nn.Module) -> None:
    """Have each BatchNorm inside a module take its statistics over the ranks.

    Tensors and names stay. Raises InputError for a BatchNorm of another kind.
    """
    for layer in module.modules():
        if type(layer) in SYNCED:
            layer.__class__ = SYNCED[type(layer)]
        elif isinstance(layer, nn.BatchNorm3d):
            kinds = " and ".join(kind.__name__ for kind in SYNCED)
            raise InputError(f"--sync_bn is for {kinds}, not {type(layer).__name__}")


def gather_rows(own: Tensor, start: int, total: int) -> Tensor:
    """Return all ranks' rows (total, ...), with a gradient, for this rank's own (n, ...).

    It is a sum to which each rank adds zeros for the others' rows. So ranks may have any number of
    rows, the gradient is one sum too, and the compiler can do it.

    Args:
        start: place of this rank's first row.
    """
    before, after = (own.new_zeros(n, *own.shape[1:]) for n in (start, total - start - len(own)))
    return _Sum.apply(torch.cat([before, own, after]))


class _Sum(torch.autograd.Function):
    """The sum of all ranks' tensors; the gradient of it is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (C,) over all ranks, and values a channel (0-d).

    All ranks combine the same table, so they have the same bits.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = x.numel() // x.shape[1]
    if count * ranks < 2:  # every rank has a sample, so two ranks have two values
        raise ValueError("BatchNorm needs two values a channel or more in training")
    var, mean = torch.var_mean(x, dim=(0, *range(2, x.dim())), correction=0)
    own = torch.stack([mean, var, torch.full_like(mean, count)])[None]
    table = gather_rows(own, rank, ranks)
    means, variances, counts = table.unbind(1)  # each (ranks, C)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, counts[:, 0].sum().detach()
