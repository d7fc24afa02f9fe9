"""Printed output."""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from configs import one_line

if TYPE_CHECKING:  # options are checked before torch is imported
    from tqdm import tqdm

    from dataloaders import ImageData
    from models import ContSupNetwork

T = TypeVar("T")

MIB, GIB = 2**20, 2**30

LINE_EVERY = 10.0
"""Seconds between two lines of `watched`."""


def readable(count: int) -> str:
    """Return bytes as "12 MiB", or as "1.50 GiB" from 1 GiB on."""
    return f"{count / MIB:.0f} MiB" if count < GIB else f"{count / GIB:.2f} GiB"


class Progress:
    """A bar on a terminal, lines elsewhere or without tqdm; use it with `with`."""

    def __init__(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        self.title, self.total = f"epoch {epoch:3}/{epochs}", steps
        self.bar = terminal_bar(self.title, steps, done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self) -> None:
        """Count a step."""
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, losses: list[float | None], has_last: bool) -> None:
        """Show this process's mean losses up to `step`, from 1.

        Args:
            losses: of this process's modules; None where there is none.
            has_last: whether the network's last module is among them.
        """
        mean = statistics.mean(loss for loss in losses if loss is not None)
        text = f"mean of rank 0's local losses {mean:.4f}"
        if has_last:
            text = f"loss {losses[-1]:.4f}, mean of the local losses {mean:.4f}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"{self.title}  step {step:4}/{self.total}  {text}", flush=True)

    def show_compiling(self, module: int, modules: int) -> None:
        """Show that this module's step is being compiled; the first of a kind takes long."""
        text = f"compiling module {module} of 0-{modules - 1}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"{self.title}  {text}", flush=True)


def terminal_bar(title: str, total: int, done: int = 0) -> "tqdm | None":
    """Return a progress bar; None where the output is no terminal or tqdm is not installed."""
    if not getattr(sys.stdout, "isatty", bool)():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, desc=title, leave=False, file=sys.stdout)


