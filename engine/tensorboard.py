"""TensorBoard's events of a run."""

import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from configs import one_line
from engine.console import MIB


def _or_give_up(write: Callable[..., None]) -> Callable[..., None]:
    """Make a method of Board end the board, not the run, when something goes wrong."""

    @wraps(write)
    def attempt(self: "Board", *args: object) -> None:
        try:
            if not self.failed:
                write(self, *args)
        except ImportError:
            self.failed = True
            self.warn("tensorboard is not installed (pip install tensorboard): the run goes on "
                      "without its events")  # fmt: skip
        except Exception as error:  # of file systems and of TensorBoard
            self.failed = True
            self.warn(f"TensorBoard's events can't be written ({one_line(error)}): the run goes on")

    return attempt


class Board:
    """Writer of a run folder's events; those of `first_epoch` and later replace earlier ones.

    If they cannot be written, it calls `warn` once, with a line, and writes nothing more.
    """

    def __init__(self, folder: Path, first_epoch: int, warn: Callable[[str], None]) -> None:
        self.warn, self.failed = warn, False
        threading.excepthook = _report_unless_writer
        self._open(folder, first_epoch)

    @_or_give_up
    def _open(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder), purge_step=first_epoch)

    @_or_give_up
    def add_epoch(self, metrics: dict) -> None:
        """Add each figure of an epoch; of a list, one for each module or rank."""
        for name, value in metrics.items():
            each = "rank" if name.startswith("rank_") else "module"
            scalars = {f"epoch/{name}": value}
            if isinstance(value, list):
                scalars = {f"{name}/{each}_{index:02}": v for index, v in enumerate(value)}
            for tag, scalar in scalars.items():
                if name != "epoch" and scalar is not None:
                    self.events.add_scalar(tag, scalar, metrics["epoch"])
        self.events.flush()

    @_or_give_up
    def add_reconstructions(self, rows: dict[str, Tensor], epoch: int) -> None:
        """Add a picture of rows of images, (N, 3, H, W) in [0, 1] each, and the rows' names."""
        if rows:
            images = torch.cat([row.cpu() for row in rows.values()])
            grid = make_grid(images, nrow=len(images) // len(rows))
            self.events.add_image("reconstructions", grid, epoch)
            self.events.add_text("reconstructions/rows", "; ".join(rows), epoch)
            self.events.flush()

    @_or_give_up
    def add_hparams(self, options: dict[str, object], summary: dict) -> None:
        """Add options and results to the HParams tab, and close the events."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in options.items()}
        results = {
            "final/error_last": summary["error_last"],
            "final/error_best": summary["error_best"],
            "final/peak_memory_MiB": summary["peak_memory_bytes"] / MIB,
        }
        for entry in hparams(plain, results):  # add_hparams would make a run of its own of them
            self.events.file_writer.add_summary(entry)
        for name, value in results.items():
            self.events.add_scalar(name, value, summary["epochs"])
        self.events.close()


def _report_unless_writer(failed: threading.ExceptHookArgs) -> None:
    """Report a thread's exception, but for TensorBoard's writer: the next write raises it again."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)
