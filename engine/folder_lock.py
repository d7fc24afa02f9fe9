"""The lock of a folder: one process at a time trains into it."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs import InputError, one_line
from dataloaders import cannot_lock, file_lock
from engine.console import note
from engine.errors import CannotSave

LOCK = ".lock"
"""File in a folder that says which process trains into it."""

ELSEWHERE = "choose another --output_dir, --name or --no"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder, which is made if need be, and removed again if nothing is put into it.

    The system gives up the lock of a process that dies: a stale lock file is in nobody's way.

    Raises InputError where another process has it, and CannotSave where the disk is full.
    """
    lock = file_lock(path / LOCK)
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except TimeoutError as error:
        owner = "another process"
        with contextlib.suppress(OSError, ValueError):
            owner = (path / LOCK).read_text().strip() or owner
        raise InputError(f"{path} is in use by {owner}: wait, or {ELSEWHERE}") from error
    except FileExistsError as error:
        raise InputError(f"{path} is a file, so it can't be the run folder: {ELSEWHERE}") from error
    except (OSError, NotImplementedError) as error:
        if not cannot_lock(error):
            raise cannot_write(path, error) from error
        note(f"{path} can't be locked here: see to it that no other run goes there")
    try:
        with contextlib.suppress(OSError):
            (path / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            if [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def cannot_write(path: Path, error: OSError) -> InputError | CannotSave:
    """Return the exception for an OSError: CannotSave where the disk is full."""
    kind = CannotSave if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    return kind(f"cannot write the run folder {path}: {one_line(error)}")
