"""What `--parallel modules` would give on devices of an assumed speed.

FLOPs are those of planning/plan.py. The memory of each process is that of its own training step, on
tensors without data. The time of an epoch is a formula (`PipelinePlan`).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataloaders import count_images
from engine.console import MIB
from models import ContSupNetwork, build_network
from models.torch_internals import FakeTensorMode
from parallel.stages import balanced_ranges, check_count, check_ranges, format_range
from parallel.transfer import IN_FLIGHT, FeatureSpec, Link, crossing
from planning.plan import Plan, fake_batch, step_peaks

MB = 10**6


@dataclass(frozen=True)
class DevicePlan:
    """One process: its modules by index, and what a full batch costs it.

    `peak_bytes` is of a step in the middle of an epoch, when as many features are in flight as
    there can be. `bytes_back` are the weights that go to the process before with `--momentum_aux`.
    """

    modules: list[int]
    train_flops_per_sample: int
    peak_bytes: int
    bytes_in: int
    bytes_out: int
    bytes_back: int


@dataclass(frozen=True)
class PipelinePlan:
    """One number of processes.

    With P processes an epoch of T steps takes T + P - 1 steps of the slowest process: a process may
    start on its first batch when the one before has done a step. This ignores time on the links,
    since features are sent during the backward. The bubble is the other P - 1 steps' part of it.

    Below `binding_gbs`, in 10^9 bytes a second, the largest link takes longer than a step of the
    slowest process, and sets the pace. One process has no link: 0.
    """

    processes: int
    samples_per_second: float
    speedup: float
    bubble_percent: float
    peak_bytes: int
    peak_rank: int
    largest_link_bytes: int
    binding_gbs: float
    devices: list[DevicePlan]


@dataclass(frozen=True)
class ParallelPlan:
    """What `--dry_run --parallel modules --json` prints as `parallel`."""

    device_tflops: float
    images: int
    steps: int
    plans: list[PipelinePlan]


def process_counts(
    modules: int, nproc: Sequence[int] | None, ranges: Sequence[range] | None
) -> list[int]:
    """Return the numbers of processes to plan for: by --nproc or --module_ranges, or 1, 2, 4 .. K.

    Raises InputError if they do not fit the number of modules, or each other.
    """
    if ranges:
        for processes in nproc or [len(ranges)]:
            check_ranges(ranges, modules, processes)
        return [len(ranges)]
    if not nproc:
        return [2**i for i in range(modules.bit_length()) if 2**i < modules] + [modules]
    check_count(modules, max(nproc))
    return list(dict.fromkeys(nproc))


def make_parallel_plan(
    options: argparse.Namespace, plan: Plan, arguments: dict[str, Any]
) -> ParallelPlan:
    """Return the plan for each number of processes that the options ask for.

    Args:
        plan: of the same run in one process.
        arguments: of `build_network`.
    Raises:
        InputError: numbers of processes or ranges of modules do not fit.
    """
    counts = process_counts(options.local_module_num, options.nproc, options.module_ranges)
    images = count_images(
        options.dataset, options.data_dir, options.limit_per_class, options.val_fraction
    )
    batch_size, tflops = options.batch_size, options.device_tflops or 5
    cuts = [None, *crossing(arguments, torch.device("cpu"), channels_last=False), None]
    flops = [module.train_flops_per_sample for module in plan.modules]
    parallel = ParallelPlan(tflops, images, math.ceil(images / batch_size), plans=[])
    with FakeTensorMode():
        network, batch = build_network(**arguments), fake_batch(arguments, batch_size)
        for count in counts:
            ranges = options.module_ranges or balanced_ranges(flops, count)
            devices = [plan_device(network, *batch, modules, cuts, flops) for modules in ranges]
            parallel.plans.append(plan_pipeline(devices, parallel, batch_size))
    return parallel


def plan_device(
    network: ContSupNetwork,
    images: Tensor,
    targets: Tensor,
    modules: range,
    cuts: Sequence[Sequence[FeatureSpec] | None],
    flops: Sequence[int],
) -> DevicePlan:
    """Return the plan of the process that has these modules; call it in FakeTensorMode.

    Args:
        cuts: what crosses before each module and after the last; None at both ends.
        flops: of each module for a sample.
    """
    incoming, outgoing = cuts[modules.start], cuts[modules.stop]
    transfer = torch.futures.Future()
    transfer.set_result(None)  # nothing travels: each transfer is complete at once
    done = lambda _: transfer  # noqa: E731
    link = Link(images.device, incoming, done, outgoing, done, done, done)
    network.set_stage(modules, link)
    link.begin([len(targets)] * (IN_FLIGHT + 2))  # one more than there are steps below
    with torch.no_grad():
        for _ in range(IN_FLIGHT):  # until as many batches as possible are in flight
            network(images)
    return DevicePlan(
        modules=list(modules),
        train_flops_per_sample=sum(flops[index] for index in modules),
        peak_bytes=max(step_peaks(network, images, targets)),
        bytes_in=sum(spec.nbytes(len(targets)) for spec in incoming or ()),
        bytes_out=sum(spec.nbytes(len(targets)) for spec in outgoing or ()),
        bytes_back=network.bytes_back,
    )


def plan_pipeline(
    devices: list[DevicePlan], parallel: ParallelPlan, batch_size: int
) -> PipelinePlan:
    """Return the plan of these processes for an epoch of `parallel`."""
    flops = [device.train_flops_per_sample for device in devices]
    peaks = [device.peak_bytes for device in devices]
    largest_link = max(device.bytes_out for device in devices)
    epoch = parallel.steps + len(devices) - 1  # in steps of the slowest process
    steps_per_second = parallel.device_tflops * 1e12 / (max(flops) * batch_size)
    return PipelinePlan(
        processes=len(devices),
        samples_per_second=parallel.images / epoch * steps_per_second,
        speedup=sum(flops) * parallel.steps / (max(flops) * epoch),
        bubble_percent=100 * (len(devices) - 1) / epoch,
        peak_bytes=max(peaks),
        peak_rank=peaks.index(max(peaks)),
        largest_link_bytes=largest_link,
        binding_gbs=largest_link * steps_per_second / 1e9,
        devices=devices,
    )


def print_parallel_plan(plan: ParallelPlan) -> None:
    """Print the assumptions, and a line a number of processes; if there is one, its devices."""
    print(f"assumed: {plan.device_tflops:g} * 10^12 FLOPs/s a device (--device_tflops)")
    print(f"an epoch: {plan.images:,} images in {plan.steps:,} steps")
    print("processes  samples/s  x one bubble %  peak MiB of rank  MB/link binds below GB/s")
    for p in plan.plans:
        print(f"{p.processes:9} {p.samples_per_second:10,.1f} {p.speedup:6.2f} "
              f"{p.bubble_percent:8.1f} {p.peak_bytes / MIB:9,.0f} {p.peak_rank:7} "
              f"{p.largest_link_bytes / MB:8,.1f} {p.binding_gbs:16.3g}")  # fmt: skip
    if len(plan.plans) > 1:
        return
    print("rank   modules % of FLOPs  peak MiB    MB in   MB out  MB back")
    devices = plan.plans[0].devices
    flops = sum(device.train_flops_per_sample for device in devices)
    for rank, d in enumerate(devices):
        modules = format_range(range(d.modules[0], d.modules[-1] + 1))
        share = 100 * d.train_flops_per_sample / flops
        traffic = f"{d.bytes_in / MB:8,.1f} {d.bytes_out / MB:8,.1f} {d.bytes_back / MB:8,.2f}"
        print(f"{rank:4} {modules:>9} {share:10.1f} {d.peak_bytes / MIB:9,.0f} {traffic}")
