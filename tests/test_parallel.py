"""Runs in several processes come to what one process does, and continue in any number of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from cli import end_of, metrics_of, summary_of
from fork_server import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import InputError
from engine.checkpoint import read_checkpoint
from models import build_network
from models.context import Contexts
from parallel.transfer import crossing
from report.results import read_runs

TINY = [
    "--dataset", "digits", "--limit_per_class", "3", "--layers", "8", "--local_module_num", "4",
    "--batch_size", "4", "--epochs", "3", "--device", "cpu",
]  # fmt: skip
"""24 steps, 8 an epoch, of 4 samples and at its end 2."""

SOFTMAX = ["--local_loss_mode", "cross_entropy"]
DECODER = ["--h_reconstruct", "--loss_scale", "5", "1", "5", "1"]
HELD_OUT = ["--limit_per_class", "5", "--val_fraction", "0.4", "--limit_test", "30"]
METHODS = {
    "R0": ["--context_mode", "R0", "--amp", "bf16", *SOFTMAX],
    "E": ["--context_mode", "E", "--droprate", "0.2", *DECODER, *SOFTMAX],
    "R2": ["--context_mode", "R2", "--no-channels_last"],
    "R1E": ["--context_mode", "R1E", "--recompute", *DECODER],
    "R4": ["--context_mode", "R4", "--amp", "fp16", *SOFTMAX],
    "val": ["--context_mode", "E", *SOFTMAX, *HELD_OUT],
    "manpp": ["--method", "manpp", "--context_mode", "R1E", "--recompute", *DECODER],
    "sid": ["--method", "sid", "--context_mode", "R2", "--amp", "bf16"],
}

MODULES = ["--parallel", "modules"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(server):
    """Return what a run in one process leaves, by the name of its method."""
    found = {}

    def run(name):
        if name not in found:
            ended = server.run(*TINY, *METHODS[name], "-p", 3, "--output_dir", f"alone_{name}")
            assert (ended.status, ended.err) == (0, [])
            steps = [line for line in ended.out if " step " in line]
            found[name] = learned(server.folder / f"alone_{name}"), steps
        return found[name]

    return run


def learned(folder):
    """Return all that a run leaves except times, memory and how the work was divided."""

    def without(figures):
        about = ("rank_", "peak_memory", "samples_per_second", "parallel")
        return {k: v for k, v in figures.items() if not k.startswith(about)}

    end = end_of(folder)
    states = {
        name: (tensors, others[:-1], [*map(without, history)])
        for name, (tensors, others, history) in end["states"].items()
    }
    images = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    if "reconstructions" in images.Tags()["images"]:
        states["images"] = [
            (image.step, image.encoded_image_string) for image in images.Images("reconstructions")
        ]
    return end | {
        "metrics": [*map(without, end["metrics"])], "summary": without(end["summary"]),
        "states": states,
    }  # fmt: skip


def together(server, processes, folder, *arguments, how=MODULES, plans=None, status=0):
    """Run in several processes, check the exit statuses, and return how each ended."""
    ended = server.run_together(
        processes, *TINY, *how, *arguments, "--output_dir", folder, plans=plans
    )
    assert [each.status for each in ended] == [status] * processes, [each.err for each in ended]
    return ended


def steps_done(server, folder):
    state = read_checkpoint(server.folder / folder / "checkpoint.pt")
    return state.epoch, state.step


def check_figures_by_rank(folder, processes):
    rows = metrics_of(folder)
    for row in rows:
        peaks = row["rank_peak_memory_bytes"]
        assert len(peaks) == processes and row["peak_memory_bytes"] == max(peaks) > 2**20
        assert all(0 < busy <= 100 for busy in row["rank_busy_percent"])
        rates = row["rank_samples_per_second"]
        assert row["samples_per_second"] == pytest.approx(min(rates))
    summary = summary_of(folder)
    assert summary["peak_memory_bytes"] == max(rows[-1]["rank_peak_memory_bytes"])
    how = summary["peak_memory_how"]
    assert how.endswith(f"the largest of {processes} processes") == (processes > 1)
    return summary["parallel"]


# ---------------------------------------------------------------------------------------------
# --parallel modules


@pytest.mark.parametrize(("name", "ranges"), [
    ("R1E", ["0", "1-3"]),
    ("val", ["0-1", "2-3"]),
    ("manpp", ["0-1", "2-3"]),
    pytest.param("manpp", ["0", "1", "2-3"], marks=slow),
    pytest.param("sid", ["0", "1-3"], marks=slow),
    pytest.param("R1E", ["0-3"], marks=slow),
    pytest.param("E", ["0-2", "3"], marks=slow),
    pytest.param("R4", ["0", "1", "2", "3"], marks=slow),
])  # fmt: skip
def test_the_same_bits_as_in_one_process(server, alone, name, ranges):
    """Weights, statistics, momentum, scalers, metrics, images and lines of output."""
    expected, steps = alone(name)
    folder, number = f"{name}_{len(ranges)}", len(ranges)
    ended = together(
        server, number, folder, *METHODS[name], "-p", 3, "--module_ranges", *ranges
    )  # fmt: skip
    assert [each.err for each in ended] == [[]] * number
    assert not any(each.out for each in ended[1:])
    parts = ", ".join(f"{part} on rank {rank}" for rank, part in enumerate(ranges))
    assert ended[0].out[3] == f"modules {parts}"
    assert learned(server.folder / folder) == expected
    printed = [line for line in ended[0].out if " step " in line]
    assert len(printed) == 3 * 3 and (printed == steps) == (number == 1)  # those of rank 0
    described = check_figures_by_rank(server.folder / folder, number)
    assert described == {"processes": number, "strategy": "modules", "ranges": ranges}


MADE_UP = [
    "--dataset", "noise", "--model", "plain", "--layers", "8", "--local_module_num", "4",
    "--context_mode", "R1S", "--aux_net_config", "pool2", "--local_loss_mode", "smooth",
    "--epochs", "2", "--device", "cpu", "--module_ranges", "0-1", "2-3", "--train_modules", "1-3",
]  # fmt: skip


def test_parts_of_ones_own_in_several_processes(server):
    """A context, a head, a loss, a backbone and a data set, each an entry of a user's script."""
    of_one = [word for word in MADE_UP if word not in ("--module_ranges", "0-1", "2-3")]
    script = {"main": "recipes.main"}
    ended = server.run(*of_one, "--output_dir", "made_up/one", **script)
    assert (ended.status, ended.err) == (0, [])
    both = server.run_together(2, *MADE_UP, *MODULES, "--output_dir", "made_up/two", **script)
    assert [(each.status, each.err) for each in both] == [(0, [])] * 2
    one, two = (learned(server.folder / "made_up" / name) for name in ("one", "two"))
    assert one == two
    test = f"test error {one['metrics'][-1]['test_error']:.2f} %"
    of_checkpoint = ["--evaluate", "made_up/two/checkpoint.pt", "--device", "cpu"]
    assert test in server.run(*of_checkpoint, **script).out[-1]
    evaluated = server.run_together(2, *of_checkpoint, *MODULES, **script)
    assert test in evaluated[0].out[-1]
    planned = server.run(*MADE_UP, *MODULES, "--dry_run", "--json", **script)
    plan = json.loads(planned.out[-1])
    assert plan["parallel"]["images"] == 64 and len(plan["modules"]) == 4
    runs, notes = read_runs([server.folder / "made_up" / "one"])  # this process knows no part
    assert notes == []
    assert runs[["dataset", "K", "mode", "kind"]].to_numpy().tolist() == [
        ["noise", 4, "R1S", "smooth, pool2"]
    ]


