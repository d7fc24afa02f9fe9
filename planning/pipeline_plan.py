"""What `--parallel modules` would give on devices and links of an assumed speed, without training.

Each process's FLOPs and memory are those of its own training step, on tensors without contents as
in planner.py. From them and the bytes that cross the cuts, the schedule of an epoch is gone
through batch by batch.
"""

import argparse
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from configs import InputError
from dataloaders import count_images
from engine.memory import MIB
from models import ContSupNetwork, build_network
from parallel.stages import balanced_ranges, check_count, check_ranges
from parallel.stages import format_range as shown_range
from parallel.transfer import IN_FLIGHT, Link, crossing
from parallel.transfer import FeatureSpec as Kind
from planning.plan import Plan, fake_batch, step_peaks

MB = 10**6


class Speeds(NamedTuple):
    """Assumed: 10^12 FLOPs a second of each device, 10^9 bytes a second of each link."""

    device_tflops: float
    link_gbs: float

    def computing(self, flops: float) -> float:
        """Seconds that a device takes for so many FLOPs."""
        return flops / (self.device_tflops * 1e12)

    def moving(self, nbytes: float) -> float:
        """Seconds that a link takes for so many bytes."""
        return nbytes / (self.link_gbs * 1e9)


@dataclass(frozen=True)
class DevicePlan:
    """One process: its modules by index, and what a full batch takes there.

    `flops_share` is its part of all FLOPs, 1 at most. `peak_bytes` is of a step in the middle of an
    epoch, when as much is on its way as ever.
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
    """So many processes.

    `samples_per_second` is of a whole epoch. The bubble is the part of it in which the slowest
    device, or the slowest link if that is slower, has nothing to do: while the first batch is on
    its way there, and while the last one goes on from there. Below `binding_gbs`, 10^9 bytes a
    second, the slowest link takes longer than the slowest device; None without links.
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

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


# ---------------------------------------------------------------------------------------------
# What is planned for


def processes_asked(
    modules: int, nproc: Sequence[int] | None, ranges: Sequence[range] | None
) -> list[int]:
    """Numbers of processes to plan for: `--nproc`, that of --module_ranges, or powers of 2 and K.

    InputError if they do not fit the number of modules or each other.
    """
    if ranges:
        for processes in nproc or [len(ranges)]:
            check_ranges(ranges, modules, processes)
        return [len(ranges)]
    if not nproc:
        return [2**i for i in range(modules.bit_length()) if 2**i < modules] + [modules]
    check_count(modules, max(nproc))
    return list(dict.fromkeys(nproc))


def plan_processes(
    options: argparse.Namespace, plan: Plan, arguments: dict[str, Any]
) -> ParallelPlan:
    """The plan that the options ask for, of a run whose `plan` in one process this is.

    InputError if numbers of processes or ranges of modules do not fit.
    """
    processes = processes_asked(options.local_module_num, options.nproc, options.module_ranges)
    images = count_images(options.dataset, options.data_dir, options.limit_per_class)
    speeds = Speeds(options.device_tflops or 5, options.link_gbs or 12)
    return make_parallel_plan(
        plan, arguments, options.batch_size, images, processes, speeds, options.module_ranges
    )


def make_parallel_plan(
    plan: Plan,
    arguments: dict[str, Any],
    batch_size: int,
    images: int,
    processes: Sequence[int],
    speeds: Speeds,
    ranges: Sequence[range] | None = None,
) -> ParallelPlan:
    """The plan for each of some numbers of processes.

    Args:
        plan: of the same run in one process.
        arguments: of `build_network`.
        batch_size: samples a step, at least 2.
        images: in an epoch.
        processes: how many there are to be, each time at most as many as modules.
        speeds: assumed of devices and links.
        ranges: modules of each process, instead of those balanced by FLOPs.
    """
    whole, rest = divmod(images, batch_size)
    batches = [1.0] * whole + [rest / batch_size] * bool(rest)
    cuts = crossing(arguments, torch.device("cpu"), channels_last=False)
    flops = [module.train_flops_per_sample for module in plan.modules]
    alone = speeds.computing(sum(flops) * images)
    plans = []
    with FakeTensorMode():
        network, batch = build_network(**arguments), fake_batch(arguments, batch_size)
        for count in processes:
            held = ranges or balanced_ranges(flops, count)
            taken = [take(network, *batch, modules, cuts) for modules in held]
            plans.append(pipeline_plan(held, taken, batch_size, batches, speeds, alone))
    return ParallelPlan(*speeds, batch_size, images, len(batches), plans)


