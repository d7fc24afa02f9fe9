"""Times training steps and the loader for options of train.py, against plain modules.

python bench.py --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E \\
    --batch_size 128 --versus="--amp bf16 --compile"

Plain are eager modules in contiguous float32, with ungrouped encoders and nothing made again.
Every configuration has a process of its own (some options hold for a whole process); they take
turns step by step, so that whatever else the machine does hits all alike.
"""

from interrupts import INTERRUPTS

if __name__ == "__main__":
    INTERRUPTS.install()  # before the imports that take seconds

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs import DATASETS, InputError, one_line
from dataloaders import Batches, Split
from engine import Totals, make_optimizers, tensors_alive, train_step
from memory import MIB, PeakMemory
from models import build_network
from options import Parser, read_options, whole
from speed import choose_device, compile_errors, device_name, ready, set_switches
from train import network_arguments

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


def serve(argv: list[str], pipe: Connection) -> None:
    """Send (device, batch size, peak bytes, loader samples/s), then seconds of a step for each
    message; or a sentence that says what is wrong."""
    try:
        options, _ = read_options(argv)
        for name in ("resume", "evaluate", "dry_run"):
            if getattr(options, name):
                raise InputError(f"a step of a new run is timed: leave --{name} out")
        device = choose_device(options.device)
        step, peak = training_step(options, device)
        for _ in range(WARM_UP):
            step()
        loader = loader_speed(options, device)
        pipe.send((device_name(device), options.batch_size, peak.bytes, loader))
        while pipe.recv():
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except (InputError, ValueError, torch.OutOfMemoryError, *compile_errors()) as error:
        pipe.send(one_line(error))


def training_step(
    options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], None], PeakMemory]:
    """One step of a run with these options, on one random batch, that waits for the device."""
    arguments, _ = network_arguments(options)
    set_switches(
        device,
        cudnn_benchmark=options.cudnn_benchmark,
        tf32=options.tf32,
        keeps_heap=options.keep_heap,
    )
    torch.manual_seed(0)
    network = ready(
        build_network(**arguments),
        device,
        channels_last=options.channels_last,
        compiled=options.compile,
    )
    optimizers, totals = make_optimizers(network), Totals(network, device)
    split = random_split(options, options.batch_size, arguments["num_classes"])
    ((images, targets),) = batches(split, options, device).epoch(0)
    peak = PeakMemory(device, compiled=options.compile)
    alive = partial(tensors_alive, network, optimizers, images, targets)

    def step() -> None:
        with peak.step(len(targets), alive):
            for _ in train_step(network, optimizers, images, targets, totals):
                pass
        wait_for(device)

    return step, peak


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


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------
# In the process that was started


def time_in_turn(rows: dict[str, list[str]], steps: int) -> list[Timed]:
    """Each row's figures; InputError for what a process says."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, starts = [], [], []
    try:
        for argv in rows.values():
            pipe, other = context.Pipe()
            processes.append(context.Process(target=serve, args=(argv, other), daemon=True))
            processes[-1].start()
            other.close()
            pipes.append(pipe)
            starts.append(receive(pipe))  # before the next begins: they'd slow each other
        seconds: list[list[float]] = [[] for _ in pipes]
        for _ in range(steps):
            for pipe, times in zip(pipes, seconds, strict=True):
                pipe.send(True)
                times.append(receive(pipe))
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(timeout=5)
            process.terminate()
    return [
        Timed(name, *start, times) for name, start, times in zip(rows, starts, seconds, strict=True)
    ]


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
    parser.add_argument("--steps", type=whole(1), default=10, metavar="N", help="timed steps a row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> int:
    """Exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    own, argv = build_parser().parse_known_args()
    rows = {"plain": [*argv, *shlex.split(PLAIN)], "as given": argv}
    try:
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
