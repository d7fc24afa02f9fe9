"""Times training steps and the loader for options of train.py, against plain modules.

python bench.py --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E \\
    --batch_size 128 --versus="--amp bf16 --compile"

Plain are eager modules in contiguous float32, with ungrouped encoders and nothing made again.
Every configuration has a process of its own (some options hold for a whole process); they take
turns step by step, so that whatever else the machine does hits all alike.

With --parallel modules it times several processes against one, in turns of --steps steps.
"""

from engine.signals import INTERRUPTS

if __name__ == "__main__":
    INTERRUPTS.install()  # before the imports that take seconds

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from configs import DATASETS, InputError, one_line
from dataloaders import Batches, Split
from engine.device import choose_device, compile_errors, device_name, ready, set_switches, wait_for
from engine.memory import MIB, PeakMemory
from engine.options import Parser, integer_between, read_options
from engine.options import build_parser as build_train_parser
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from engine.training import Elsewhere, Lost
from models import build_network
from train import network_arguments

if TYPE_CHECKING:
    from parallel.training import Parallel

PLAIN = (
    "--no-channels_last --amp off --compile False --context_group 0 --recompute False "
    "--cudnn_benchmark False --tf32 False --data_on_device False --keep_heap False"
)
"""The first row: what stands after it in the command line of the others is switched off again."""

WARM_UP = 3
"""Steps that are not timed; the memory meter watches them."""


class Timed(NamedTuple):
    """One configuration: where it ran, peak of a step, loader samples/s, seconds of steps."""

    name: str
    device: str
    batch_size: int
    peak_bytes: int
    loader: float
    seconds: list[float]


# ---------------------------------------------------------------------------------------------
# In a process of its own


def serve(argv: list[str], pipe: Connection, threads: int | None = None) -> None:
    """Send (device, batch size, peak bytes, loader samples/s), then seconds of a step for each
    message; or a sentence that says what is wrong. `threads` are PyTorch's own, if it is None."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        options, _ = read_options(argv)
        for name in ("resume", "evaluate", "dry_run"):
            if getattr(options, name):
                raise InputError(f"a step of a new run is timed: leave --{name} out")
        device = choose_device(options.device)
        step, peak = training_step(options, device)
        for _ in range(WARM_UP):
            step()
        wait_for(device)
        loader = loader_speed(options, device)
        pipe.send((device_name(device), options.batch_size, peak.bytes, loader))
        while pipe.recv():
            start = time.perf_counter()
            step()
            wait_for(device)
            pipe.send(time.perf_counter() - start)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except (InputError, ValueError, torch.OutOfMemoryError, *compile_errors()) as error:
        pipe.send(one_line(error))


def training_step(
    options: argparse.Namespace, device: torch.device, team: "Parallel | None" = None
) -> tuple[Callable[[], None], PeakMemory]:
    """One step of a run with these options, or this process's part of it, on one random batch."""
    arguments, _ = network_arguments(options)
    set_switches(
        device,
        cudnn_benchmark=options.cudnn_benchmark,
        tf32=options.tf32,
        keeps_heap=options.keep_heap,
    )
    if team is not None:
        team.choose_way(options, arguments)
    torch.manual_seed(0)
    network = build_network(**arguments)
    if team is not None:
        team.way.prepare(network)
    ready(network, device, channels_last=options.channels_last, compiled=options.compile)
    optimizers, totals = make_optimizers(network), Totals(network, device)
    split = random_split(options, options.batch_size, arguments["num_classes"])
    ((images, targets),) = batches(split, options, device).epoch(0)
    steps = 2 if team is None else team.way.steps_to_fill
    peak = PeakMemory(device, compiled=options.compile, steps=steps)
    alive = partial(tensors_alive, network, optimizers, images, targets)

    def step() -> None:
        with peak.step(len(targets), alive):
            train_step(network, optimizers, images, targets, totals)

    return step, peak


