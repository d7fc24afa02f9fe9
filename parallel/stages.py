"""`--parallel modules`: which process runs which modules."""

import argparse
import gc
import time
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from configs import InputError
from engine.device import memory_format, move_to_device, wait_for
from engine.step import Totals, make_optimizers, train_step
from models import LocalModule, build_network


def module_times(
    arguments: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> list[float]:
    """Return the seconds that each module takes for a training step on noise.

    Two steps warm up. Then each module's least time of three to eight steps counts, as many as fit
    into 15 s: other work on the machine only adds time, and would unbalance the whole run.
    """
    network = move_to_device(
        build_network(**arguments), device,
        channels_last=options.channels_last, compiled=options.compile,
    )  # fmt: skip
    optimizers, totals = make_optimizers(network), Totals(network, device)
    size = arguments["image_size"]
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    images = images.to(memory_format=memory_format(options.channels_last))
    targets = torch.arange(options.batch_size, device=device) % arguments["num_classes"]
    seconds: list[list[float]] = [[] for _ in network.stage]
    last = began = 0.0

    def after_module(module: LocalModule) -> None:
        nonlocal last
        before, last = last, _now(device)
        seconds[module.index].append(last - before)

    for step in range(10):
        last = _now(device)
        if step == 2:
            began = last  # the first two may compile
        elif step >= 5 and last - began > 15:
            break
        train_step(network, optimizers, images, targets, totals, after_module=after_module)
    del network, optimizers, totals
    gc.collect()  # else compiled code would stay, and count in the peak of the run
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [min(of_module[2:]) for of_module in seconds]


def _now(device: torch.device) -> float:
    """Return the clock in seconds when the device has done all its work."""
    wait_for(device)
    return time.perf_counter()


def balanced_ranges(times: Sequence[float], processes: int) -> list[range]:
    """Return a range of modules for each process, with the smallest largest sum of times."""
    K = len(times)
    check_count(K, processes)
    until = [0.0, *accumulate(times)]

    @cache
    def best(end: int, number: int) -> tuple[float, int]:
        """Return the largest sum, and where the last range starts, of the modules before `end`."""
        if number == 1:
            return until[end], 0
        return min(
            (max(best(start, number - 1)[0], until[end] - until[start]), start)
            for start in range(number - 1, end)
        )

    ranges, end = [], K
    for number in range(processes, 0, -1):
        start = best(end, number)[1]
        ranges.insert(0, range(start, end))
        end = start
    return ranges


def check_ranges(ranges: Sequence[range], modules: int, processes: int) -> None:
    """Raise InputError unless `--module_ranges` give all modules to the processes, in order."""
    check_count(modules, processes)
    if len(ranges) != processes:
        raise InputError(f"--module_ranges has {len(ranges)} ranges for {processes} processes")
    following = 0
    for given in ranges:
        if given.start != following:
            raise InputError(
                f"--module_ranges: {format_range(given)} should begin with module {following}"
            )
        following = given.stop
    if following != modules:
        raise InputError(
            f"--module_ranges ends with module {following - 1}, and the last of {modules} is "
            f"{modules - 1}"
        )


def check_count(modules: int, processes: int) -> None:
    """Raise InputError if there are more processes than modules."""
    if processes > modules:
        raise InputError(
            f"{processes} processes for {modules} modules: take {modules} at most, or a larger "
            "--local_module_num"
        )


def format_range(modules: range) -> str:
    """Return a range as --module_ranges takes it."""
    return f"{modules[0]}" if len(modules) == 1 else f"{modules[0]}-{modules[-1]}"
