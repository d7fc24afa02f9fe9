"""What a run says of its images, which of them choose its best epoch, and images that change."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import TINY as OF_16
from cli import end_of, interrupt_after, metrics_of, summary_of
from PIL import Image

import train
from dataloaders import load_dataset
from engine import console, training
from engine.checkpoint import read_checkpoint, save_checkpoint
from models import build_network
from report.results import read_runs

TINY = [*OF_16, "--batch_size", "4"]
HELD_OUT = [*TINY, "--limit_per_class", "6", "--val_fraction", "0.5", "--lr", "0.5"]

pytestmark = pytest.mark.usefixtures("here")


def write_images(folder, counts, seed=0):
    """A data set with so many training images of each class, and 2 test images of each."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        for part, number in (("train", count), ("test", 2)):
            path = Path(folder, part, name)
            path.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{i}.png")


def test_a_run_says_what_it_read(train_py):
    out = train_py(*HELD_OUT, "--epochs", "1")[1]  # 40 test images, as the fixture has it
    assert out[3] == "data: 30 training, 30 validation, 40 test images of 10 classes"
    checkpoint = next(Path("runs").glob("*/checkpoint.pt"))
    assert "val_fraction-0.5" in checkpoint.parent.name
    write_images("mine", {"a": 3, "b": 2})
    Path("mine/train/a/c.heic").touch()
    mine = [*TINY, "--dataset", "folder", "--data_dir", "mine", "--epochs", "1"]
    mine += ["--image_size", "8", "--batch_size", "5", "--limit_per_class", "9"]
    mine += ["--output_dir", "run"]
    status, out, err = train_py(*mine)
    assert (status, out[3]) == (0, "data: 5 training, 4 test images of 2 classes")
    assert err == ["train.py: note: left out of mine/train: 1 (1 *.heic)"]
    status, out, err = train_py("--evaluate", "run/checkpoint.pt", "--device", "cpu")
    assert (status, out[3], err) == (0, "data: 4 test images of 2 classes", [])


def test_fewer_test_images(train_py, monkeypatch):
    monkeypatch.setattr(train, "load_dataset", load_dataset)  # all 360
    few = [*TINY, "--epochs", "1", "--limit_test", "15", "--output_dir", "run"]
    out = train_py(*few)[1]
    assert "data: 20 training, 15 test images of 10 classes" in out
    assert summary_of("run")["config"]["limit_test"] == 15
    again = ["--evaluate", "run/checkpoint.pt", "--device", "cpu"]
    assert ", 15 images," in train_py(*again)[1][-1]
    assert ", 7 images," in train_py(*again, "--limit_test", "7")[1][-1]


