"""`--parallel modules`: each process has a range of the modules, and features travel on.

Module l needs for batch t what module l-1 makes of batch t, and no later update changes that. So
process r works on batch t-r while those before it work on later ones: none waits for a backward,
no weight is stale, and every module computes what it would in a process of its own.
"""

import argparse
import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import InputError
from engine.checkpoint import Checkpoint
from engine.device import memory_format, ready, wait_for
from engine.step import Totals, make_optimizers, train_step
from models import ContSupNetwork, build_network
from models.context import ContextMode, Contexts
from models.network import Ends
from parallel.process_group import PATIENCE, Team

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
        is_last = tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
        layout = torch.channels_last if is_last else torch.contiguous_format
        return cls(tuple(tensor.shape[1:]), tensor.dtype, layout)

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """Room for so many samples."""
        shape, layout = (samples, *self.shape), self.memory_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)

    def of_this(self, tensor: Tensor) -> Tensor:
        """A tensor in the memory format of this kind; RuntimeError if it is of another kind."""
        if tuple(tensor.shape[1:]) != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(f"{Kind.of(tensor)} crosses a cut where {self} should")
        return tensor.contiguous(memory_format=self.memory_format)

    def nbytes(self, samples: int) -> int:
        """Of so many samples."""
        return samples * torch.Size(self.shape).numel() * self.dtype.itemsize


def crossing(
    arguments: dict[str, Any], device: torch.device, channels_last: bool
) -> list[list[Kind]]:
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


class Link(Ends):
    """The ends of a process's range: features come from the process before and go to the next.

    The next batch's are expected before this one's are computed with, and what is sent is on its
    way while the backward runs.

    Args:
        device: of the features.
        incoming: Kinds of what the process before sends; None where the range is the first.
        receive: starts to receive into a tensor, which lies in memory in one piece.
        outgoing: Kinds of what the next one expects; None where the range is the last.
        send: starts to send a tensor in one piece.
    """

    def __init__(
        self,
        device: torch.device,
        incoming: Sequence[Kind] | None,
        receive: Callable[[Tensor], dist.Work] | None,
        outgoing: Sequence[Kind] | None,
        send: Callable[[Tensor], dist.Work] | None,
    ) -> None:
        self.device, self.incoming, self.outgoing = device, incoming, outgoing
        self.receive, self.send = receive, send
        self.stalls = Stalls(device)
        self._sizes: deque[int] = deque()
        self._coming: deque[tuple[list[Tensor], list[dist.Work]]] = deque()
        self._going: deque[tuple[list[Tensor], list[dist.Work]]] = deque()

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
        if self.outgoing is None:
            return
        if len(self._going) == IN_FLIGHT:
            self._wait(self._going.popleft()[1])
        kinds_and_tensors = zip(self.outgoing, (h, *contexts.pushed()), strict=True)
        pieces = [in_one_piece(kind.of_this(tensor)) for kind, tensor in kinds_and_tensors]
        with unrecorded():
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
        with unrecorded():
            works = [self.receive(in_one_piece(tensor)) for tensor in tensors]
        self._coming.append((tensors, works))

    def _wait(self, works: Sequence[dist.Work]) -> None:
        with self.stalls:
            for work in works:
                work.wait()


@contextmanager
def unrecorded() -> Iterator[None]:
    """No profiler sees what is inside.

    A transfer ends steps after the one in which it starts. Where each of them has a profiler of its
    own (memory.py, `AllocatedBytes`), torch would write the end into the record of the first one,
    the memory of which has been given back.
    """
    torch.autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch.autograd._enable_record_function(True)


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
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception: object) -> None:
        if self.on_cuda:
            self._events.append((self._start, self._now()))
            while self._events and self._events[0][1].query():
                self._fold()
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
        while self._events:
            self._events[0][1].synchronize()
            self._fold()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _fold(self) -> None:
        start, end = self._events.popleft()
        self._seconds += start.elapsed_time(end) / 1000


# ---------------------------------------------------------------------------------------------
# The way to split the work


