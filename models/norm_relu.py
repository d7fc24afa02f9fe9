"""BatchNorm and ReLU of a conv's output by statistics in hand: what `grouped.py` runs, twice.

On CUDA PyTorch's kernels do it (`Kernels`). On the CPU theirs crawl where the channels do not fill
a vector: forward and backward of an encoder's 12 channels take several times those of 16. `Rows`
looks at channels-last maps as rows of whole image lines instead, in which any number of channels
fills the vectors, and computes in plain operations. Compiled code takes `Kernels` everywhere, which
the compiler writes out itself: rows beside maps would give it indices that it can't simplify.

Where processes share a batch and take its statistics together, `OfRanks` has either of the two
compute on a process's own part of it.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class SharedBatch(Protocol):
    """A batch of which each process has a part."""

    def count(self, own: int) -> int:
        """Values a channel in the whole batch, where a part has `own`."""

    def combined(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) of a part -> those of the whole batch."""

    def summed(self, sums: Tensor) -> Tensor:
        """Sums over a part -> over the whole batch."""


class Kernels:
    """By PyTorch's kernels, in any memory format."""

    @staticmethod
    def statistics(conv: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (C,), of (N, C, H, W); float32 of narrower floats."""
        var, mean = torch.var_mean(wide(conv), dim=(0, 2, 3), correction=0)
        return mean, var

    @staticmethod
    def forward(
        conv: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """What `backward` takes for `conv` (whose storage may be used for it), and the output."""
        return conv, F.batch_norm(conv, mean, var, gamma, beta, eps=eps).relu_()

    @staticmethod
    def backward(
        grad: Tensor, kept: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, eps: float,
        of_batch: bool, shared: SharedBatch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of conv, gamma and beta; of the latter two what this part adds to them.

        Args:
            grad: of BatchNorm's output, zero where ReLU was; may be overwritten, as `kept` may.
            of_batch: whether the statistics were taken of this conv, and have a gradient too.
            shared: of which this conv is a part, where the statistics were taken of all of it.
        """
        invstd = (var + eps).rsqrt()
        apart = of_batch and shared is not None
        of_conv, of_gamma, of_beta = aten.native_batch_norm_backward(
            grad, kept, gamma, mean, var, mean, invstd, of_batch, eps, [not apart, True, True]
        )
        if apart:
            count = shared.count(kept.numel() // kept.shape[1])
            sums = shared.summed(torch.stack([of_gamma, of_beta]))
            towards_gamma, towards_beta = gamma * invstd * sums / count
            of_conv = wide(kept) - _as_map(mean)
            of_conv.mul_(_as_map(-invstd * towards_gamma)).sub_(_as_map(towards_beta))
            of_conv = of_conv.addcmul_(grad, _as_map(gamma * invstd)).to(grad.dtype)
        return of_conv, of_gamma, of_beta


class Rows:
    """By plain operations, on channels-last maps; the same three functions."""

    @staticmethod
    def statistics(conv: Tensor) -> tuple[Tensor, Tensor]:
        """In two passes: sums of squares alone would lose what a far mean leaves of them."""
        channels, count = conv.shape[1], conv.numel() // conv.shape[1]
        rows = _rows(_channels_last(conv))
        mean = _sum(rows, channels) / count
        return mean, _sum((rows - _repeat(mean, conv)).square_(), channels) / count

    @staticmethod
    def forward(
        conv: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Keeps conv - mean."""
        centred = _channels_last(conv)
        rows = _rows(centred).sub_(_repeat(mean, conv))
        scale = gamma * (var + eps).rsqrt()
        out = torch.addcmul(_repeat(beta, conv), rows, _repeat(scale, conv)).relu_()
        return centred, _like(conv, out).to(conv.dtype)

    @staticmethod
    def backward(
        grad: Tensor, kept: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, eps: float,
        of_batch: bool, shared: SharedBatch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """With d = conv - mean of M values a channel and s = 1/sqrt(var + eps): gamma has
        sum(grad d) s, conv has gamma s (grad - sum(grad)/M - d s^2 sum(grad d)/M)."""
        channels, count = kept.shape[1], kept.numel() // kept.shape[1]
        rows, centred = _rows(_channels_last(grad)), _rows(kept)
        of_beta = _sum(rows, channels)
        of_scale = _sum(rows * centred, channels)
        invstd = (var + eps).rsqrt()
        scale = gamma * invstd
        if of_batch:
            sums = of_scale, of_beta
            if shared is not None:
                count, sums = shared.count(count), shared.summed(torch.stack(sums))
            centred.mul_(_repeat(-scale * invstd.square() * sums[0] / count, kept))
            centred.sub_(_repeat(scale * sums[1] / count, kept))
            centred.addcmul_(rows, _repeat(scale, kept))
        else:
            centred = rows.mul_(_repeat(scale, kept))
        return _like(kept, centred).to(grad.dtype), of_scale * invstd, of_beta


class OfRanks:
    """What is fast there on this process's part of a batch, by statistics of the whole batch.

    The same three functions. In training all processes call them, in the same order.
    """

    def __init__(self, shared: SharedBatch) -> None:
        self.shared = shared

    def statistics(self, conv: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (C,), of the whole batch."""
        return self.shared.combined(*best_for(conv.device).statistics(conv))

    def forward(
        self, conv: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As those of `Rows` or `Kernels`."""
        return best_for(conv.device).forward(conv, mean, var, gamma, beta, eps)

    def backward(
        self, grad: Tensor, kept: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, eps: float,
        of_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of conv, from all processes' losses, and of gamma and beta, from its own."""
        way = best_for(grad.device)
        return way.backward(grad, kept, mean, var, gamma, eps, of_batch, self.shared)


def move_running(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics of a BatchNorm to these (C,), of `count` values a channel."""
    unbiased = var * (count / (count - 1))
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
    bn.running_var.lerp_(unbiased.to(bn.running_var.dtype), bn.momentum)


def best_for(device: torch.device) -> type[Kernels] | type[Rows]:
    """Which of the two is fast there, in eager or in compiled code."""
    return Rows if device.type == "cpu" and not torch.compiler.is_compiling() else Kernels


def wide(x: Tensor) -> Tensor:
    """x, or a float32 copy of float16 or bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _as_map(values: Tensor) -> Tensor:
    """A value a channel (C,) -> (C, 1, 1)."""
    return values[:, None, None]


def _channels_last(x: Tensor) -> Tensor:
    """The same of what is in that format, as convs on the CPU give it, and a copy of other maps."""
    return wide(x).contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """View (N, C, H, W), channels last, as (N*H, W*C)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h, w * c)


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """View rows as (N, C, H, W) of x's shape."""
    n, c, h, w = x.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _repeat(values: Tensor, x: Tensor) -> Tensor:
    """A value a channel (C,) -> (W*C,), for rows of x."""
    return values.repeat(x.shape[3])


def _sum(rows: Tensor, channels: int) -> Tensor:
    """(N*H, W*C) -> sum of each channel (C,)."""
    return rows.sum(0).view(-1, channels).sum(0)