def test_progress_is_a_line_now_and_then_or_a_bar_on_a_terminal(monkeypatch, capsys):
    now = iter(range(0, 1000, 4))  # each look at the clock 4 s after the last
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    assert [*console.watched("abcdefghi", "reading", 9)] == list("abcdefghi")
    assert capsys.readouterr().out.splitlines() == ["reading  3/9", "reading  6/9"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert [*console.watched("abc", "reading", 3)] == list("abc")
    assert "reading:   0%" in sys.stdout.getvalue()


def test_every_evaluation_shows_its_progress(train_py, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY", 0)
    run = [*HELD_OUT, "--epochs", "1", "--batch_size", "15", "--output_dir", "run"]
    out = train_py(*run)[1]
    lines = [line for line in out if "evaluating" in line]
    assert lines == [
        "epoch   1/1  evaluating, val batch  1/2",
        "epoch   1/1  evaluating, test batch  1/3", "epoch   1/1  evaluating, test batch  2/3",
    ]  # fmt: skip
    out = train_py("--evaluate", "run/checkpoint.pt", "--device", "cpu")[1]
    assert [line for line in out if "evaluating" in line] == [
        "evaluating, batch  1/3", "evaluating, batch  2/3",
    ]  # fmt: skip


def error_on(path, split):
    """The last head's error on plain images, without any of the run's code for it."""
    checkpoint = read_checkpoint(path)
    network = build_network(
        layers=8, local_module_num=2, context_mode="R0", local_loss_mode="cross_entropy",
        dataset="digits",
    )  # fmt: skip
    network.load_state_dict(checkpoint.state_dict)
    with torch.no_grad():
        output = network.eval()(split.images / 127.5 - 1)
    return 100 * float((output.argmax(1) != split.targets).double().mean())


def test_the_best_epoch_is_that_of_the_lowest_validation_error(train_py, monkeypatch):
    """Even where the test error says otherwise: it is made to rise from epoch to epoch."""
    evaluate, called = training.evaluate, []

    def with_worse_test(network, batches, device):
        totals = evaluate(network, batches, device)
        called.append(totals.samples)
        if totals.samples == 40:
            totals._wrong[-1] = len(called)
        return totals

    monkeypatch.setattr(training, "evaluate", with_worse_test)
    status, out, err = train_py(*HELD_OUT, "--epochs", "4", "--output_dir", "run")
    assert (status, err) == (0, []) and called == [30, 40] * 4
    metrics, summary = metrics_of("run"), summary_of("run")
    assert [m["test_error"] for m in metrics] == [5, 10, 15, 20]
    errors = [m["val_error"] for m in metrics]
    best = errors.index(min(errors))
    assert best > 0  # or it would be the best by its test error too
    assert summary["epoch_best"] == read_checkpoint("run/model_best.pt").epoch == best + 1
    assert summary["val_error_best"] == min(errors)
    assert (summary["error_best"], summary["error_last"]) == (5 * (best + 1), 20)
    assert all(m["val_errors"][-1] == m["val_error"] and m["val_loss"] > 0 for m in metrics)
    assert f"{5 * (best + 1):.2f} % at epoch {best + 1}, whose validation error" in out[-3]
    assert any(f"val loss {metrics[0]['val_loss']:.4f}" in line for line in out)

    every = load_dataset("digits", "unused", 32, 6, val_fraction=0.5, seed=5)
    for path, epoch in (("run/model_best.pt", best), ("run/checkpoint.pt", 3)):
        assert error_on(path, every.val) == pytest.approx(errors[epoch])
    runs, _ = read_runs([Path("run")])
    assert ", val_fraction 0.5," in runs.setting[0]
    assert (runs.error_best[0], runs.error_last[0]) == (5 * (best + 1), 20)


def test_without_a_validation_split_the_test_images_decide(train_py):
    assert train_py(*TINY, "--output_dir", "run")[0] == 0
    metrics, summary = metrics_of("run"), summary_of("run")
    errors = [m["test_error"] for m in metrics]
    assert not any(name.startswith("val") for m in metrics for name in m)
    assert summary["epoch_best"] == errors.index(min(errors)) + 1
    assert "val_error_best" not in summary


def test_a_run_with_a_validation_split_goes_on_to_the_same_end(train_py, refused):
    assert train_py(*HELD_OUT, "--output_dir", "whole")[0] == 0
    with interrupt_after(1):
        assert train_py(*HELD_OUT, "--output_dir", "run")[0] == 130
    assert read_checkpoint("run/checkpoint.pt").step == 1
    changed = ["--resume", "run/checkpoint.pt", "--val_fraction", "0.4", "--output_dir", "other"]
    assert "so val_fraction must stay as it was" in refused(*changed)
    status, _, err = train_py(*HELD_OUT, "--output_dir", "run", "--resume", "auto")
    assert (status, err) == (0, [])
    assert end_of("run") == end_of("whole")


# Images that change


MINE = [
    *OF_16, "--dataset", "folder", "--data_dir", "mine", "--image_size", "8", "--limit_per_class",
    "9", "--batch_size", "2", "--output_dir", "run",
]  # fmt: skip


@pytest.fixture
def stopped(train_py, monkeypatch):
    """A run on 4 + 4 + 4 images, that was killed after its first epoch."""
    monkeypatch.setattr(train, "load_dataset", load_dataset)
    write_images("mine", {"a": 4, "b": 4, "c": 4})

    def die(path, state):
        save_checkpoint(path, state)
        if path.name == "checkpoint.pt":
            raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", die)
        assert train_py(*MINE)[0] == 9
    assert read_checkpoint("run/checkpoint.pt").done == (1, 0)


@pytest.fixture
def in_an_epoch(stopped, train_py):
    """The same, stopped after the first step of its second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        step = training.train_step

        def step_and_stop(*args, **options):
            step(*args, **options)
            training.INTERRUPTS.handle(2)

        patch.setattr(training, "train_step", step_and_stop)
        assert train_py(*MINE, "--resume", "auto")[0] == 130
    assert read_checkpoint("run/checkpoint.pt").done == (1, 1)


def change_the_images():
    for i in range(3):
        shutil.copy("mine/train/a/0.png", f"mine/train/a/n{i}.png")
    Path("mine/train/c/1.png").unlink()
    shutil.copy("mine/test/a/0.png", "mine/test/b/1.png")


OTHERS = "the training images are not those of the checkpoint: 12 before, now 14 (a 4, now 7; " \
    "c 4, now 3)"  # fmt: skip
OTHER_TESTS = (
    "train.py: note: the test images are not those of the checkpoint: as many of each class, but "
    "their pixels or their order differ (other files, or another version of Pillow)"
)


def test_a_resume_says_which_images_are_others(stopped, train_py):
    change_the_images()
    status, _, err = train_py(*MINE, "--resume", "auto")
    two_sets = "; error_best compares errors on two test sets"
    assert (status, err) == (0, [f"train.py: note: {OTHERS}", OTHER_TESTS + two_sets])
    assert len(metrics_of("run")) == 3
    assert train_py(*MINE, "--resume", "auto")[2] == []


def test_a_run_elsewhere_has_no_best_error_of_before(stopped, train_py):
    change_the_images()
    elsewhere = ["--resume", "run/checkpoint.pt", "--output_dir", "other", "--device", "cpu"]
    assert train_py(*elsewhere)[2] == [f"train.py: note: {OTHERS}", OTHER_TESTS]
    fewer = [*elsewhere[:-3], "third", *elsewhere[-2:], "--limit_per_class", "2"]
    assert train_py(*fewer)[::2] == (0, [])  # other images were asked for


def test_no_note_where_nothing_changed_or_nobody_knows(stopped, train_py):
    state = read_checkpoint("run/checkpoint.pt")
    assert state.data["train"]["images"] == [4, 4, 4]
    shutil.copytree("mine", "moved/mine")
    shutil.rmtree("mine")
    shutil.copytree("run", "old")
    save_checkpoint(Path("old/checkpoint.pt"), state._replace(data={}))  # as earlier versions do
    moved = ["--data_dir", "moved/mine", "--device", "cpu"]
    assert train_py("--resume", "run/checkpoint.pt", *moved)[::2] == (0, [])
    Path("moved/mine/train/c/1.png").unlink()
    assert train_py("--resume", "old/checkpoint.pt", *moved)[::2] == (0, [])


def test_an_epoch_does_not_go_on_with_other_numbers_of_images(in_an_epoch, train_py, refused):
    shutil.copy("mine/train/a/0.png", "mine/train/b/1.png")  # its steps are the same
    shutil.copytree("run", "copy")
    shutil.copytree("mine", "copied/mine")
    there = ["--output_dir", "copy", "--data_dir", "copied/mine"]
    status, _, err = train_py(*MINE, *there, "--resume", "auto")
    assert (status, len(err)) == (0, 1) and "as many of each class" in err[0]
    change_the_images()
    line = refused(*MINE, "--resume", "auto")
    assert OTHERS in line and "in the middle of epoch 2, which can't go on with others" in line


@pytest.mark.parametrize(
    "data", [{"train": 1}, {"train": {}}, {"train": {"images": 1, "crc32": 1}}, {1: {}}, [],
             {"test": {"images": ["\n"], "crc32": 1}},
             {"test": {"images": [math.nan], "crc32": 1}}]
)  # fmt: skip
def test_a_fingerprint_that_is_none_is_refused(stopped, refused, data):
    state = read_checkpoint("run/checkpoint.pt")
    save_checkpoint(Path("bad.pt"), state._replace(data=data))
    assert "is not a checkpoint that can be read" in refused("--resume", "bad.pt")


def test_options_that_a_run_of_an_earlier_version_lacks_had_the_defaults(train_py, refused):
    run = [*TINY, "--output_dir", "run", "--resume", "auto"]
    assert train_py(*run)[0] == 0
    for name in ("config.json", "summary.json"):
        contents = json.loads(Path("run", name).read_text())
        for option in ("val_fraction", "limit_test", "train_modules"):
            del contents.get("config", contents)[option]
        Path("run", name).write_text(json.dumps(contents))
    assert train_py(*run)[1] == ["run is finished after 3 epochs"]
    assert "limit_test None, now 20" in refused(*run, "--limit_test", "20")


def test_a_class_more_is_said_in_words(train_py, refused):
    write_images("mine", {"a": 3, "b": 2})
    run = [*TINY, "--dataset", "folder", "--data_dir", "mine", "--image_size", "8", "--epochs", "1"]
    assert train_py(*run, "--output_dir", "run")[0] == 0
    write_images("mine", {"c": 2})
    message = refused("--resume", "run/checkpoint.pt", "--epochs", "9", "--output_dir", "more")
    assert "was trained on 2 classes (a, b), and the data have 3" in message
