"""Printed output."""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from configs import one_line
from engine.memory import readable
from models import ContSupNetwork


class Progress:
    """A bar on a terminal, lines elsewhere or without tqdm; use it with `with`."""

    def __init__(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        self.title, self.total, self.bar = f"epoch {epoch:3}/{epochs}", steps, None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=done, desc=self.title, leave=False,
                                file=sys.stdout)  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self) -> None:
        """Count a step."""
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, losses: list[float], has_last: bool) -> None:
        """Show this process's mean losses up to `step`, from 1.

        Args:
            losses: of this process's modules.
            has_last: whether the network's last module is among them.
        """
        mean = statistics.mean(losses)
        text = f"mean of rank 0's local losses {mean:.4f}"
        if has_last:
            text = f"loss {losses[-1]:.4f}, mean of the local losses {mean:.4f}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"{self.title}  step {step:4}/{self.total}  {text}", flush=True)


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


def note(text: str) -> None:
    """Print a line on stderr that is no error."""
    say(f"train.py: note: {text}")


def say(line: str) -> None:
    """Print a line on stderr, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def headline(options: argparse.Namespace) -> str:
    """Return net, data and method in a line."""
    model = "ResNet" if options.model == "resnet" else options.model
    method = "end to end"
    if options.local_module_num > 1:
        loss = options.local_loss_mode + (" with decoders" if options.h_reconstruct else "")
        method = f"K={options.local_module_num}, context {options.context_mode}, {loss}"
    return f"{model}-{options.layers} on {options.dataset}: {method}"


def print_network(network: ContSupNetwork, options: argparse.Namespace) -> None:
    """Print net, cuts and numbers of parameters, in three lines."""
    cuts = [list(module.unit_names[-1]) for module in network.local_modules[:-1]]
    counts = [f"{name} {n:,}" for name, n in network.parameter_counts().items()]
    print(headline(options))
    print("cuts after [stage, block]:", *(cuts or ["none"]))
    print("parameters:", ", ".join(counts), flush=True)


def print_epoch(metrics: dict, epochs: int) -> None:
    """Print an epoch's metrics, in one line and with K > 1 two more; then a line for each rank."""
    m = metrics
    print(f"epoch {m['epoch']:3}/{epochs}  lr {m['lr']:.4f}"
          f"  train loss {m['train_loss']:.4f} error {m['train_error']:.2f} %"
          f"  test loss {m['test_loss']:.4f} error {m['test_error']:.2f} %"
          f"  {m['samples_per_second']:.0f} samples/s"
          f"  peak {readable(m['peak_memory_bytes'])}")  # fmt: skip
    if len(m["local_losses"]) > 1:
        print("  local loss by module   " + " ".join(f"{x:6.3f}" for x in m["local_losses"]))
    if len(m["test_errors"]) > 1 and None not in m["test_errors"]:
        print("  test error by module % " + " ".join(f"{x:6.2f}" for x in m["test_errors"]))
    for rank, peak in enumerate(m.get("rank_peak_memory_bytes", ())):
        busy = f"  busy {m['rank_busy_percent'][rank]:.1f} %" if "rank_busy_percent" in m else ""
        print(f"  rank {rank}  {m['rank_samples_per_second'][rank]:.0f} samples/s{busy}"
              f"  peak {readable(peak)}")  # fmt: skip
    sys.stdout.flush()


def print_summary(summary: dict, folder: Path) -> None:
    """Print how the run ended and where its files are."""
    print(f"test error {summary['error_last']:.2f} % at the last epoch, "
          f"{summary['error_best']:.2f} % at the best")  # fmt: skip
    print(f"peak memory {readable(summary['peak_memory_bytes'])} ({summary['peak_memory_how']})")
    print(f"run folder {folder}; TensorBoard: tensorboard --logdir {folder}")
