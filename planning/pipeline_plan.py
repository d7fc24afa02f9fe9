"""What `--parallel modules` would give on devices and links of an assumed speed.

FLOPs and memory of each process are those of its own training step on tensors without data, as in
planning/plan.py. From them and the bytes that cross the cuts follows the schedule of an epoch,
batch by batch.
"""

import argparse
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from configs import InputError
from dataloaders import count_images
from engine.memory import MIB
from models import ContSupNetwork, build_network
from parallel.stages import balanced_ranges, check_count, check_ranges, format_range
from parallel.transfer import IN_FLIGHT, FeatureSpec, Link, crossing
from planning.plan import Plan, fake_batch, step_peaks

MB = 10**6


@dataclass(frozen=True)
class DevicePlan:
    """One process: its modules by index, and what a full batch costs it.

    `flops_share` is its part of all FLOPs. `peak_bytes` is of a step in the middle of an epoch,
    when as many features are in flight as there can be.
    """

    rank: int
    modules: list[int]
    train_flops_per_sample: int
    flops_share: float
    step_seconds: float
    peak_bytes: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class PipelinePlan:
    """One number of processes.

    `samples_per_second` is of a full epoch. The bubble is the part of it in which the slowest
    device, or the slowest link if that is slower, is idle: until the first batch reaches it, and
    from its last batch to the end. Below `binding_gbs`, in 10^9 bytes a second, the slowest link
    takes longer than the slowest device; None without links.
    """

    processes: int
    samples_per_second: float
    speedup: float
    epoch_seconds: float
    bubble_seconds: float
    bubble_percent: float
    peak_bytes: int
    peak_rank: int
    largest_link_bytes: int
    bytes_per_step: int
    binding_gbs: float | None
    devices: list[DevicePlan]


