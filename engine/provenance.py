"""Library versions and git commit, which are recorded with each run."""

import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
import torchvision

CODE = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def git_state(folder: Path = CODE) -> dict[str, str | bool | None]:
    """Return the `commit` of the code, and whether tracked files differ from it (`dirty`).

    Both are None without git, or where the folder's code is not tracked.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "train.py")
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *arguments],
        capture_output=True, text=True, check=True, timeout=20,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    )  # fmt: skip
    return done.stdout.strip()
