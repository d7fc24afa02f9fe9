"""What the strategies of several processes share: batches in step, and results put together.

Subclasses say how the work is split: PipelineStrategy (`--parallel modules`) and
DataParallelStrategy (`--parallel data`).
"""

import argparse
import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError
from dataloaders import Batches, ImageData
from engine.checkpoint import Checkpoint
from engine.console import Progress
from engine.memory import PeakMemory
from engine.run_folder import RunFolder
from engine.signals import INTERRUPTS, Interrupted
from engine.step import Totals
from engine.strategy import Strategy
from models import ContSupNetwork
from parallel.process_group import TorchrunGroup

T = TypeVar("T")


class ParallelStrategy(Strategy):
    """Several processes that do the same things in the same order.

    Args:
        options: as typed.
    Attributes:
        waits: a context in which time counts as waiting for other processes.
    """

    waits: AbstractContextManager = nullcontext()

    def __init__(self, options: argparse.Namespace) -> None:
        self.group = TorchrunGroup(options)
        self.rank, self.size = self.group.rank, self.group.size
        if self.size > 1:
            self.peak_note = f", in that of {self.size} processes which took most"
        self.busy_percent: float | None = None
        self._shown: deque[tuple[int, tuple[list[float], int], Progress]] = deque()

    def __enter__(self) -> "ParallelStrategy":
        self.group.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.group.__exit__(*exception)

    # How the work is split

    def begin(self, sizes: Sequence[int]) -> None:
        """Prepare for batches of these sizes, counted over all processes that share a batch."""

    def begin_batch(self) -> None:
        """Prepare for the next of these batches."""

    def end_early(self) -> None:
        """Expect no batch after the one that begins now."""

    def end(self) -> None:
        """Complete the transfers after the last batch."""

    def merge_totals(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the `Totals.state` of all modules and samples, from every rank's on the CPU."""
        raise NotImplementedError

    def merge_losses(self, parts: Sequence[tuple[list[float], int]]) -> list[float]:
        """Return all modules' mean losses, from every rank's and its number of samples."""
        raise NotImplementedError

    def merge_scalers(self, parts: Sequence[Sequence[dict]]) -> Sequence[dict]:
        """Return the states of all modules' loss scalers, from every rank's."""
        raise NotImplementedError

    def state_to_send(self, own: Checkpoint) -> Checkpoint:
        """Return what rank 0 needs of this rank's part of a checkpoint."""
        return own

    def split(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with this rank's scalers and totals."""
        raise NotImplementedError

    def seconds_waited(self) -> float | None:
        """Return how long the device has waited for others since the last call, if known."""
        return None

    # Communication

    def on_first(self, act: Callable[[], T]) -> T:
        return self.broadcast(act() if self.is_first else None)

    def broadcast(self, value: T) -> T:
        return self.group.broadcast(value)

    def all_gather(self, value: T) -> list[T]:
        return self.group.all_gather(value)

    # Setting up

    def device(self, name: str) -> torch.device:
        return self.group.device

    def run_folder(self, folder: RunFolder, options: argparse.Namespace) -> RunFolder:
        return folder if self.is_first else _UnwrittenFolder(folder.path, options)

    def place(
        self, network: ContSupNetwork, options: argparse.Namespace, device: torch.device
    ) -> None:
        self.network = network
        print(self, flush=True)
        super().place(network, options, device)

    def load_data(self, load: Callable[[], ImageData]) -> ImageData:
        """Have one process of a machine load, which may download, before the others do."""
        if self.group.local_rank:
            dist.barrier()
        data = load()
        if not self.group.local_rank:
            dist.barrier()
        by_rank = self.all_gather(_checksums(data))
        for rank, checksums in enumerate(by_rank):
            if checksums != by_rank[0]:
                raise InputError(f"rank {rank} has other images than rank 0: give all the same")
        return data

    # Training

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches; after a signal to any process, one more on every rank."""
        self.begin(batches.sizes()[skip:])
        self.seconds_waited()  # until now, which is not the epoch's
        start, stop = time.perf_counter(), 0
        for batch in batches.epoch(epoch, skip):
            self.begin_batch()
            with self.waits:
                stop = self.group.stop_signal()
            if stop:
                self.end_early()
            yield batch
            if stop:
                break
        seconds, waited = time.perf_counter() - start, self.seconds_waited()
        self.busy_percent = None if waited is None else 100 * (1 - waited / seconds)
        self._show_pending(wait=True)
        self.end()
        self.group.settle()
        if stop:
            self.group.all_stop = True
            raise Interrupted(stop)

    def show_losses(self, step: int, totals: Totals, progress: Progress) -> None:
        """Send this rank's losses to rank 0, which shows all of them when it has them."""
        own = totals.losses(), totals.samples
        if self.is_first:
            self._shown.append((step, own, progress))
            self._show_pending()
        else:
            self.group.store.set(_losses_key(step, self.rank), json.dumps(own))

    def _show_pending(self, wait: bool = False) -> None:
        """Show the losses of steps that all ranks have done; with `wait`, of all steps."""
        store = self.group.store
        while self._shown:
            step, own, progress = self._shown[0]
            keys = [_losses_key(step, rank) for rank in range(1, self.size)]
            while keys and not store.check(keys):
                if not wait:
                    return
                time.sleep(0.01)  # store.wait would be deaf to signals
            parts = [own, *(json.loads(store.get(key)) for key in keys)]
            for key in keys:
                store.delete_key(key)
            progress.show(step, self.merge_losses(parts))
            self._shown.popleft()

    def all_reduce(self, totals: Totals) -> Totals:
        parts = self.all_gather(_on_cpu(totals.state()))
        reduced = Totals(self.network, torch.device("cpu"), list(self.network.local_modules))
        reduced.load(self.merge_totals(parts))
        return reduced

    def figures(self, own: Totals, trained: Totals, peak: PeakMemory) -> dict[str, Any]:
        """Return the run's figures, and each process's by rank."""
        of_ranks = self.all_gather({
            "samples_per_second": own.samples / own.seconds,
            "peak_memory_bytes": peak.bytes,
            "busy_percent": self.busy_percent,
        })  # fmt: skip
        by_rank = {f"rank_{name}": [rank[name] for rank in of_ranks] for name in of_ranks[0]}
        if self.busy_percent is None:
            del by_rank["rank_busy_percent"]
        largest = max(by_rank["rank_peak_memory_bytes"])
        return super().figures(own, trained, peak) | {"peak_memory_bytes": largest} | by_rank

    def gather_images(self, draw: Callable[[], dict[str, Tensor]], count: int) -> dict[str, Tensor]:
        self.begin([count])
        self.begin_batch()
        rows = _on_cpu(draw())
        self.end()
        parts = self.group.gather(rows) or []
        return {name: row for part in parts for name, row in part.items()}

    def end_run(self) -> None:
        """Raise Interrupted on every rank if a signal came to any during the last steps."""
        self.group.all_stop = True
        if asked := max(self.all_gather(int(INTERRUPTS.asked or 0))):
            raise Interrupted(asked)

    # Checkpoints

    def own_part(self, checkpoint: Checkpoint) -> Checkpoint:
        peak = dict(checkpoint.peak)
        if f"rank {self.rank}" in peak:
            peak["bytes"] = peak[f"rank {self.rank}"]
        return self.split(checkpoint._replace(peak=peak))

    def join_parts(self, own: Checkpoint) -> Checkpoint:
        present = {name: t for name, t in own.state_dict.items() if not t.is_meta}
        part = own._replace(
            state_dict=_on_cpu(present), momentum=_on_cpu(own.momentum), totals=_on_cpu(own.totals),
            history=(),
        )  # fmt: skip
        parts = self.group.gather(self.state_to_send(part))
        if parts is None:
            return part
        state, momentum = (
            {name: t for part in reversed(parts) for name, t in getattr(part, kind).items()}
            for kind in ("state_dict", "momentum")
        )
        peaks = [part.peak["bytes"] for part in parts]
        return own._replace(
            state_dict={name: state[name] for name in own.state_dict},
            momentum={n: momentum[n] for n, _ in self.network.named_parameters() if n in momentum},
            scalers=self.merge_scalers([part.scalers for part in parts]),
            totals=self.merge_totals([part.totals for part in parts]) if own.totals else {},
            peak={
                **own.peak, "bytes": max(peaks),
                **{f"rank {rank}": peak for rank, peak in enumerate(peaks)},
            },
        )  # fmt: skip


class _UnwrittenFolder(RunFolder):
    """The run folder on a rank that does not write it."""

    def open(self, *arguments: object) -> None:
        """Write nothing."""

    def add_epoch(self, metrics: dict, rows: dict[str, Tensor]) -> None:
        self.history.append(metrics)


def _losses_key(step: int, rank: int) -> str:
    return f"losses/{step}/{rank}"


def _checksums(data: ImageData) -> list:
    """Return what tells whether two processes have read the same images, targets and classes."""
    tensors = [tensor for split in (data.train, data.test) for tensor in split]
    contents = [(t.shape, zlib.crc32(t.contiguous().numpy())) for t in tensors]
    return [*contents, *data.classes]


def _on_cpu(state: Mapping[str, T]) -> dict[str, T]:
    return {name: t.cpu() if isinstance(t, Tensor) else t for name, t in state.items()}