@pytest.mark.parametrize("is_carried", [False, True])
def test_a_context_that_does_not_cross_as_it_is_is_refused(monkeypatch, is_carried):
    """Here one of a module's input that has left the window of R1."""
    push, named = Contexts.push, Contexts.named

    def keep_and_push(self, h_in):
        self.kept = [*getattr(self, "kept", []), h_in]
        push(self, h_in)

    def named_with_first(self):
        kept = getattr(self, "kept", [])
        return named(self) | ({"recent_first": kept[0]} if kept else {})

    monkeypatch.setattr(Contexts, "push", keep_and_push)
    monkeypatch.setattr(Contexts, "named", named_with_first)
    if is_carried:
        monkeypatch.setattr(Contexts, "pushed", lambda self: getattr(self, "kept", []))
    arguments = {"layers": 8, "local_module_num": 4, "context_mode": "R1", "image_size": 8}
    if is_carried:
        cuts = crossing(arguments, torch.device("cpu"), True)
        assert [len(specs) for specs in cuts] == [1, 2, 3]
    else:
        with pytest.raises(InputError, match="recent_first does not reach the next process"):
            crossing(arguments, torch.device("cpu"), True)


@slow
def test_frozen_modules_with_data_in_parallel(server):
    method = [*METHODS["R1E"], "--train_modules", "1-2"]
    together(server, 2, "frozen", *method, how=["--parallel", "data", "--sync_bn"])
    torch.manual_seed(0)
    arguments = {"layers": 8, "local_module_num": 4, "context_mode": "R1E"}
    decoders = {"h_reconstruct": True, "loss_scale": (5, 1, 5, 1), "local_loss_mode": "contrast"}
    start = build_network(**arguments, **decoders).state_dict()
    after = read_checkpoint(server.folder / "frozen/checkpoint.pt")
    changed = {n.split(".")[1] for n, t in after.state_dict.items() if not torch.equal(t, start[n])}
    assert changed == {"1", "2"} == {name.split(".")[1] for name in after.momentum}


