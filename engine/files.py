"""Files that are complete or not there: written under another name first, then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` in one step, once it is on the disk.

    If anything goes wrong, what was there stays. Raises OSError.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # so that the new name survives a power cut, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, contents: dict) -> None:
    """Write a JSON file, as `replacing` does."""
    write_text(path, json.dumps(contents, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())
