"""The processes that torchrun starts: rendezvous, communication, and how they end.

The tensors of a step travel by NCCL on CUDA, and everything else by Gloo. Rare messages (a loss to
print, the failure of a process) go through the store that torchrun keeps.
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
from engine.errors import ConnectionLost, Diverged, PeerFailed
from engine.signals import INTERRUPTS, Interrupted

T = TypeVar("T")

ALIVE_TIMEOUT = timedelta(minutes=30)
"""How long to wait for a process that is alive: it may compile, download or save."""

START_TIMEOUT = timedelta(minutes=5)
"""How long to wait for all processes to begin."""

HEARTBEAT_TIMEOUT = 20.0
"""Seconds without a heartbeat after which a process counts as dead."""


class TorchrunGroup:
    """The processes of a run, as one of them sees them; use it with `with`.

    A process that fails or dies ends the others too.

    Args:
        options: as typed. Entering raises InputError unless all processes have the same.
    Attributes:
        rank, size: of this process, from 0; number of processes.
        device: of this process.
        all_stop: whether all processes know that the run stops here.
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
        self.all_stop = False
        self._flags: deque[tuple[Tensor, list[dist.Work]]] = deque()

    def __enter__(self) -> "TorchrunGroup":
        if self.rank != 0:
            sys.stdout = open(os.devnull, "w")
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        except RuntimeError as error:
            address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise ConnectionLost(
                f"rank {self.rank} can't reach {address}: {one_line(error)}"
            ) from error
        store.set_timeout(ALIVE_TIMEOUT)
        name = rendezvous(store, self.rank, self.size)
        self.store = dist.PrefixStore(name, store)
        self.heartbeat = Heartbeat(dist.PrefixStore(name, store.clone()), self.rank, self.size)
        self.heartbeat.start()
        with self._failures():
            self.device = self._device()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", self.store), rank=self.rank,
                world_size=self.size, timeout=ALIVE_TIMEOUT,
            )  # fmt: skip
            self._check_options()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._failures():
            if error is not None and not (isinstance(error, Interrupted) and self.all_stop):
                raise error
            dist.barrier()  # torchrun would end rank 0, which may have a file to write
        self.heartbeat.stop()
        dist.destroy_process_group()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell the other processes of an exception inside, which ends them.

        Raises PeerFailed where another process says why, and ConnectionLost.
        """
        try:
            yield
        except PeerFailed:
            raise
        except RuntimeError as error:
            if not _is_of_a_connection(error):
                self.heartbeat.fail()
                raise
            if self.heartbeat.knows_why():
                raise PeerFailed from error
            self.heartbeat.fail()
            reason = one_line(error).split("] ", 1)[-1].split(". ")[0]
            raise ConnectionLost(
                f"rank {self.rank} lost the connection to another process ({reason})"
            ) from error
        except (InputError, CannotSave, Diverged) as error:
            self.heartbeat.fail()
            if not self.heartbeat.is_first_report():
                raise PeerFailed from error
            raise
        except BaseException:
            self.heartbeat.fail()
            raise

    def _device(self) -> torch.device:
        """Return a GPU of this process's own, or the CPU; raise InputError if there is none."""
        name = self.options.device
        if ":" in name:
            raise InputError(f"--device {name} is one device, and each process has its own: "
                             "give --device cuda")  # fmt: skip
        device = choose_device(name)
        for backend in ("gloo", "nccl") if device.type == "cuda" else ("gloo",):
            if not dist.is_backend_available(backend):
                raise InputError(f"--parallel needs {backend}, which this PyTorch does not have")
        if device.type == "cpu":
            return device
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(f"each process has a GPU of its own, and there are {count} here: give "
                             f"--nproc_per_node={count} at most, or --device cpu")  # fmt: skip
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def _check_options(self) -> None:
        typed = self.all_gather({name: repr(v) for name, v in vars(self.options).items()})
        for rank, theirs in enumerate(typed):
            for name, value in theirs.items():
                if value != typed[0][name]:
                    raise InputError(
                        f"rank {rank} was started with --{name} {value}, and rank 0 with "
                        f"{typed[0][name]}: give all the same options"
                    )

    # Communication

    def broadcast(self, value: T | None = None) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's value, by rank, on rank 0, and None elsewhere."""
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def stop_signal(self) -> int:
        """Return the signal to stop by after the next step, or 0: rank 0 sends it before each step.

        It travels between hosts, so that no device is waited for.
        """
        if self.rank != 0:
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
        while len(self._flags) > 4 * self.size:  # none lags this many steps behind for long
            self._wait_for_oldest_flag()
        return number

    def settle(self) -> None:
        """Wait until all stop signals have been received."""
        while self._flags:
            self._wait_for_oldest_flag()

    def _wait_for_oldest_flag(self) -> None:
        for work in self._flags.popleft()[1]:
            work.wait()