@slow
def test_a_script_of_ones_own_under_torchrun(here):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--",
               ROOT / "tests/recipes.py", *MADE_UP, *MODULES, "--output_dir", "run"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    assert len(metrics_of("run")) == 2


@slow
def test_peaks_are_the_planned_ones(server, alone, train_py):
    """Of contiguous features, which plans count with."""
    method = [*METHODS["R2"], "--module_ranges", "0", "1-2", "3"]
    together(server, 3, "metered", *method)
    assert learned(server.folder / "metered") == alone("R2")[0]
    measured = metrics_of(server.folder / "metered")[0]["rank_peak_memory_bytes"]
    status, out, _ = train_py(*TINY, *MODULES, *method, "--dry_run", "--json")
    (plan,) = json.loads(out[-1])["parallel"]["plans"]
    assert (status, measured) == (0, [device["peak_bytes"] for device in plan["devices"]])


@pytest.mark.parametrize("how", ["modules", "data"])
def test_evaluated_as_in_one_process(server, alone, how):
    alone("R1E")
    evaluation = ["--evaluate", "alone_R1E/checkpoint.pt", "--device", "cpu"]
    said = server.run(*evaluation).out[-1]
    ended = server.run_together(2, "--parallel", how, *evaluation)
    assert [(each.status, each.err) for each in ended] == [(0, [])] * 2
    assert ended[0].out[-1] == said
    assert "measured" not in " ".join(ended[0].out)


@slow
def test_compiled_and_ranges_by_measured_times(server):
    """Steps compiled in one process and in two are the same code."""
    method = [*METHODS["R0"], "--compile", "--epochs", "1"]
    assert server.run(*TINY, *method, "--output_dir", "alone_compiled").status == 0
    ended = together(server, 2, "compiled", *method)
    assert "; measured ms a step: " in ended[0].out[3]
    end, expected = (learned(server.folder / f) for f in ("compiled", "alone_compiled"))
    assert end == expected


# ---------------------------------------------------------------------------------------------
# Stopped, and continued by another number of processes


RANGES = {1: ["0-3"], 2: ["0-1", "2-3"], 3: ["0", "1-2", "3"], 4: ["0", "1", "2", "3"]}


@pytest.mark.parametrize(("name", "asked", "numbers", "last"), [
    ("R1E", 1, [2], 3), pytest.param("R4", 0, [4, 2], 1, marks=slow)
])  # fmt: skip
def test_a_signal_to_one_stops_all_and_any_number_continues(
    server, alone, name, asked, numbers, last
):
    """Some are stopped in their sixth step, and another number of processes ends the run."""
    folder, method = f"stopped_{name}", [*METHODS[name], "--resume", "auto"]
    stop = {asked: {"call": "train_step", "nth": 6, "send": ["SIGTERM"]}}
    steps = [(0, 0)]
    for number in numbers:
        how = [*method, "--module_ranges", *RANGES[number]]
        ended = together(server, number, folder, *how, plans=stop, status=143)
        steps.append(steps_done(server, folder))
        how = f"train.py: note: stopped by SIGTERM; continue with --resume {folder}/checkpoint.pt"
        assert ended[0].err[-1] == how
        said = ["", "stopping after this step; a second signal stops at once"]
        assert [each.err for each in ended[1:]] == [
            said if rank == asked else [] for rank in range(1, number)
        ]
    assert sorted({*steps}) == steps
    if last == 1:
        assert server.run(*TINY, *method, "--output_dir", folder).status == 0
    else:
        together(server, last, folder, *method, "--module_ranges", *RANGES[last])
    assert learned(server.folder / folder) == alone(name)[0]


