"""What TensorBoard shows of a run."""

import gc
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from configs import one_line
from engine.memory import MIB
from report import figures

FIRST_HPARAMS = ("context_mode", "layers", "local_loss_mode", "local_module_num", "seed")
"""TensorBoard shows five options unasked: these, not the first five of the alphabet."""


def if_it_can(draw: Callable[..., None]) -> Callable[..., None]:
    """Have a method of Board give up the board, not the run, when something goes wrong."""

    @wraps(draw)
    def tried(self: "Board", *args: object) -> None:
        if self.events is None:
            return
        try:
            draw(self, *args)
        except Exception as error:  # of file systems, TensorBoard and Matplotlib
            self.give_up(error)

    return tried


class Board:
    """TensorBoard's events in a run folder; those of `first_epoch` and later begin anew.

    If they can't be written, `warn` is told so, once, and nothing more is drawn.
    """

    def __init__(self, folder: Path, first_epoch: int, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.events: SummaryWriter | None = None
        threading.excepthook = _leave_out_the_writer
        gc.collect()
        gc.freeze()  # what there is by now stays: else a collection takes 0.2 s and not 0.003
        try:
            self.events = SummaryWriter(str(folder), purge_step=first_epoch)
        except Exception as error:  # as above
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Draw no more, and say why."""
        self.events = None
        self.warn(f"TensorBoard's events can't be written ({one_line(error)}): the run goes on")

    @if_it_can
    def add_epoch(self, metrics: dict) -> None:
        """The figures of an epoch, and with softmax heads the error by depth."""
        for name, value in metrics.items():
            if name == "epoch":
                continue
            if isinstance(value, list):
                each = "rank" if name.startswith("rank_") else "module"
                scalars = {f"{name}/{each}_{index:02}": v for index, v in enumerate(value)}
            else:
                scalars = {f"epoch/{name}": value}
            for tag, scalar in scalars.items():
                if scalar is not None:
                    self.events.add_scalar(tag, scalar, metrics["epoch"])
        errors = {"test": metrics["test_errors"], "train": metrics["train_errors"]}
        if len(errors["test"]) > 1 and None not in errors["test"]:
            modules = range(len(errors["test"]))
            lines = [figures.Line("test", modules, errors["test"]),
                     figures.Line("train", modules, errors["train"], dashed=True)]  # fmt: skip
            drawn = figures.error_by_depth({"": lines}, f"epoch {metrics['epoch']}")
            self._add_figure("error_by_depth", drawn, metrics["epoch"])
        self.events.flush()

    @if_it_can
    def add_reconstructions(self, rows: dict[str, Tensor], epoch: int) -> None:
        """Rows of images (N, 3, H, W) in [0, 1] by their label; none: nothing."""
        if not rows:
            return
        title = f"epoch {epoch}: what the decoder at each cut makes of its features"
        self._add_figure("reconstructions", figures.image_rows(rows, title), epoch)
        self.events.flush()

    def _add_figure(self, tag: str, figure: Figure, epoch: int) -> None:
        self.events.add_figure(tag, figure, epoch)
        gc.collect()  # a figure is full of cycles: 40 of them left alone were 30 MiB

    @if_it_can
    def add_hparams(self, options: dict[str, object], summary: dict) -> None:
        """Options and how it ended, to the HParams tab; then the board is closed."""
        options = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in options.items()
        }
        results = {
            "final/error_last": summary["error_last"],
            "final/error_best": summary["error_best"],
            "final/peak_memory_MiB": summary["peak_memory_bytes"] / MIB,
        }
        columns, start, end = hparams(options, results)
        plugin_data = columns.value[0].metadata.plugin_data
        described = HParamsPluginData.FromString(plugin_data.content)
        for option in described.experiment.hparam_infos:
            option.differs = option.name in FIRST_HPARAMS  # TensorBoard lists such ones first
        plugin_data.content = described.SerializeToString()
        for entry in (columns, start, end):
            self.events.file_writer.add_summary(entry)
        for name, value in results.items():
            self.events.add_scalar(name, value, summary["epochs"])
        self.events.close()


def _leave_out_the_writer(failed: threading.ExceptHookArgs) -> None:
    """Tell of a thread's exception, but for those of TensorBoard's writer.

    They come again in the thread that draws.
    """
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)
