"""Signs of life: a process of several that fails or falls silent ends the others."""

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from engine.console import say

T = TypeVar("T")

HEARTBEAT_TIMEOUT = 20.0
"""Seconds without a heartbeat after which a process counts as dead."""


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

    def claim_report(self) -> bool:
        """Return whether this process is the first on its machine to claim the report of an error.

        Several may find something wrong in the same step, each in its own modules.
        """
        key = f"reported on {os.environ.get('GROUP_RANK', '0')}"  # torchrun's number of a machine
        return self._ask(lambda: self.store.add(key, 1)) in (1, None)

    def wait_for_report(self) -> bool:
        """Return whether another process has failed and says why; wait at most 2 s for that."""
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
