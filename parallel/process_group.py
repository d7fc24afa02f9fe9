"""The processes that torchrun starts: rendezvous, communication, and how they end.

The tensors of a step travel by NCCL on CUDA, and everything else by Gloo. Rare messages (a loss to
print, the failure of a process) go through the store that torchrun keeps.
"""

import argparse
import contextlib
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs import InputError, one_line
from engine.device import choose_device
from engine.errors import CannotSave, ConnectionLost, Diverged, PeerFailed
from engine.signals import INTERRUPTS, Interrupted
from parallel.heartbeat import Heartbeat

T = TypeVar("T")

ALIVE_TIMEOUT = timedelta(minutes=30)
"""How long to wait for a process that is alive: it may compile, download or save."""

START_TIMEOUT = timedelta(minutes=5)
"""How long to wait for all processes to begin."""


class TorchrunGroup:
    """The processes of a run, as one of them sees them; use it with `with`.

    A process that fails or dies ends the others too.

    Args:
        options: as typed. Entering raises InputError unless all processes have the same.
    Attributes:
        rank, size: of this process, from 0; number of processes.
        device: of this process.
        stop_is_agreed: whether all ranks stop after the same step, so that to leave is no failure.
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
        self.stop_is_agreed = False
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
        # A connection of its own: on one, a wait of the main thread would hold up the heartbeat.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = dist.TCPStore(*address, is_master=False, timeout=ALIVE_TIMEOUT)
        self.heartbeat = Heartbeat(dist.PrefixStore(name, own), self.rank, self.size)
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
            if error is not None and not (isinstance(error, Interrupted) and self.stop_is_agreed):
                raise error
            dist.barrier()  # torchrun would end rank 0, which may have a file to write
        self.heartbeat.stop()
        # A thread of Gloo's lets go of the barrier's tensor and needs Python's lock for that. torch
        # 2.6 holds it while it waits for the thread to end.
        time.sleep(0.1)
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
            if self.heartbeat.wait_for_report():
                raise PeerFailed from error
            self.heartbeat.fail()
            reason = one_line(error).split("] ", 1)[-1].split(". ")[0]
            raise ConnectionLost(
                f"rank {self.rank}: communication with another process failed ({reason})"
            ) from error
        except (InputError, CannotSave, Diverged) as error:
            self.heartbeat.fail()
            if not self.heartbeat.claim_report():
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
        # Machines may keep the data in different places, but must have the same kind of device.
        own = vars(self.options) | {"data_dir": None, "device": self.device.type}
        typed = self.all_gather({name: repr(value) for name, value in own.items()})
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

        It is a tensor on the CPU, so no GPU is waited for. An all-reduce would have rank 0 wait for
        the last rank before each step.
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

    def wait_for_flags(self) -> None:
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


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Return whether the other end may have caused this error; Gloo's errors have no class."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
