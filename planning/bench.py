"""Times training steps and the loader for options of train.py, against plain modules.

python -m planning.bench --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E \\
    --batch_size 128 --versus="--amp bf16 --compile"

Plain are eager modules in contiguous float32, with ungrouped encoders and nothing recomputed. Each
row of the table has a process of its own, because some options hold for a process. The rows
take turns step by step, so that other work on the machine slows all of them alike. With
`--parallel modules` the rows are one process, and several that share the modules.
"""

from engine.signals import INTERRUPTS

if __name__ == "__main__":
    INTERRUPTS.install()  # before the imports that take seconds

import argparse
import json
import multiprocessing
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from configs import DATASETS, InputError, one_line
from dataloaders import Batches, Split
from engine.device import (
    compile_errors,
    configure_backends,
    device_name,
    memory_format,
    wait_for,
)
from engine.errors import ConnectionLost, PeerFailed
from engine.memory import MIB, PeakMemory
from engine.options import Parser, integer_between, read_options
from engine.options import build_parser as build_train_parser
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from engine.strategy import Strategy
from models import build_network
from parallel.launch import make_strategy
from planning.dry_run import choose_network

PLAIN = (
    "--no-channels_last --amp off --compile False --context_group 0 --recompute False "
    "--cudnn_benchmark False --tf32 False --data_on_device False --keep_heap False"
)
"""Options of the first row, after those that are given."""

WARM_UP = 3
"""Steps that are not timed; the memory meter watches them."""

Processes = list[tuple[list[str], dict[str, str]]]
"""Options of train.py, and environment variables, of each process of a row."""

Row = tuple[str, list[dict[str, Any]], list[list[tuple[float, float]]]]
"""A name; what each of its processes sent first; of each turn what each process sent."""

# ---------------------------------------------------------------------------------------------
# In a process of its own


def work(argv: list[str], environment: dict[str, str], threads: int, pipe: Connection) -> None:
    """Send what a run with these options is like; then, for each number of steps, their times.

    Sends an exception instead where something is wrong. 0 steps end it.

    Args:
        argv: options of train.py.
        environment: variables that torchrun would set, for one of several processes.
        threads: of PyTorch; 0 leaves its own default.
    """
    os.environ.update(environment)
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        strategy = make_strategy(build_train_parser().parse_args(argv))
        with redirect_stdout(None), strategy:
            options, _ = read_options(argv)
            device = strategy.device(options.device)
            step, peak = training_step(options, strategy, device)
            turn = partial(take_turn, step, strategy, device, options.batch_size)
            turn(WARM_UP + strategy.size)
            pipe.send({
                "batch_size": options.batch_size,
                "peak_bytes": peak.bytes,
                "loader_samples_per_second": loader_speed(options, device),
                "machine": f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, device "
                f"{device_name(device)}, PyTorch {torch.__version__}",
                "division": str(strategy) if strategy.size > 1 else "",
            })  # fmt: skip
            while steps := pipe.recv():
                pipe.send(turn(steps))
    except (EOFError, BrokenPipeError, KeyboardInterrupt, PeerFailed):
        pass
    except (
        InputError, ConnectionLost, ValueError, torch.OutOfMemoryError, *compile_errors()
    ) as error:  # fmt: skip
        pipe.send(InputError(one_line(error)))


def training_step(
    options: argparse.Namespace, strategy: Strategy, device: torch.device
) -> tuple[Callable[[], None], PeakMemory]:
    """Return this process's part of a step on a random batch, and the meter of its memory."""
    arguments, _ = choose_network(options)
    configure_backends(device, options)
    strategy.divide(options, arguments, device)
    torch.manual_seed(0)
    network = build_network(**arguments)
    strategy.place(network, options, device)
    optimizers, totals = make_optimizers(network), Totals(network, device)
    images = torch.randn(options.batch_size, 3, *[options.image_size] * 2, device=device)
    images = images.to(memory_format=memory_format(options.channels_last))
    targets = torch.arange(options.batch_size, device=device) % arguments["num_classes"]
    peak = PeakMemory(device, compiled=options.compile, steps=strategy.warm_up)
    alive = partial(tensors_alive, network, optimizers, images, targets)

    def step() -> None:
        with peak.step(len(targets), alive):
            train_step(network, optimizers, images, targets, totals)

    return step, peak