# ---------------------------------------------------------------------------------------------
# What a process takes


class Taken(NamedTuple):
    """By a process for a batch: FLOPs, those before its features leave, and bytes."""

    flops: int
    flops_before_leaving: int
    peak_bytes: int
    bytes_in: int
    bytes_out: int


class Done:
    """A transfer that is over at once."""

    def wait(self) -> None:
        """Nothing to wait for."""


def take(
    network: ContSupNetwork,
    images: Tensor,
    targets: Tensor,
    held: range,
    cuts: Sequence[Sequence[Kind]],
) -> Taken:
    """What the process that has the modules `held` takes, in the middle of an epoch.

    Call it in FakeTensorMode; `cuts` are those of `crossing`.
    """
    samples, device = len(targets), images.device
    incoming = cuts[held.start - 1] if held.start else None
    outgoing = cuts[held.stop - 1] if held.stop <= len(cuts) else None
    counter = FlopCounterMode(display=False)
    left: list[int] = []

    def send(_: Tensor) -> Done:
        left.append(counter.get_total_flops())
        return Done()

    link = Link(device, incoming, lambda _: Done(), outgoing, send)
    network.set_stage(held, link)
    link.begin([samples] * (IN_FLIGHT + 2))  # another one follows the last step here
    with counter:
        step_peaks(network, images, targets)
    with torch.no_grad():
        for _ in range(IN_FLIGHT - 1):  # until as many batches are on their way
            network(images)
    peak, flops = max(step_peaks(network, images, targets)), counter.get_total_flops()
    return Taken(
        flops=flops,
        flops_before_leaving=left[0] if left else flops,
        peak_bytes=peak,
        bytes_in=bytes_of(incoming, samples),
        bytes_out=bytes_of(outgoing, samples),
    )


def bytes_of(kinds: Sequence[Kind] | None, samples: int) -> int:
    """Of all that crosses a cut for so many samples; 0 where there is no cut."""
    return sum(kind.nbytes(samples) for kind in kinds or ())


# ---------------------------------------------------------------------------------------------
# How long it takes


def ends_of_epoch(
    devices: Sequence[tuple[float, float]], links: Sequence[float], batches: Sequence[float]
) -> list[float]:
    """When each device has done its last batch, in seconds from the first one's start.

    A device takes the batches one after the other, each when it has arrived. A batch travels once
    it is ready and the next device has room for it, which it makes when it begins with the batch
    before. With `IN_FLIGHT` batches that have not arrived there, a device waits before it adds
    another one.

    Args:
        devices: seconds of a full batch until its features are ready, and from then on.
        links: seconds of a full batch, from each device to the next.
        batches: sizes, as parts of a full one.
    """
    began, ended = [0.0] * len(devices), [0.0] * len(devices)
    arrivals = [deque([0.0] * IN_FLIGHT, maxlen=IN_FLIGHT) for _ in links]
    for size in batches:
        arrived = 0.0
        for rank, (before, after) in enumerate(devices):
            began[rank] = max(ended[rank], arrived)
            ready = began[rank] + before * size
            if rank < len(links):
                ready = max(ready, arrivals[rank][0])
                has_room = began[rank + 1]  # with the batch before this one
                arrived = max(ready, has_room) + links[rank] * size
                arrivals[rank].append(arrived)
            ended[rank] = ready + after * size
    return ended


