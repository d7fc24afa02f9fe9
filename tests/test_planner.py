"""What is planned against what is metered on real steps, and that against the allocator."""

import json
from pathlib import Path

import pytest
import torch
from cli import main
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import LocalModule, build_network
from planning import dry_run, equal_flops
from planning.plan import make_plan, step_peaks

BATCH = 32
TINY = {"layers": 14, "local_module_num": 4, "image_size": 16, "context_mode": "R0"}
RUNS = [
    *({"context_mode": mode} for mode in ("R0", "R1", "R3", "E", "R1E", "R2E")),
    {"context_mode": "R1E", "context_group": 0},
    {"context_mode": "R1E", "context_group": 5},
    {"context_mode": "E", "recompute": True},
    {"context_mode": "R1", "recompute": True, "droprate": 0.1},
    {"context_mode": "E", "local_loss_mode": "contrast"},
    {"context_mode": "R1E", "h_reconstruct": True, "loss_scale": (1, 1, 1, 1)},
    {"local_module_num": 1},
]


def real_batch():
    return torch.randn(BATCH, 3, 16, 16), torch.randint(0, 10, (BATCH,))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_real_step_takes_what_was_planned(run):
    """Module by module."""
    peaks = step_peaks(build_network(**TINY | run), *real_batch())
    plan = make_plan(TINY | run, BATCH)
    assert [m.peak_bytes for m in plan.modules] == pytest.approx(peaks, rel=0.01)
    assert plan.peak_bytes == max(m.peak_bytes for m in plan.modules)
    assert plan.modules[plan.peak_module].peak_bytes == plan.peak_bytes


def check_against_the_allocator(arguments):
    """The meter's peak is the allocator's, seen wherever an operation ends; to 1 %."""
    network = build_network(**arguments)
    optimizers = make_optimizers(network)
    totals = Totals(network, torch.device("cpu"))
    images, targets = real_batch()

    def step():
        train_step(network, optimizers, images, targets, totals)

    step()
    alive = tensors_alive(network, optimizers, images, targets)
    with LiveBytes(alive) as meter:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocated = allocated_peak(profiler.profiler.kineto_results.events())
    assert meter.peak == pytest.approx(allocated + sum(t.nbytes for t in alive), rel=0.01)


def allocated_peak(events):
    """Return the most bytes that the CPU allocator has given out, beyond those at the start.

    Read at the end of every operation that is in no other one, so that scratch memory inside an
    operation is left out.
    """
    operations = sorted((e.start_ns(), e.end_ns()) for e in events if e.name().startswith("aten::"))
    ends = []
    for start, end in operations:
        if not ends or start >= ends[-1]:
            ends.append(end)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for end in ends:
        while changes and changes[0][0] <= end:
            live += changes.pop(0)[1]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("run", [RUNS[0], RUNS[4], RUNS[6], RUNS[9]], ids=str)
def test_the_meter_counts_what_the_allocator_gives(run):
    check_against_the_allocator(TINY | run)


def test_an_allocation_that_the_meter_does_not_see_is_found(monkeypatch):
    plain = LocalModule.forward

    def forward(self, h_in):
        with _disable_current_modes():
            self.hidden = torch.empty(2**17)  # 512 KiB of some 7 MiB
        return plain(self, h_in)

    monkeypatch.setattr(LocalModule, "forward", forward)
    with pytest.raises(AssertionError):
        check_against_the_allocator(TINY)


def test_flops_by_hand():
    """ResNet-8 of 8x8 images, K=2, image as context, head 0c1f; 2 FLOPs a multiply-add."""
    arguments = {
        "layers": 8, "local_module_num": 2, "image_size": 8, "context_mode": "E",
        "aux_net_config": "0c1f", "cuts": [(1, 0)],
    }  # fmt: skip
    stem = 2 * 64 * 9 * 3 * 16
    first = 2 * 64 * 9 * (16 * 16 + 16 * 16)
    second = 2 * 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 2 * 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    encoder_1, encoder_2 = 2 * 64 * 9 * 3 * 12, 2 * 64 * 9 * 12 * 16
    head_1, head_2 = 2 * 16 * 10, 2 * 64 * 10

    plan = make_plan(arguments, 4)
    assert plan.inference_flops_per_sample == {
        "backbone": stem + first + second + third + head_2,
        "context": encoder_1 + encoder_2,
    }
    # Forward and two gradients of the same size; images need none, and the encoder's features are
    # made twice.
    assert [m.train_flops_per_sample for m in plan.modules] == [
        2 * stem + 3 * (first + head_1),
        3 * (second + third + head_2) + 3 * encoder_1 + 4 * encoder_2,
    ]


