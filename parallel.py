"""Training in several processes, started by torchrun: how they come together, agree, and end.

torch.distributed carries everything. Tensors of a step go by NCCL on CUDA, and all else by Gloo;
what is rare (a loss to be printed, that a process has failed) by the store that torchrun keeps.
What a process does in a step is in pipeline.py (`--parallel modules`) and replicas.py (`data`).
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError, one_line
from console import Progress, say
from dataloaders import Batches, ImageData, epoch_seed
from engine import Totals, evaluate
from interrupts import INTERRUPTS, Interrupted
from memory import PeakMemory
from models import ContSupNetwork
from models.checkpoint import CannotSave, Checkpoint
from pipeline import Pipeline
from run_folder import RunFolder
from speed import choose_device
from training import Diverged, Elsewhere, Lost, Training

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another that is alive: it may compile, download or save."""

WELCOME = timedelta(minutes=5)
"""How long a process waits for the store, which is there before torchrun starts any."""

SILENCE = 20.0
"""Seconds without a sign of life after which a process counts as dead."""


# ---------------------------------------------------------------------------------------------
# Coming together


class Team:
    """The processes of a run, as one of them sees them; use it with `with`.

    Rank 0 prints, and writes the run folder. A process that fails or dies takes the others with it.

    Args:
        options: as typed; raises InputError where they are not all the same.
    Attributes:
        rank, size: of this process, from 0; how many there are.
        device: of this process.
        way: how the work is split, once that is chosen.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in os.environ]:
            raise InputError(
                f"--parallel {options.parallel} is for processes that torchrun starts "
                f"({missing[0]} is not set): torchrun --nproc_per_node=P train.py ..."
            )
        self.options = options
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names[:3])
        self.is_first = self.rank == 0
        self.has_begun = False
        self._flags: deque[tuple[Tensor, list[dist.Work]]] = deque()

    def __enter__(self) -> "Team":
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")
        store, _, _ = next(dist.rendezvous("env://", timeout=WELCOME))
        self.store = dist.PrefixStore("contsup", store)
        self.watch = Watch(dist.PrefixStore("contsup", store.clone()), self.rank, self.size)
        self.watch.start()
        with self._told():
            self.device = self._device()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", store), rank=self.rank,
                world_size=self.size, timeout=PATIENCE,
            )  # fmt: skip
            self.watch.all_are_here()
            self._check_options()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            with self._told():
                dist.barrier()
        else:
            with self._told():
                raise error
        self.watch.stop()
        dist.destroy_process_group()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong inside is made known to the others, and ends them."""
        try:
            yield
        except (Elsewhere, Interrupted):  # which the others know
            raise
        except RuntimeError as error:
            broken = isinstance(error, dist.DistError) or "gloo" in str(error)
            if not broken:
                self.watch.fail()
                raise
            if self.watch.knows_why():
                raise Elsewhere from error
            self.watch.fail()
            reason = one_line(error).split("] ", 1)[-1].split(". ")[0]
            raise Lost(
                f"rank {self.rank} lost the connection to another process ({reason})"
            ) from error
        except (InputError, CannotSave, Diverged) as error:
            self.watch.fail()
            if self.store.add(f"said: {error}", 1) > 1:  # what several find alike, one says
                raise Elsewhere from error
            raise
        except BaseException:
            self.watch.fail()
            raise

    def _device(self) -> torch.device:
        """A GPU a process, or the CPU; InputError where that can't be."""
        name = self.options.device
        if ":" in name:
            raise InputError(f"--device {name} is one device, and each process has its own: "
                             "give --device cuda")  # fmt: skip
        device = choose_device(name)
        if device.type == "cpu":
            if not dist.is_gloo_available():
                raise InputError("--parallel on the CPU needs Gloo, which this PyTorch has not")
            return device
        if not (dist.is_nccl_available() and dist.is_gloo_available()):
            raise InputError("--parallel on CUDA needs NCCL and Gloo, which this PyTorch has not")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(f"each process has a GPU of its own, and there are {count} here: give "
                             f"--nproc_per_node={count} at most, or --device cpu")  # fmt: skip
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def _check_options(self) -> None:
        typed = self.gather_all({name: repr(v) for name, v in vars(self.options).items()})
        for rank, theirs in enumerate(typed):
            for name, value in theirs.items():
                if value != typed[0][name]:
                    raise InputError(
                        f"rank {rank} was started with --{name} {value}, and rank 0 with "
                        f"{typed[0][name]}: give all the same options"
                    )

    # What they do

    def begin(self, act: str, *arguments: object) -> None:
        """Rank 0: have the others do the same."""
        if self.is_first:
            self.has_begun = True
            self.share((act, arguments))

    def told(self) -> tuple[str, tuple] | None:
        """The others: what rank 0 begins with `begin`, or None where it has nothing to do."""
        return self.share()

    def choose_way(self, options: argparse.Namespace, arguments: dict[str, Any]) -> None:
        """Split the work; `arguments` are those of `build_network`. InputError if it can't be."""
        if options.parallel == "modules":
            self.way = Pipeline(self, options, arguments)
        else:
            from replicas import Replicas

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

    def evaluate(self, network: ContSupNetwork, batches: Batches) -> Totals:
        """`engine.evaluate` of all modules and samples."""
        self.way.begin(batches.whole_sizes())
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
            (list(split.images.shape), zlib.crc32(split.images.numpy()), split.targets.tolist())
            for split in (data.train, data.test)
        ]
        everyones = self.gather_all(zlib.crc32(json.dumps([seen, data.classes]).encode()))
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise InputError(f"rank {rank} has other images than rank 0: give all the same")

    # What they tell each other

    def share(self, value: T | None = None) -> T:
        """Rank 0's value, for all."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_all(self, value: T) -> list[T]:
        """Everyone's value by rank, for all."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T] | None:
        """Everyone's value by rank, for rank 0."""
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values

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

    def signal(self) -> int:
        """What rank 0 says before each step: 0 to go on after it, or the signal to stop by.

        It goes from host to host, so that no device is waited for.
        """
        if not self.is_first:
            if INTERRUPTS.asked is not None:
                self.store.set("asked", str(int(INTERRUPTS.asked)))
            flag = torch.empty(1, dtype=torch.int64)
            dist.recv(flag, src=0)
            return int(flag)
        number = int(INTERRUPTS.asked or 0)
        if not number and self.store.check(["asked"]):
            number = int(self.store.get("asked"))
        flag = torch.tensor([number])
        self._flags.append((flag, [dist.isend(flag, dst=r) for r in range(1, self.size)]))
        if len(self._flags) > 4 * self.size:  # a flag for a process that is so many steps behind
            for work in self._flags.popleft()[1]:
                work.wait()
        return number

    def settle(self) -> None:
        """Wait until all flags have come through."""
        while self._flags:
            for work in self._flags.popleft()[1]:
                work.wait()


