"""What a run prints, for people."""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from configs import one_line
from engine.device import CompileTime
from engine.memory import readable
from models import ContSupNetwork


class Progress:
    """A bar on a terminal, lines elsewhere; use it with `with`.

    Says as well what a step compiled, and for how long.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        steps: int,
        compile_time: CompileTime | None = None,
        done: int = 0,
    ) -> None:
        self.compile_time = compile_time
        self.title = f"epoch {epoch:3}/{epochs}"
        self.steps = steps
        self.bar = tqdm(total=steps, initial=done, desc=self.title, leave=False,
                        file=sys.stdout, disable=not sys.stdout.isatty())  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def took(self) -> None:
        """A step is done."""
        self.bar.update()
        if self.compile_time is not None and self.compile_time.is_news():
            self.bar.clear()
            print(self.compile_time.news(), flush=True)

    def show(self, step: int, losses: list[float]) -> None:
        """The mean losses up to `step`, from 1."""
        text = f"loss {losses[-1]:.4f}, mean of the local losses {statistics.mean(losses):.4f}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{self.title}  step {step:4}/{self.steps}  {text}", flush=True)


class Tolerant:
    """A stream that gives up, with a line on stderr, where it can't be written any more."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed = False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def _try(self, act: Callable, *arguments: object) -> None:
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
    """Inside, prints do not fail: a run of hours is not ended by a full disk or a closed pipe."""
    stream = sys.stdout
    sys.stdout = Tolerant(stream)
    try:
        yield
    finally:
        sys.stdout = stream


def discard(stream: TextIO) -> None:
    """Have what is in a stream's buffer, and what comes, go nowhere; else Python fails at exit."""
    with contextlib.suppress(OSError):  # or it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(text: str) -> None:
    """A line on stderr that is no error."""
    say(f"train.py: note: {text}")


def say(line: str) -> None:
    """A line on stderr, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def headline(options: argparse.Namespace) -> str:
    """Net, data and method in a line."""
    loss = options.local_loss_mode + (" with decoders" if options.h_reconstruct else "")
    return (
        f"ResNet-{options.layers} on {options.dataset}: K={options.local_module_num}, "
        f"context {options.context_mode}, {loss}"
    )


def print_network(network: ContSupNetwork, options: argparse.Namespace) -> None:
    """What is to be trained, in three lines."""
    cuts = [list(module.unit_names[-1]) for module in network.local_modules[:-1]]
    counts = [f"{name} {n:,}" for name, n in network.parameter_counts().items()]
    print(headline(options))
    print("cuts after [stage, block]:", *(cuts or ["none"]))
    print("parameters:", ", ".join(counts), flush=True)


def print_epoch(metrics: dict, epochs: int) -> None:
    """The figures of an epoch, in two lines; with K > 1 the modules' in two more."""
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
    """How the run ended and where its files are."""
    print(f"test error {summary['error_last']:.2f} % at the last epoch, "
          f"{summary['error_best']:.2f} % at the best")  # fmt: skip
    print(f"peak memory {readable(summary['peak_memory_bytes'])} ({summary['peak_memory_how']})")
    print(f"run folder {folder}; TensorBoard: tensorboard --logdir {folder}")
