"""Plans of parallel runs against real steps, and against sums made by hand."""

import argparse
import json
from collections import deque
from unittest import mock

import pytest
import torch
from cli import main
from PIL import Image

from configs import DATASETS
from dataloaders import count_images, load_dataset
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network
from parallel.transfer import IN_FLIGHT, Link, crossing
from planning import pipeline_plan
from planning.pipeline_plan import make_parallel_plan, process_counts
from planning.plan import make_plan
from report.results import read_runs

BATCH = 8
TINY = {"layers": 14, "local_module_num": 4, "image_size": 16, "context_mode": "R0"}
RUNS = [
    {"context_mode": "R0"},
    {"context_mode": "E"},
    {"context_mode": "R2"},
    {"context_mode": "R1E", "h_reconstruct": True, "loss_scale": (1, 1, 1, 1)},
    {"context_mode": "R2E", "recompute": True},
    {"context_mode": "R1E", "momentum_aux": 0.9, "recompute": True},
    {"context_mode": "E", "consistency": 0.5},
]
CLI = (
    "--layers", "8", "--local_module_num", "4", "--dataset", "cifar10", "--batch_size", "16",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--dry_run", "--parallel", "modules",
)  # fmt: skip


def plan_of(arguments, nproc, ranges=None):
    """Return the plan of each number of processes: 100 images, at 10^12 FLOPs a second."""
    options = argparse.Namespace(
        local_module_num=arguments["local_module_num"], nproc=nproc, module_ranges=ranges,
        batch_size=BATCH, device_tflops=1, dataset="folder", data_dir="", limit_per_class=None,
        val_fraction=None,
    )  # fmt: skip
    with mock.patch.object(pipeline_plan, "count_images", return_value=100):
        return make_parallel_plan(options, make_plan(arguments, BATCH), arguments).plans


class Transfer:
    """A tensor that is filled, when it is waited for, with what the process before sent."""

    def __init__(self, tensor=None, sent=None):
        self.tensor, self.sent = tensor, sent

    def wait(self):
        if self.tensor is not None:
            self.tensor.copy_(self.sent.popleft())


def real_peaks(arguments, ranges, steps):
    """Return the peak bytes of each step of each process, all run in this one in turns."""
    device = torch.device("cpu")
    cuts = crossing(arguments, device, channels_last=False)
    traffic = [deque() for _ in ranges]
    processes = []
    for rank, modules in enumerate(ranges):

        def receive(tensor, sent=traffic[rank - 1]):
            return Transfer(tensor, sent)

        def send(tensor, sent=traffic[rank]):
            sent.append(tensor)
            return Transfer()

        incoming = cuts[modules.start - 1] if modules.start else None
        outgoing = cuts[modules.stop - 1] if modules.stop <= len(cuts) else None
        back = [lambda _: Transfer()] * 2
        link = Link(device, incoming, receive, outgoing, send, *back)
        network = build_network(**arguments)
        network.set_stage(modules, link)
        processes.append((network, make_optimizers(network)))
        link.begin([BATCH] * (steps + 1))
    size = arguments["image_size"]
    peaks = [[] for _ in ranges]
    for _ in range(steps):
        images, targets = torch.randn(BATCH, 3, size, size), torch.randint(0, 10, (BATCH,))
        for (network, optimizers), of_steps in zip(processes, peaks, strict=True):
            batch = images.clone(), targets.clone()
            totals = Totals(network, device)
            with LiveBytes(tensors_alive(network, optimizers, *batch)) as meter:
                train_step(network, optimizers, *batch, totals)
            of_steps.append(meter.peak)
    return peaks


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_each_process_takes_what_was_planned(run):
    arguments = TINY | run
    ranges = [range(0, 1), range(1, 3), range(3, 4)]
    (plan,) = plan_of(arguments, None, ranges=ranges)
    peaks = real_peaks(arguments, ranges, steps=IN_FLIGHT + 3)
    for steady in range(IN_FLIGHT, IN_FLIGHT + 3):
        assert [device.peak_bytes for device in plan.devices] == [p[steady] for p in peaks]
    assert peaks[1][0] < peaks[1][IN_FLIGHT - 1] < peaks[1][IN_FLIGHT]
    assert plan.peak_bytes == max(device.peak_bytes for device in plan.devices)
    assert plan.devices[plan.peak_rank].peak_bytes == plan.peak_bytes


