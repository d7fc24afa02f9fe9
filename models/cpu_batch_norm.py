"""BatchNorm for few channels on the CPU, in training and in eager mode only.

On channels-last maps PyTorch's CPU kernel takes a vector register for the channels of one pixel.
The 12 channels of the image encoder do not fill one, and cost five times what 16 do. Here an image
line with all its channels is a row, which fills the registers with any number of channels. CUDA
and compiled code use none of this. On the CPU an eager step of mode E takes 1.2 times as long
without it.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_faster_for(layer: nn.Module, x: Tensor) -> bool:
    """Return whether `batch_norm` is faster than a layer that is applied to x (N, C, H, W)."""
    return (
        x.device.type == "cpu"
        and type(layer) is nn.BatchNorm2d
        and layer.training
        and layer.weight is not None
        and layer.track_running_stats
        and layer.running_mean is not None
        and x.shape[1] % 16 > 0
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return `layer(x)` in training, and move the layer's running statistics."""
    out, mean, var = _ByLines.apply(x, layer.weight, layer.bias, layer.eps)
    update_running_statistics(layer, mean, var, x.numel() / x.shape[1])
    return out


@torch.no_grad()
def update_running_statistics(
    layer: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: float | Tensor
) -> None:
    """Move a layer's running statistics, if it has any, as PyTorch's own BatchNorm does.

    Args:
        mean, var: (C,) of a batch; the variance is biased.
        count: values a channel that they are of, at least 2.
    """
    if layer.running_mean is None:
        return
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:  # the mean of all batches
        momentum = 1 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    var = var * (count / (count - 1))
    layer.running_var.lerp_(var.to(layer.running_var.dtype), momentum)


class _ByLines(torch.autograd.Function):
    """x, weight, bias, eps -> output, mean and biased variance; the latter without gradients.

    With d = x - mean of M values a channel, s = 1/sqrt(var + eps) and the output's gradient g, the
    gradient of weight is s sum(g d), and that of x is weight s (g - sum(g)/M - d s^2 sum(g d)/M).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        lines, width = _lines(x), x.shape[3]
        mean = _sum(lines, x) / (x.numel() / x.shape[1])
        centred = lines - mean.repeat(width)
        # In two passes: sums of squares alone would lose what a far mean leaves of them.
        var = _sum(centred.square(), x) / (x.numel() / x.shape[1])
        inverse_std = (var + eps).rsqrt()
        scale = (weight * inverse_std).repeat(width)
        out = torch.addcmul(bias.repeat(width), centred, scale)
        ctx.save_for_backward(x, mean, inverse_std, weight)
        ctx.mark_non_differentiable(mean, var)
        return _maps(out, x), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *of_statistics):
        x, mean, inverse_std, weight = ctx.saved_tensors
        width, count = x.shape[3], x.numel() / x.shape[1]
        grad, centred = _lines(grad), _lines(x) - mean.repeat(width)
        of_bias = _sum(grad, x)
        of_weight = _sum(grad * centred, x) * inverse_std
        scale = weight * inverse_std
        of_x = centred.mul_((-scale * inverse_std * of_weight / count).repeat(width))
        of_x.sub_((scale * of_bias / count).repeat(width)).addcmul_(grad, scale.repeat(width))
        return _maps(of_x, x), of_weight, of_bias, None


def _lines(x: Tensor) -> Tensor:
    """(N, C, H, W), channels last -> (N*H, W*C), float32 or wider; a view if it can be."""
    n, c, h, w = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(n * h, w * c)
    return lines.to(torch.promote_types(x.dtype, torch.float32))


def _maps(lines: Tensor, like: Tensor) -> Tensor:
    """(N*H, W*C) -> (N, C, H, W) of the shape and dtype of another tensor, as a copy.

    What a Function returns must not be a view where a ReLU works in place.
    """
    n, c, h, w = like.shape
    return torch.empty_like(like).copy_(lines.view(n, h, w, c).permute(0, 3, 1, 2))


def _sum(lines: Tensor, like: Tensor) -> Tensor:
    """(N*H, W*C) -> sum of each channel (C,)."""
    return lines.sum(0).view(-1, like.shape[1]).sum(0)
