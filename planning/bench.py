"""Times training steps and the loader for options of train.py, against plain modules.

python -m planning.bench --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E \\
    --batch_size 128 --versus="--amp bf16 --compile"

Plain are eager modules in contiguous float32, with ungrouped encoders and nothing recomputed. Each
row of the table has a process of its own, because some options hold for a process. The rows
take turns step by step, so that other work on the machine slows all of them alike. `--nproc` adds
a row of several processes that share the modules.
"""

from engine.errors import start_script
from engine.options import Parser, integer_between

PLAIN = (
    "--no-channels_last --amp off --compile False --context_group 0 --recompute False "
    "--cudnn_benchmark False --tf32 False --data_on_device False --keep_heap False"
)
"""Options of the first row, after those that are given."""


# fmt: off
def build_parser() -> Parser:
    """Return the parser of the bench's own options; all others are train.py's."""
    parser = Parser(
        prog="bench", allow_abbrev=False,
        description="Time training steps and the loader for options of train.py.",
        epilog="All other options are those of train.py. The first row is plain: the same with "
        f"{PLAIN}.")
    add = parser.add_argument
    add("--versus", action="append", default=[], metavar="OPTIONS",
        help='--versus="...": options of train.py to add in one more row; may be repeated')
    add("--steps", type=integer_between(1), default=10, metavar="N",
        help="timed steps of each row (default: 10)")
    add("--nproc", type=integer_between(2), metavar="P",
        help="leave plain out; add a row of P processes with --parallel modules. On the CPU each "
        "process of any row then has one thread, unless OMP_NUM_THREADS is set")
    add("--json", action="store_true", help="print a list of JSON objects, one for each row")
    return parser
# fmt: on


if __name__ == "__main__":  # before the imports that take seconds
    start_script(lambda argv: build_parser().parse_known_args(argv))

import argparse
import json
import multiprocessing
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from configs import DATASETS, InputError, one_line
from dataloaders import Batches, Split
from engine.console import MIB
from engine.device import configure_backends, device_name, wait_for
from engine.errors import ConnectionLost, PeerFailed
from engine.memory import PeakMemory
from engine.options import build_parser as build_train_parser
from engine.options import read_options
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network
from models.torch_internals import compile_errors
from parallel.launch import make_strategy
from planning.dry_run import choose_network

WARM_UP = 4
"""Steps that are not timed; the memory meter watches them."""

# ---------------------------------------------------------------------------------------------
# In each process of a row


def work(pipe: Connection, *arguments: Any) -> None:
    """Send what `timed_steps` yields, the next when asked; an InputError if something is wrong."""
    try:
        for result in timed_steps(*arguments):
            pipe.send(result)
            pipe.recv()
    except (EOFError, BrokenPipeError, KeyboardInterrupt, PeerFailed):
        pass  # nobody asks any more, or another process says what is wrong
    except (ConnectionLost, ValueError, torch.OutOfMemoryError, *compile_errors()) as error:
        pipe.send(InputError(one_line(error)))


def timed_steps(argv: list[str], environment: dict[str, str], steps: int) -> Iterator[Any]:
    """Yield what a run is like; then the seconds of each of its steps, on noise.

    Args:
        argv: options of train.py.
        environment: variables that torchrun would set.
        steps: how many are timed.
    """
    os.environ.update(environment)
    strategy = make_strategy(build_train_parser().parse_args(argv))
    with redirect_stdout(sys.stderr), strategy:  # which prints which process has which modules
        options, _ = read_options(argv)
        device = strategy.device(options.device)
        arguments, _ = choose_network(options)
        configure_backends(device, options)
        strategy.divide(options, arguments, device)
        network = build_network(**arguments)
        strategy.place(network, options, device)
        optimizers, totals = make_optimizers(network), Totals(network, device)
        batches = WARM_UP + strategy.size - 1 + steps
        loader = make_loader(options, arguments["num_classes"], device, batches)
        samples_per_second = loader_speed(loader)
        peak = PeakMemory(
            device, compiled=options.compile, apart=loader.device_bytes, steps=strategy.warm_up
        )
        # Process r is a step ahead of process r+1: then all can do their next one at once.
        warm_up = batches - steps - strategy.rank
        for index, batch in enumerate(strategy.batches(loader, epoch=0)):
            if index == warm_up:
                yield {
                    "batch_size": options.batch_size,
                    "peak_bytes": peak.bytes,
                    "loader_samples_per_second": samples_per_second,
                    "machine": f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, "
                    f"device {device_name(device)}, PyTorch {torch.__version__}",
                }
            start = time.perf_counter()
            with peak.step(len(batch[0]), partial(tensors_alive, network, optimizers, *batch)):
                train_step(network, optimizers, *batch, totals)
            wait_for(device)
            if index >= warm_up:
                yield time.perf_counter() - start