def take_turn(
    step: Callable[[], None], strategy: Strategy, device: torch.device, batch_size: int, steps: int
) -> tuple[float, float]:
    """Return seconds a step, and percent of them that the device did not wait for other processes.

    The first P steps of P processes, which fill the pipeline, do not count.
    """
    fill = strategy.size if strategy.size > 1 else 0
    waited, filled, end = 0.0, time.perf_counter(), 0.0
    batches = SimpleNamespace(
        sizes=lambda: [batch_size] * steps, epoch=lambda epoch, skip: repeat(None, steps)
    )
    for count, _ in enumerate(strategy.batches(batches, 0), start=1):
        step()
        if count in (fill, steps):
            wait_for(device)
            waited = strategy.seconds_waited() if fill else 0.0
            filled, end = end or filled, time.perf_counter()
    return (end - filled) / (steps - fill), 100 * (1 - waited / (end - filled))


def loader_speed(options: argparse.Namespace, device: torch.device) -> float:
    """Return augmented samples a second, over some tens of batches; on the CPU with one thread."""
    count, threads = min(20_000, 80 * options.batch_size), torch.get_num_threads()
    images = torch.randint(256, (count, 3, *[options.image_size] * 2), dtype=torch.uint8)
    batches = Batches(
        Split(images, torch.randint(10, (count,))), DATASETS[options.dataset], options.batch_size,
        device, augment=not options.no_augment, shuffle=True, channels_last=options.channels_last,
        on_device=options.data_on_device,
    )  # fmt: skip
    torch.set_num_threads(1)
    seconds = []
    for epoch in range(4):
        start = time.perf_counter()
        for _ in batches.epoch(epoch):
            pass
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return count / median(seconds[1:])


# ---------------------------------------------------------------------------------------------
# In the process that was started


def time_in_turns(
    rows: dict[str, Processes], turns: int, steps: int, threads: int = 0
) -> list[Row]:
    """Start all rows, then let them take turns; raise InputError with what a process says.

    Args:
        rows: by name.
        turns: of each row.
        steps: of a turn.
        threads: of each process; 0 for PyTorch's default.
    """
    with ExitStack() as stack:
        timed = []
        for name, processes in rows.items():  # one warms up before the next starts
            pipes = stack.enter_context(started(processes, threads))
            timed.append((pipes, (name, receive(pipes), [])))
        for _ in range(turns):
            for pipes, (_, _, results) in timed:
                for pipe in pipes:
                    pipe.send(steps)
                results.append(receive(pipes))
    return [row for _, row in timed]


@contextmanager
def started(processes: Processes, threads: int) -> Iterator[list[Connection]]:
    """Start the processes of a row; inside the `with` are pipes to them."""
    context, pipes, workers = multiprocessing.get_context("spawn"), [], []
    try:
        for argv, environment in processes:
            pipe, other = context.Pipe()
            pipes.append(pipe)
            arguments = argv, environment, threads, other
            workers.append(context.Process(target=work, args=arguments, daemon=True))
            workers[-1].start()
            other.close()
        yield pipes
        for pipe in pipes:
            pipe.send(0)
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join(timeout=5)
            worker.terminate()


