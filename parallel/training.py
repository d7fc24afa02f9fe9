"""A run's training in several processes: what of it is each one's, and what they put together.

How the work is split is in pipeline.py (`--parallel modules`) and replicas.py (`data`), how the
processes come together and end in team.py.
"""

import argparse
import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError
from dataloaders import Batches, ImageData, epoch_seed
from engine.checkpoint import Checkpoint
from engine.console import Progress
from engine.memory import PeakMemory
from engine.run_folder import RunFolder
from engine.signals import INTERRUPTS, Interrupted
from engine.step import Totals, evaluate
from engine.training import Training
from models import ContSupNetwork
from parallel.data_parallel import Replicas
from parallel.pipeline import Pipeline
from parallel.process_group import Team

T = TypeVar("T")


class Parallel(Team):
    """The processes, and what they do of a run.

    Attributes:
        way: how the work is split, once that is chosen.
    """

    def choose_way(self, options: argparse.Namespace, arguments: dict[str, Any]) -> None:
        """Split the work; `arguments` are those of `build_network`. InputError if it can't be."""
        if options.parallel == "modules":
            self.way = Pipeline(self, options, arguments)
        else:
            self.way = Replicas(sync_bn=options.sync_bn)

    def describe(self) -> dict[str, Any]:
        """For the run's files."""
        return {"processes": self.size, **self.way.describe()}

    def folder(self, path: Path, options: argparse.Namespace) -> RunFolder:
        """The run folder, which rank 0 writes."""
        return (RunFolder if self.is_first else _Unwritten)(path, options)

    def training(self, *arguments: Any) -> "ParallelTraining":
        """This process's part of it."""
        return ParallelTraining(*arguments, team=self)

    def signal(self) -> int:
        """As `Team.signal`; to wait for it counts as stalled."""
        with self.way.waiting:
            return super().signal()

    def evaluate(self, network: ContSupNetwork, batches: Batches) -> Totals:
        """`engine.evaluate` of all modules and samples."""
        self.way.begin(batches.sizes())
        totals = evaluate(network, batches.epoch(0), self.device)
        self.way.end()
        return self.whole(network, totals)

    def whole(self, network: ContSupNetwork, totals: Totals) -> Totals:
        """Everyone's as those of all modules and samples."""
        parts = self.gather_all(_on_cpu(totals.state()))
        whole = Totals(network, torch.device("cpu"), list(network.local_modules))
        whole.load(self.way.merged(parts))
        return whole

    def _check_data(self, data: ImageData) -> None:
        seen = [
            (
                list(split.images.shape),
                zlib.crc32(split.images.contiguous().numpy()),
                split.targets.tolist(),
            )
            for split in (data.train, data.test)
        ]
        everyones = self.gather_all(zlib.crc32(json.dumps([seen, data.classes]).encode()))
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise InputError(f"rank {rank} has other images than rank 0: give all the same")

    def loaded(self, load: Callable[[], ImageData]) -> ImageData:
        """What `load` gives, which may download it: one process of a machine does, then others.

        InputError unless all have the same.
        """
        if self.local_rank:
            dist.barrier()
        data = load()
        if not self.local_rank:
            dist.barrier()
        self._check_data(data)
        return data