class Watch(threading.Thread):
    """Gives signs of life, and ends this process if another has failed or gives none.

    A thread of its own, since the main one may be waiting for the other process.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.others = store, rank, [r for r in range(size) if r != rank]
        self._lock, self._done = threading.Lock(), threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._failing = False

    def run(self) -> None:
        for beat in itertools.count():
            try:
                with self._lock:
                    self.store.set(f"beat/{self.rank}", str(beat))
                    why = self._why()
            except RuntimeError:  # the store has gone with its process
                why = "the process that keeps the store is gone"
            if why is not None:
                self._end(why)
            if self._done.wait(1):
                return

    def all_are_here(self) -> None:
        """From now on each should give signs of life; before, it may not have begun."""
        with self._lock:
            for rank in self.others:
                self._heard.setdefault(rank, (b"", time.monotonic()))

    def _why(self) -> str | None:
        """Why this process should end, if it should; '' where another says that."""
        if self.store.check(["failed"]):
            return ""
        now = time.monotonic()
        for rank, (beat, when) in self._heard.items():
            key = f"beat/{rank}"
            latest = self.store.get(key) if self.store.check([key]) else b""
            if latest != beat:
                self._heard[rank] = latest, now
            elif now - when > SILENCE:
                return f"rank {rank} has given no sign of life for {SILENCE:.0f} s"
        return None

    def _end(self, why: str) -> None:
        # It may be about to end by itself, and to say more.
        if not self._done.wait(8 if self._failing else 3):
            if why:
                say(f"train.py: error: rank {self.rank}: {why}")
            os._exit(1)

    def fail(self) -> None:
        """This process has failed: tell the others."""
        self._failing = True
        with self._lock, contextlib.suppress(RuntimeError):
            self.store.set("failed", str(self.rank))

    def knows_why(self) -> bool:
        """Whether another process has failed, and says why; waits for that a little."""
        for _ in range(20):
            with self._lock, contextlib.suppress(RuntimeError):
                if self.store.check(["failed"]):
                    return True
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        """The end is as it should be."""
        self._done.set()


# ---------------------------------------------------------------------------------------------
# A run in several processes


class Way(Protocol):
    """How the work is split: `Pipeline` of pipeline.py or `Replicas` of replicas.py.

    Attributes:
        share: which part of each batch is this process's, of how many.
        stream: what sets apart what it draws from what others draw for the same module.
        steps_to_fill: after so many a step takes as much memory as any.
    """

    share: tuple[int, int]
    stream: tuple[int, ...]
    steps_to_fill: int

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

    def __init__(self, *arguments: Any, team: Team) -> None:
        super().__init__(*arguments)
        self.team, self.way = team, team.way
        self.stopped = 0
        self.peak = PeakMemory(
            self.device, compiled=self.options.compile, apart=self.data_bytes,
            steps=team.way.steps_to_fill,
        )  # fmt: skip
        self.peak.how += f", in that of {team.size} processes which took most"
        self._looks: deque[tuple[int, tuple[list[float], int]]] = deque()

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
        own = own._replace(
            state_dict={n: t for n, t in own.state_dict.items() if not t.is_meta},
            totals=_on_cpu(own.totals), history=(),
        )  # fmt: skip
        own = own._replace(state_dict=_on_cpu(own.state_dict), momentum=_on_cpu(own.momentum))
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
        """The summary, by rank 0."""
        self.peak.bytes = max(self.team.gather_all(self.peak.bytes))
        if self.team.is_first:
            super().finish()

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of an epoch; after a signal, one more."""
        self.way.begin(batches.whole_sizes()[skip:])
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
            raise Interrupted(self.stopped)

    def check_asked(self) -> None:
        """Not here: `batches` end where all know it."""

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
            if keys and not wait and not store.check(keys):
                return
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
