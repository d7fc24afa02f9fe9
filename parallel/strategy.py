"""Base of the strategies for several processes: ranks' batches in step, and results merged.

Subclasses say how the work is split: PipelineStrategy (`--parallel modules`) and
DataParallelStrategy (`--parallel data`).
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError
from dataloaders import Batches, ImageData, fingerprint
from engine.checkpoint import Checkpoint
from engine.memory import PeakMemory
from engine.signals import INTERRUPTS, Interrupted
from engine.step import Totals
from engine.strategy import Strategy
from models import ContSupNetwork
from parallel.process_group import TorchrunGroup
from parallel.transfer import DeviceWaits

T = TypeVar("T")


class ParallelStrategy(Strategy):
    """Several processes that do the same things in the same order.

    Args:
        options: as typed.
    Attributes:
        waits: measures how long the device waits for other processes, if that is known.
    """

    waits: DeviceWaits | None = None

    def __init__(self, options: argparse.Namespace) -> None:
        self.group = TorchrunGroup(options)
        self.rank, self.size = self.group.rank, self.group.size
        if self.size > 1:
            self.peak_note = f", the largest of {self.size} processes"
        self.busy_percent: float | None = None

    def __enter__(self) -> "ParallelStrategy":
        self.group.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.group.__exit__(*exception)

    # How the work is split

    def begin(self, sizes: Sequence[int]) -> None:
        """Prepare for batches of these sizes, counted over all processes that share a batch."""

    def begin_batch(self, size: int, is_last: bool) -> None:
        """Prepare for the next of these batches; after a signal, it is the last."""

    def end(self) -> None:
        """Complete the transfers after the last batch."""

    def merge_states(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the `Totals.state` of all modules and samples, from every rank's on the CPU."""
        raise NotImplementedError

    def state_to_send(self, own: Checkpoint) -> Checkpoint:
        """Return a checkpoint without the parts that rank 0 has already."""
        return own

    def split(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with this rank's scalers and totals."""
        raise NotImplementedError

    # Communication

    def broadcast(self, value: T) -> T:
        return self.group.broadcast(value)

    def all_gather(self, value: T) -> list[T]:
        return self.group.all_gather(value)

    # Setting up

    def device(self, name: str) -> torch.device:
        return self.group.device

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
        by_rank = self.all_gather((fingerprint(data), data.classes))
        for rank, contents in enumerate(by_rank):
            if contents != by_rank[0]:
                raise InputError(f"rank {rank} has other images than rank 0: give all the same")
        return data

    # Training

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, and set `busy_percent` after them.

        After a signal to any process, every rank gets the current batch and no other; then it
        raises Interrupted.
        """
        sizes = batches.sizes()[skip:]
        if self.waits is not None:
            self.waits.seconds()  # those until now are not the epoch's
        self.begin(sizes)
        start, stop = time.perf_counter(), 0
        for size, batch in zip(sizes, batches.epoch(epoch, skip), strict=True):
            with self.waits or nullcontext():
                stop = self.group.stop_signal()
            self.begin_batch(size, is_last=bool(stop))
            yield batch
            if stop:
                break
        if self.waits is not None:
            waited = self.waits.seconds()
            self.busy_percent = 100 * (1 - waited / (time.perf_counter() - start))
        self.end()
        self.group.wait_for_flags()
        if stop:
            self.group.stop_is_agreed = True
            raise Interrupted(stop)

    def merge_totals(self, totals: Totals) -> Totals:
        parts = self.all_gather(_on_cpu(totals.state()))
        merged = Totals(self.network, torch.device("cpu"), list(self.network.local_modules))
        merged.load(self.merge_states(parts))
        return merged

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
        self.begin_batch(count, is_last=False)
        rows = _on_cpu(draw())
        self.end()
        parts = self.group.gather(rows) or []
        return {name: row for part in parts for name, row in part.items()}

    def end_run(self) -> None:
        """Raise Interrupted on every rank if a signal came to any during the last steps."""
        self.group.stop_is_agreed = True
        if asked := max(self.all_gather(int(INTERRUPTS.asked or 0))):
            raise Interrupted(asked)

    # Checkpoints

    def own_part(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return this rank's part, without a peak: it measures that of its own work."""
        return self.split(checkpoint._replace(peak={}))

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
        return own._replace(
            state_dict={name: state[name] for name in own.state_dict},
            momentum={n: momentum[n] for n, _ in self.network.named_parameters() if n in momentum},
            scalers=[scaler for part in parts for scaler in part.scalers],
            totals=self.merge_states([part.totals for part in parts]) if own.totals else {},
            peak=own.peak | {"bytes": max(part.peak["bytes"] for part in parts)},
        )


def _on_cpu(state: Mapping[str, T]) -> dict[str, T]:
    return {name: t.cpu() if isinstance(t, Tensor) else t for name, t in state.items()}
