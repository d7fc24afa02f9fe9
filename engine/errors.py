"""How a script begins and ends: the exceptions of a run, and the exit status and line of each.

Nothing here imports torch before it is needed, since that takes seconds.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from configs import InputError, one_line
from engine.console import discard, note, say
from engine.signals import INTERRUPTS, SIGNALS, Interrupted


class Diverged(Exception):
    """A loss, or a tensor that a checkpoint would keep, is NaN or infinite.

    Attributes:
        advice: what to do, to be printed after the message.
    """

    advice = ""


class CannotSave(Exception):
    """A file of the run could not be written; the last checkpoint is as it was.

    Attributes:
        advice: what to do, to be printed after the message.
    """

    advice = ""


class PeerFailed(Exception):
    """Another process of the run has failed and says why; this one says nothing."""


class ConnectionLost(Exception):
    """The connection to another process of the run broke."""


def start_script(check: Callable[[list[str]], object]) -> None:
    """Prepare the process, before a script imports torch, which takes seconds.

    Signals are answered from here on. A wrong command line, or `--help`, ends the process.

    Args:
        check: parses the command line; raises InputError or SystemExit.
    """
    INTERRUPTS.install()
    # OpenMP's threads wait by spinning, which takes the cores from other processes (docs/speed.md).
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"
    _open_closed_streams()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the first of torchrun's processes says it, and `main` ends this one
    try:
        check(sys.argv[1:])
    except (SystemExit, InputError, OSError) as ended:
        run_script(partial(_raise, ended))


def _raise(error: BaseException, argv: list[str]) -> None:
    raise error


def _open_closed_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as for some daemons
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


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
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's or a test's can only write
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
    except _out_of_memory() as error:
        return _fail(2, "out of memory, so take a smaller --batch_size, a larger "
                     "--local_module_num, a --memory_budget or --recompute "
                     f"({one_line(error)})")  # fmt: skip
    except _compile_errors() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _fail(2, f"--compile failed, so leave it out or mend this: {reason}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # what the CPU allocator raises
            return _fail(2, f"out of memory: {one_line(error)[-300:]}")
        import torch

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
        if error.advice:
            note(f"stopped by {error}{error.advice}")
        else:  # rank 0 says it, and torchrun would end it if this process ended first
            time.sleep(1)
        return error.status
    return 0


def _fail(status: int, reason: Exception | str) -> int:
    """Say why on stderr in one line, with the exception's `advice` if it has any; return status."""
    say(f"train.py: error: {one_line(reason)}{getattr(reason, 'advice', '')}")
    return status


# Except clauses are evaluated when an exception reaches them. So these import torch only then.


def _out_of_memory() -> tuple[type[Exception], ...]:
    import torch

    return torch.OutOfMemoryError, MemoryError


def _compile_errors() -> tuple[type[Exception], ...]:
    from models.torch_internals import compile_errors

    return compile_errors()
