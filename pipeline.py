"""`--parallel modules`: each process has a range of the modules, and features travel on.

Module l needs for batch t what module l-1 makes of batch t, and no later update changes that. So
process r works on batch t-r while those before it work on later ones: none waits for a backward,
no weight is stale, and every module computes what it would in a process of its own.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import InputError
from models import build_network
from models.context import ContextMode, Contexts
from models.network import Ends
from speed import memory_format

IN_FLIGHT = 2
"""Batches whose features may be on their way to the next process at once."""


# ---------------------------------------------------------------------------------------------
# What travels


class Kind(NamedTuple):
    """A tensor that crosses a cut, but for the number of samples."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        """That of features (N, C, S, S)."""
        last = torch.channels_last
        if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
            last = torch.contiguous_format
        return cls(tuple(tensor.shape[1:]), tensor.dtype, last)

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """Room for so many samples."""
        shape, layout = (samples, *self.shape), self.memory_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)

    def nbytes(self, samples: int) -> int:
        """Of so many samples."""
        return samples * torch.Size(self.shape).numel() * self.dtype.itemsize


def crossing(arguments: dict[str, Any], device: torch.device, channels_last: bool) -> list[list]:
    """Of each cut, the Kinds of what the modules after it need from those before it.

    These are the features, then the module inputs in the window of `Rn`, oldest first; the image
    and the labels each process has. Found on tensors without contents. `arguments` are those of
    `build_network`.
    """
    with FakeTensorMode(), torch.no_grad(), device:
        network = build_network(**arguments)
        size = arguments["image_size"]
        images = torch.empty(2, 3, size, size, memory_format=memory_format(channels_last))
        record = _Record()
        network.eval().ends = record
        for module in network.local_modules:
            network.held = [module]
            for _ in network.features(images):
                pass
        return [[Kind.of(tensor) for tensor in tensors] for tensors in record.left[:-1]]


class _Record(Ends):
    """Has modules run one at a time, and keeps what they leave to the next."""

    def __init__(self) -> None:
        self.left: list[list[Tensor]] = []

    def enter(self, mode: ContextMode, images: Tensor) -> tuple[Tensor, Contexts[Tensor]]:
        return arrived(mode, images, self.left[-1]) if self.left else super().enter(mode, images)

    def leave(self, h: Tensor, contexts: Contexts[Tensor]) -> None:
        self.left.append([h, *contexts.pushed()])


def arrived(
    mode: ContextMode, images: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Contexts[Tensor]]:
    """Features and contexts as they were where features and window were sent from."""
    h, *pushed = tensors
    contexts = Contexts(mode, images)
    for h_in in pushed:
        contexts.push(h_in)
    return h, contexts


# ---------------------------------------------------------------------------------------------
# How it travels


class Work(Protocol):
    """What torch.distributed gives for a transfer under way."""

    def wait(self) -> object:
        """Until it is done; on CUDA the stream waits and not the host."""


class Link(Ends):
    """The ends of a process's range: features come from the process before and go to the next.

    The next batch's are expected before this one's are computed with, and what is sent is on its
    way while the backward runs.

    Args:
        device: of the features.
        incoming: Kinds of what the process before sends; None where the range is the first.
        receive: starts to receive into a tensor, which lies in memory in one piece.
        send: starts to send such a tensor; None where the range is the last.
    """

    def __init__(
        self,
        device: torch.device,
        incoming: Sequence[Kind] | None,
        receive: Callable[[Tensor], Work] | None,
        send: Callable[[Tensor], Work] | None,
    ) -> None:
        self.device, self.incoming, self.receive, self.send = device, incoming, receive, send
        self.stalls = Stalls(device)
        self._sizes: deque[int] = deque()
        self._coming: deque[tuple[list[Tensor], list[Work]]] = deque()
        self._going: deque[tuple[list[Tensor], list[Work]]] = deque()

    def begin(self, sizes: Sequence[int]) -> None:
        """Batches of these sizes are about to come, one after the other."""
        self._sizes = deque(sizes)
        self._expect()

    def end(self) -> None:
        """No batch follows the one that comes next, or that is here."""
        self._sizes.clear()

    def enter(self, mode: ContextMode, images: Tensor) -> tuple[Tensor, Contexts[Tensor]]:
        if self.incoming is None:
            return super().enter(mode, images)
        tensors, works = self._coming.popleft()
        self._wait(works)
        self._expect()
        return arrived(mode, images, tensors)

    def leave(self, h: Tensor, contexts: Contexts[Tensor]) -> None:
        if self.send is None:
            return
        if len(self._going) == IN_FLIGHT:
            self._wait(self._going.popleft()[1])
        pieces = [in_one_piece(tensor) for tensor in (h, *contexts.pushed())]
        self._going.append((pieces, [self.send(piece) for piece in pieces]))

    def in_flight(self) -> list[Tensor]:
        """Received ahead of time, or not yet sent."""
        return [t for tensors, _ in (*self._coming, *self._going) for t in tensors]

    def flush(self) -> None:
        """Wait until all is sent."""
        while self._going:
            self._wait(self._going.popleft()[1])

    def _expect(self) -> None:
        if self.incoming is None or not self._sizes:
            return
        samples = self._sizes.popleft()
        tensors = [kind.empty(samples, self.device) for kind in self.incoming]
        works = [self.receive(in_one_piece(tensor)) for tensor in tensors]
        self._coming.append((tensors, works))

    def _wait(self, works: Sequence[Work]) -> None:
        with self.stalls:
            for work in works:
                work.wait()


def in_one_piece(tensor: Tensor) -> Tensor:
    """A contiguous view of features (N, C, S, S) that are dense in either format; else a copy."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor.contiguous()


