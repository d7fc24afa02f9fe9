"""Modules in processes of their own train to the same bits as in one, and a run ends as a whole."""

import json

import pytest
import torch
from cli import end_of, main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.checkpoint import read_checkpoint

TINY = [
    "--dataset", "digits", "--limit_per_class", "3", "--layers", "8", "--local_module_num", "4",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--batch_size", "4", "--epochs", "3", "--device", "cpu",
]  # fmt: skip
"""24 steps, 8 an epoch, of 4 samples and at its end 2."""

DECODER = ["--h_reconstruct", "--loss_scale", "5", "1", "5", "1"]

METHODS = {
    "R0": ["--context_mode", "R0", "--amp", "bf16"],
    "E": ["--context_mode", "E", *DECODER, "--droprate", "0.2"],
    "R2": ["--context_mode", "R2", "--local_loss_mode", "contrast", "--no-channels_last"],
    "R1E": ["--context_mode", "R1E", "--local_loss_mode", "contrast", *DECODER, "--recompute"],
    "R4": ["--context_mode", "R4", "--amp", "fp16"],
}

PARALLEL = ["--parallel", "modules"]


@pytest.fixture(scope="module")
def alone(server):
    """By the name of its method, what a run in one process leaves."""
    found = {}

    def run(name):
        if name not in found:
            ended = server.run(*TINY, *METHODS[name], "-p", 3, "--output_dir", f"alone_{name}")
            assert (ended.status, ended.err) == (0, [])
            steps = [line for line in ended.out if " step " in line]
            (server.folder / f"alone_{name}.steps").write_text("\n".join(steps))
            found[name] = learned(server.folder / f"alone_{name}")
        return found[name]

    return run


def learned(folder):
    """All that a run leaves but for time, memory and processes."""

    def without(figures):
        about = ("rank_", "peak_memory", "samples_per_second", "parallel")
        return {k: v for k, v in figures.items() if not k.startswith(about)}

    end = end_of(folder)
    states = {
        name: (tensors, others[:-1], [*map(without, history)])
        for name, (tensors, others, history) in end["states"].items()
    }
    return {
        "metrics": [*map(without, end["metrics"])], "summary": without(end["summary"]),
        "config": end["config"], "states": states,
    }  # fmt: skip


def together(server, processes, folder, *arguments, way=PARALLEL, plans=None, status=0):
    ended = server.run_together(
        processes, *TINY, *way, *arguments, "--output_dir", folder, plans=plans
    )
    assert [each.status for each in ended] == [status] * processes, [each.err for each in ended]
    return ended