@dataclass(frozen=True)
class ParallelPlan:
    """What `--dry_run --parallel modules --json` prints as `parallel`."""

    device_tflops: float
    link_gbs: float
    batch_size: int
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
        InputError: numbers of processes or ranges of modules do not fit, or the speeds are so low
            that an epoch takes infinitely long.
    """
    counts = process_counts(options.local_module_num, options.nproc, options.module_ranges)
    images = count_images(options.dataset, options.data_dir, options.limit_per_class)
    batch_size, tflops, gbs = options.batch_size, options.device_tflops or 5, options.link_gbs or 12
    cuts = crossing(arguments, torch.device("cpu"), channels_last=False)
    flops = [module.train_flops_per_sample for module in plan.modules]
    alone = sum(flops) * images / (tflops * 1e12)
    plans = []
    with FakeTensorMode():
        network, batch = build_network(**arguments), fake_batch(arguments, batch_size)
        for count in counts:
            ranges = options.module_ranges or balanced_ranges(flops, count)
            planned = [
                plan_device(network, *batch, rank, modules, cuts, sum(flops), tflops)
                for rank, modules in enumerate(ranges)
            ]
            devices, until_sent = map(list, zip(*planned, strict=True))
            plans.append(plan_pipeline(devices, until_sent, batch_size, images, gbs, alone))
    return ParallelPlan(tflops, gbs, batch_size, images, -(-images // batch_size), plans)


class _Done:
    """A transfer that is complete at once."""

    def wait(self) -> None:
        """Return at once."""


def plan_device(
    network: ContSupNetwork,
    images: Tensor,
    targets: Tensor,
    rank: int,
    modules: range,
    cuts: Sequence[Sequence[FeatureSpec]],
    total_flops: int,
    tflops: float,
) -> tuple[DevicePlan, float]:
    """Return a process's plan, and the seconds of a batch until it can send its features.

    Call it in FakeTensorMode.

    Args:
        modules: of the process.
        cuts: from `crossing`.
        total_flops: of all modules for a sample.
    """
    samples, device = len(targets), images.device
    incoming = cuts[modules.start - 1] if modules.start else None
    outgoing = cuts[modules.stop - 1] if modules.stop <= len(cuts) else None
    counter = FlopCounterMode(display=False)
    flops_when_sent: list[int] = []

    def send(_: Tensor) -> _Done:
        flops_when_sent.append(counter.get_total_flops())
        return _Done()

    link = Link(device, incoming, lambda _: _Done(), outgoing, send)
    network.set_stage(modules, link)
    link.begin([samples] * (IN_FLIGHT + 2))  # one more than there are steps below
    with counter:
        step_peaks(network, images, targets)
    flops = counter.get_total_flops()
    with torch.no_grad():
        for _ in range(IN_FLIGHT - 1):  # until as many batches as possible are in flight
            network(images)
    bytes_in, bytes_out = (
        sum(spec.nbytes(samples) for spec in specs or ()) for specs in (incoming, outgoing)
    )
    plan = DevicePlan(
        rank=rank,
        modules=list(modules),
        train_flops_per_sample=flops // samples,
        flops_share=flops / (total_flops * samples),
        step_seconds=flops / (tflops * 1e12),
        peak_bytes=max(step_peaks(network, images, targets)),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
    )
    until_sent = flops_when_sent[0] if outgoing else flops
    return plan, until_sent / (tflops * 1e12)


def finish_times(
    devices: Sequence[tuple[float, float]], links: Sequence[float], batches: Sequence[float]
) -> list[float]:
    """Return when each device finishes its last batch, in seconds from the start of the first.

    A device works on the batches one after the other, each when it has arrived. A batch is sent
    when the next device has memory for it, which it allocates as it starts on the batch before.
    With `IN_FLIGHT` batches on the link, a device waits before it sends another one.

    Args:
        devices: seconds of a full batch until its features can be sent, and from then on.
        links: seconds of a full batch, from each device to the next.
        batches: sizes, as parts of a full one.
    """
    began, ended = [0.0] * len(devices), [0.0] * len(devices)
    arrivals = [deque([0.0] * IN_FLIGHT, maxlen=IN_FLIGHT) for _ in links]
    for size in batches:
        arrived = 0.0
        for rank, (before, after) in enumerate(devices):
            began[rank] = max(ended[rank], arrived)
            can_send = began[rank] + before * size
            if rank < len(links):
                can_send = max(can_send, arrivals[rank][0])
                has_memory = began[rank + 1]  # with the batch before this one
                arrived = max(can_send, has_memory) + links[rank] * size
                arrivals[rank].append(arrived)
            ended[rank] = can_send + after * size
    return ended


def plan_pipeline(
    devices: list[DevicePlan],
    until_sent: Sequence[float],
    batch_size: int,
    images: int,
    link_gbs: float,
    alone: float,
) -> PipelinePlan:
    """Return the plan of some processes.

    Args:
        until_sent: seconds of a full batch until a process can send its features.
        images: in an epoch.
        alone: seconds that one device takes for an epoch.
    Raises:
        InputError: an epoch takes infinitely long.
    """
    full, rest = divmod(images, batch_size)
    batches = [1.0] * full + [rest / batch_size] * bool(rest)
    computing = [(u, d.step_seconds - u) for d, u in zip(devices, until_sent, strict=True)]
    sent = [device.bytes_out for device in devices[:-1]]
    sending = [nbytes / (link_gbs * 1e9) for nbytes in sent]
    seconds = max(finish_times(computing, sending, batches))
    if not math.isfinite(seconds + alone):
        raise InputError("so few --device_tflops or --link_gbs that an epoch never ends")
    slowest = max(device.step_seconds for device in devices)
    bubble = max(0.0, seconds - max(slowest, *sending, 0.0) * sum(batches)) if sent else 0.0
    heaviest = max(devices, key=lambda device: device.peak_bytes)
    return PipelinePlan(
        processes=len(devices),
        samples_per_second=batch_size * sum(batches) / seconds,
        speedup=alone / seconds,
        epoch_seconds=seconds,
        bubble_seconds=bubble,
        bubble_percent=100 * bubble / seconds,
        peak_bytes=heaviest.peak_bytes,
        peak_rank=heaviest.rank,
        largest_link_bytes=max(sent, default=0),
        bytes_per_step=sum(sent),
        binding_gbs=max(sent) / slowest / 1e9 if sent else None,
        devices=devices,
    )


def print_parallel_plan(plan: ParallelPlan) -> None:
    """Print the assumptions, and a line a number of processes; if there is one, its devices."""
    print(f"assumed: {plan.device_tflops:g} * 10^12 FLOPs/s a device (--device_tflops), "
          f"{plan.link_gbs:g} GB/s a link (--link_gbs)")  # fmt: skip
    print(f"an epoch: {plan.images:,} images in {plan.steps:,} steps")
    print(f"{'processes':>9} {'samples/s':>10} {'x one':>6} {'bubble s':>9} {'%':>5} "
          f"{'peak MiB':>9} {'of rank':>7} {'MB/link':>8} {'MB in all':>9} "
          f"{'binds below GB/s':>16}")  # fmt: skip
    for p in plan.plans:
        rate = p.samples_per_second
        binding = "-" if p.binding_gbs is None else f"{p.binding_gbs:.3g}"
        print(f"{p.processes:9} {format(rate, ',.0f' if rate >= 1000 else '.4g'):>10} "
              f"{p.speedup:6.2f} {p.bubble_seconds:9.3g} {p.bubble_percent:5.1f} "
              f"{p.peak_bytes / MIB:9,.0f} {p.peak_rank:7} {p.largest_link_bytes / MB:8,.1f} "
              f"{p.bytes_per_step / MB:9,.1f} {binding:>16}")  # fmt: skip
    if len(plan.plans) > 1:
        return
    print(f"{'rank':>4} {'modules':>9} {'% of FLOPs':>10} {'peak MiB':>9} "
          f"{'MB in':>8} {'MB out':>8}")  # fmt: skip
    for d in plan.plans[0].devices:
        modules = format_range(range(d.modules[0], d.modules[-1] + 1))
        print(f"{d.rank:4} {modules:>9} {100 * d.flops_share:10.1f} {d.peak_bytes / MIB:9,.0f} "
              f"{d.bytes_in / MB:8,.1f} {d.bytes_out / MB:8,.1f}")  # fmt: skip