class Way(Protocol):
    """How the work is split: `Pipeline` of pipeline.py or `Replicas` of replicas.py.

    Attributes:
        share: which part of each batch is this process's, of how many.
        stream: what sets apart what it draws from what others draw for the same module.
        steps_to_fill: after so many a step takes as much memory as any.
        waiting: inside it, time counts as `stalled`.
    """

    share: tuple[int, int]
    stream: tuple[int, ...]
    steps_to_fill: int
    waiting: AbstractContextManager

    def describe(self) -> dict[str, Any]:
        """For the run's files."""

    def prepare(self, network: ContSupNetwork) -> None:
        """Before it is put on its device."""

    def ready(self, network: ContSupNetwork) -> None:
        """After that."""

    def begin(self, sizes: Sequence[int]) -> None:
        """Batches of these sizes come next, of all processes together where they share them."""

    def next(self) -> None:
        """The next of them is here."""

    def last(self) -> None:
        """No batch follows the one that comes now."""

    def end(self) -> None:
        """All batches have been taken."""

    def merged(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Everyone's `Totals.state`, on the CPU, as that of all modules and samples."""

    def losses(self, parts: Sequence[tuple[list[float], int]]) -> list[float]:
        """Everyone's mean losses and number of samples as mean losses of all modules."""

    def part(self, checkpoint: Checkpoint) -> Checkpoint:
        """What this process goes on from: scalers and totals are its own."""

    def scalers(self, parts: Sequence[Sequence[dict]]) -> list[dict]:
        """Everyone's states of loss scalers as those of all modules."""

    def stalled(self) -> float | None:
        """Seconds that the device waited for others since this was last asked, if known."""


class ParallelTraining(Training):
    """One process's part of a run's training; all of them do the same things in the same order."""

    def __init__(self, *arguments: Any, team: Parallel) -> None:
        self.team, self.way = team, team.way
        super().__init__(*arguments)
        self.stopped = 0
        self._looks: deque[tuple[int, tuple[list[float], int]]] = deque()

    def meter(self) -> PeakMemory:
        """Of this process's."""
        peak = PeakMemory(
            self.device, compiled=self.options.compile, apart=self.data_bytes,
            steps=self.way.steps_to_fill,
        )  # fmt: skip
        if self.team.size > 1:
            peak.how += f", in that of {self.team.size} processes which took most"
        return peak

    # Where it stands

    def load(self, checkpoint: Checkpoint) -> None:
        peak = dict(checkpoint.peak)
        if f"rank {self.team.rank}" in peak:
            peak["bytes"] = peak[f"rank {self.team.rank}"]
        super().load(self.way.part(checkpoint._replace(peak=peak)))
        self.is_saved = self.team.share(self.is_saved)

    def checkpoint(self) -> Checkpoint:
        """On rank 0 of all processes; on others of their own part."""
        own = super().checkpoint()
        held = {name: t for name, t in own.state_dict.items() if not t.is_meta}
        own = own._replace(
            state_dict=_on_cpu(held), momentum=_on_cpu(own.momentum), totals=_on_cpu(own.totals),
            history=(),
        )  # fmt: skip
        parts = self.team.gather(own)
        return own if parts is None else self._joined(parts)

    def _joined(self, parts: list[Checkpoint]) -> Checkpoint:
        state, momentum = (
            {name: t for part in reversed(parts) for name, t in getattr(part, kind).items()}
            for kind in ("state_dict", "momentum")
        )
        peaks = [part.peak["bytes"] for part in parts]
        return parts[0]._replace(
            state_dict={name: state[name] for name in self.network.state_dict()},
            momentum={n: momentum[n] for n, _ in self.network.named_parameters() if n in momentum},
            scalers=self.way.scalers([part.scalers for part in parts]),
            totals=self.way.merged([part.totals for part in parts]) if parts[0].totals else {},
            history=self.folder.history,
            peak={
                **parts[0].peak, "bytes": max(peaks),
                **{f"rank {rank}": peak for rank, peak in enumerate(peaks)},
            },
        )  # fmt: skip

    def write(self, path: Path, checkpoint: Checkpoint) -> None:
        """As always, on rank 0."""
        if self.team.is_first:
            super().write(path, checkpoint)

    # How it goes on

    def run(self) -> None:
        """As always; what was the best epoch, all know."""
        self.folder.history = self.team.share(self.folder.history)
        super().run()

    def finish(self) -> None:
        """The summary, by rank 0; Interrupted on all where one was asked to stop by then."""
        self.peak.bytes = max(self.team.gather_all(self.peak.bytes))
        if self.team.is_first:
            super().finish()
        self.team.all_stop = True
        if asked := max(self.team.gather_all(int(INTERRUPTS.asked or 0))):
            raise Interrupted(asked)

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of an epoch; after a signal, one more."""
        self.way.begin(batches.sizes()[skip:])
        self._began = time.perf_counter()
        for batch in batches.epoch(epoch, skip):
            self.way.next()
            self.stopped = self.team.signal()
            if self.stopped:
                self.way.last()
            yield batch
            if self.stopped:
                break

    def _done_with_batches(self) -> None:
        self.way.end()
        self.team.settle()
        if self.stopped:
            self.team.all_stop = True
            raise Interrupted(self.stopped)

    def check_asked(self) -> None:
        """Not here: `batches` and `finish` end where all know it."""

    def look(self, step: int, totals: Totals, progress: Progress) -> None:
        """Read this process's losses, and let rank 0 show all of them when it has them."""
        losses = totals.losses()
        self.check_losses(losses)
        seen = losses, totals.samples
        if self.team.is_first:
            self._looks.append((step, seen))
            self._show(progress)
        else:
            self.team.store.set(self._key(step, self.team.rank), json.dumps(seen))

    def _show(self, progress: Progress, wait: bool = False) -> None:
        """Losses of the steps that all have done; of all steps if it is to `wait`."""
        store = self.team.store
        while self._looks:
            step, own = self._looks[0]
            keys = [self._key(step, rank) for rank in range(1, self.team.size)]
            while keys and not store.check(keys):
                if not wait:
                    return
                time.sleep(0.01)  # a wait for the store would be deaf to signals
            parts = [own, *(json.loads(store.get(key)) for key in keys)]
            for key in keys:
                store.delete_key(key)
            progress.show(step, self.way.losses(parts))
            self._looks.popleft()

    def _key(self, step: int, rank: int) -> str:
        return f"losses/{self.epoch + 1}/{step}/{rank}"

    def trained(self, progress: Progress) -> None:
        seconds, stalled = time.perf_counter() - self._began, self.way.stalled()
        self._busy = None if stalled is None else 100 * (1 - stalled / seconds)
        self._show(progress, wait=True)
        self._done_with_batches()

    def evaluated(self) -> Totals:
        totals = evaluate(self.network, self.batches(self.test_batches, 0), self.device)
        self._done_with_batches()
        self.way.stalled()
        return self.whole(totals)

    def whole(self, totals: Totals) -> Totals:
        return self.team.whole(self.network, totals)

    def figures(self, trained: Totals) -> dict[str, object]:
        """Those of the run, and each process's by rank."""
        own = {
            "samples_per_second": self.totals.samples / self.totals.seconds,
            "peak_memory_bytes": self.peak.bytes,
            "busy_percent": self._busy,
        }
        everyones = self.team.gather_all(own)
        by_rank = {f"rank_{name}": [each[name] for each in everyones] for name in own}
        if self._busy is None:
            del by_rank["rank_busy_percent"]
        largest = max(by_rank["rank_peak_memory_bytes"])
        return super().figures(trained) | {"peak_memory_bytes": largest} | by_rank

    def reconstructed(self) -> dict[str, Tensor]:
        """Of all cuts, on rank 0."""
        if all(module.decoder is None for module in self.network.local_modules):
            return {}
        self.way.begin([len(self.shown)])
        rows = _on_cpu(super().reconstructed())
        self.way.end()
        parts = self.team.gather(rows) or []
        return {name: row for part in parts for name, row in part.items()}

    def seed_of(self, epoch: int) -> Callable[[int, int], int] | None:
        if not self.way.stream or not self.options.droprate:
            return super().seed_of(epoch)
        own = partial(epoch_seed, self.options.seed, epoch)
        return lambda step, module: own(step, module, *self.way.stream)


class _Unwritten(RunFolder):
    """The run folder, for a process that does not write it."""

    def open(self, *how: object) -> None:
        """Nothing to make here."""

    def add_epoch(self, metrics: dict, rows: dict[str, Tensor]) -> None:
        self.history.append(metrics)


def _on_cpu(state: Mapping[str, T]) -> dict[str, T]:
    return {name: t.cpu() if isinstance(t, Tensor) else t for name, t in state.items()}