class Stalls:
    """How long a device stood still, inside the `with`: on CUDA its stream, and not the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception: object) -> None:
        if self.on_cuda:
            self._events.append((self._start, self._now()))
        else:
            self._seconds += self._now() - self._start

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> float:
        """Seconds since this was last asked; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


# ---------------------------------------------------------------------------------------------
# Who has which modules


def balanced_ranges(times: Sequence[float], processes: int) -> list[range]:
    """Ranges of modules, one a process, whose largest sum of times is the smallest there is."""
    K = len(times)
    check_count(K, processes)
    until = [0.0, *accumulate(times)]
    # best[end]: (largest sum, where the last range starts) of modules before `end`, by number.
    best = [{end: (until[end], 0) for end in range(1, K + 1)}]
    for _ in range(processes - 1):
        before = best[-1]
        best.append({
            end: min(
                (max(before[start][0], until[end] - until[start]), start)
                for start in range(len(best), end)
            )
            for end in range(len(best) + 1, K + 1)
        })  # fmt: skip
    ranges, end = [], K
    for column in reversed(best):
        start = column[end][1]
        ranges.insert(0, range(start, end))
        end = start
    return ranges


def check_ranges(ranges: Sequence[range], modules: int, processes: int) -> None:
    """InputError unless `--module_ranges` give each process some of all the modules, in order."""
    check_count(modules, processes)
    if len(ranges) != processes:
        raise InputError(f"--module_ranges has {len(ranges)} ranges for {processes} processes")
    following = 0
    for given in ranges:
        if given.start != following:
            raise InputError(
                f"--module_ranges: {shown(given)} should begin with module {following}"
            )
        following = given.stop
    if following != modules:
        raise InputError(
            f"--module_ranges ends with module {following - 1}, and the last of {modules} is "
            f"{modules - 1}"
        )


def check_count(modules: int, processes: int) -> None:
    """InputError if there are more processes than modules."""
    if processes > modules:
        raise InputError(
            f"{processes} processes for {modules} modules: take {modules} at most, or a larger "
            "--local_module_num"
        )


def shown(modules: range) -> str:
    """A range as --module_ranges takes it."""
    return f"{modules[0]}" if len(modules) == 1 else f"{modules[0]}-{modules[-1]}"