@pytest.mark.parametrize(
    ("K", "widths", "layers"),
    [(2, [32], 38), (4, [16, 32, 64], 38), (8, [16] * 3 + [32] * 2 + [64] * 2, 50),
     (16, [16] * 6 + [32] * 5 + [64] * 4, 62)],
)  # fmt: skip
def test_the_depth_with_equal_flops_by_hand(capsys, K, widths, layers):
    """`widths` are those of the features that have an encoder, on 32x32 images."""
    block, encoder = 2 * 1024 * 2 * 9 * 16 * 16, 2 * 1024 * 9 * 12

    def backbone(n):  # a block that halves the image has half of one conv, and a shortcut
        stem, linear, shortcut = 2 * 1024 * 9 * 3 * 16, 2 * 64 * 10, 2 * 256 * 16 * 32
        return stem + linear + 3 * n * block - 2 * block // 4 + 2 * shortcut

    wanted = backbone(5) + sum(encoder * (3 + width) for width in widths)
    n = layers // 6
    assert backbone(n - 1) < wanted <= backbone(n)
    equal_flops.main(f"--layers 32 --local_module_num {K} --context_mode E".split())
    assert capsys.readouterr().out == f"{layers}\n"


def test_end_to_end_is_the_plan_of_one_module():
    one = make_plan(TINY | {"local_module_num": 1}, BATCH)
    assert one.peak_bytes == one.end_to_end_peak_bytes
    for run in (RUNS[4], RUNS[8], RUNS[11]):
        assert make_plan(TINY | run, BATCH).end_to_end_peak_bytes == one.peak_bytes


def test_a_plan_allocates_nothing():
    """A step of this run takes some 9 TB."""
    plan = make_plan({"layers": 20, "local_module_num": 2, "image_size": 32}, 2**22)
    assert plan.peak_bytes > 2**42


def test_json_has_what_was_promised(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = main(
        monkeypatch, capsys, "--dataset", "cifar10", "--layers", "8", "--local_module_num", "3",
        "--context_mode", "E", "--batch_size", "64",
        "--local_loss_mode", "cross_entropy", "--dry_run", "--json",
    )  # fmt: skip
    assert (status, len(out), err) == (0, 1, [])
    plan = json.loads(out[0])
    assert plan.keys() == {
        "peak_bytes", "peak_module", "end_to_end_peak_bytes", "modules", "parameters",
        "inference_flops_per_sample",
    }  # fmt: skip
    assert [m["index"] for m in plan["modules"]] == [0, 1, 2]
    assert [m["units"] for m in plan["modules"]] == [[[0, 0]], [[1, 0]], [[2, 0], [3, 0]]]
    network = build_network(layers=8, local_module_num=3, context_mode="E")
    assert plan["parameters"] == network.parameter_counts()
    assert [m["parameters"] for m in plan["modules"]] == [
        sum(p.numel() for p in module.parameters()) for module in network.local_modules
    ]
    assert not list(Path().iterdir())


def test_the_table_names_the_module_that_sets_the_peak(monkeypatch, capsys):
    """A plan for CUDA needs no CUDA."""
    arguments = ["--layers", "8", "--local_module_num", "2", "--dry_run", "--device", "cuda:7"]
    status, out, _ = main(monkeypatch, capsys, *arguments)
    assert status == 0
    (marked,) = (line for line in out if "sets the peak" in line)
    total = next(line for line in out if line.startswith("peak "))
    assert f"set by module {marked.split()[0]}" in total
    assert sum(line.startswith("inference FLOPs/sample: ") for line in out) == 1


def test_a_budget_above_what_the_device_has_free_is_noted(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**29 if index else 2**28, 0))
    for device, free in [("cuda:1", 512), ("cuda", 256), ("auto", 256), ("cpu", 0), ("cuda:2", 0)]:
        dry_run._note_if_above_free(2**30, device)
        assert (f"is above the {free} MiB" in capsys.readouterr().err) == bool(free)
    dry_run._note_if_above_free(2**29, "cuda:1")
    assert not capsys.readouterr().err
