"""How much memory a training step takes, in bytes.

On CUDA the allocator counts. Elsewhere no public counter exists; `LiveBytes` watches every
operation instead and adds up the tensor storages that are alive.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
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


class PeakMemory:
    """The peak of a run's training steps, by the means that the device has.

    On CUDA each step is watched, by the allocator's own counter. Elsewhere the first two steps of
    the largest batch are, by `LiveBytes`: the second has momentum, which the first only makes.

    Attributes:
        bytes: the peak so far.
        how: how it was got, in a few words.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._largest_batch = self._steps = 0
        self.how = (
            "torch.cuda.max_memory_allocated over all training steps"
            if device.type == "cuda"
            else "live tensor storage counted by memory.py in the first two full training steps"
        )

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
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device))
            return
        if samples > self._largest_batch:
            self._largest_batch, self._steps = samples, 0
        if samples < self._largest_batch or self._steps == 2:
            yield
            return
        self._steps += 1
        with LiveBytes(alive()) as meter:
            yield
        self.bytes = max(self.bytes, meter.peak)


def readable(count: int) -> str:
    """Bytes in MiB, or in GiB from one up."""
    return f"{count / MIB:.0f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"