def make_loader(
    options: argparse.Namespace, classes: int, device: torch.device, batches: int
) -> Batches:
    """Return a loader of noise: so many batches, but some tens at least, to time it by."""
    count = max(min(20_000, 80 * options.batch_size), batches * options.batch_size)
    images = torch.randint(256, (count, 3, *[options.image_size] * 2), dtype=torch.uint8)
    return Batches(
        Split(images, torch.arange(count) % classes), DATASETS[options.dataset],
        options.batch_size, device, augment=not options.no_augment, shuffle=True,
        channels_last=options.channels_last, on_device=options.data_on_device,
    )  # fmt: skip


def loader_speed(loader: Batches) -> float:
    """Return samples a second: the median of three epochs after the first."""
    seconds = []
    for epoch in range(4):
        start = time.perf_counter()
        for _ in loader.epoch(epoch):
            pass
        wait_for(loader.device)
        seconds.append(time.perf_counter() - start)
    return len(loader.split.targets) / median(seconds[1:])


# ---------------------------------------------------------------------------------------------
# In the process that starts them


class Row:
    """A row of the table: processes that take a step when asked, and end with this process.

    Starting and timing raise InputError with what a process says.

    Attributes:
        starts: what each process's run is like.
        seconds: of each step, in the slowest process.
    """

    def __init__(self, name: str, argv: list[str], processes: int, steps: int) -> None:
        self.name, self.pipes, self.seconds = name, [], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        context = multiprocessing.get_context("spawn")
        for rank in map(str, range(processes)):
            torchrun = {"WORLD_SIZE": str(processes), "RANK": rank, "LOCAL_RANK": rank, **address}
            ours, theirs = context.Pipe()
            arguments = theirs, argv, torchrun, steps
            context.Process(target=work, args=arguments, daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        self.starts = self._receive()

    def time_step(self) -> None:
        """Have all processes take a step."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # of a dead process, as `_receive` says
                pipe.send("next")
        self.seconds.append(max(self._receive()))

    def _receive(self) -> list[Any]:
        received = []
        for pipe in self.pipes:
            with suppress(EOFError, ConnectionResetError):
                received.append(pipe.recv())
        for error in received:
            if isinstance(error, InputError):
                raise error
        if len(received) < len(self.pipes):
            raise InputError(f"a process of {self.name!r} ended early: see above if it said why")
        return received


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Return each row's figures; `speedup` compares samples a second of the steps of a turn."""
    result, first = [], None
    for row in rows:
        speeds = [row.starts[0]["batch_size"] / seconds for seconds in row.seconds]
        first = first or speeds
        ratios = [own / of_first for own, of_first in zip(speeds, first, strict=True)]
        result.append({
            "options": row.name,
            **row.starts[0],
            "samples_per_second": median(speeds),
            "step_ms": 1000 * median(row.seconds),
            "step_ms_least": 1000 * min(row.seconds),
            "step_ms_most": 1000 * max(row.seconds),
            "speedup": median(ratios),
            "speedup_least": min(ratios),
            "speedup_most": max(ratios),
            "peak_bytes": [start["peak_bytes"] for start in row.starts],
        })  # fmt: skip
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for the machine, and one for each row."""
    width = max(len(row["options"]) for row in rows)
    print(rows[0]["machine"])
    print(f"{'':{width}}  samples/s  ms a step    least to most  x first  least to most  "
          "loader, samples/s  peak MiB")  # fmt: skip
    for row in rows:
        spread = f"{row['step_ms_least']:.1f}-{row['step_ms_most']:.1f}"
        ratios = f"{row['speedup_least']:.2f}-{row['speedup_most']:.2f}"
        peaks = ", ".join(f"{peak / MIB:.0f}" for peak in row["peak_bytes"])
        print(f"{row['options']:{width}}  {row['samples_per_second']:9.0f}  {row['step_ms']:9.1f}  "
              f"{spread:>15}  {row['speedup']:7.2f}  {ratios:>13}  "
              f"{row['loader_samples_per_second']:17,.0f}  {peaks:>8}")  # fmt: skip


def make_rows(own: argparse.Namespace, argv: list[str]) -> Iterator[Row]:
    """Start the rows, each when the one before has warmed up; raise ValueError if they can't be."""
    more = {} if own.nproc else {"plain": PLAIN}
    more |= {"as given": ""} | {options: options for options in own.versus}
    commands = {name: ([*argv, *shlex.split(options)], 1) for name, options in more.items()}
    for given, _ in commands.values():
        options, _ = read_options(given)
        for name in ("resume", "evaluate", "dry_run", "parallel"):
            if getattr(options, name):
                raise InputError(f"steps of a new run are timed: leave --{name} out")
    if own.nproc:
        commands[f"{own.nproc} processes"] = [*argv, "--parallel", "modules"], own.nproc
    for name, command in commands.items():
        yield Row(name, *command, own.steps)


def main() -> int:
    """Return the exit status: 0, or 2 for bad input."""
    own, argv = build_parser().parse_known_args()
    if own.nproc:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    try:
        rows = list(make_rows(own, argv))
        for _ in range(own.steps):
            for row in rows:
                row.time_step()
    except ValueError as error:  # an InputError, or of shlex
        print(f"bench: error: {one_line(error)}", file=sys.stderr)
        return 2
    if own.json:
        print(json.dumps(figures(rows)))
    else:
        print_table(figures(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