@pytest.mark.parametrize(
    ("mode", "sent"),
    [
        ("E", [["h0"], ["h1"], ["h2"]]),
        ("R1", [["h0"], ["h1", "in1"], ["h2", "in2"]]),
        ("R2", [["h0"], ["h1", "in1"], ["h2", "in1", "in2"]]),
        ("R1E", [["h0"], ["h1", "in1"], ["h2", "in2"]]),
    ],
)
@pytest.mark.parametrize(("amp", "width"), [("off", 4), ("bf16", 2)])
def test_bytes_by_hand(mode, sent, amp, width):
    """ResNet-14 of 16x16 images; a module's input is as large as the features it is made of."""
    cuts = [(1, 0), (1, 1), (2, 1)]
    first, second = 16 * 16 * 16 * width, 32 * 8 * 8 * width
    sizes = {"h0": first, "in1": first, "h1": first, "in2": first, "h2": second}
    links = [BATCH * sum(sizes[name] for name in names) for names in sent]
    (plan,) = plan_of(TINY | {"context_mode": mode, "cuts": cuts, "amp": amp}, [4])
    assert [device.bytes_out for device in plan.devices] == [*links, 0]
    assert [device.bytes_in for device in plan.devices] == [0, *links]
    assert plan.largest_link_bytes == max(links)


def test_bytes_of_methods_by_hand():
    """A consistency loss sends 10 probabilities a sample too, momentum heads a block back."""
    plain, sid, man = (
        plan_of(TINY | {"context_mode": "R0"} | more, [4])[0].devices
        for more in ({}, {"consistency": 0.5}, {"momentum_aux": 0.9})
    )
    extra = [a.bytes_out - b.bytes_out for a, b in zip(sid, plain, strict=True)]
    assert extra == [BATCH * 10 * 4] * 3 + [0]
    assert [device.bytes_back for device in sid] == [0] * 4
    # Two 3x3 convs with norms, and with other channels a 1x1 conv with a norm.
    same = 2 * 9 * 16 * 16 + 2 * 2 * 16
    widening = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 3 * 2 * 32
    assert [d.bytes_back for d in man][:3] == [0, 4 * same, 4 * widening]
    assert [d.bytes_out for d in man] == [d.bytes_out for d in plain]


def test_speed_by_hand():
    """100 images in 13 batches; test_planner.py has the FLOPs of modules by hand."""
    arguments = TINY | {"context_mode": "R1E"}
    flops = [module.train_flops_per_sample for module in make_plan(arguments, BATCH).modules]
    one, four = plan_of(arguments, [1, 4])
    (three,) = plan_of(arguments, None, ranges=[range(0, 1), range(1, 3), range(3, 4)])
    for plan, own in (
        (one, [sum(flops)]),
        (four, flops),
        (three, [flops[0], sum(flops[1:3]), flops[3]]),
    ):
        P, step = len(own), BATCH * max(own) / 1e12
        assert [device.train_flops_per_sample for device in plan.devices] == own
        assert [i for device in plan.devices for i in device.modules] == [0, 1, 2, 3]
        assert plan.samples_per_second == pytest.approx(100 / ((13 + P - 1) * step))
        assert plan.speedup == pytest.approx(sum(own) * 13 / (max(own) * (13 + P - 1)))
        assert plan.bubble_percent == pytest.approx(100 * (P - 1) / (13 + P - 1))
        assert plan.binding_gbs == pytest.approx(plan.largest_link_bytes / step / 1e9)
    assert (one.speedup, one.bubble_percent, one.binding_gbs) == (1, 0, 0)


def test_training_images_are_those_that_are_loaded(tmp_path):
    for limit in (None, 3, 143, 10**6):
        data = load_dataset("digits", "nowhere", 32, limit)
        assert count_images("digits", "nowhere", limit) == len(data.train.targets)
    for name, count in (("a", 3), ("b", 5)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    assert [count_images("folder", tmp_path, limit) for limit in (None, 4)] == [8, 7]
    for fraction in (0.15, 0.25, 0.33):
        data = load_dataset("digits", "nowhere", 32, 7, val_fraction=fraction)
        assert count_images("digits", "nowhere", 7, fraction) == len(data.train.targets)


def test_training_images_of_the_published_data_sets():
    counts = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "stl10": 5_000}
    for name, count in counts.items():
        assert count_images(name, "nowhere") == count
        assert len(DATASETS[name].per_class) == DATASETS[name].classes
    assert count_images("cifar100", "nowhere", 7) == 700
    assert count_images("svhn", "nowhere", 5_000) == 10 * 5_000 - 52 - 341