def watched(things: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield the things, and show how many: by a bar on a terminal, by lines elsewhere.

    Args:
        title: what is being done.
        total: number of things.
    """
    bar, shown = terminal_bar(title, total), time.monotonic()
    try:
        for done, thing in enumerate(things, start=1):
            yield thing
            if bar is not None:
                bar.update()
            elif done < total and time.monotonic() - shown >= LINE_EVERY:
                print(f"{title}  {done:,}/{total:,}", flush=True)
                shown = time.monotonic()
    finally:
        if bar is not None:
            bar.close()


class ForgivingStream:
    """A stream that drops its output, after one note, once it cannot be written any more."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed = False

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        return bool(getattr(self.stream, "isatty", bool)())

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def _attempt(self, act: Callable, *arguments: object) -> None:
        if self.failed:
            return
        try:
            act(*arguments)
        except OSError as error:
            self.failed = True
            note(f"the output can't be written ({one_line(error)}): the run goes on")
            discard(self.stream)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Keep prints from failing: a full disk or a closed pipe does not end a run of hours."""
    stream = sys.stdout
    sys.stdout = ForgivingStream(stream)
    try:
        yield
    finally:
        sys.stdout = stream


def discard(stream: TextIO) -> None:
    """Discard a stream's buffer and further output; else Python fails when it exits."""
    with contextlib.suppress(OSError):  # or it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def count_of(number: int, noun: str) -> str:
    """Return "1 epoch", "2 epochs"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def note(text: str) -> None:
    """Print a line on stderr that is no error."""
    say(f"train.py: note: {text}")


def say(line: str) -> None:
    """Print a line on stderr, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


OF_METHODS = {"aux_net_config": "1c2f", "momentum_aux": None, "overlap": 0, "consistency": None}
"""Options that tell methods apart, and their defaults."""


def headline(options: argparse.Namespace) -> str:
    """Return net, data and method in a line."""
    model = "ResNet" if options.model == "resnet" else options.model
    method = "end to end"
    if options.local_module_num > 1:
        loss = options.local_loss_mode + (" with decoders" if options.h_reconstruct else "")
        method = f"K={options.local_module_num}, context {options.context_mode}, {loss}"
        for name, usual in OF_METHODS.items():
            if getattr(options, name) != usual:
                method += f", {name} {getattr(options, name)}"
    if options.train_modules is not None:
        method += f", training modules {' '.join(map(str, options.train_modules))} alone"
    return f"{model}-{options.layers} on {options.dataset}: {method}"


def print_network(network: "ContSupNetwork", options: argparse.Namespace) -> None:
    """Print net, cuts and numbers of parameters, in three lines."""
    cuts = [list(module.unit_names[-1]) for module in network.local_modules[:-1]]
    counts = [f"{name} {n:,}" for name, n in network.parameter_counts().items()]
    print(headline(options))
    print("cuts after [stage, block]:", *(cuts or ["none"]))
    print("parameters:", ", ".join(counts), flush=True)
    windows = network.overlap_weight is not None  # there a module has the next one's loss too
    for module in network.local_modules[: 2 if windows else None]:
        if module.decoder is not None and not any(module.loss_weights):
            index = module.index - windows
            note(f"module {index} trains on nothing: with this --loss_scale its loss weighs 0")


def print_data(data: "ImageData") -> None:
    """Print how many images and classes were read, in a line; notes go to stderr."""
    splits = {"training": data.train, "validation": data.val, "test": data.test}
    counts = {name: len(split.targets) for name, split in splits.items() if split is not None}
    text = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    print(f"data: {text} images of {len(data.classes)} classes", flush=True)
    for line in data.notes:
        note(line)


def print_epoch(metrics: dict, epochs: int) -> None:
    """Print an epoch's metrics, in one line and with K > 1 two more; then a line for each rank."""
    m = metrics
    val = f"  val loss {m['val_loss']:.4f} error {m['val_error']:.2f} %" if "val_loss" in m else ""
    print(f"epoch {m['epoch']:3}/{epochs}  lr {m['lr']:.4f}"
          f"  train loss {m['train_loss']:.4f} error {m['train_error']:.2f} %{val}"
          f"  test loss {m['test_loss']:.4f} error {m['test_error']:.2f} %"
          f"  {m['samples_per_second']:.0f} samples/s"
          f"  peak {readable(m['peak_memory_bytes'])}")  # fmt: skip
    if len(m["local_losses"]) > 1:
        print(f"  local loss by module   {_row(m['local_losses'], 3)}")
    if len(m["test_errors"]) - m["test_errors"].count(None) > 1:
        print(f"  test error by module % {_row(m['test_errors'], 2)}")
    for rank, peak in enumerate(m.get("rank_peak_memory_bytes", ())):
        busy = f"  busy {m['rank_busy_percent'][rank]:.1f} %" if "rank_busy_percent" in m else ""
        print(f"  rank {rank}  {m['rank_samples_per_second'][rank]:.0f} samples/s{busy}"
              f"  peak {readable(peak)}")  # fmt: skip
    sys.stdout.flush()


def _row(values: list[float | None], digits: int) -> str:
    return " ".join("     -" if x is None else f"{x:6.{digits}f}" for x in values)


def print_summary(summary: dict, folder: Path) -> None:
    """Print how the run ended and where its files are."""
    best = "the best"
    if "val_error_best" in summary:
        best = f"epoch {summary['epoch_best']}, whose validation error is the lowest"
    print(f"test error {summary['error_last']:.2f} % at the last epoch, "
          f"{summary['error_best']:.2f} % at {best}")  # fmt: skip
    print(f"peak memory {readable(summary['peak_memory_bytes'])} ({summary['peak_memory_how']})")
    print(f"run folder {folder}; TensorBoard: tensorboard --logdir {folder}")