class Pipeline:
    """A range of the modules a process (see parallel.py, `Way`).

    Args:
        team: the processes.
        options, arguments: complete; of `build_network`.
    Raises:
        InputError: there are more processes than modules, or `--module_ranges` do not fit.
    """

    share, stream, steps_to_fill = (0, 1), (), IN_FLIGHT + 1

    def __init__(self, team: Team, options: argparse.Namespace, arguments: dict) -> None:
        self.ranges, self.times = self._ranges(team, options, arguments)
        self.own = self.ranges[team.rank]
        # A group a pair: NCCL would have what is sent wait for what is received in the same one.
        pairs = [
            dist.new_group([rank, rank + 1], timeout=PATIENCE) for rank in range(team.size - 1)
        ]
        crossed = crossing(arguments, team.device, options.channels_last)
        incoming = receive = outgoing = send = None
        if team.rank > 0:
            incoming, group = crossed[self.own.start - 1], pairs[team.rank - 1]
            receive = partial(dist.irecv, src=team.rank - 1, group=group)
        if team.rank < team.size - 1:
            outgoing, group = crossed[self.own.stop - 1], pairs[team.rank]
            send = partial(dist.isend, dst=team.rank + 1, group=group)
        self.link = Link(team.device, incoming, receive, outgoing, send)
        self.waiting = self.link.stalls

    @staticmethod
    def _ranges(
        team: Team, options: argparse.Namespace, arguments: dict
    ) -> tuple[list[range], list[float] | None]:
        """Of each process, and the seconds of a step of each module where they were measured."""
        K, ranges, times = arguments["local_module_num"], options.module_ranges, None
        if ranges:
            check_ranges(ranges, K, team.size)
        else:
            check_count(K, team.size)
            if team.size > 1 and not options.evaluate:
                times = team.share(
                    module_times(arguments, options, team.device) if team.is_first else None
                )
            ranges = balanced_ranges(times or [1.0] * K, team.size)
        return ranges, times

    def describe(self) -> dict[str, Any]:
        """For the run's files."""
        return {"way": "modules", "ranges": [shown(modules) for modules in self.ranges]}

    def __str__(self) -> str:
        parts = [f"{shown(modules)} on rank {r}" for r, modules in enumerate(self.ranges)]
        told = "modules " + ", ".join(parts)
        if self.times:
            sums = [1000 * sum(self.times[i] for i in modules) for modules in self.ranges]
            told += f"; measured ms a step: {', '.join(f'{ms:.0f}' for ms in sums)}"
        return told

    def prepare(self, network: ContSupNetwork) -> None:
        """Have it hold this process's modules."""
        network.hold(self.own, self.link)

    def ready(self, network: ContSupNetwork) -> None:
        """Nothing is left to do."""

    def begin(self, sizes: Sequence[int]) -> None:
        """Batches of these sizes come next."""
        self.link.begin(sizes)

    def next(self) -> None:
        """The next of them is here: its features come by the link."""

    def last(self) -> None:
        """No batch follows the one that comes now."""
        self.link.end()

    def end(self) -> None:
        """All is sent."""
        self.link.flush()

    def merged(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The modules' sums one after the other; the time is the longest."""
        sums = {
            name: torch.cat([part[name] for part in parts])
            for name, value in parts[0].items()
            if isinstance(value, Tensor)
        }
        return {**parts[0], **sums, "seconds": max(part["seconds"] for part in parts)}

    def losses(self, parts: Sequence[tuple[list[float], int]]) -> list[float]:
        """One after the other."""
        return [loss for losses, _ in parts for loss in losses]

    def part(self, checkpoint: Checkpoint) -> Checkpoint:
        """The modules' own scalers and sums."""
        own = slice(self.own.start, self.own.stop)
        totals = {
            name: value[own] if isinstance(value, Tensor) and value.dim() else value
            for name, value in checkpoint.totals.items()
        }
        return checkpoint._replace(totals=totals, scalers=checkpoint.scalers[own])

    def scalers(self, parts: Sequence[Sequence[dict]]) -> list[dict]:
        """One after the other."""
        return [scaler for scalers in parts for scaler in scalers]

    def stalled(self) -> float:
        """Seconds that the device waited for another's features, or for room to send."""
        return self.link.stalls.taken()


def module_times(
    arguments: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> list[float]:
    """Seconds that each module takes for a step on noise, after two that are not timed.

    The least of three to eight, as many as fit into 15 s: what else a machine does only adds time,
    and a module that seems slow for it would be in the wrong place for the whole run.
    """
    network = ready(
        build_network(**arguments), device,
        channels_last=options.channels_last, compiled=options.compile,
    )  # fmt: skip
    optimizers, totals = make_optimizers(network), Totals(network, device)
    size = arguments["image_size"]
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    images = images.to(memory_format=memory_format(options.channels_last))
    targets = torch.arange(options.batch_size, device=device) % arguments["num_classes"]
    seconds: list[list[float]] = [[] for _ in network.held]
    began = _now(device)
    for step in range(10):
        if step >= 5 and _now(device) - began > 15:
            break
        start = _now(device)
        for module in train_step(network, optimizers, images, targets, totals):
            end = _now(device)
            seconds[module.index].append(end - start)
            start = end
    del network, optimizers, totals, module
    gc.collect()  # else what was compiled would stay, and count in the peak of the run
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [min(of_module[2:]) for of_module in seconds]


def _now(device: torch.device) -> float:
    """The clock, in seconds, when the device has done what it was told."""
    wait_for(device)
    return time.perf_counter()


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
