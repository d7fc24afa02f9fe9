"""The exceptions of a run, and the exit status and line on stderr of each."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from configs import InputError, one_line
from engine.checkpoint import CannotSave
from engine.console import discard, note, say
from engine.device import compile_errors
from engine.signals import INTERRUPTS, SIGNALS, Interrupted


class Diverged(Exception):
    """A loss, or a tensor that a checkpoint would keep, is NaN or infinite."""


class PeerFailed(Exception):
    """Another process of the run has failed and says why; this one says nothing."""


class ConnectionLost(Exception):
    """The connection to another process of the run broke."""


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main function on the command line, and end the process (see exit_status).

    A process that has failed does not wait for its connections to others.
    """
    INTERRUPTS.install()
    try:
        status = exit_status(main)
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit()


def exit_status(main: Callable[[list[str]], None]) -> int:
    """Run a script's main function on the command line; return the process's exit status.

    0 if it succeeded; 1 if an output or a connection failed; 2 for bad input, or too little memory;
    3 if the run diverged; 130 and 143 after SIGINT and SIGTERM. One line on stderr says why, unless
    the reader of the output has gone or another process says it. Other exceptions pass.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as for some daemons
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = _attempt(main)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has seen enough
        discard(sys.stdout)
        return 1
    except OSError as error:
        discard(sys.stdout)
        what = "" if error.filename else "the output can't be written: "
        return _fail(1, f"{what}{one_line(error)}")
    return status


def _attempt(main: Callable[[list[str]], None]) -> int:
    try:
        main(sys.argv[1:])
    except SystemExit as ended:  # from the option parser
        return ended.code
    except InputError as error:
        return _fail(2, error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _fail(2, "out of memory, so take a smaller --batch_size, a larger "
                     "--local_module_num, a --memory_budget or --recompute "
                     f"({one_line(error)})")  # fmt: skip
    except compile_errors() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _fail(2, f"--compile failed, so leave it out or mend this: {reason}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # what the CPU allocator raises
            return _fail(2, f"out of memory: {one_line(error)[-300:]}")
        if not torch.are_deterministic_algorithms_enabled() or "deterministic" not in str(error):
            raise
        return _fail(2, f"--deterministic: {str(error).split(',')[0]}, so leave it out")
    except (CannotSave, ConnectionLost) as error:
        return _fail(1, error)
    except PeerFailed:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(5)  # torchrun ends all when one ends: first should be the one that says why
        return 1
    except Diverged as error:
        return _fail(3, error)
    except Interrupted as error:
        if how_to_continue := getattr(error, "__notes__", []):
            note(f"stopped by {error}{how_to_continue[0]}")
        else:  # rank 0 says it, and torchrun would end it if this process ended first
            time.sleep(1)
        return error.status
    return 0


def _fail(status: int, reason: Exception | str) -> int:
    """Say why on stderr in one line, with the notes added to the exception; return the status."""
    text = "".join([one_line(reason), *getattr(reason, "__notes__", [])])
    say(f"train.py: error: {text}")
    return status
