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

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.norm_relu import Kernels, OfRanks, Rows, best_for, move_running

aten = torch.ops.aten


class Layer(NamedTuple):
    """Conv-BN-ReLU with C channels out: the weight (C, C_in, k, k), other tensors (C,).

    `ranks` take the statistics of the batch together, where they share it.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    of_batch: bool
    eps: float
    ranks: OfRanks | None = None

    def first_run(self, x: Tensor) -> tuple["Layer", Tensor]:
        """The layer, of the batch with the statistics that it takes now, and its output."""
        conv = _convolve(x, self.weight, self.bias)
        layer = self
        if self.of_batch:
            mean, var = self.way(conv).statistics(conv)
            layer = self._replace(mean=mean, var=var)
        return layer, layer.normalise(conv)[1]

    def only(self, channels: slice) -> "Layer":
        """The layer that makes some of the channels."""
        *tensors, of_batch, eps, ranks = self
        return Layer(*(tensor[channels] for tensor in tensors), of_batch, eps, ranks)

    def way(self, x: Tensor) -> type[Kernels] | type[Rows] | OfRanks:
        """What computes BatchNorm and ReLU of maps like x."""
        return self.ranks or best_for(x.device)

    def normalise(self, conv: Tensor) -> tuple[Tensor, Tensor]:
        """BN and ReLU by the layer's own statistics: what the backward keeps, and the output."""
        forward = self.way(conv).forward
        return forward(conv, self.mean, self.var, self.gamma, self.beta, self.eps)

    def maps(self, x: Tensor) -> list[Tensor]:
        """What `backward` takes as maps; the second is the layer's output."""
        return list(self.normalise(_convolve(x, self.weight, self.bias)))

    def backward(
        self, grad: list[Tensor], x: Tensor, maps: list[Tensor], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of x, or None, and of the parameters.

        `grad` = [of the output] and `maps` are emptied: each goes as soon as nothing needs it.
        """
        kept, out = maps
        maps.clear()
        of_norm = aten.threshold_backward.grad_input(grad.pop(), out, 0, grad_input=out)
        del out
        of_conv, gamma, beta = self.way(x).backward(
            of_norm, kept, self.mean, self.var, self.gamma, self.eps, self.of_batch
        )
        del of_norm, kept
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
    functions: "Functions",
) -> Tensor:
    """Conv-BN-ReLU layers and an average pool, with only `source` kept for the backward.

    Args:
        layers: conv (stride 1, H and W kept) and BatchNorm of each layer.
        source: (N, C_in, H, W), the context.
        size: (S, S) that the result is pooled to.
        group: how many channels of the last layer are worked on at a time, at least 1.
        functions: what computes: `EAGER`, or compiled.
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
        if bn.training and (count := _count(source, bn)) < 2:
            raise ValueError(f"BatchNorm trains on two values a channel or more, not on {count}")
    tensors = []
    for conv, bn in layers:
        running = bn.running_mean.clone(), bn.running_var.clone()  # a backward may come after
        weights = conv.weight.to(dtype), conv.bias.to(dtype), bn.weight, bn.bias
        tensors += [*weights, *running]
    return _Encode.apply(source, size, group, dtype, functions, norms, *tensors)


class Functions(NamedTuple):
    """`encode` and `encode_backward`, or what `--compile` made of them."""

    forward: Callable[..., tuple[Tensor, list[Layer]]]
    backward: Callable[..., tuple[Tensor | None, list[list[Tensor]]]]


def encode(
    source: Tensor,
    size: tuple[int, int],
    group: int,
    dtype: torch.dtype,
    layers: Sequence[Layer],
) -> tuple[Tensor, list[Layer]]:
    """The pooled context (N, C, *size), and the layers with the statistics that they took."""
    *first, last = layers
    ran, groups = [], []
    x = _as_input(source, dtype)
    for layer in first:
        layer, x = layer.first_run(x)
        ran.append(layer)

    def pooled_groups() -> Iterator[Tensor]:
        for channels in _groups(len(last.bias), group):
            layer, y = last.only(channels).first_run(x)
            groups.append(layer)
            y = [pool(y, size)]
            yield y.pop()  # handed over: else it would stay for the next group

    context = _join(pooled_groups(), len(last.bias), source)
    mean, var = (torch.cat([layer[i] for layer in groups]) for i in (4, 5))
    return context, [*ran, last._replace(mean=mean, var=var)]


def encode_backward(
    source: Tensor,
    layers: Sequence[Layer],
    group: int,
    dtype: torch.dtype,
    grad: Tensor,
    needs_source: bool,
) -> tuple[Tensor | None, list[list[Tensor]]]:
    """Gradients of the source, or None, and of each layer's four parameters."""
    *first, last = layers
    with torch.autocast(source.device.type, enabled=False):
        inputs, maps = [_as_input(source, dtype)], []
        for layer in first:
            maps.append(layer.maps(inputs[-1]))
            inputs.append(maps[-1][1])
        of_out, of_last = _backward_in_groups(
            last, group, inputs.pop(), grad, needs_x=bool(first) or needs_source
        )
        of_layers = [of_last]
        for layer in reversed(first):
            x = inputs.pop()
            of_x, of_layer = layer.backward(
                of_out, x, maps.pop(), needs_x=bool(inputs) or needs_source
            )
            of_out, of_layers = [of_x], [of_layer, *of_layers]
    return of_out[0], of_layers


EAGER = Functions(encode, encode_backward)


class _Encode(torch.autograd.Function):
    """Computes in `dtype`, also in a backward that runs under another autocast."""

    @staticmethod
    def forward(ctx, source, size, group, dtype, functions, norms, *tensors):
        layers = _layers(tensors, [(bn.training, bn.eps, _ranks(bn)) for bn in norms])
        context, layers = functions.forward(source, size, group, dtype, layers)
        for bn, layer in zip(norms, layers, strict=True):
            if layer.of_batch:
                move_running(bn, layer.mean, layer.var, _count(source, bn))
        ctx.group, ctx.dtype, ctx.functions = group, dtype, functions
        ctx.norms = [layer[6:] for layer in layers]
        ctx.save_for_backward(source, *(tensor for layer in layers for tensor in layer[:6]))
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        source, *tensors = ctx.saved_tensors
        layers = _layers(tensors, ctx.norms)
        of_source, of_layers = ctx.functions.backward(
            source, layers, ctx.group, ctx.dtype, grad, ctx.needs_input_grad[0]
        )
        of_tensors = [of for of_layer in of_layers for of in (*of_layer, None, None)]
        return of_source, None, None, None, None, None, *of_tensors


def _layers(
    tensors: Sequence[Tensor], norms: Sequence[tuple[bool, float, OfRanks | None]]
) -> list[Layer]:
    """Layers from six tensors each, and (of_batch, eps, ranks) of their BatchNorms."""
    return [Layer(*tensors[6 * i : 6 * i + 6], *norm) for i, norm in enumerate(norms)]


def _ranks(bn: nn.BatchNorm2d) -> OfRanks | None:
    """Those that take its statistics together, as `replicas.SyncedBatchNorm2d` has them."""
    return getattr(bn, "ranks", None)


def _count(source: Tensor, bn: nn.BatchNorm2d) -> int:
    """Values a channel in the batch that a BatchNorm takes its statistics of."""
    own, ranks = source.numel() // source.shape[1], _ranks(bn)
    return own if ranks is None else ranks.shared.count(own)


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


def _join(parts: Iterator[Tensor], channels: int, source: Tensor) -> Tensor:
    """Parts of a context (N, some, S, S) as one (N, channels, S, S) in the source's format."""
    if torch.compiler.is_compiling():  # which fuses a cat, and copies at each write into a slice
        whole = torch.cat(list(parts), dim=1)
        return whole.contiguous(memory_format=_memory_format(source))
    whole, start = None, 0
    for part in parts:
        if whole is None:
            n, _, *size = part.shape
            whole = torch.empty(
                (n, channels, *size), dtype=part.dtype, device=part.device,
                memory_format=_memory_format(source),
            )  # fmt: skip
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
        del part
    return whole


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


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average pool to `size`; x itself where it has that already."""
    if x.shape[-2:] == size:
        return x
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = _averages(x, size)
        return rows @ x @ columns.T
    return F.adaptive_avg_pool2d(x, size)


def _pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of what was pooled."""
    if grad.shape == x.shape:
        return grad
    (height, width), pooled = x.shape[-2:], grad.shape[-2:]
    if height % pooled[0] or width % pooled[1]:
        if torch.are_deterministic_algorithms_enabled():
            rows, columns = _averages(x, pooled)
            return rows.T @ grad.to(x.dtype) @ columns
        return aten._adaptive_avg_pool2d_backward(grad, x)
    share = pooled.numel() / (height * width)
    return F.interpolate(grad, (height, width), mode="nearest").mul_(share)


def _averages(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Matrices (S, H) and (S, W) that pool x (N, C, H, W) as adaptive pooling does.

    Its backward on CUDA adds in any order; that of a matrix product does not.
    """
    matrices = []
    for count, total in zip(size, x.shape[-2:], strict=True):
        row = torch.arange(count, device=x.device)[:, None]
        column = torch.arange(total, device=x.device)
        averaged = (column >= row * total // count) & (column * count < (row + 1) * total)
        weights = averaged.to(x.dtype)
        matrices.append(weights / weights.sum(1, keepdim=True))
    return matrices
