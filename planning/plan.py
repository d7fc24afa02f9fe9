"""What a training step would take, found without training: one step on tensors without data.

Under FakeTensorMode an operation returns tensors of the right shape and storage size, and neither
allocates nor computes anything. The memory meter then counts what it would count on a real step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs import Cut
from engine.console import MIB, readable
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import ContSupNetwork, LocalModule, build_network
from models.torch_internals import FakeTensorMode

END_TO_END = {
    "local_module_num": 1,
    "context_mode": "R0",
    "cuts": None,
    "balanced_memory": False,
    "h_reconstruct": False,
    "loss_scale": None,
    "recompute": False,
    "train_modules": None,
    "aux_net_config": "1c2f",
    "momentum_aux": None,
    "momentum_aux_mix": None,
    "overlap": 0,
    "consistency": None,
    "patch_decoder": False,
    "loss_scale_rule": "module",
}
"""Arguments of `build_network` that turn any run into plain end-to-end training."""


@dataclass(frozen=True)
class ModulePlan:
    """One local module: FLOPs of its forward and backward, and the peak while it trains."""

    index: int
    units: list[Cut]
    parameters: int
    train_flops_per_sample: int
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `--dry_run --json` prints.

    A FLOP is a multiplication or an addition in a convolution or a matrix product. What the
    backward computes again counts.
    """

    peak_bytes: int
    peak_module: int
    end_to_end_peak_bytes: int
    modules: list[ModulePlan]
    parameters: dict[str, int]
    inference_flops_per_sample: dict[str, int]


def make_plan(arguments: dict[str, Any], batch_size: int) -> Plan:
    """Return the plan of a run in one process.

    Args:
        arguments: of `build_network`.
        batch_size: samples a step, at least 2.
    Raises:
        InputError: as `build_network` does.
    """
    with FakeTensorMode():
        network = build_network(**arguments)
        batch = fake_batch(arguments, batch_size)
        flops, peaks = step_flops(network, *batch), step_peaks(network, *batch)
        inference = inference_flops(network, batch[0][:1])
        (end_to_end,) = step_peaks(build_network(**arguments | END_TO_END), *batch)
    modules = [
        ModulePlan(
            index=module.index,
            units=module.unit_names,
            parameters=sum(p.numel() for p in module.parameters()),
            train_flops_per_sample=module_flops // batch_size,
            peak_bytes=peak,
        )
        for module, module_flops, peak in zip(network.local_modules, flops, peaks, strict=True)
    ]
    return Plan(
        peak_bytes=max(peaks),
        peak_module=peaks.index(max(peaks)),
        end_to_end_peak_bytes=end_to_end,
        modules=modules,
        parameters=network.parameter_counts(),
        inference_flops_per_sample=inference,
    )


def planned_peak(arguments: dict[str, Any], batch_size: int) -> int:
    """Return the peak bytes of `make_plan`, for the same arguments and errors."""
    with FakeTensorMode():
        return max(step_peaks(build_network(**arguments), *fake_batch(arguments, batch_size)))


def accuracy_of_plan(planned: int, measured: int) -> str:
    """Return a line that compares a planned peak with a measured one, in bytes."""
    return (f"planned peak {readable(planned)}, measured {readable(measured)}: accuracy "
            f"{planned / measured:.3f} (planned / measured)")  # fmt: skip


def end_to_end_peaks(arguments: dict[str, Any], batch_size: int) -> tuple[int, int]:
    """Return the peak bytes of end-to-end training, without and with `recompute`.

    Arguments and errors are those of `make_plan`.
    """
    with FakeTensorMode():
        batch = fake_batch(arguments, batch_size)
        plain, recomputed = (
            step_peaks(build_network(**arguments | END_TO_END | {"recompute": again}), *batch)[0]
            for again in (False, True)
        )
    return plain, recomputed


def fake_batch(arguments: dict[str, Any], batch_size: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, S, S) and targets (N,) of a run; call it in FakeTensorMode."""
    size = arguments["image_size"]
    return torch.empty(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)


def step_flops(network: ContSupNetwork, images: Tensor, targets: Tensor) -> list[int]:
    """Return the FLOPs of each module of the stage in a training step."""
    optimizers, totals, flops = make_optimizers(network), Totals(network, images.device), []
    with FlopCounterMode(display=False) as counter:
        train_step(
            network, optimizers, images, targets, totals,
            after_module=lambda _: flops.append(counter.get_total_flops() - sum(flops)),
        )  # fmt: skip
    return flops


def step_peaks(network: ContSupNetwork, images: Tensor, targets: Tensor) -> list[int]:
    """Return the peak bytes of a training step while each module of the stage trains."""
    optimizers, totals, peaks = make_optimizers(network), Totals(network, images.device), []
    with LiveBytes(tensors_alive(network, optimizers, images, targets)) as meter:

        def after_module(_: LocalModule) -> None:
            peaks.append(meter.peak)
            meter.peak = meter.live

        train_step(network, optimizers, images, targets, totals, after_module=after_module)
    return peaks


@torch.no_grad()
def inference_flops(network: ContSupNetwork, image: Tensor) -> dict[str, int]:
    """Return the FLOPs of `network(image)`, image (1, 3, H, W): `backbone` and `context`."""
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(image)
    by_module = counter.get_flop_counts()
    context = sum(
        sum(counts.values()) for name, counts in by_module.items() if name.endswith(".context")
    )
    return {"backbone": counter.get_total_flops() - context, "context": context}


def print_plan(plan: Plan) -> None:
    """Print a table of the modules, then the totals."""
    print(f"{'module':>6}  {'units [stage, block]':20} {'parameters':>12} "
          f"{'training FLOPs/sample':>22} {'peak MiB':>10}")  # fmt: skip
    for m in plan.modules:
        first, last = list(m.units[0]), list(m.units[-1])
        units = f"{first}" if first == last else f"{first} to {last}"
        mark = "  sets the peak" if m.index == plan.peak_module else ""
        print(f"{m.index:6}  {units:20} {m.parameters:12,} {m.train_flops_per_sample:22,} "
              f"{m.peak_bytes / MIB:10,.0f}{mark}")  # fmt: skip
    ratio = plan.end_to_end_peak_bytes / plan.peak_bytes
    print(f"peak {readable(plan.peak_bytes)}, set by module {plan.peak_module}; "
          f"end to end {readable(plan.end_to_end_peak_bytes)}, {ratio:.2f} times that")  # fmt: skip
    print("parameters:", ", ".join(f"{name} {n:,}" for name, n in plan.parameters.items()))
    flops = plan.inference_flops_per_sample
    print(f"inference FLOPs/sample: backbone {flops['backbone']:,}, context {flops['context']:,} "
          f"({100 * flops['context'] / flops['backbone']:.0f} % more), "
          "auxiliary 0 (dropped)")  # fmt: skip
