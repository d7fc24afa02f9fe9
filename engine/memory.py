"""Meters of the peak memory of training steps, in bytes.

On CUDA the allocator counts. Elsewhere PyTorch has no public counter, so `LiveBytes` watches every
operation and adds up the tensor storages that are alive.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.torch_internals import TorchDispatchMode, allocations


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensor storage that are alive while the mode is on.

    A storage counts once, however many tensors view it, from the operation that made it until it
    is freed. What autograd saves counts; scratch memory inside an operation does not.

    Args:
        tensors: what is alive already (weights, momentum, the batch). Any other tensor made before
            counts from the first operation that returns it.
    Attributes:
        live: bytes alive now.
        peak: the most so far.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then count what it returned."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch returns one object for a storage as long as that is held
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self._known[key].atexit = False

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class AllocatedBytes:
    """The most bytes that the CPU allocator had given out at once, from PyTorch's profiler.

    It is for compiled code, whose allocations no dispatch mode sees. Scratch memory inside an
    operation counts, too.

    Args:
        tensors: what is allocated already.
    Attributes:
        peak: the most so far, known after the `with`.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        self.before = self.peak = sum(storages.values())
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would log each start and stop
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "AllocatedBytes":
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.__exit__(*exception)
        self.peak = max(accumulate(allocations(self.profiler), initial=self.before))


class PeakMemory:
    """Meter of the peak memory of a run's training steps.

    On CUDA the allocator's counter watches every step. Elsewhere `LiveBytes` watches the first
    `steps` of the largest batch. Of compiled steps `AllocatedBytes` watches one more: compiling
    allocates, so the first counts only until there is a second.

    Args:
        device: where the steps run.
        compiled: whether they run compiled.
        apart: bytes of the data set on the device, which do not count.
        steps: eager steps until the memory of a step is constant.
    Attributes:
        bytes: the peak so far.
        how: how it was measured, in words.
    """

    def __init__(
        self, device: torch.device, compiled: bool = False, apart: int = 0, steps: int = 2
    ) -> None:
        self.device, self.apart, self.bytes = device, apart, 0
        self._largest_batch = self._steps = 0
        self._meter, self._last_watched = LiveBytes, steps
        self.how = (
            "live tensor storage counted by engine/memory.py in the first "
            f"{ {2: 'two', 3: 'three'}.get(steps, steps) } full training steps"
        )
        if device.type == "cuda":
            self.how = "torch.cuda.max_memory_allocated over all training steps"
        elif compiled:
            self._meter, self._last_watched = AllocatedBytes, steps + 1
            self.how = "the CPU allocator's record of the first full training steps"

    def state(self) -> dict[str, int | str]:
        """Return all of it, for `load` to continue from."""
        return {
            "bytes": self.bytes, "largest": self._largest_batch, "steps": self._steps,
            "how": self.how,
        }  # fmt: skip

    def load(self, state: dict[str, int | str]) -> None:
        """Continue from a `state`, unless it was measured in another way.

        Compiled steps on the CPU that were not all watched are watched from the first one again,
        since they are compiled again. Raises KeyError or ValueError if it is no `state`.
        """
        if not all(type(state[name]) is int for name in ("bytes", "largest", "steps")):
            raise ValueError("its peak is no number of bytes")
        watching = self._meter is AllocatedBytes and state["steps"] < self._last_watched
        if state["how"] == self.how and not watching:
            self.bytes, self._largest_batch = state["bytes"], state["largest"]
            self._steps = state["steps"]

    @contextmanager
    def step(self, samples: int, alive: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Watch one training step.

        Args:
            samples: size of its batch.
            alive: returns the tensors that exist before it (weights, momentum, the batch).
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device) - self.apart)
            return
        if samples > self._largest_batch:
            self._largest_batch, self._steps = samples, 0
        self._steps += samples == self._largest_batch
        if samples < self._largest_batch or self._steps > self._last_watched:
            yield
            return
        with self._meter(alive()) as meter:
            yield
        if self._steps == 2 and self._meter is AllocatedBytes:
            self.bytes = 0
        self.bytes = max(self.bytes, meter.peak)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory in this process; return whether it can (glibc can).

    A step on the CPU allocates and frees the same features as the step before. By default glibc
    returns large ones to the kernel, which clears and maps every page again.
    """
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # Windows
        return False
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
