"""Times training steps of train.py's options against the same with others, side by side.

python bench.py --layers 32 --local_module_num 16 --context_mode E --context_group 0 \\
    --versus="--context_group 16" --versus="--recompute"
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch

from configs import InputError, one_line
from engine import Totals, make_optimizers, train_step
from models import build_network
from options import Parser, read_options, whole
from train import choose_device, network_arguments


def training_step(argv: list[str]) -> Callable[[], None]:
    """One step of a run with these options, on random images, that waits for the device."""
    options, _ = read_options(argv)
    for name in ("resume", "evaluate", "dry_run"):
        if getattr(options, name):
            raise InputError(f"a step of a new run is timed: leave --{name} out")
    device = choose_device(options.device)
    arguments, _ = network_arguments(options)
    torch.manual_seed(0)
    network = build_network(**arguments).to(device)
    optimizers = make_optimizers(network)
    totals = Totals(network, device)
    size = options.image_size
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    targets = torch.randint(arguments["num_classes"], (options.batch_size,), device=device)

    def step() -> None:
        for _ in train_step(network, optimizers, images, targets, totals):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def time_in_turn(steps: list[Callable[[], None]], count: int) -> list[list[float]]:
    """Seconds of `count` runs of each, after one that is not timed, all taking turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(count + 1):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


def build_parser() -> Parser:
    """Options of its own; all others are train.py's."""
    parser = Parser(
        description=__doc__.splitlines()[0], allow_abbrev=False, add_help=True,
        epilog="All other options are those of train.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--versus", action="append", default=[], metavar="OPTIONS",
        help="--versus=\"...\": options of train.py to add in a second (third, ...) run",
    )  # fmt: skip
    parser.add_argument("--steps", type=whole(1), default=10, metavar="N", help="timed steps")
    return parser


def main() -> int:
    """Exit status: 0, or 2 for bad input."""
    own, argv = build_parser().parse_known_args()
    try:
        rows = [("as given", argv)] + [(more, argv + shlex.split(more)) for more in own.versus]
        seconds = time_in_turn([training_step(arguments) for _, arguments in rows], own.steps)
    except (InputError, ValueError, torch.OutOfMemoryError) as error:
        print(f"bench.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}  {'ms, median':>10}  {'least to most':>15}  ratio to the first, in median")
    for (name, _), times in zip(rows, seconds, strict=True):
        ms = [1000 * t for t in times]
        ratio = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))
        print(f"{name:{width}}  {statistics.median(ms):10.1f}  {min(ms):7.1f}-{max(ms):7.1f}"
              f"  {ratio:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
