"""SIGINT and SIGTERM: what a terminal's Ctrl-C and a scheduler's preemption send.

Nothing but the standard library is imported here: a script installs this before what takes seconds
to import, and so answers from its start.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A training was asked to stop, and has. `status` is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interrupts:
    """What this process was asked to do by signals.

    While `held`, the first one only asks: `check` raises Interrupted. A later one ends the process
    at once, with status 130 or 143, as any does that is not held. What comes within half a second
    is the same one: a scheduler that signals all processes of a job reaches this one also by way of
    command.sh.

    Attributes:
        asked: number of the signal that came while held, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._held = False
        self._when = 0.0

    def install(self) -> None:
        """Take the place of Python's own handlers, which know no SIGTERM and print tracebacks."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and others ask for
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """A signal has come."""
        if self._held and self.asked is None:
            self.asked, self._when = number, time.monotonic()
            _say("stopping after this step; a second signal stops at once")
        elif not self._held or time.monotonic() - self._when > 0.5:
            _say("stopped at once" if self._held else "interrupted")
            os._exit(128 + number)

    @contextmanager
    def held(self, at_once: bool = True) -> Iterator[None]:
        """Inside, there is something to finish first: `at_once`, or from the first `hold` on."""
        self._held, self.asked = at_once, None
        try:
            yield
        finally:
            self._held = False

    def hold(self) -> None:
        """From here on there is something to finish."""
        self._held = True

    def check(self) -> None:
        """Raise Interrupted if that was asked for."""
        if self.asked is not None:
            raise Interrupted(self.asked)


def _say(text: str) -> None:
    """Past Python's buffers, which the signal may have come in the middle of."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


INTERRUPTS = Interrupts()
"""This process's."""
