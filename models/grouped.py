"""Context encoders a group of channels at a time, made again in the backward.

An encoder is conv-BN-ReLU layers at the context's own size, then a pool. Its last layer has as many
channels as the module it supplies; kept for the backward, its maps would outweigh that module.
But no output channel needs another one: not in the conv, nor in BatchNorm, where each channel has
its own statistics, nor in ReLU and pool. So the last layer runs group by group, nothing but the
pooled context stays, and the backward makes the maps of the layers before it once more, and then
those of one group after the other. That changes no number but by the order of float sums.

Statistics of the batch are taken in the forward alone, and kept. The backward normalises by them:
it makes the same maps, and has no running statistics in hand to move a second time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class Layer(NamedTuple):
    """Conv-BN-ReLU with C channels out: the weight (C, C_in, k, k), other tensors (C,)."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    of_batch: bool
    eps: float

    @classmethod
    def first_run(
        cls, x: Tensor, learned: Sequence[Tensor], bn: nn.BatchNorm2d, channels: slice
    ) -> tuple["Layer", Tensor]:
        """The layer that makes some channels, with the statistics that it takes, and its output."""
        weight, bias, gamma, beta = (parameter[channels] for parameter in learned)
        conv = _convolve(x, weight, bias)
        taken = _statistics(conv, bn, channels)
        layer = cls(weight, bias, gamma, beta, *taken, bn.training, bn.eps)
        return layer, layer.normalise(conv)

    def only(self, channels: slice) -> "Layer":
        """The layer that makes some of the channels."""
        *tensors, of_batch, eps = self
        return Layer(*(tensor[channels] for tensor in tensors), of_batch, eps)

    def normalise(self, conv: Tensor) -> Tensor:
        """BN and ReLU by the layer's own statistics."""
        return F.batch_norm(conv, self.mean, self.var, self.gamma, self.beta, eps=self.eps).relu_()

    def maps(self, x: Tensor) -> list[Tensor]:
        """The conv's output and the layer's, as its backward needs them."""
        conv = _convolve(x, self.weight, self.bias)
        return [conv, self.normalise(conv)]

    def backward(
        self, grad: list[Tensor], x: Tensor, maps: list[Tensor], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of x, or None, and of the parameters.

        `grad` = [of the output] and `maps` are emptied: each goes as soon as nothing needs it.
        """
        conv, out = maps
        maps.clear()
        of_conv = aten.threshold_backward.grad_input(grad.pop(), out, 0, grad_input=out)
        del out
        invstd = (self.var + self.eps).rsqrt()
        of_conv, gamma, beta = aten.native_batch_norm_backward(
            of_conv, conv, self.gamma, self.mean, self.var, self.mean, invstd,
            self.of_batch, self.eps, [True, True, True],
        )  # fmt: skip
        del conv
        padding = [self.weight.shape[-1] // 2] * 2
        of_x, weight, bias = aten.convolution_backward(
            of_conv, x, self.weight, [len(self.bias)], [1, 1], padding, [1, 1], False, [0, 0], 1,
            [needs_x, True, True],
        )  # fmt: skip
        return of_x, [weight, bias, gamma, beta]


def encode_in_groups(
    layers: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
    source: Tensor,
    size: tuple[int, int],
    group: int,
) -> Tensor:
    """Conv-BN-ReLU layers and an average pool, with only `source` kept for the backward.

    Args:
        layers: conv (stride 1, H and W kept) and BatchNorm of each layer.
        source: (N, C_in, H, W), the context.
        size: (S, S) that the result is pooled to.
        group: how many channels of the last layer are worked on at a time, at least 1.
    Returns:
        (N, C, S, S) with a storage of its own; under autocast in autocast's dtype.
    Raises:
        ValueError: in training, there is but one value a channel.
    """
    device, dtype = source.device.type, source.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    norms = [bn for _, bn in layers]
    for bn in norms:
        if bn.training:
            bn.num_batches_tracked.add_(1)
    parameters = [
        parameter
        for conv, bn in layers
        for parameter in (conv.weight.to(dtype), conv.bias.to(dtype), bn.weight, bn.bias)
    ]
    return _Encode.apply(source, size, group, dtype, norms, *parameters)


class _Encode(torch.autograd.Function):
    """Computes in `dtype` and with autocast off, whatever it is by the time of the backward."""

    @staticmethod
    def forward(ctx, source, size, group, dtype, norms, *parameters):
        *first, last = (parameters[i : i + 4] for i in range(0, len(parameters), 4))
        layers = []
        with torch.autocast(source.device.type, enabled=False):
            x = _as_input(source, dtype)
            for learned, bn in zip(first, norms, strict=False):
                layer, x = Layer.first_run(x, learned, bn, slice(None))
                layers.append(layer)
            context = torch.empty(
                (len(x), len(last[0]), *size), dtype=dtype, device=x.device,
                memory_format=_memory_format(source),
            )  # fmt: skip
            taken = []
            for channels in _groups(len(last[0]), group):
                layer, y = Layer.first_run(x, last, norms[-1], channels)
                context[:, channels] = pool(y, size)
                taken.append((layer.mean, layer.var))
                del y
        mean, var = map(torch.cat, zip(*taken, strict=True))
        layers.append(Layer(*last, mean, var, layer.of_batch, layer.eps))
        ctx.group, ctx.dtype = group, dtype
        ctx.norms = [(layer.of_batch, layer.eps) for layer in layers]
        ctx.save_for_backward(source, *(tensor for layer in layers for tensor in layer[:6]))
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        source, *tensors = ctx.saved_tensors
        *first, last = (
            Layer(*tensors[6 * i : 6 * i + 6], *norm) for i, norm in enumerate(ctx.norms)
        )
        needs_source = ctx.needs_input_grad[0]
        with torch.autocast(source.device.type, enabled=False):
            inputs, maps = [_as_input(source, ctx.dtype)], []
            for layer in first:
                maps.append(layer.maps(inputs[-1]))
                inputs.append(maps[-1][1])
            of_out, of_parameters = _backward_in_groups(
                last, ctx.group, inputs.pop(), grad, needs_x=bool(first) or needs_source
            )
            del grad
            for layer in reversed(first):
                x = inputs.pop()
                of_x, of_layer = layer.backward(
                    of_out, x, maps.pop(), needs_x=bool(inputs) or needs_source
                )
                of_out, of_parameters = [of_x], of_layer + of_parameters
        return *of_out, None, None, None, None, *of_parameters


def _backward_in_groups(
    layer: Layer, group: int, x: Tensor, grad: Tensor, needs_x: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """[gradient of x, or None] and those of the parameters, from the gradient of the context."""
    of_x, of_groups = None, []
    for channels in _groups(len(layer.bias), group):
        some = layer.only(channels)
        maps = some.maps(x)
        of_out = [_pool_backward(grad[:, channels], maps[1])]
        more, of_parameters = some.backward(of_out, x, maps, needs_x)
        of_x = more if of_x is None else of_x.add_(more)
        of_groups.append(of_parameters)
        del more
    return [of_x], list(map(torch.cat, zip(*of_groups, strict=True)))


def _groups(channels: int, group: int) -> list[slice]:
    return [slice(start, start + group) for start in range(0, channels, group)]


def _as_input(source: Tensor, dtype: torch.dtype) -> Tensor:
    """What convs take: on the CPU channels last, for oneDNN reorders other maps at every call.

    Forward and backward of 12 to 16 channels at 32x32 take half the time or less that way.
    """
    on_cpu = source.device.type == "cpu"
    return source.to(dtype, memory_format=torch.channels_last if on_cpu else torch.preserve_format)


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _statistics(conv: Tensor, bn: nn.BatchNorm2d, channels: slice) -> tuple[Tensor, Tensor]:
    """Mean and variance that BatchNorm normalises by; in training they move the running ones."""
    running_mean, running_var = bn.running_mean[channels], bn.running_var[channels]
    if not bn.training:
        return running_mean.clone(), running_var.clone()
    count = conv.numel() // conv.shape[1]
    if count < 2:
        raise ValueError(f"BatchNorm trains on two values a channel or more, not on {count}")
    wide = conv.float() if conv.dtype in (torch.float16, torch.bfloat16) else conv
    mean = wide.mean(dim=(0, 2, 3))
    var = (wide - mean[:, None, None]).square_().mean(dim=(0, 2, 3))
    unbiased = var * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), bn.momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), bn.momentum)
    return mean, var


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average pool to `size`; x itself where it has that already."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)


def _pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of what was pooled."""
    return grad if grad.shape == x.shape else aten._adaptive_avg_pool2d_backward(grad, x)