def serve_one_of_several(argv: list[str], environment: dict[str, str], pipe: Connection) -> None:
    """As `serve` does, for a process of a team, in turns of as many steps as each message says.

    Sends (device, batch size, peak bytes, how the work is split), then (seconds a step, seconds
    of the turn, percent that it was busy) for each message.
    """
    from parallel.training import Parallel  # which nothing else needs

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with Parallel(build_train_parser().parse_args(argv)) as team:
            options, _ = read_options(argv)
            step, peak = training_step(options, team.device, team)
            take_turn(team, options.batch_size, step, WARM_UP + team.size)
            pipe.send((device_name(team.device), options.batch_size, peak.bytes, str(team.way)))
            while steps := pipe.recv():
                pipe.send(take_turn(team, options.batch_size, step, steps))
    except (EOFError, BrokenPipeError, KeyboardInterrupt, Elsewhere):
        pass
    except (InputError, Lost, ValueError, torch.OutOfMemoryError, *compile_errors()) as error:
        pipe.send(one_line(error))


def take_turn(
    team: "Parallel", batch_size: int, step: Callable[[], None], steps: int
) -> tuple[float, float, float]:
    """Seconds of a step once all have begun, seconds of all steps, and percent that it was busy.

    More than the size of the team are needed for the first.
    """
    team.way.begin([batch_size] * steps)
    began = time.perf_counter()
    for count in range(1, steps + 1):
        team.signal()
        if count == steps:
            team.way.last()
        step()
        if count == team.size:
            wait_for(team.device)
            filled = time.perf_counter()
            team.way.stalled()
    wait_for(team.device)
    ended = time.perf_counter()
    busy = 100 * (1 - team.way.stalled() / (ended - filled)) if steps > team.size else 0.0
    team.way.end()
    team.settle()
    return (ended - filled) / max(1, steps - team.size), ended - began, busy