def pipeline_plan(
    held: Sequence[range],
    taken: Sequence[Taken],
    batch_size: int,
    batches: Sequence[float],
    speeds: Speeds,
    alone: float,
) -> PipelinePlan:
    """The plan for processes that hold these modules, and take this for a batch.

    Args:
        batches: of an epoch, as parts of a full one.
        alone: seconds that one device takes for an epoch.
    """
    total = sum(t.flops for t in taken)
    devices = [
        DevicePlan(
            rank=rank,
            modules=list(modules),
            train_flops_per_sample=t.flops // batch_size,
            flops_share=t.flops / total,
            step_seconds=speeds.computing(t.flops),
            peak_bytes=t.peak_bytes,
            bytes_in=t.bytes_in,
            bytes_out=t.bytes_out,
        )
        for rank, (modules, t) in enumerate(zip(held, taken, strict=True))
    ]
    computing = [
        (
            speeds.computing(t.flops_before_leaving),
            speeds.computing(t.flops - t.flops_before_leaving),
        )
        for t in taken
    ]
    crossed = [t.bytes_out for t in taken[:-1]]
    moving = [speeds.moving(nbytes) for nbytes in crossed]
    slowest_device = max(device.step_seconds for device in devices)
    seconds = max(ends_of_epoch(computing, moving, batches))
    if not math.isfinite(seconds + alone):
        raise InputError("so few --device_tflops or --link_gbs that an epoch never ends")
    busy = max(slowest_device, *moving, 0.0) * sum(batches)
    bubble = max(0.0, seconds - busy) if crossed else 0.0
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
        largest_link_bytes=max(crossed, default=0),
        bytes_per_step=sum(crossed),
        binding_gbs=max(crossed) / slowest_device / 1e9 if crossed else None,
        devices=devices,
    )


# ---------------------------------------------------------------------------------------------
# What is printed


def print_parallel_plan(plan: ParallelPlan) -> None:
    """What is assumed, a line for each number of processes, and one for each device of a single."""
    print(f"assumed: {plan.device_tflops:g} * 10^12 FLOPs/s a device (--device_tflops), "
          f"{plan.link_gbs:g} GB/s a link (--link_gbs)")  # fmt: skip
    print(f"an epoch: {plan.images:,} images in {plan.steps:,} steps")
    print(f"{'processes':>9} {'samples/s':>10} {'x one':>6} {'bubble s':>9} {'%':>5} "
          f"{'peak MiB':>9} {'of rank':>7} {'MB/link':>8} {'MB in all':>9} "
          f"{'binds below GB/s':>16}")  # fmt: skip
    for p in plan.plans:
        binding = "-" if p.binding_gbs is None else f"{p.binding_gbs:.3g}"
        print(f"{p.processes:9} {readable_rate(p.samples_per_second):>10} {p.speedup:6.2f} "
              f"{p.bubble_seconds:9.3g} {p.bubble_percent:5.1f} {p.peak_bytes / MIB:9,.0f} "
              f"{p.peak_rank:7} {p.largest_link_bytes / MB:8,.1f} {p.bytes_per_step / MB:9,.1f} "
              f"{binding:>16}")  # fmt: skip
    if len(plan.plans) == 1:
        print_devices(plan.plans[0])


def print_devices(plan: PipelinePlan) -> None:
    """A line for each device."""
    print(f"{'rank':>4} {'modules':>9} {'% of FLOPs':>10} {'peak MiB':>9} "
          f"{'MB in':>8} {'MB out':>8}")  # fmt: skip
    for d in plan.devices:
        modules = shown_range(range(d.modules[0], d.modules[-1] + 1))
        print(f"{d.rank:4} {modules:>9} {100 * d.flops_share:10.1f} {d.peak_bytes / MIB:9,.0f} "
              f"{d.bytes_in / MB:8,.1f} {d.bytes_out / MB:8,.1f}")  # fmt: skip


def readable_rate(rate: float) -> str:
    """In whole numbers from 1000 up, else in four digits."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"
