"""What the CPU allocator gives out, counted by hand, and freed memory that stays."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

from engine import memory
from engine.device import ready
from engine.memory import AllocatedBytes, PeakMemory
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network

MIB = 2**20
CPU = torch.device("cpu")
SCRATCH = 1.15
"""How far what operations allocate within may raise a peak."""


def new(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_peak_by_hand():
    with AllocatedBytes() as meter:
        a, b = new(4), new(3)
        del a
        c = new(2)
        del b, c
    assert meter.peak == 7 * MIB


def test_what_is_there_before_counts_once():
    weight = new(8)
    with AllocatedBytes([weight, weight[:5]]) as meter:
        a = new(1)
        del a
        b = new(2)
        del b
    assert meter.peak == 10 * MIB


def test_nothing_allocated_is_what_was_there():
    weight = new(3)
    with AllocatedBytes([weight]) as meter:
        weight.view(3, -1)
    assert meter.peak == 3 * MIB


def test_temporary_tensors_count():
    """A copy as int32, its sorted values and their indices, all at once."""
    x = torch.ones(MIB, dtype=torch.uint8)
    with AllocatedBytes([x]) as meter:
        x.to(torch.int32).sort()
    assert meter.peak >= (1 + 4 + 4 + 8) * MIB


def test_raising_inside_ends_the_count():
    with pytest.raises(KeyError), AllocatedBytes() as meter:
        new(1)
        raise KeyError
    assert meter.peak == MIB
    with AllocatedBytes() as meter:
        new(2)
    assert meter.peak == 2 * MIB


def steps(peak, compiled, count=4):
    """Training steps under PeakMemory; its bytes after each."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = build_network(layers=8, local_module_num=2, context_mode="E")
    ready(network, CPU, channels_last=True, compiled=False)
    if compiled:
        network.compile_steps("aot_eager")
    optimizers = make_optimizers(network)
    images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    targets = torch.randint(10, (32,))
    totals, seen = Totals(network, CPU), []
    for _ in range(count):
        with peak.step(32, lambda: tensors_alive(network, optimizers, images, targets)):
            for _ in train_step(network, optimizers, images, targets, totals):
                pass
        seen.append(peak.bytes)
    return seen


def test_peak_of_steps_by_either_meter():
    """Scratch memory is all that the allocator's has besides, and a compiled step, where the
    backend fuses nothing, keeps what an eager one keeps."""
    compiled, eager, allocated = (PeakMemory(CPU, compiled=c) for c in (True, False, True))
    seen = steps(compiled, compiled=True)
    assert 0 < seen[1] <= seen[2] == seen[3]
    steps(eager, compiled=False)
    steps(allocated, compiled=False)
    assert "allocator" in compiled.how
    assert "allocator" not in eager.how
    assert eager.bytes <= allocated.bytes <= SCRATCH * eager.bytes
    assert compiled.bytes == pytest.approx(eager.bytes, rel=SCRATCH - 1)


FAULTS = """
import resource, sys
import torch
from engine.memory import keep_heap

if sys.argv[1] == "keep":
    print(keep_heap())
def work():
    for _ in range(10):
        torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_kept_heap_is_not_mapped_anew():
    """10 times 40 MiB, which glibc maps each time: 10,240 pages of 4 KiB, or 20 huge ones."""
    faults = {}
    for way in ("keep", "plain"):
        command = [sys.executable, "-c", FAULTS, way]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(memory.__file__).parent, check=True
        )
        *kept, count = done.stdout.split()
        assert kept == (["True"] if way == "keep" else [])
        faults[way] = int(count)
    assert faults["keep"] < 20
    assert faults["plain"] >= 10 * 20


def test_without_mallopt_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_heap() is False
