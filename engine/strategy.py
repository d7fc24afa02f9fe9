"""How the work of a run is divided among processes: here, one process does all of it.

The strategies of several processes are in parallel/. The training loop calls the same methods of
either and does not know how many processes there are.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from dataloaders import Batches, ImageData
from engine.checkpoint import Checkpoint
from engine.device import choose_device, move_to_device
from engine.memory import PeakMemory
from engine.signals import INTERRUPTS
from engine.step import Totals
from models import ContSupNetwork

T = TypeVar("T")


class Strategy:
    """One process that has all modules and all samples; the base of the strategies in parallel/.

    Use it with `with`.

    Attributes:
        rank: this process's rank. Rank 0 prints and writes.
        size: number of processes.
        share: (part, number of parts): which part of each batch this process takes.
        warm_up: training steps until the memory of a step is constant.
        peak_note: added to `PeakMemory.how`.
    """

    rank, size = 0, 1
    share = (0, 1)
    warm_up = 2
    peak_note = ""

    def __enter__(self) -> "Strategy":
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process's part of the run."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    # Communication

    def on_first(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0 alone; return its result on every rank."""
        return self.broadcast(act() if self.is_first else None)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return value

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        return [value]

    # Setting up

    def device(self, name: str) -> torch.device:
        """Return this process's device for `--device`; raise InputError if it is not there."""
        return choose_device(name)

    def divide(
        self, options: argparse.Namespace, arguments: dict[str, Any], device: torch.device
    ) -> None:
        """Assign the work to the processes; `arguments` are those of `build_network`."""

    def describe(self) -> dict[str, Any] | None:
        """Return how the work is divided, for the run's files; None for one process."""
        return None

    def place(
        self, network: ContSupNetwork, options: argparse.Namespace, device: torch.device
    ) -> None:
        """Move what this process runs of the network to the device, and compile it if asked."""
        move_to_device(
            network, device, channels_last=options.channels_last, compiled=options.compile
        )

    def load_data(self, load: Callable[[], ImageData]) -> ImageData:
        """Return what `load` gives; raise InputError unless all ranks read the same data."""
        return load()

    # Training

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches without the first `skip`; raise Interrupted after a signal."""
        for batch in batches.epoch(epoch, skip):
            yield batch
            INTERRUPTS.check()

    def merge_totals(self, totals: Totals) -> Totals:
        """Return the sums of all ranks' modules and samples."""
        return totals

    def figures(self, own: Totals, trained: Totals, peak: PeakMemory) -> dict[str, Any]:
        """Return speed and peak memory of an epoch's training steps, for metrics.jsonl.

        Args:
            own: this process's sums of the epoch.
            trained: the same after `merge_totals`.
            peak: this process's meter.
        """
        return {
            "samples_per_second": trained.samples / trained.seconds,
            "peak_memory_bytes": peak.bytes,
        }

    def gather_images(self, draw: Callable[[], dict[str, Tensor]], count: int) -> dict[str, Tensor]:
        """Return every rank's rows of images on rank 0; `draw` makes this rank's of `count`."""
        return draw()

    def end_run(self) -> None:
        """Raise Interrupted if a signal came during the last steps: command.sh stops then."""
        INTERRUPTS.check()

    # Checkpoints

    def own_part(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as this process continues from it."""
        return checkpoint

    def join_parts(self, own: Checkpoint) -> Checkpoint:
        """Return the checkpoint of the run on rank 0, from every rank's own part."""
        return own
