"""BatchNorm2d that takes its statistics over the batches of all ranks (`--sync_bn`).

torch.nn.SyncBatchNorm runs on CUDA alone. This one is made of differentiable operations, so it runs
wherever torch.distributed does, and the tests compare it with one process on the CPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the ranks of the default group, which run the same layers in training.

    The ranks' parts of a batch may differ in size. Each channel is computed by itself, so encoders
    can run it in groups of channels: `channelwise` says so.
    """

    channelwise = True

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Turn each BatchNorm2d inside a module into this class. Tensors and names stay."""
        for layer in module.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) normalised. In training statistics are float32 or wider."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = _batch_statistics(wide)
        self._update_running(mean.detach(), var.detach() * count / (count - 1))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the mean of all batches
            momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (C,) over all ranks, and values a channel (0-d).

    A rank fills its row of a table and adds zeros to the others', so all have the same bits.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = x.numel() // x.shape[1]
    if count * ranks < 2:  # every rank has a sample, so two ranks have two values
        raise ValueError("BatchNorm needs two values a channel or more in training")
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    own = torch.stack([mean, var, torch.full_like(mean, count)])[None]
    before, after = (own.new_zeros(n, *own.shape[1:]) for n in (rank, ranks - rank - 1))
    table = collectives.all_reduce(torch.cat([before, own, after]), "sum", dist.group.WORLD)
    means, variances, counts = table.unbind(1)  # each (ranks, C)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, counts[:, 0].sum().detach()
