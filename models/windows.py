"""Windows of two modules (`--overlap 1`; HPFF's cascade): a module also trains on the next's loss.

A module's own loss, and the loss of a window that ends with it, are both taken from its output,
which has the same value in each. So one forward serves both. The backward runs twice: the window's
reaches the module before, the own loss's does not. It waits for the next module's window.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.layers import to_float32
from models.torch_internals import keep_saved_tensors

if TYPE_CHECKING:
    from models.network import ContSupNetwork, ForwardState, LocalModule


class OpenWindow(NamedTuple):
    """A module whose output is part of the next module's window, which is yet to go backward.

    Attributes:
        h_out: the module's output (N, C, S, S), with its graph.
        next_input: h_out, detached: where the next window's gradient gathers.
        gradient: by h_out, of the module's own loss; None for the first module, which has none.
        scale: 0-d factor of `gradient`, for a loss scaler.
    """

    module: "LocalModule"
    h_out: Tensor
    next_input: Tensor
    gradient: Tensor | None
    scale: Tensor


def window_step(
    network: "ContSupNetwork",
    module: "LocalModule",
    state: "ForwardState",
    targets: Tensor,
    pixels: Tensor | None,
    scale_loss: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Run a module's forward and backward, as `ContSupNetwork.module_step` does without windows.

    With weight w, the window's loss w L(head, decoder) reaches this module and the one before, and
    the own loss (1 - w) L(own head) this module alone. The last module has one head for both. The
    gradients of the module before are complete then, and those of the last module too.

    Returns:
        0-d loss and output of `head` (N, D), detached; None from the first module, which trains in
        the second one's window alone.
    """
    before, state.window = state.window, None
    with network.autocast(targets.device):
        h_out = module(network.supplied(module, state))
        features = h_out.detach().requires_grad_()
        network.pass_on(module, state, features)
        scale = torch.ones((), device=h_out.device)
        scale = scale if scale_loss is None else scale_loss(scale)
        if module.head is None:
            state.window = OpenWindow(module, h_out, features, None, scale)
            return None
        output, *losses = module.losses(features, targets, pixels)
    loss = network.overlap_weight * module.local_loss(*losses)
    with network.without_autocast(targets.device):
        (loss * scale).backward()
        gradient, features.grad = features.grad, None
        h_out.backward(gradient, retain_graph=True)
        close_window(network, before, scale, state)
    del before  # with its output
    with network.autocast(targets.device):
        own_loss = (1 - network.overlap_weight) * module.own_loss(features, targets)
    with network.without_autocast(targets.device):
        (own_loss * scale).backward()
        gradient, features.grad = features.grad, None
        window = OpenWindow(module, h_out, features, gradient, scale)
        if module is network.local_modules[-1]:
            close_window(network, window, scale, state)
        else:
            state.window = window
    return (loss + own_loss).detach(), output.detach()


def close_window(
    network: "ContSupNetwork", window: OpenWindow, scale: Tensor, state: "ForwardState"
) -> None:
    """Run a module's last backward: that of its own loss and of the window it opens.

    Args:
        scale: 0-d factor of the gradient that the next module has left.
    """
    gradient = window.gradient
    if window.next_input.grad is not None:
        # In float32, in which no ratio of scales is 0 or infinite.
        of_window = to_float32(window.next_input.grad) * (window.scale / scale)
        of_window = of_window.to(window.h_out.dtype)
        gradient = of_window if gradient is None else gradient + of_window
    trained = [p for p in window.module.parameters() if p.requires_grad]
    window.h_out.backward(gradient, inputs=trained)
    if network.average_gradients is not None:
        network.average_gradients(window.module)
    state.finished.append(window.module)


def compile_windows(
    modules: Sequence["LocalModule"], kind: type["LocalModule"], compiled: Callable
) -> None:
    """Compile the parts of `window_step` that a forward consists of; `compiled` compiles one."""
    keep_saved_tensors()
    for name in ("forward", "losses", "own_loss"):
        part = compiled(getattr(kind, name))
        for module in modules:
            setattr(module, name, partial(part, module))
