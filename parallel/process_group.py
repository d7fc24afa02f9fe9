"""The processes that torchrun starts: how they come together, tell each other things, and end.

torch.distributed carries everything. Tensors of a step go by NCCL on CUDA, and all else by Gloo;
what is rare (a loss to be printed, that a process has failed) by the store that torchrun keeps.
"""

import argparse
import contextlib
import itertools
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError, one_line
from engine.checkpoint import CannotSave
from engine.console import say
from engine.device import choose_device
from engine.signals import INTERRUPTS, Interrupted
from engine.training import Diverged, Elsewhere, Lost

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another that is alive: it may compile, download or save."""

WELCOME = timedelta(minutes=5)
"""How long a process waits for all others to have begun."""

SILENCE = 20.0
"""Seconds without a sign of life after which a process counts as dead."""


class Team:
    """The processes of a run, as one of them sees them; use it with `with`.

    Rank 0 prints, and writes the run folder. A process that fails or dies takes the others with it.

    Args:
        options: as typed; raises InputError where they are not all the same.
    Attributes:
        rank, size: of this process, from 0; how many there are.
        device: of this process.
        all_stop: whether all of them know that the run stops here.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in os.environ]:
            raise InputError(
                f"--parallel {options.parallel} is for processes that torchrun starts "
                f"({missing[0]} is not set): torchrun --nproc_per_node=P -- train.py ..."
            )
        self.options = options
        self.rank, self.size, self.local_rank = (int(os.environ[name]) for name in names[:3])
        self.is_first = self.rank == 0
        self.all_stop = False
        self._flags: deque[tuple[Tensor, list[dist.Work]]] = deque()

    def __enter__(self) -> "Team":
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=WELCOME))
        except RuntimeError as error:
            address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise Lost(f"rank {self.rank} can't reach {address}: {one_line(error)}") from error
        store.set_timeout(PATIENCE)
        name = meet(store, self.rank, self.size)
        self.store = dist.PrefixStore(name, store)
        self.watch = Watch(dist.PrefixStore(name, store.clone()), self.rank, self.size)
        self.watch.start()
        with self._told():
            self.device = self._device()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", self.store), rank=self.rank,
                world_size=self.size, timeout=PATIENCE,
            )  # fmt: skip
            self._check_options()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._told():
            if error is not None and not (isinstance(error, Interrupted) and self.all_stop):
                raise error
            dist.barrier()  # torchrun would end rank 0, which may have a file to write
        self.watch.stop()
        dist.destroy_process_group()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What goes wrong inside is made known to the others, and ends them."""
        try:
            yield
        except Elsewhere:
            raise
        except RuntimeError as error:
            if not _is_of_a_connection(error):
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
            if not self.watch.is_news(str(error)):
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

    # What they tell each other

    def begin(self, act: str, *arguments: object) -> None:
        """Rank 0: have the others do the same; without an act they are done."""
        if self.is_first:
            self.share((act, arguments))

    def told(self) -> tuple[str, tuple]:
        """The others: the act that rank 0 begins with `begin`, and its arguments."""
        return self.share()

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
        while len(self._flags) > 4 * self.size:  # none is so many steps behind for long
            self._wait_for_oldest_flag()
        return number

    def settle(self) -> None:
        """Wait until all flags have come through."""
        while self._flags:
            self._wait_for_oldest_flag()

    def _wait_for_oldest_flag(self) -> None:
        for work in self._flags.popleft()[1]:
            work.wait()


def meet(store: dist.Store, rank: int, size: int) -> str:
    """Wait until all processes are here; gives a name that is of this meeting alone.

    torchrun may start them again (--max_restarts), not everywhere the same number of times, and its
    store has what was there before. So each comes with a new token, and rank 0 gives the name to
    every token that it sees. Lost if one does not come within WELCOME, or if the store goes.
    """
    token = name = uuid.uuid4().hex
    end = time.monotonic() + WELCOME.total_seconds()
    try:
        store.set(f"token/{rank}", token)
        while True:
            if rank == 0:
                for other in range(size):
                    if store.check([f"token/{other}"]):
                        store.set(f"name for {store.get(f'token/{other}').decode()}", name)
            elif store.check([f"name for {token}"]):
                name = store.get(f"name for {token}").decode()
            store.set(f"{name}/here/{rank}", "")
            here = [r for r in range(size) if store.check([f"{name}/here/{r}"])]
            if len(here) == size:
                return name
            if time.monotonic() > end:
                raise Lost(f"rank {rank}: of {size} processes only {here} have come in "
                           f"{WELCOME.seconds // 60} minutes")  # fmt: skip
            time.sleep(0.05)
    except RuntimeError as error:
        raise Lost(f"rank {rank}: the process that keeps the store is gone") from error


class Watch(threading.Thread):
    """Gives signs of life, and ends this process if another has failed or gives none.

    A thread of its own, since the main one may be waiting for the other process.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank = store, rank
        self._lock, self._done = threading.Lock(), threading.Event()
        # Of each other one the last beat, and in which of its own this process saw it.
        self._heard = dict.fromkeys({*range(size)} - {rank}, (b"", 0))
        self._beat = 0
        self._failing = False
        self._parent = os.getppid()

    def run(self) -> None:
        for self._beat in itertools.count():
            try:
                with self._lock:
                    self.store.set(f"beat/{self.rank}", str(self._beat))
                    why = self._why()
            except RuntimeError:  # the store has gone with its process
                why = "the process that keeps the store is gone"
            if why is not None:
                self._end(why)
            if self._done.wait(1):
                return

    def _why(self) -> str | None:
        """Why this process should end, if it should; '' where another says that.

        Time is counted in beats of its own: a machine may have been suspended.
        """
        if self.store.check(["failed"]):
            return ""
        if os.getppid() != self._parent:
            return "what started this process has ended"
        for rank, (beat, when) in self._heard.items():
            key = f"beat/{rank}"
            latest = self.store.get(key) if self.store.check([key]) else b""
            if latest != beat:
                self._heard[rank] = latest, self._beat
            elif self._beat - when > SILENCE:
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
        self._ask(lambda: self.store.set("failed", str(self.rank)))
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            time.sleep(2)  # else this torchrun may be gone, with its store, before others know it

    def is_news(self, error: str) -> bool:
        """Whether no other process here has asked this: what several find alike, one says."""
        key = f"said on {os.environ.get('GROUP_RANK', '0')}: {error}"  # that is, on a machine
        return self._ask(lambda: self.store.add(key, 1)) in (1, None)

    def knows_why(self) -> bool:
        """Whether another process has failed, and says why; waits for that a little."""
        for _ in range(20):
            if self._ask(lambda: self.store.check(["failed"])):
                return True
            time.sleep(0.1)
        return False

    def _ask(self, question: Callable[[], T]) -> T | None:
        """What the store answers; None if it is gone or does not answer."""
        if self._lock.acquire(timeout=2):
            try:
                return question()
            except RuntimeError:
                return None
            finally:
                self._lock.release()
        return None

    def stop(self) -> None:
        """The end is as it should be."""
        self._done.set()


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether a process at the other end may be the reason; Gloo's errors have no class."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