def rendezvous(store: dist.Store, rank: int, size: int) -> str:
    """Wait until all processes have started; return a name for this start alone.

    torchrun may restart them (--max_restarts), a different number of times on each machine, and its
    store keeps what earlier starts wrote. So each process writes a new token, and rank 0 answers
    every token that it sees with the name.

    Raises ConnectionLost if a process does not start within START_TIMEOUT, or if the store goes.
    """
    token = name = uuid.uuid4().hex
    end = time.monotonic() + START_TIMEOUT.total_seconds()
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
                raise ConnectionLost(f"rank {rank}: of {size} processes only {here} have come in "
                           f"{START_TIMEOUT.seconds // 60} minutes")  # fmt: skip
            time.sleep(0.05)
    except RuntimeError as error:
        raise ConnectionLost(f"rank {rank}: the process that keeps the store is gone") from error


class Heartbeat(threading.Thread):
    """A thread that sends heartbeats, and ends this process if another fails or sends none.

    It is a thread since the main one may be waiting for the other process.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank = store, rank
        self._lock, self._done = threading.Lock(), threading.Event()
        # Of each other rank: its last beat, and this process's own beat when it was seen.
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
        """Return None to go on, '' to end silently, or else a reason to print before the end.

        Time is counted in this process's own beats, since the machine may have been suspended.
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
            elif self._beat - when > HEARTBEAT_TIMEOUT:
                return f"rank {rank} has sent no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s"
        return None

    def _end(self, why: str) -> None:
        # The main thread may be about to end the process by itself, with a better message.
        if not self._done.wait(8 if self._failing else 3):
            if why:
                say(f"train.py: error: rank {self.rank}: {why}")
            os._exit(1)

    def fail(self) -> None:
        """Tell the others that this process has failed."""
        self._failing = True
        self._ask(lambda: self.store.set("failed", str(self.rank)))
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            time.sleep(2)  # else this torchrun may be gone, with its store, before others know it

    def is_first_report(self) -> bool:
        """Return whether this process is the first on its machine to report an error.

        Several may find something wrong in the same step, each in its own modules.
        """
        key = f"reported on {os.environ.get('GROUP_RANK', '0')}"  # torchrun's number of a machine
        return self._ask(lambda: self.store.add(key, 1)) in (1, None)

    def knows_why(self) -> bool:
        """Return whether another process has failed and says why; poll 20 times, 0.1 s apart."""
        for _ in range(20):
            if self._ask(lambda: self.store.check(["failed"])):
                return True
            time.sleep(0.1)
        return False

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Return the store's answer; None if the store is gone or does not answer."""
        if self._lock.acquire(timeout=2):
            try:
                return question()
            except RuntimeError:
                return None
            finally:
                self._lock.release()
        return None

    def stop(self) -> None:
        """Stop watching: the run has ended as it should."""
        self._done.set()


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Return whether the other end may have caused this error; Gloo's errors have no class."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
