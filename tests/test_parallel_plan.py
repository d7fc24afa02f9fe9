"""Plans of parallel runs against real steps, closed formulas and schedules made by hand."""

import argparse
import json
from collections import deque
from unittest import mock

import pytest
import torch
from cli import main
from PIL import Image

from configs import DATASETS, InputError
from dataloaders import count_images, load_dataset
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network
from parallel.transfer import IN_FLIGHT, Link, crossing
from planning import pipeline_plan
from planning.pipeline_plan import finish_times, make_parallel_plan, process_counts
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
]
CLI = (
    "--layers", "8", "--local_module_num", "4", "--dataset", "cifar10", "--batch_size", "16",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--dry_run", "--parallel", "modules",
)  # fmt: skip


def plan_of(arguments, nproc, tflops=1, gbs=1, ranges=None, batch_size=BATCH, images=100):
    """Return make_parallel_plan's for each number of processes."""
    options = argparse.Namespace(
        local_module_num=arguments["local_module_num"], nproc=nproc, module_ranges=ranges,
        batch_size=batch_size, device_tflops=tflops, link_gbs=gbs,
        dataset="folder", data_dir="", limit_per_class=None,
    )  # fmt: skip
    with mock.patch.object(pipeline_plan, "count_images", return_value=images):
        return make_parallel_plan(options, make_plan(arguments, batch_size), arguments).plans


# ---------------------------------------------------------------------------------------------
# Memory


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
        link = Link(device, incoming, receive, outgoing, send)
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


@pytest.mark.parametrize("run", RUNS[2:4], ids=str)
def test_one_process_is_the_ordinary_plan(run):
    (alone,) = plan_of(TINY | run, [1])
    assert alone.peak_bytes == make_plan(TINY | run, BATCH).peak_bytes
    assert alone.speedup == pytest.approx(1)
    assert (alone.bubble_seconds, alone.bubble_percent, alone.binding_gbs) == (0, 0, None)
    assert (alone.largest_link_bytes, alone.bytes_per_step) == (0, 0)


# ---------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize(
    ("mode", "sent"),
    [
        ("R0", [["h0"], ["h1"], ["h2"]]),
        ("E", [["h0"], ["h1"], ["h2"]]),
        ("R1", [["h0"], ["h1", "in1"], ["h2", "in2"]]),
        ("R2", [["h0"], ["h1", "in1"], ["h2", "in1", "in2"]]),
        ("R1E", [["h0"], ["h1", "in1"], ["h2", "in2"]]),
    ],
)
def test_bytes_by_hand(mode, sent):
    """ResNet-14 of 16x16 images in float32; a module's input is as large as what it is made of."""
    cuts = [(1, 0), (1, 1), (2, 1)]
    first, second = 16 * 16 * 16 * 4, 32 * 8 * 8 * 4
    sizes = {"h0": first, "in1": first, "h1": first, "in2": first, "h2": second}
    links = [BATCH * sum(sizes[name] for name in names) for names in sent]
    (plan,) = plan_of(TINY | {"context_mode": mode, "cuts": cuts}, [4])
    assert [device.bytes_out for device in plan.devices] == [*links, 0]
    assert [device.bytes_in for device in plan.devices] == [0, *links]
    assert (plan.largest_link_bytes, plan.bytes_per_step) == (max(links), sum(links))


def test_bfloat16_features_are_half_as_large():
    wide, narrow = (plan_of(TINY | {"amp": amp}, [4])[0] for amp in ("off", "bf16"))
    assert 2 * narrow.bytes_per_step == wide.bytes_per_step


# ---------------------------------------------------------------------------------------------
# Time


def test_schedule_by_hand():
    """The first device is done with batch 4 after 9 s, and waits for batch 2 to arrive.

    The second begins with the batches at 2, 10, 18, 26 and 34 s, and has room for the next then.
    """
    devices, links = [(1, 1), (4, 4)], [1]
    assert finish_times(devices, links, [1] * 5) == [12, 42]
    assert finish_times(devices, links, [1, 1, 1, 1, 0.5]) == [11.5, 38]


