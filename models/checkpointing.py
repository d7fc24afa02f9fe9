"""Activation checkpointing: the backward recomputes activations that autograd has not kept.

`checkpoint_unit` keeps the input of a unit (`--recompute`). `encode_in_groups` runs a context
encoder with only its input and its pooled output in memory. Its last layer has as many channels as
the module that it supplies; at the context's own size its activations would outweigh that module. A
channel of a conv, of BatchNorm or of an activation needs no other channel. So the last layer runs
some channels at a time, in the forward and again in the backward. That changes no number but by the
order of float sums.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from models import cpu_batch_norm

CHANNELWISE = (
    nn.BatchNorm2d, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish,
    nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip
"""Layers without randomness that can run on some channels alone. A class of your own can join them
by an attribute `channelwise = True`. Its parameters and buffers have one value a channel."""

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def checkpoint_unit(unit: nn.Module, x: Tensor) -> Tensor:
    """Return `unit(x)`, of which autograd keeps only x.

    The recomputation has the dropout and the autocast of the forward (torch.utils.checkpoint sees
    to that). It does not update BatchNorm's running statistics.
    """
    return _checkpoint(unit, x, [unit])


def encode_in_groups(
    layers: Sequence[nn.Module], pool: Callable[[Tensor], Tensor], source: Tensor, group: int
) -> Tensor:
    """Return the pooled output of an encoder, of which autograd keeps only `source`.

    Args:
        layers: the encoder. The last conv and the layers after it run in groups of channels, unless
            one of them has hooks or is of a type that is not known to allow that.
        pool: follows the layers; it treats each channel by itself.
        source: (N, C_in, H, W).
        group: output channels that are computed at a time, at least 1.
    """
    convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    last_conv = convs[-1] if convs else 0
    first, last = layers[:last_conv], layers[last_conv:]
    if not _can_be_split(last) or last[0].out_channels <= group:
        return _checkpoint(lambda x: pool(_run(layers, x)), source, layers)
    channels = last[0].out_channels

    def run_group(x: Tensor, start: int) -> Tensor:
        some = slice(start, start + group)
        return pool(_run_channels(last, x, some, count_batch=some.stop >= channels))

    def run_all(x: Tensor) -> Tensor:
        x = _run(first, x)
        return torch.cat([run_group(x, start) for start in starts], dim=1)

    starts = range(0, channels, group)
    if torch.compiler.is_compiling():  # the compiler orders the recomputation by itself
        return _checkpoint(run_all, source, layers)
    x = _checkpoint(lambda x: Kept.apply(_run(first, x)), source, first) if first else source
    with RecomputedInput(x, len(starts)) if first else nullcontext():
        parts = [_checkpoint(run_group, x, last, start) for start in starts]
    return torch.cat(parts, dim=1)


def _checkpoint(
    function: Callable[..., Tensor], x: Tensor, modules: Sequence[nn.Module], *args: object
) -> Tensor:
    """Return `function(x, *args)`, which runs these modules, with only x kept by autograd."""
    if not torch.is_grad_enabled():
        return function(x, *args)
    if torch.compiler.is_compiling():  # there BatchNorm moves its statistics once in any case
        return checkpoint(function, x, *args, use_reentrant=False)
    contexts = nullcontext(), FrozenRunningStatistics(modules)
    return checkpoint(function, x, *args, use_reentrant=False, context_fn=lambda: contexts)


def _can_be_split(layers: Sequence[nn.Module]) -> bool:
    """Return whether these are a conv and layers after it that can run some channels at a time."""
    if not layers or type(layers[0]) is not nn.Conv2d or layers[0].groups > 1:
        return False
    channelwise = (type(x) in CHANNELWISE or getattr(x, "channelwise", False) for x in layers[1:])
    return all(channelwise) and all(map(_is_unchanged, layers))


def _is_unchanged(layer: nn.Module) -> bool:
    """Return whether nobody has given a layer hooks or a forward of its own."""
    own = layer.__dict__  # torch 2.6 compiles no vars(layer)
    return not any(own[name] for name in HOOKS) and "forward" not in own


def _run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        if cpu_batch_norm.is_faster_for(layer, x) and _is_unchanged(layer):
            x = cpu_batch_norm.batch_norm(layer, x)
        else:
            x = layer(x)
    return x


def _run_channels(
    layers: Sequence[nn.Module], x: Tensor, channels: slice, count_batch: bool
) -> Tensor:
    """Run layers with these channels of their weights and running statistics (views of them).

    `count_batch` says whether BatchNorm counts the batch.
    """
    for layer in layers:
        tensors = {}
        for name, tensor in chain(layer.named_parameters(), layer.named_buffers()):
            if tensor.dim():
                tensors[name] = tensor[channels]
            elif not count_batch:  # num_batches_tracked
                tensors[name] = tensor.clone()
        x = functional_call(layer, tensors, x) if tensors else layer(x)
    return x


class FrozenRunningStatistics:
    """A context manager that stops a forward from updating BatchNorm's running statistics.

    With a momentum of 0 BatchNorm updates nothing, and autograd saves the same tensors as the first
    time. It may be entered again for another backward.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        within = chain.from_iterable(module.modules() for module in modules)
        self.norms = [m for m in within if hasattr(m, "num_batches_tracked")]

    def __enter__(self) -> None:
        self.before = [(bn.momentum, bn.num_batches_tracked) for bn in self.norms]
        for bn in self.norms:
            bn.momentum, bn.num_batches_tracked = 0.0, None

    def __exit__(self, *exception: object) -> None:
        for bn, (momentum, count) in zip(self.norms, self.before, strict=True):
            bn.momentum, bn.num_batches_tracked = momentum, count


class Kept(torch.autograd.Function):
    """The identity; `output.grad_fn.saved_tensors` has the output.

    Inside a checkpoint, to read it there in the backward runs the checkpoint's recomputation.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class RecomputedInput(saved_tensors_hooks):
    """A context manager in which autograd saves x, an output of `Kept`, without keeping it.

    The first user to need it in the backward has it recomputed, the last lets go of it. Where x
    has no gradient, as with frozen layers, it is kept.
    """

    def __init__(self, x: Tensor, users: int) -> None:
        self.node, self.users = x.grad_fn, users
        self.x, self.left = None, users
        # Each checkpoint saves its inputs under these hooks, and what is inside under hooks of its
        # own. So all that is saved here is x, and in torch 2.6 an empty tensor.
        super().__init__(lambda x: None if self.node and x.numel() else x, self.unpack)

    def unpack(self, kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        if self.x is None:
            (self.x,) = self.node.saved_tensors
        x, self.left = self.x, self.left - 1
        if not self.left:
            self.x, self.left = None, self.users
        return x
