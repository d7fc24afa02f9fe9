"""`--detect_anomaly`: the first operation of a training step that makes a NaN or an infinity.

torch.autograd.detect_anomaly watches the backward alone, so that a NaN of the forward is laid to
the first backward function it gets to. `FirstAnomaly` watches every operation, of the forward, of
the backward (inside of custom autograd functions too) and of the optimizers.
"""

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent

OVERWRITES = {"copy_": "self"}
"""Operations that write all of an argument and read none of it, though it may be new memory."""

UNDECLARED = {
    name: frozenset({"running_mean", "running_var"})
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
}
"""Arguments that operations write to, though their schemas don't say so."""


NODES = 100_000
"""Of so many autograd nodes at least, the latest, the modules are known: some steps' worth."""


class BadTensor(NamedTuple):
    """A tensor that is not finite; `name` is a parameter's, a buffer's or an argument's, or ''."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nans: int
    infs: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        counts = f"{self.nans} NaN and {self.infs} Inf of {math.prod(self.shape)} values"
        return f"{self.name} {self.shape} {dtype} with {counts}".lstrip()


class Anomaly(ArithmeticError):
    """The first values that are not finite; the message tells all of it in a line.

    Attributes:
        operation: e.g. `aten.convolution`.
        made: whether the operation made them of finite inputs; else it was given them.
        tensor: the result that has them; of an operation that was given them, the input.
        phase: `forward`, `backward` or `optimizer step`.
        node: in the backward the autograd node, e.g. `ConvolutionBackward0`, else ''.
        module: the innermost module that runs the operation, or in the backward ran the one that
            this is the gradient of. `after X` outside of any, X being the last that ran; ''
            where none did yet.
        place: `file:line (function)` of the innermost frame in this repository, or ''. In the
            backward that is where it was called, or a line of a custom function's own.
    """

    def __init__(
        self, operation: str, made: bool, tensor: BadTensor, phase: str, node: str, module: str,
        place: str,
    ) -> None:  # fmt: skip
        self.operation, self.made, self.tensor = operation, made, tensor
        self.phase, self.node, self.module, self.place = phase, node, module, place
        what = f"{operation} makes {tensor} of finite inputs"
        if not made:
            what = f"{operation}: its input is not finite already, {tensor}"
        where = f"in the {phase}" + (f" ({node})" if node else "")
        if module:
            where += f", {module}" if module.startswith("after ") else f" of {module}"
        super().__init__(", ".join([what, where] + ([f"at {place}"] if place else [])))


class FirstAnomaly(TorchDispatchMode):
    """Raises Anomaly at the first operation with a NaN or an infinity in a result.

    An operation's results are what it returns and the arguments that it writes to. Were its inputs
    finite, the operation made it. Were they not (weights, images; else an earlier operation would
    have been caught), the message says so. What takes such an input and gives a finite result is
    passed over, and so are:
        - new memory, whatever is in it, and views: neither computes anything. Where an operation
          writes to a view, only that is looked at, not what the rest of its storage holds;
        - an infinite constant (masked_fill with -inf). To compute with it is an anomaly.

    It waits for the device at every operation, and changes no result. It sees nothing inside of
    compiled code. `LiveBytes` counts the same with it, whichever of the two is entered first.

    Args:
        network: whose modules, parameters and buffers are named.
        backward: False passes over the backward and the loss scaling, where gradients in float16
            may overflow: the scaler leaves such a step out.
    """

    def __init__(self, network: nn.Module, backward: bool = True) -> None:
        super().__init__()
        self.network = network
        self.backward = backward

    def __enter__(self) -> "FirstAnomaly":
        self._names = {m: n or type(m).__name__ for n, m in self.network.named_modules()}
        self._running: list[str] = []
        self._last = ""
        self._module_of_node: dict[int, str] = {}
        self._thread = threading.get_ident()
        with ExitStack() as hooks:
            for handle in (
                register_module_forward_pre_hook(self._starts),
                # Also where it raises: recomputing stops by an exception as soon as it can.
                register_module_forward_hook(self._ends, always_call=True),
            ):
                hooks.callback(handle.remove)
            super().__enter__()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._hooks:
            super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then look at what it returned and wrote to."""
        kwargs = kwargs or {}
        node = torch._C._current_autograd_node()
        if node is None:
            self._note_node()
        if self._passes_over(func, node, kwargs):
            return func(*args, **kwargs)
        signature = _signature(func)
        inputs = signature.inputs(args, kwargs)
        bad_before = self._first_bad(inputs) if signature.writes else None
        result = func(*args, **kwargs)
        bad_after = self._first_bad(signature.results(args, kwargs, result))
        if bad_after is None:
            return result
        bad_input = bad_before if signature.writes else self._first_bad(inputs)
        if bad_input is None and _has_infinite_constant((args, kwargs)):
            return result
        raise Anomaly(
            operation=str(func.overloadpacket),
            made=bad_input is None,
            tensor=bad_input or bad_after,
            phase="backward" if node is not None else self._phase(),
            node="" if node is None else node.name().removeprefix("torch::autograd::"),
            module=self._module(node),
            place=_place(self._frames()),
        )

    def _passes_over(self, func: Any, node: Any, kwargs: dict[str, Any]) -> bool:
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or "empty" in name or name.startswith("resize") or name == "set_":
            return True
        if not self.backward and (node is not None or name.startswith("_amp_")):
            return True
        found_inf = kwargs.get("found_inf")  # then a fused optimizer's step does nothing
        return found_inf is not None and bool(_value(found_inf))

    def _first_bad(self, named: list[tuple[str, Tensor]]) -> BadTensor | None:
        """The first tensor that is not finite, of (name, tensor)."""
        with torch._C._DisableTorchDispatch():  # other modes need not know of this
            for name, tensor in named:
                if not _is_finite(tensor):
                    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
                    name = self._owner(tensor) or name
                    return BadTensor(name, tuple(tensor.shape), tensor.dtype, nans, infs)
        return None

    def _owner(self, tensor: Tensor) -> str:
        """Name of the parameter or buffer, or of whose gradient, this is or is a view of; or ''."""
        storage = tensor.untyped_storage()._cdata
        for name, buffer in self.network.named_buffers():
            if buffer.untyped_storage()._cdata == storage:
                return name
        for name, parameter in self.network.named_parameters():
            if parameter.untyped_storage()._cdata == storage:
                return name
            grad = parameter.grad
            if grad is not None and grad.untyped_storage()._cdata == storage:
                return f"gradient of {name}"
        return ""

    # Modules: those that run, and who made which autograd node

    def _starts(self, module: nn.Module, args: tuple) -> None:
        above = self._running[-1] if self._running else ""
        self._running.append(self._names.get(module, above))

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._running:  # empty if it had started before this mode
            self._last = self._running.pop()

    def _note_node(self) -> None:
        """Autograd numbers its nodes, and makes an operation's right before the operation runs."""
        latest = torch._C._autograd._get_sequence_nr() - 1
        self._module_of_node.setdefault(latest, self._module(None))
        if len(self._module_of_node) > 2 * NODES:
            for number in list(islice(self._module_of_node, NODES)):
                del self._module_of_node[number]

    def _module(self, node: Any) -> str:
        if self._running:  # in the backward too, where it runs a forward again
            return self._running[-1]
        if node is not None:
            return self._module_of_node.get(node._sequence_nr(), "")
        return f"after {self._last}" if self._last else ""

    # The stack

    def _frames(self) -> Iterator[FrameType]:
        """Innermost first. A backward on CUDA has a thread of its own: then its caller's follow."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            yield frame
            frame = frame.f_back
        if threading.get_ident() != self._thread:
            frame = sys._current_frames().get(self._thread)
            while frame is not None:
                yield frame
                frame = frame.f_back

    def _phase(self) -> str:
        folder = Path(torch.optim.__file__).parent
        steps = any(Path(f.f_code.co_filename).is_relative_to(folder) for f in self._frames())
        return "optimizer step" if steps else "forward"


class _Signature(NamedTuple):
    """Of an operation's arguments, by name: all in order, those written to, those not read."""

    names: tuple[str, ...]
    writes: frozenset[str]
    not_read: frozenset[str]

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """(argument's name, tensor) of all that is read."""
        return [pair for pair in self._tensors(args, kwargs) if pair[0] not in self.not_read]

    def results(self, args: tuple, kwargs: dict[str, Any], result: Any) -> list[tuple[str, Tensor]]:
        """(argument's name, or '', tensor) of all that is written or returned, each once."""
        found = {id(t): (name, t) for name, t in self._tensors(args, kwargs) if name in self.writes}
        for tensor in _tensors(result):
            found.setdefault(id(tensor), ("", tensor))
        return list(found.values())

    def _tensors(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        for name, value in given.items():
            for tensor in _tensors(value):
                yield name, tensor


@cache
def _signature(func: Any) -> _Signature:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    writes = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    not_read = {a.name for a in schema.arguments if a.is_out} | {OVERWRITES.get(name, "")}
    return _Signature(
        names=tuple(a.name for a in schema.arguments),
        writes=frozenset(writes | UNDECLARED.get(name, frozenset())),
        not_read=frozenset(not_read),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of floating numbers, also in lists."""
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in tensor.aminmax())  # NaN if there is one


def _value(tensor: Tensor) -> float:
    with torch._C._DisableTorchDispatch():
        return tensor.item()


def _has_infinite_constant(arguments: Any) -> bool:
    return any(isinstance(x, float) and not math.isfinite(x) for x in tree_iter(arguments))


def _place(frames: Iterator[FrameType]) -> str:
    """`file:line (function)` of the first frame in this repository, but for this file; or ''."""
    for frame in frames:
        file = Path(frame.f_code.co_filename)
        ours = file.is_relative_to(ROOT) and "site-packages" not in file.parts
        if ours and file != Path(__file__):
            function = frame.f_code.co_name
            return f"{file.relative_to(ROOT).as_posix()}:{frame.f_lineno} ({function})"
    return ""