def test_schedule_by_hand_where_the_link_is_slowest():
    assert finish_times([(1, 1), (2, 0)], [5], [1] * 3) == [7, 18]
    assert finish_times([(1, 1), (2, 0)], [5], [1] * 4) == [12, 23]


def test_the_end_of_a_device_before_may_be_the_last():
    assert finish_times([(1, 9), (2, 0)], [0], [1] * 3) == [30, 23]


def test_features_that_leave_at_the_end():
    """Then devices and links are machines in a row, and equal batches the pieces of a flow shop."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        P, steps = torch.randint(1, 9, (2,), generator=draw).tolist()
        times = torch.randint(1, 20, (2 * P - 1,), generator=draw).tolist()
        ends = finish_times([(t, 0) for t in times[::2]], times[1::2], [1] * steps)
        assert max(ends) == sum(times) + (steps - 1) * max(times)


def test_seconds_by_hand():
    """The net of test_flops_by_hand in test_planner.py, without context, in batches of 4, 4, 2."""
    arguments = {
        "layers": 8, "local_module_num": 2, "image_size": 8, "context_mode": "R0",
        "aux_net_config": "0c1f", "cuts": [(1, 0)],
    }  # fmt: skip
    stem, unit = 2 * 64 * 9 * 3 * 16, 2 * 64 * 9 * (16 * 16 + 16 * 16)
    second = 2 * 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 2 * 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    ready = 4 * (stem + unit + 2 * 16 * 10) / 1e12
    first_step = ready + 4 * (stem + 2 * (unit + 2 * 16 * 10)) / 1e12
    enters = 2 * 16 * (9 * 16 * 32 + 16 * 32)  # what needs no gradient of its input
    second_step = 4 * (3 * (second + third + 2 * 64 * 10) - enters) / 1e12
    moved = 4 * 16 * 8 * 8 * 4

    (plan,) = plan_of(arguments, [2], 1, 100, batch_size=4, images=10)
    assert second_step > first_step
    full = 2.5 * second_step
    epoch = ready + moved / 100e9 + full
    assert plan.epoch_seconds == pytest.approx(epoch)
    assert plan.samples_per_second == pytest.approx(10 / epoch)
    assert plan.speedup == pytest.approx(2.5 * (first_step + second_step) / epoch)
    assert plan.bubble_seconds == pytest.approx(epoch - full)
    assert plan.bubble_percent == pytest.approx(100 * (epoch - full) / epoch)
    assert plan.binding_gbs == pytest.approx(moved / second_step / 1e9)
    assert [d.step_seconds for d in plan.devices] == pytest.approx([first_step, second_step])

    (plan,) = plan_of(arguments, [2], 1, 0.1, batch_size=4, images=10)
    assert moved / 0.1e9 > second_step
    assert plan.epoch_seconds == pytest.approx(ready + 2.5 * moved / 0.1e9 + second_step / 2)
    assert plan.bubble_seconds == pytest.approx(ready + second_step / 2)


def test_where_communication_binds():
    """A step in the middle of an epoch takes twice as long where half as much travels a second."""

    def step(gbs):
        long, longer = (
            plan_of(TINY, [4], 2, gbs, images=images)[0].epoch_seconds
            for images in (BATCH * 100, BATCH * 101)
        )
        return longer - long

    (plan,) = plan_of(TINY, [4], 2)
    slowest = max(device.step_seconds for device in plan.devices)
    for gbs, expected in ((1.01, 1), (0.5, 2)):
        assert step(gbs * plan.binding_gbs) == pytest.approx(expected * slowest)


def test_flops_of_the_processes_are_those_of_their_modules():
    arguments = TINY | {"context_mode": "R1E"}
    flops = [module.train_flops_per_sample for module in make_plan(arguments, BATCH).modules]
    for plan in plan_of(arguments, [1, 2, 4]):
        for device in plan.devices:
            assert device.train_flops_per_sample == sum(flops[i] for i in device.modules)
            assert device.flops_share == device.train_flops_per_sample / sum(flops)
        assert [i for device in plan.devices for i in device.modules] == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------
# How many images


def test_training_images_are_those_that_are_loaded():
    for limit in (None, 3, 143, 10**6):
        data = load_dataset("digits", "nowhere", 32, limit)
        assert count_images("digits", "nowhere", limit) == len(data.train.targets)


def test_training_images_of_the_published_data_sets():
    counts = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "stl10": 5_000}
    for name, count in counts.items():
        assert count_images(name, "nowhere") == count
        assert len(DATASETS[name].per_class) == DATASETS[name].classes
    assert count_images("cifar100", "nowhere", 7) == 700
    assert count_images("svhn", "nowhere", 5_000) == 10 * 5_000 - 52 - 341


def test_images_of_ones_own_are_counted_by_name(tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    assert count_images("folder", tmp_path) == 8
    assert count_images("folder", tmp_path, 4) == 7


# ---------------------------------------------------------------------------------------------
# The command


def test_numbers_of_processes():
    assert process_counts(1, None, None) == [1]
    assert process_counts(6, None, None) == [1, 2, 4, 6]
    assert process_counts(8, None, []) == [1, 2, 4, 8]
    assert process_counts(8, [5, 2, 5], None) == [5, 2]
    assert process_counts(8, None, [range(3), range(3, 8)]) == [2]
    with pytest.raises(InputError, match="9 processes for 8 modules"):
        process_counts(8, [1, 9], None)


def test_json_has_the_ordinary_plan_and_the_parallel_one(monkeypatch, capsys):
    _, (plain,), _ = main(monkeypatch, capsys, *CLI[:-2], "--json")
    status, (line,), err = main(monkeypatch, capsys, *CLI, "--json")
    assert (status, err) == (0, [])
    plan = json.loads(line)
    parallel = plan.pop("parallel")
    assert plan == json.loads(plain)
    plans = parallel.pop("plans")
    assert parallel == {
        "device_tflops": 5, "link_gbs": 12, "batch_size": 16, "images": 50_000, "steps": 3125,
    }  # fmt: skip
    assert [p["processes"] for p in plans] == [1, 2, 4]
    assert plans[0]["peak_bytes"] == plan["peak_bytes"]
    assert plans[1].keys() == {
        "processes", "samples_per_second", "speedup", "epoch_seconds", "bubble_seconds",
        "bubble_percent", "peak_bytes", "peak_rank", "largest_link_bytes", "bytes_per_step",
        "binding_gbs", "devices",
    }  # fmt: skip
    assert plans[1]["devices"][0].keys() == {
        "rank", "modules", "train_flops_per_sample", "flops_share", "step_seconds", "peak_bytes",
        "bytes_in", "bytes_out",
    }  # fmt: skip


def test_table_begins_with_what_is_assumed(monkeypatch, capsys):
    speeds = ("--device_tflops", "0.25", "--link_gbs", "3.5", "--limit_per_class", "20")
    status, out, err = main(monkeypatch, capsys, *CLI, *speeds)
    assert (status, err) == (0, [])
    assert out[1] == (
        "assumed: 0.25 * 10^12 FLOPs/s a device (--device_tflops), 3.5 GB/s a link (--link_gbs)"
    )
    assert out[2] == "an epoch: 200 images in 13 steps"
    assert [line.split()[0] for line in out[3:]] == ["processes", "1", "2", "4"]


def test_a_single_number_of_processes_has_a_line_a_device(monkeypatch, capsys):
    _, out, _ = main(monkeypatch, capsys, *CLI, "--nproc", "2", "--module_ranges", "0", "1-3")
    assert [line.split()[:2] for line in out[5:]] == [["rank", "modules"], ["0", "0"], ["1", "1-3"]]
    assert sum(float(line.split()[2]) for line in out[6:]) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--nproc", "5"], "5 processes for 4 modules"),
        (["--nproc", "0"], "--nproc"),
        (["--nproc", "3", "--module_ranges", "0-1", "2-3"], "2 ranges for 3 processes"),
        (["--nproc", "2", "3", "--module_ranges", "0-1", "2-3"], "2 ranges for 3 processes"),
        (["--module_ranges", "0-1", "3"], "should begin with module 2"),
        (["--module_ranges", "0-1", "2"], "ends with module 2"),
        (["--link_gbs", "0"], "--link_gbs"),
        (["--device_tflops", "1e-315"], "--device_tflops"),
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