def test_numbers_of_processes():
    assert process_counts(1, None, None) == [1]
    assert process_counts(6, None, None) == [1, 2, 4, 6]
    assert process_counts(8, None, []) == [1, 2, 4, 8]
    assert process_counts(8, [5, 2, 5], None) == [5, 2]
    assert process_counts(8, None, [range(3), range(3, 8)]) == [2]


def test_json_has_the_ordinary_plan_and_the_parallel_one(monkeypatch, capsys):
    _, (plain,), _ = main(monkeypatch, capsys, *CLI[:-2], "--json")
    status, (line,), err = main(monkeypatch, capsys, *CLI, "--json")
    assert (status, err) == (0, [])
    plan = json.loads(line)
    parallel = plan.pop("parallel")
    assert plan == json.loads(plain)
    plans = parallel.pop("plans")
    assert parallel == {"device_tflops": 5, "images": 50_000, "steps": 3125}
    assert [p["processes"] for p in plans] == [1, 2, 4]
    assert plans[0]["peak_bytes"] == plan["peak_bytes"]
    assert plans[1].keys() == {
        "processes", "samples_per_second", "speedup", "bubble_percent", "peak_bytes", "peak_rank",
        "largest_link_bytes", "binding_gbs", "devices",
    }  # fmt: skip
    assert plans[1]["devices"][0].keys() == {
        "modules", "train_flops_per_sample", "peak_bytes", "bytes_in", "bytes_out", "bytes_back",
    }  # fmt: skip


def test_the_table(monkeypatch, capsys):
    few = ("--device_tflops", "0.25", "--limit_per_class", "20")
    status, out, err = main(monkeypatch, capsys, *CLI, *few)
    assert (status, err) == (0, [])
    assert out[1] == "assumed: 0.25 * 10^12 FLOPs/s a device (--device_tflops)"
    assert out[2] == "an epoch: 200 images in 13 steps"
    assert [line.split()[0] for line in out[3:]] == ["processes", "1", "2", "4"]
    _, out, _ = main(monkeypatch, capsys, *CLI, "--nproc", "2", "--module_ranges", "0", "1-3")
    assert [line.split()[:2] for line in out[5:]] == [["rank", "modules"], ["0", "0"], ["1", "1-3"]]
    assert sum(float(line.split()[2]) for line in out[6:]) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--nproc", "5"], "5 processes for 4 modules"),
        (["--nproc", "0"], "--nproc"),
        (["--nproc", "2", "3", "--module_ranges", "0-1", "2-3"], "2 ranges for 3 processes"),
        (["--module_ranges", "0-1", "3"], "should begin with module 2"),
        (["--module_ranges", "0-1", "2"], "ends with module 2"),
        (["--device_tflops", "0"], "--device_tflops"),
        (["--device_tflop", "1"], "did you mean --device_tflops?"),
    ],
)
def test_what_does_not_fit_is_one_line(monkeypatch, capsys, options, why):
    status, out, err = main(monkeypatch, capsys, *CLI, *options)
    assert (status, out, len(err)) == (2, [], 1)
    assert why in err[0]


def test_a_plan_that_is_kept_can_be_read_and_be_added_to(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    keep = ("--save_plan", "--output_dir", "kept")
    assert main(monkeypatch, capsys, *CLI[:-2], *keep)[0] == 0
    assert main(monkeypatch, capsys, *CLI, *keep)[0] == 0
    kept = json.loads((tmp_path / "kept" / "plan.json").read_text())
    assert [p["processes"] for p in kept["parallel"]["plans"]] == [1, 2, 4]
    runs, notes = read_runs([tmp_path])
    assert ([*runs.is_plan], notes) == ([True], [])
    assert main(monkeypatch, capsys, *CLI[:-2], *keep)[1] == ["kept/plan.json is there already"]
