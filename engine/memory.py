"""How much memory a training step takes, in bytes.

On CUDA the allocator counts. Elsewhere no public counter exists; `LiveBytes` watches every
operation instead and adds up the tensor storages that are alive.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MIB, GIB = 2**20, 2**30


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensor storage alive at once while the mode is on.

    A storage counts once, however many tensors view it, from the operation that made it until it
    dies, saved tensors of autograd included. Scratch memory inside an operation does not count.

    Args:
        tensors: what is alive already (weights, momentum, the batch). Other tensors made before
            count from the first operation that returns them.
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
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._died, key, size)
        self._known[key].atexit = False

    def _died(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class AllocatedBytes:
    """The most bytes that the CPU allocator had given out at once, as PyTorch's profiler saw it.

    For compiled code, whose allocations no dispatch mode sees. What an operation allocates while
    it runs counts too.

    Args:
        tensors: what is allocated already.
    Attributes:
        peak: the most so far, known after the `with`.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        self.before = self.peak = sum(storages.values())
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of each start and stop
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "AllocatedBytes":
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.__exit__(*exception)
        events = self.profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        given = accumulate((nbytes for _, nbytes in changes), initial=self.before)
        self.peak = max(given)


class PeakMemory:
    """The peak of a run's training steps, by the means that the device has.

    On CUDA each step is watched, by the allocator's own counter. Elsewhere the first `steps` of the
    largest batch are, by `LiveBytes`. Of compiled steps they are as many after its first, by
    `AllocatedBytes`: compiling allocates too, so the first counts only until there is a second.

    Args:
        device: where the steps run.
        compiled: whether they do compiled.
        apart: bytes of the data set that are on the device, and are not to be counted.
        steps: how many there are before they all take the same, uncompiled.
    Attributes:
        bytes: the peak so far.
        how: how it was got, in a few words.
    """

    def __init__(
        self, device: torch.device, compiled: bool = False, apart: int = 0, steps: int = 2
    ) -> None:
        self.device = device
        self.apart = apart
        self.bytes = 0
        self._largest_batch = self._steps = 0
        self._meter, self._watched = LiveBytes, tuple(range(1, steps + 1))
        count = {2: "two", 3: "three"}.get(steps, steps)
        self.how = (
            "live tensor storage counted by engine/memory.py in the first "
            f"{count} full training steps"
        )
        if device.type == "cuda":
            self.how = "torch.cuda.max_memory_allocated over all training steps"
        elif compiled:
            self._meter, self._watched = AllocatedBytes, tuple(range(1, steps + 2))
            self.how = "the CPU allocator's record of the first full training steps"

    def state(self) -> dict[str, int | str]:
        """All of it, to go on from with `load`."""
        return {
            "bytes": self.bytes, "largest": self._largest_batch, "steps": self._steps,
            "how": self.how,
        }  # fmt: skip

    def load(self, state: dict[str, int | str]) -> None:
        """Go on from the `state` of steps of the same kind; that of others is left alone.

        Compiled steps on the CPU that have not all been watched are watched anew, since they are
        compiled anew. Raises KeyError or ValueError if it is not one.
        """
        if not all(type(state[name]) is int for name in ("bytes", "largest", "steps")):
            raise ValueError("its peak is no number of bytes")
        watching = self._meter is AllocatedBytes and state["steps"] < max(self._watched)
        if state["how"] == self.how and not watching:
            self.bytes, self._largest_batch = state["bytes"], state["largest"]
            self._steps = state["steps"]

    @contextmanager
    def step(self, samples: int, alive: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Watch one training step.

        Args:
            samples: size of its batch.
            alive: gives the tensors that exist before it (weights, momentum, the batch).
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device) - self.apart)
            return
        if samples > self._largest_batch:
            self._largest_batch, self._steps = samples, 0
        self._steps += samples == self._largest_batch
        if samples < self._largest_batch or self._steps not in self._watched:
            yield
            return
        with self._meter(alive()) as meter:
            yield
        if self._steps == 2 and self._meter is AllocatedBytes:
            self.bytes = 0
        self.bytes = max(self.bytes, meter.peak)


def keep_heap() -> bool:
    """Have the C library keep freed memory for this process; says whether it can (glibc can).

    A step on the CPU allocates and frees the same maps as the one before. glibc gives freed ones
    back to the kernel, and each page that comes again is cleared and mapped anew.
    """
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # Windows
        return False
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def readable(count: int) -> str:
    """Bytes in MiB, or in GiB from one up."""
    return f"{count / MIB:.0f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"
