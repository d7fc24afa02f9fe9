"""The memory meters against counts by hand, and freed memory that stays in the process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from engine import memory
from engine.device import move_to_device
from engine.memory import AllocatedBytes, LiveBytes, PeakMemory
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network

KIB, MIB = 2**10, 2**20
CPU = torch.device("cpu")


def new(size):
    return torch.empty(size, dtype=torch.uint8)


def test_a_storage_counts_once_from_its_making_until_it_is_freed():
    weight = new(8)
    with LiveBytes([weight, weight[:1]]) as meter:
        a, b = new(4), new(3)
        assert meter.live == meter.peak == 8 + 7
        del a
        view = weight.view(2, -1)[1]
        view += 1
        c = view.clone()  # of 4
        assert (meter.live, meter.peak) == (8 + 3 + 4, 8 + 7)
        del b, c, view
    assert (meter.live, meter.peak) == (8, 8 + 7)


def test_counts_what_autograd_saves_until_backward_frees_it():
    x = torch.zeros(256, requires_grad=True)  # 1 KiB
    with LiveBytes([x]) as meter:
        y = x.exp()  # saved for the backward
        z = y.sin()  # saves y
        del y
        assert meter.live == 3 * KIB
        loss = z.sum()
        del z
        assert meter.live == 2 * KIB + 4
        loss.backward()
        assert meter.live == 2 * KIB + 4  # x, its gradient, the loss; y is gone
    assert meter.peak >= 3 * KIB + 4


def test_counts_temporary_tensors_inside_the_backward():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    features, weights = x.untyped_storage().nbytes(), weight.untyped_storage().nbytes()
    with LiveBytes([x, weight]) as meter:
        out = F.conv2d(x, weight, padding=1).relu()  # the conv's output dies: relu saves its own
        assert meter.live == 2 * features + weights
        out.sum().backward()
    # Before, with the loss and its gradient; then the gradients of the relu, of x and of weight.
    assert meter.peak == (2 * features + weights) + 2 * 4 + (2 * features + weights)


def test_the_allocator_counts_by_hand():
    weight = new(8 * MIB)
    with AllocatedBytes([weight, weight[:5]]) as meter:  # known ones count once
        a, b = new(4 * MIB), new(3 * MIB)
        del a
        c = new(2 * MIB)
        del b, c
    assert meter.peak == (8 + 7) * MIB
    with AllocatedBytes([weight]) as meter:
        weight.view(8, -1)
    assert meter.peak == 8 * MIB
    x = torch.ones(MIB, dtype=torch.uint8)
    with AllocatedBytes([x]) as meter:
        x.to(torch.int32).sort()  # a copy as int32, its sorted values and their indices
    assert meter.peak >= (1 + 4 + 4 + 8) * MIB


def test_peak_of_a_run_is_the_highest_of_the_first_two_full_steps():
    for first, second in ((5, 7), (7, 5)):
        peak = PeakMemory(CPU)
        for samples, size in [(4, 1), (8, first), (8, second), (8, 100), (4, 100)]:
            with peak.step(samples, list):
                new(size)
        assert peak.bytes == 7
    assert "live tensor" in peak.how
    with peak.step(9, lambda: [new(30)]):  # what is alive before the step counts
        pass
    assert peak.bytes == 30


def test_weights_statistics_momentum_and_batch_are_alive_before_a_step():
    network = build_network(layers=8, local_module_num=2, context_mode="E")
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    alive = tensors_alive(network, make_optimizers(network), *batch)
    weights = sum(network.parameter_counts().values())
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    statistics = sum(2 * 4 * m.num_features + 8 for m in norms)
    assert sum(t.nbytes for t in alive) == 2 * 4 * weights + statistics + 4 * 2 * 3 * 1024 + 2 * 8


def test_a_meter_continues_from_its_state():
    """Of steps of the same kind; compiled ones are watched again until all three have been."""
    state = {"bytes": 123, "largest": 4, "steps": 2, "how": PeakMemory(CPU).how}
    meter = PeakMemory(CPU)
    meter.load(state)
    assert meter.state() == state
    meter.load(state | {"bytes": 9, "how": "another"})
    assert meter.bytes == 123
    for steps, peak in ((2, 0), (3, 123)):
        compiled = PeakMemory(CPU, compiled=True)
        compiled.load(state | {"how": compiled.how, "steps": steps})
        assert compiled.bytes == peak
    with pytest.raises(ValueError, match="no number of bytes"):
        meter.load(state | {"bytes": "many"})


def steps(peak, compiled, count=4):
    """Train for some steps under PeakMemory; return its bytes after each."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = build_network(layers=8, local_module_num=2, context_mode="E")
    move_to_device(network, CPU, channels_last=True, compiled=False)
    if compiled:
        network.compile_steps("aot_eager")
    optimizers = make_optimizers(network)
    images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    targets, totals, seen = torch.randint(10, (32,)), Totals(network, CPU), []
    for _ in range(count):
        with peak.step(32, lambda: tensors_alive(network, optimizers, images, targets)):
            train_step(network, optimizers, images, targets, totals)
        seen.append(peak.bytes)
    return seen


def test_both_meters_see_the_same_steps():
    """The allocator's has the scratch memory of operations besides."""
    eager, allocated = PeakMemory(CPU), PeakMemory(CPU, compiled=True)
    steps(eager, compiled=False)
    steps(allocated, compiled=False)
    assert "allocator" in allocated.how
    assert eager.bytes <= allocated.bytes <= 1.15 * eager.bytes


@pytest.mark.slow
def test_a_compiled_step_keeps_what_an_eager_one_keeps():
    """Where the backend fuses nothing; memory of the compilation does not count."""
    compiled, eager = PeakMemory(CPU, compiled=True), PeakMemory(CPU)
    seen = steps(compiled, compiled=True)
    steps(eager, compiled=False)
    assert 0 < seen[1] <= seen[2] == seen[3]
    assert compiled.bytes == pytest.approx(eager.bytes, rel=0.15)


FAULTS = """
import resource
import torch
from engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_kept_heap_is_not_mapped_again():
    """10 times 40 MiB are 102,400 pages of 4 KiB, or 200 huge ones, which glibc maps each time."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
        cwd=Path(memory.__file__).parent.parent,
    )  # fmt: skip
    plain, can_keep, _, kept = done.stdout.split()
    assert can_keep == "True"
    assert int(plain) >= 10 * 20 > 20 > int(kept)


def test_without_mallopt_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
