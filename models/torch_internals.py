"""The names of PyTorch that are not public. Where a version lacks one that not all runs need, the
others go on: see each function. FakeTensorMode and TorchDispatchMode are in torch 2.6 to 2.14.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "COMPILES_CHECKPOINTS",
    "FakeTensorMode",
    "TorchDispatchMode",
    "allocations",
    "compile_errors",
    "hidden_from_profiler",
    "is_fake",
    "keep_graphs_whole",
    "keep_saved_tensors",
    "raise_recompile_limits",
]


COMPILES_CHECKPOINTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Whether compiled code that recomputes layers moves BatchNorm's statistics once a step."""


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no data, for planning."""
    return isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of compiling: a graph break, a missing C++ compiler, ..."""
    from torch._dynamo import exc  # here, because it takes a second

    base = getattr(exc, "TorchDynamoException", None)  # without it they end a run with a traceback
    return (base,) if base else ()


def raise_recompile_limits(kinds: int) -> None:
    """Have torch.compile keep the code of so many modules, each for two batch sizes.

    The names are those of torch 2.6 and later. Where they are gone, compiling fails in one line
    when there are more modules than torch has room for.
    """
    limits = torch._dynamo.config
    for name, least in (("recompile_limit", 2 * kinds), ("accumulated_recompile_limit", 8 * kinds)):
        if hasattr(limits, name):
            setattr(limits, name, max(getattr(limits, name), least))


def keep_graphs_whole() -> None:
    """Have torch.compile not split graphs where the buckets of DistributedDataParallel are full.

    It holds for the process. A graph with --recompute can't be split.
    """
    if hasattr(torch._dynamo.config, "optimize_ddp"):
        torch._dynamo.config.optimize_ddp = False


def keep_saved_tensors() -> None:
    """Have a compiled backward leave what the forward saved, so that it can run a second time.

    It holds for the process. Torch 2.6 and later reuse that memory unless they are told not to.
    """
    from torch._functorch import config  # here, because it takes time

    if hasattr(config, "donated_buffer"):
        config.donated_buffer = False


def allocations(profiler: torch.profiler.profile) -> list[int]:
    """Return the bytes of each allocation, and of each release below 0, in the order of time."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [nbytes for _, nbytes in changes]


@contextmanager
def hidden_from_profiler() -> Iterator[None]:
    """Hide what is inside from torch.profiler, which measures compiled steps on the CPU.

    A transfer ends some steps after the one that starts it. torch would then write its end into the
    record of a profiler whose memory has been freed. A version that can't hide it does so.
    """
    enable = getattr(torch.autograd, "_enable_record_function", lambda _: None)
    enable(False)
    try:
        yield
    finally:
        enable(True)