def images_of(folder):
    """What TensorBoard shows of an epoch's reconstructions, by step."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    if "reconstructions" not in events.Tags()["images"]:
        return []
    return [(image.step, image.encoded_image_string) for image in events.Images("reconstructions")]


def check_figures_by_rank(folder, processes):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        peaks = row["rank_peak_memory_bytes"]
        assert len(peaks) == processes and row["peak_memory_bytes"] == max(peaks) > 2**20
        assert all(0 < busy <= 100 for busy in row["rank_busy_percent"])
        rates = row["rank_samples_per_second"]
        assert row["samples_per_second"] == pytest.approx(min(rates))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["peak_memory_bytes"] == max(rows[-1]["rank_peak_memory_bytes"])
    assert summary["parallel"]["processes"] == processes
    how = summary["peak_memory_how"]
    assert how.endswith(f"in that of {processes} processes which took most") == (processes > 1)


def test_peaks_are_the_planned_ones(server, capsys, monkeypatch):
    """Contiguous, as plans count."""
    method = ["--context_mode", "R2", "--no-channels_last", "--module_ranges", "0", "1-2", "3"]
    together(server, 3, "metered", *method)
    summary = server.folder / "metered" / "metrics.jsonl"
    measured = json.loads(summary.read_text().splitlines()[0])["rank_peak_memory_bytes"]
    status, out, _ = main(monkeypatch, capsys, *TINY, *PARALLEL, *method, "--dry_run", "--json")
    (plan,) = json.loads(out[-1])["parallel"]["plans"]
    assert (status, measured) == (0, [device["peak_bytes"] for device in plan["devices"]])


@pytest.mark.parametrize("way", ["modules", "data"])
def test_evaluated_as_in_one_process(server, alone, way):
    alone("R1E")
    evaluation = ["--evaluate", "alone_R1E/checkpoint.pt"]
    said = server.run("--device", "cpu", *evaluation).out[-1]
    ended = server.run_together(2, "--device", "cpu", "--parallel", way, *evaluation)
    assert [(each.status, each.err) for each in ended] == [(0, [])] * 2
    assert ended[0].out[-1] == said
    assert "measured" not in " ".join(ended[0].out)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_bits_as_in_one_process(server, alone, name, processes):
    folder = f"{name}_{processes}"
    ended = together(server, processes, folder, *METHODS[name], "-p", 3)
    assert [each.err for each in ended] == [[]] * processes
    assert learned(server.folder / folder) == alone(name)
    assert images_of(server.folder / folder) == images_of(server.folder / f"alone_{name}")
    steps = [line for line in ended[0].out if " step " in line]
    assert steps == (server.folder / f"alone_{name}.steps").read_text().splitlines()
    assert len(steps) == 3 * 3 and not any(each.out for each in ended[1:])
    check_figures_by_rank(server.folder / folder, processes)


@pytest.mark.parametrize("ranges", [["0", "1-3"], ["0-2", "3"]])
def test_ranges_do_not_matter(server, alone, ranges):
    folder = "-".join(ranges)
    ended = together(server, 2, folder, *METHODS["R1E"], "--module_ranges", *ranges)
    assert ended[0].out[3] == f"modules {ranges[0]} on rank 0, {ranges[1]} on rank 1"
    assert learned(server.folder / folder) == alone("R1E")
    summary = json.loads((server.folder / folder / "summary.json").read_text())
    assert summary["parallel"] == {"processes": 2, "way": "modules", "ranges": ranges}


def test_compiled(server):
    """Steps compiled in one process and in two are the same code."""
    method = [*METHODS["R0"], "--compile", "--epochs", "1"]
    assert server.run(*TINY, *method, "--output_dir", "alone_compiled").status == 0
    together(server, 2, "compiled", *method, "--module_ranges", "0-1", "2-3")
    end, expected = (learned(server.folder / f) for f in ("compiled", "alone_compiled"))
    assert end == expected


# ---------------------------------------------------------------------------------------------
# Stopped, and taken up again by another number of processes


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("name", ["R1E", "R4"])
def test_a_signal_to_one_stops_all_and_any_number_goes_on(server, alone, name, asked):
    """Two are stopped, then four, and one ends the run."""
    folder, method = f"stopped_{name}_{asked}", [*METHODS[name], "--resume", "auto"]
    stop = {asked: {"line": 300, "files": ["engine/step.py"], "send": ["SIGTERM"]}}
    steps = []
    for processes, ranges in ((2, ["0-1", "2-3"]), (4, ["0", "1", "2", "3"])):
        how = [*method, "--module_ranges", *ranges]
        ended = together(server, processes, folder, *how, plans=stop, status=143)
        state = read_checkpoint(server.folder / folder / "checkpoint.pt")
        steps.append((state.epoch, state.step))
        how = f"train.py: note: stopped by SIGTERM; continue with --resume {folder}/checkpoint.pt"
        assert ended[0].err[-1] == how
        assert ended[1].err in ([], ["", "stopping after this step; a second signal stops at once"])
    assert steps[0] < steps[1] and any(step for _, step in steps)
    ended = server.run(*TINY, *method, "--output_dir", folder)
    assert ended.status == 0
    assert learned(server.folder / folder) == alone(name)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_during_the_last_evaluation(server, alone, asked):
    """After it there are no steps to learn of that in, and the run is finished."""
    folder = f"late_{asked}"
    late = {
        asked: {"call": "reconstructed", "files": ["parallel/training.py"], "send": ["SIGTERM"]}
    }
    how = [*METHODS["E"], "--epochs", "1"]
    ended = together(server, 2, folder, *how, plans=late, status=143)
    assert ended[0].err[-1] == "train.py: note: stopped by SIGTERM; the run is finished"
    assert (server.folder / folder / "summary.json").exists()
    again = together(server, 2, folder, *how, "--resume", "auto")
    assert again[0].out[-1] == f"{folder} is finished: all 1 epochs are done"


@pytest.mark.parametrize(("name", "line", "epoch"), [("E", 3000, 0), ("R4", 3000, 0),
                                                     ("E", 8500, 1)])  # fmt: skip
def test_a_checkpoint_within_an_epoch(server, alone, name, line, epoch):
    """One process leaves it; two go on from it, and save often. Both know the best epoch so far."""
    folder = f"every_{name}_{epoch}"
    method = [*METHODS[name], "--resume", "auto", "--checkpoint_every", "3"]
    killed = server.run(*TINY, *method, "--output_dir", folder, line=line, files=["engine/step.py"])
    assert killed.status == -9
    state = read_checkpoint(server.folder / folder / "checkpoint.pt")
    assert state.epoch == epoch and state.step in (3, 6)
    together(server, 2, folder, *method)
    end = learned(server.folder / folder)
    assert end["metrics"] == alone(name)["metrics"]
    for kept in ("checkpoint.pt", "model_best.pt"):
        assert end["states"][kept][0] == alone(name)["states"][kept][0]


# ---------------------------------------------------------------------------------------------
# Data parallel, as a run; the arithmetic is in test_replicas.py

DATA = ["--parallel", "data", "--lr", "0.01"]


def figures_of(end):
    """Of all epochs: losses and errors, one after the other."""
    names = ("local_losses", "train_errors", "test_errors")
    rows = [row[name] for row in end["metrics"] for name in names]
    return torch.tensor([x for row in rows for x in row if x is not None])


@pytest.mark.parametrize("name", ["R0", "R1E"])
def test_with_sync_bn_a_run_learns_what_one_process_does(server, name):
    """Three epochs, the second of them stopped and gone on with by another number of processes."""
    method = [a for a in METHODS[name] if a not in ("--amp", "bf16")]
    method += ["--resume", "auto"]
    alone = [*TINY, *DATA[2:], *method, "--output_dir", f"alone_data_{name}"]
    assert server.run(*alone).status == 0
    folder = f"data_{name}"
    stop = {0: {"line": 5200, "files": ["engine/step.py"], "send": ["SIGTERM"]}}
    together(server, 2, folder, *method, "--sync_bn", way=DATA, plans=stop, status=143)
    state = read_checkpoint(server.folder / folder / "checkpoint.pt")
    assert state.epoch and state.step
    ended = together(server, 2, folder, *method, "--sync_bn", way=DATA)
    assert [each.err for each in ended] == [[], []]
    end, expected = (learned(server.folder / f) for f in (folder, f"alone_data_{name}"))
    assert torch.allclose(figures_of(end), figures_of(expected), rtol=1e-3)
    summary = json.loads((server.folder / folder / "summary.json").read_text())
    assert summary["parallel"] == {"processes": 2, "way": "data", "sync_bn": True}
    without = together(server, 2, f"{folder}_without", *method, way=DATA)
    assert without[0].out[3].endswith("BatchNorm takes statistics of its own part")
    other = learned(server.folder / f"{folder}_without")
    assert not torch.allclose(figures_of(other), figures_of(expected), rtol=1e-3)


def test_stopped_after_the_last_step_of_an_epoch(server):
    """Each process goes on with a share of the samples, and steps of the epoch are not left."""
    method = [*METHODS["R1E"], "--sync_bn", "--epochs", "2"]
    together(server, 2, "data_whole", *method, way=DATA)
    method += ["--resume", "auto"]
    stop = {1: {"call": "evaluated", "files": ["parallel/training.py"], "send": ["SIGTERM"]}}
    together(server, 2, "data_parts", *method, way=DATA, plans=stop, status=143)
    state = read_checkpoint(server.folder / "data_parts" / "checkpoint.pt")
    assert (state.epoch, state.step) == (0, 8)
    together(server, 2, "data_parts", *method, way=DATA)
    end, expected = (learned(server.folder / f"data_{name}") for name in ("parts", "whole"))
    assert torch.equal(figures_of(end), figures_of(expected))
    row = json.loads((server.folder / "data_parts" / "metrics.jsonl").read_text().splitlines()[0])
    assert min(row["rank_samples_per_second"]) > 0


def test_a_batch_with_fewer_samples_than_processes(server):
    ended = server.run_together(3, *TINY, *DATA, "--output_dir", "few")
    assert [line for each in ended for line in each.err if "error" in line] == [
        "train.py: error: 30 samples in batches of 4 leave a batch of 2 to 3 processes: choose a "
        "batch size that gives each of them a sample in every batch, or run fewer processes"
    ]