def loader_speed(options: argparse.Namespace, device: torch.device) -> float:
    """Augmented samples a second, over some tens of batches; with one thread on the CPU."""
    count = min(20_000, 80 * options.batch_size)
    split = random_split(options, count, 10)
    loader = batches(split, options, device, augment=not options.no_augment, shuffle=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for epoch in range(4):
        start = time.perf_counter()
        for _ in loader.epoch(epoch):
            pass
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return count / statistics.median(seconds[1:])


def random_split(options: argparse.Namespace, count: int, classes: int) -> Split:
    """Noise of the data set's size."""
    size = options.image_size
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return Split(images, torch.randint(classes, (count,)))


def batches(
    split: Split, options: argparse.Namespace, device: torch.device, **how: bool
) -> Batches:
    """As train.py makes them."""
    return Batches(
        split,
        DATASETS[options.dataset],
        options.batch_size,
        device,
        channels_last=options.channels_last,
        on_device=options.data_on_device,
        **how,
    )


# ---------------------------------------------------------------------------------------------
# In the process that was started


def time_in_turn(rows: dict[str, list[str]], steps: int) -> list[Timed]:
    """Each row's figures; InputError for what a process says."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes, starts = [], []
        for argv in rows.values():
            pipes += stack.enter_context(started(context, [(serve, argv)]))
            starts.append(receive(pipes[-1]))  # before the next begins: they'd slow each other
        seconds: list[list[float]] = [[] for _ in pipes]
        for _ in range(steps):
            for pipe, times in zip(pipes, seconds, strict=True):
                pipe.send(True)
                times.append(receive(pipe))
    return [
        Timed(name, *start, times) for name, start, times in zip(rows, starts, seconds, strict=True)
    ]


def time_together(
    argv: list[str], split: list[str], processes: int, steps: int, turns: int
) -> dict[str, Any]:
    """What `--json` prints of one process and of several that share the work as `split` says.

    InputError for what a process says.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [
        (serve_one_of_several, [*argv, *split], {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        })
        for rank in range(processes)
    ]  # fmt: skip
    with started(context, [(partial(serve, threads=1), argv)]) as (alone,):
        first = receive(alone)
        with started(context, team) as pipes:
            ranks = _received_of_all(pipes)
            measured = [(_turn_of_one(alone, steps), _turn_of_all(pipes, steps))
                        for _ in range(turns)]  # fmt: skip
    return together_as_json(first, ranks, measured, steps)


def _turn_of_one(pipe: Connection, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        pipe.send(True)
        seconds.append(receive(pipe))
    return seconds


def _turn_of_all(pipes: list[Connection], steps: int) -> list[tuple[float, float, float]]:
    for pipe in pipes:
        pipe.send(steps)
    return _received_of_all(pipes)


def _received_of_all(pipes: list[Connection]) -> list[Any]:
    """What each sends; where one says what is wrong, others may just have ended."""
    received, errors = [], []
    for pipe in pipes:
        try:
            received.append(receive(pipe))
        except InputError as error:
            errors.append(error)
    if errors:
        raise min(errors, key=lambda error: error.__cause__ is not None)
    return received


def together_as_json(
    first: tuple, ranks: list[tuple], measured: list[tuple[list, list]], steps: int
) -> dict[str, Any]:
    """A turn's ratio is of seconds a step: the one process's median to those of the slowest rank,
    when all work; `with_bubble` counts the time until they do, and that in which they end."""
    device, batch_size, peak, _ = first
    alone = [statistics.median(one) for one, _ in measured]
    together = [max(step for step, _, _ in several) for _, several in measured]
    whole = [max(turn for _, turn, _ in several) / steps for _, several in measured]
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return {
        "machine": machine(device), "steps": steps, "turns": len(measured),
        "batch_size": batch_size, "way": ranks[0][3], "processes": len(ranks),
        "one": _spread(alone) | {"peak_bytes": peak},
        "several": _spread(together) | {
            "peak_bytes": [rank[2] for rank in ranks],
            "busy_percent": [statistics.median(several[r][2] for _, several in measured)
                             for r in range(len(ranks))],
        },
        "times_one": statistics.median(ratios),
        "times_one_least": min(ratios), "times_one_most": max(ratios),
        "times_one_with_bubble": statistics.median(
            a / b for a, b in zip(alone, whole, strict=True)
        ),
    }  # fmt: skip


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "step_ms_least": 1000 * min(seconds),
        "step_ms_most": 1000 * max(seconds),
    }


def print_together(result: dict[str, Any]) -> None:
    """One process, several, and by how much they are faster."""
    several = result["several"]
    print(f"{result['machine']}; {result['turns']} turns of {result['steps']} steps of "
          f"{result['batch_size']} samples, a thread a process on the CPU")  # fmt: skip
    print(result["way"])
    print(f"{'':14}  {'samples/s':>9}  {'ms a step':>9}  {'least to most':>15}  peak MiB, busy %")
    for name, row in (("one process", result["one"]),
                      (f"{result['processes']} processes", several)):  # fmt: skip
        peaks = row["peak_bytes"] if row is several else [row["peak_bytes"]]
        more = [f"{peak / MIB:.0f}" for peak in peaks]
        if row is several:
            more = [f"{p}, {b:.1f}" for p, b in zip(more, row["busy_percent"], strict=True)]
        spread = f"{row['step_ms_least']:.1f}-{row['step_ms_most']:.1f}"
        print(f"{name:14}  {1000 * result['batch_size'] / row['step_ms']:9.0f}  "
              f"{row['step_ms']:9.1f}  {spread:>15}  {'; '.join(more)}")  # fmt: skip
    print(f"{result['times_one']:.2f} times one process ({result['times_one_least']:.2f} to "
          f"{result['times_one_most']:.2f}); in turns of {result['steps']} steps, with their start "
          f"and end, {result['times_one_with_bubble']:.2f}")  # fmt: skip


@contextmanager
def started(context: Any, servers: list[tuple]) -> Iterator[list[Connection]]:
    """Processes (function, its arguments but the last, a pipe); inside, pipes to them."""
    pipes, processes = [], []
    try:
        for function, *arguments in servers:
            pipe, other = context.Pipe()
            processes.append(
                context.Process(target=function, args=(*arguments, other), daemon=True)
            )
            processes[-1].start()
            other.close()
            pipes.append(pipe)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            process.terminate()


def receive(pipe: Connection) -> Any:
    """What a process sends; InputError if that is a sentence, or if it has died."""
    try:
        message = pipe.recv()
    except EOFError as error:
        raise InputError("a process ended early; what it printed stands above") from error
    if isinstance(message, str):
        raise InputError(message)
    return message


def as_json(timed: list[Timed]) -> dict[str, Any]:
    """What `--json` prints; the ratio is of samples a second, in median of the turns."""
    plain = timed[0]
    rows = [
        {
            "options": row.name,
            "batch_size": row.batch_size,
            "samples_per_second": row.batch_size / statistics.median(row.seconds),
            "step_ms": 1000 * statistics.median(row.seconds),
            "step_ms_least": 1000 * min(row.seconds),
            "step_ms_most": 1000 * max(row.seconds),
            "peak_bytes": row.peak_bytes,
            "times_plain": row.batch_size
            / plain.batch_size
            * statistics.median(
                theirs / own for theirs, own in zip(plain.seconds, row.seconds, strict=True)
            ),
            "loader_samples_per_second": row.loader,
        }
        for row in timed
    ]
    return {"machine": machine(plain.device), "steps": len(plain.seconds), "rows": rows}


def machine(device: str) -> str:
    """Processor, threads, device and PyTorch's version."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return (
        f"{processor}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"device {device}, PyTorch {torch.__version__}"
    )


def print_table(result: dict[str, Any]) -> None:
    """A line a configuration."""
    rows = result["rows"]
    width = max(len(row["options"]) for row in rows)
    print(f"{result['machine']}; {result['steps']} steps of {rows[0]['batch_size']} samples")
    print(f"{'':{width}}  {'samples/s':>9}  {'ms a step':>9}  {'least to most':>15}"
          f"  {'peak MiB':>8}  {'x plain':>7}  {'loader, samples/s':>17}")  # fmt: skip
    for row in rows:
        spread = f"{row['step_ms_least']:.1f}-{row['step_ms_most']:.1f}"
        print(f"{row['options']:{width}}  {row['samples_per_second']:9.0f}  {row['step_ms']:9.1f}"
              f"  {spread:>15}  {row['peak_bytes'] / MIB:8.0f}  {row['times_plain']:7.2f}"
              f"  {row['loader_samples_per_second']:17,.0f}")  # fmt: skip


def build_parser() -> Parser:
    """Options of its own; all others are train.py's."""
    parser = Parser(
        description="Times training steps and the loader for options of train.py.",
        allow_abbrev=False,
        epilog="All other options are those of train.py. The first row is plain: the same with "
        f"{PLAIN}. The loader is timed on one thread where the device is the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--versus", action="append", default=[], metavar="OPTIONS",
        help="--versus=\"...\": options of train.py to add in one more row; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=integer_between(1), default=10, metavar="N", help="timed steps a row"
    )
    parser.add_argument(
        "--parallel", choices=["modules"], help="time several processes against one",
    )  # fmt: skip
    parser.add_argument(
        "--nproc", type=integer_between(1), default=2, metavar="P", help="with --parallel: so many",
    )  # fmt: skip
    parser.add_argument(
        "--module_ranges", nargs="*", default=[], metavar="A-B", help="with --parallel: of each",
    )  # fmt: skip
    parser.add_argument(
        "--turns", type=integer_between(1), default=5, metavar="N", help="with --parallel: turns of each",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def show_together(own: argparse.Namespace, argv: list[str]) -> None:
    """Time several processes against one, and print that."""
    from planning.pipeline_plan import processes_asked  # which nothing else needs

    if own.versus:
        raise InputError("--parallel is timed against one process: leave --versus out")
    if own.steps <= own.nproc:
        raise InputError(f"the first {own.nproc} steps fill the pipeline: give more --steps")
    split = ["--parallel", own.parallel]
    if own.module_ranges:
        split += ["--module_ranges", *own.module_ranges]
    options, _ = read_options([*argv, *split])
    processes_asked(options.local_module_num, [own.nproc], options.module_ranges)
    result = time_together(argv, split, own.nproc, own.steps, own.turns)
    if own.json:
        print(json.dumps(result))
    else:
        print_together(result)


def main() -> int:
    """Exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    own, argv = build_parser().parse_known_args()
    rows = {"plain": [*argv, *shlex.split(PLAIN)], "as given": argv}
    try:
        if own.parallel:
            show_together(own, argv)
            return 0
        rows |= {more: [*argv, *shlex.split(more)] for more in own.versus}
        for arguments in rows.values():
            read_options(arguments)
        result = as_json(time_in_turn(rows, own.steps))
    except (InputError, ValueError) as error:
        print(f"bench.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if own.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