def receive(pipes: list[Connection]) -> list[Any]:
    """Return what each process sends; raise it if it is an error, or InputError if one has died."""
    received = []
    for pipe in pipes:
        with suppress(EOFError, ConnectionResetError):
            received.append(pipe.recv())
    for error in received:
        if isinstance(error, InputError):
            raise error
    if len(received) < len(pipes):
        raise InputError("a process ended early; what it printed stands above")
    return received


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the figures of each row.

    The time of a turn is that of its slowest process. `speedup` is the median over the turns of a
    row's samples a second, divided by those of the first row.
    """
    figures, first = [], []
    for name, starts, turns in rows:
        own = [max(seconds for seconds, _ in turn) for turn in turns]
        first = first or own
        scale = starts[0]["batch_size"] / rows[0][1][0]["batch_size"]
        ratios = [scale * f / o for f, o in zip(first, own, strict=True)]
        figures.append({
            "options": name,
            **starts[0],
            "samples_per_second": starts[0]["batch_size"] / median(own),
            "step_ms": 1000 * median(own),
            "step_ms_least": 1000 * min(own),
            "step_ms_most": 1000 * max(own),
            "speedup": median(ratios),
            "speedup_least": min(ratios),
            "speedup_most": max(ratios),
            "peak_bytes": [start["peak_bytes"] for start in starts],
            "busy_percent": [median(busy for _, busy in of_rank)
                             for of_rank in zip(*turns, strict=True)],
        })  # fmt: skip
    return figures


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line a row, and under it how several processes share the work."""
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
        if row["division"]:
            busy = ", ".join(f"{percent:.1f}" for percent in row["busy_percent"])
            print(f"{row['division']}; busy {busy} %")


def build_parser() -> Parser:
    """Return the parser of the bench's own options; all others are train.py's."""
    parser = Parser(
        prog="bench",
        description="Time training steps and the loader for options of train.py.",
        allow_abbrev=False,
        epilog="All other options are those of train.py. The first row is plain: the same with "
        f"{PLAIN}. The loader is timed on one thread where the device is the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, number = parser.add_argument, integer_between(1)
    add(
        "--versus",
        action="append",
        default=[],
        metavar="OPTIONS",
        help='--versus="...": options of train.py to add in one more row; may be repeated',
    )
    add(
        "--steps",
        type=number,
        default=10,
        metavar="N",
        help="timed steps a row; with --parallel, in each of --turns turns",
    )
    add("--parallel", choices=["modules"], help="time several processes against one")
    add("--nproc", type=number, default=2, metavar="P", help="with --parallel: processes")
    add("--turns", type=number, default=5, metavar="N", help="with --parallel: turns of each row")
    add("--json", action="store_true", help="print one JSON object")
    return parser  # fmt: skip


def rows_of(own: argparse.Namespace, argv: list[str]) -> dict[str, Processes]:
    """Return the rows to time; raise InputError or ValueError if they can't be."""
    if not own.parallel:
        more = {"plain": PLAIN, "as given": "", **{options: options for options in own.versus}}
        rows = {name: [([*argv, *shlex.split(options)], {})] for name, options in more.items()}
    else:
        if own.versus:
            raise InputError("--parallel is timed against one process: leave --versus out")
        if own.steps <= own.nproc:
            raise InputError(f"the first {own.nproc} steps fill the pipeline: give more --steps")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        several = [*argv, "--parallel", own.parallel]
        ranks = map(str, range(own.nproc))
        environments = [
            address | {"WORLD_SIZE": str(own.nproc), "RANK": rank, "LOCAL_RANK": rank}
            for rank in ranks
        ]
        rows = {
            "1 process": [(argv, {})],
            f"{own.nproc} processes": [(several, environment) for environment in environments],
        }
    for processes in rows.values():
        options, _ = read_options(processes[0][0])
        for name in ("resume", "evaluate", "dry_run"):
            if getattr(options, name):
                raise InputError(f"a step of a new run is timed: leave --{name} out")
    return rows


def main() -> int:
    """Return the exit status: 0, or 2 for bad input."""
    own, argv = build_parser().parse_known_args()
    try:
        rows = rows_of(own, argv)
        if own.parallel:
            figures = as_json(time_in_turns(rows, own.turns, own.steps, threads=1))
        else:
            figures = as_json(time_in_turns(rows, own.steps, 1))
    except (InputError, ValueError) as error:
        print(f"bench: error: {one_line(error)}", file=sys.stderr)
        return 2
    if own.json:
        print(json.dumps(figures))
    else:
        print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