@slow
def test_a_signal_during_the_last_evaluation(server):
    """After it there are no steps in which ranks could learn of it, and the run is finished."""
    late = {1: {"call": "reconstruct", "files": ["engine/training.py"], "send": ["SIGTERM"]}}
    how = [*METHODS["E"], "--epochs", "1"]
    ended = together(server, 2, "late", *how, plans=late, status=143)
    assert ended[0].err[-1] == "train.py: note: stopped by SIGTERM; the run is finished"
    assert summary_of(server.folder / "late")["epochs"] == 1
    again = together(server, 2, "late", *how, "--resume", "auto")
    assert again[0].out[-1] == "late is finished after 1 epoch"


@slow
@pytest.mark.parametrize(("name", "nth", "done"), [("R4", 5, (0, 3)), ("E", 15, (1, 6))])
def test_a_checkpoint_within_an_epoch(server, alone, name, nth, done):
    """A process that is killed leaves it; two continue, and know the best epoch so far."""
    folder = f"every_{name}"
    method = [*METHODS[name], "--resume", "auto", "--checkpoint_every", "3"]
    killed = server.run(*TINY, *method, "--output_dir", folder, call="train_step", nth=nth)
    assert killed.status == -9
    assert steps_done(server, folder) == done
    together(server, 2, folder, *method)
    end, (expected, _) = learned(server.folder / folder), alone(name)
    assert end["metrics"] == expected["metrics"]
    for kept in ("checkpoint.pt", "model_best.pt"):
        assert end["states"][kept][0] == expected["states"][kept][0]


# ---------------------------------------------------------------------------------------------
# --parallel data, as a run; the arithmetic is in test_data_parallel.py

DATA = ["--parallel", "data", "--lr", "0.01"]


def figures_of(end):
    """Return losses and errors of all epochs, one after the other."""
    names = ("local_losses", "train_errors", "test_errors")
    rows = [row[name] for row in end["metrics"] for name in names]
    return torch.tensor([x for row in rows for x in row if x is not None], dtype=torch.float64)


@slow
def test_a_data_parallel_run_learns_what_one_process_does(server):
    """Also where it is stopped, after the last step of an epoch and within the next."""
    method = METHODS["R1E"]
    assert server.run(*TINY, *DATA[2:], *method, "--output_dir", "data_alone").status == 0
    without = together(server, 2, "data_without", *method, how=DATA)
    assert without[0].out[3].endswith("BatchNorm takes statistics of its own part")
    method = [*method, "--sync_bn"]
    ended = together(server, 2, "data", *method, how=DATA)
    assert [each.err for each in ended] == [[], []]
    described = summary_of(server.folder / "data")["parallel"]
    assert described == {"processes": 2, "strategy": "data", "sync_bn": True}
    method += ["--resume", "auto"]
    for rank, place, done in ((1, {"call": "evaluate", "files": ["engine/training.py"]}, (0, 8)),
                              (0, {"call": "train_step", "nth": 4}, (1, 5))):  # fmt: skip
        stop = {rank: {**place, "send": ["SIGTERM"]}}
        together(server, 2, "data_parts", *method, how=DATA, plans=stop, status=143)
        assert steps_done(server, "data_parts") == done
    together(server, 2, "data_parts", *method, how=DATA)
    alone, without, end, parts = (
        learned(server.folder / f"data{n}") for n in ("_alone", "_without", "", "_parts")
    )
    assert torch.allclose(figures_of(end), figures_of(alone), rtol=1e-3)
    assert not torch.allclose(figures_of(without), figures_of(alone), rtol=1e-3)
    assert torch.allclose(figures_of(parts), figures_of(end), rtol=1e-9)
    for kept in ("checkpoint.pt", "model_best.pt"):
        assert parts["states"][kept][0] == end["states"][kept][0]
    assert min(metrics_of(server.folder / "data_parts")[0]["rank_samples_per_second"]) > 0
