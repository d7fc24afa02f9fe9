"""Signals: a terminal's Ctrl-C (SIGINT), and a scheduler's preemption (SIGTERM and others).

Only the standard library is imported here: a script installs the handlers before imports that take
seconds, and so answers from its start.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGHUP and the others are handled as SIGTERM: schedulers can be asked to send them early."""


class Interrupted(Exception):
    """A training was asked to stop, and has stopped.

    Attributes:
        status: the exit status.
        advice: how to continue.
    """

    advice = ""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interrupts:
    """The signal handlers of this process.

    A signal ends the process at once, with status 130 or 143. While `deferred`, the first one only
    sets `asked`, and `check` raises Interrupted; a later one ends the process at once. One that
    comes within half a second is the same one: a scheduler that signals all processes of a job
    reaches this one through command.sh, too.

    Attributes:
        asked: number of the signal that came while deferred, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._deferred = False
        self._time = 0.0

    def install(self) -> None:
        """Replace Python's own handlers, which print tracebacks or say nothing."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and others ask for that
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        number = number if number == signal.SIGINT else signal.SIGTERM
        is_repeated = self.asked is not None and time.monotonic() - self._time <= 0.5
        if self._deferred and self.asked is None:
            self.asked, self._time = number, time.monotonic()
            _say("stopping after this step; a second signal stops at once")
        elif not is_repeated:
            _say("stopped at once" if self._deferred else "interrupted")
            os._exit(128 + number)

    @contextmanager
    def deferred(self, from_start: bool = True) -> Iterator[None]:
        """Let a signal wait for `check`: from the start, or else from the first `defer` on."""
        self._deferred, self.asked = from_start, None
        try:
            yield
        finally:
            self._deferred = False

    def defer(self) -> None:
        """Let signals wait from here on: there is something to save."""
        self._deferred = True

    def check(self) -> None:
        """Raise Interrupted if a signal has asked for it."""
        if self.asked is not None:
            raise Interrupted(self.asked)


def _say(text: str) -> None:
    """Write past Python's buffers, which the signal may have come in the middle of."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


INTERRUPTS = Interrupts()
"""The interrupts of this process."""
