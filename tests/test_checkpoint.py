"""Checkpoint files: what is damaged or meant to do harm is refused; which one a run continues."""

import copy
import gc
import io
import os
import pickle
import shutil
import stat
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from cli import TINY as OF_16
from cli import end_of, few_test_images, metrics_of

import train
from configs import InputError
from engine import files, run_folder, run_name, training
from engine.checkpoint import (
    Checkpoint,
    Unreadable,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from engine.options import read_options
from models import build_network

OLD = Path(__file__).parent / "data" / "contsup-1.pt"
"""Written by the code before engine/ was a package, after step 2 of epoch 2 of 2, with 4 of 20
images a step; tensors as float16, to be small."""

TINY = [*OF_16, "--batch_size", "8", "--epochs", "2", "--seed", "0"]

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def refused_twice(refused):
    """The line that refuses a file, alike for both uses; nothing is made or run."""

    def run(path):
        before = sorted(Path().rglob("*"))
        lines = [refused(use, path, "--device", "cpu") for use in ("--evaluate", "--resume")]
        assert sorted(Path().rglob("*")) == before
        return lines[1]

    return run


def test_a_checkpoint_of_the_old_layout_loads_and_resumes(train_py):
    network = build_network(
        layers=8, local_module_num=2, context_mode="R0", local_loss_mode="cross_entropy",
        aux_net_config="0c1f", dataset="digits",
    )  # fmt: skip
    state = read_checkpoint(OLD)
    load_weights(network, state)
    checksum = 0
    for name, tensor in network.state_dict().items():
        checksum = zlib.crc32(tensor.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    assert checksum == 0x50806155  # as the old code loads it
    status, _, err = train_py("--resume", OLD, "--lr", "0.01", "--output_dir", "run")
    assert (status, err) == (0, [])
    assert read_checkpoint("run/checkpoint.pt").done == (2, 0)
    # From the third step on: its sums have all 20 images, 8 of them from the file.
    row = metrics_of("run")[0]
    assert row["epoch"] == 2
    assert row["train_error"] * 20 / 100 >= int(state.totals["wrong"][-1])


# What is damaged, or meant to do harm


class Malicious:
    """Runs code where it is unpickled as any object."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def rewritten(to, change, compression=zipfile.ZIP_STORED):
    """Copy the old file, with entries `change(name, data)`."""
    with zipfile.ZipFile(OLD) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_pickle_that_runs_code(refused_twice):
    code = pickle.dumps({"state_dict": Malicious()}, protocol=2)
    rewritten("bad.pt", lambda name, data: code if name.endswith("data.pkl") else data)
    line = refused_twice("bad.pt")
    assert "holds more than tensors and plain values, and might run code" in line
    assert "weights_only" not in line  # no advice to load it in spite of that
    assert not Path("executed").exists()
    pickle.loads(code)  # it would have
    assert Path("executed").exists()


def test_a_zip_bomb(refused_twice, monkeypatch):
    zeros = bytes(200 * 2**20)
    change = lambda name, data: zeros if name.endswith("data/0") else data  # noqa: E731
    rewritten("bomb.pt", change, zipfile.ZIP_DEFLATED)
    assert Path("bomb.pt").stat().st_size < 2 * 2**20
    monkeypatch.setattr(torch, "load", None)  # it does not get there
    assert "it is compressed" in refused_twice("bomb.pt")


def test_entries_that_overlap(refused_twice):
    """Each entry of the directory is the same bytes of the file: more than there are, in all."""
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w") as archive:
        archive.writestr("a/data.pkl", bytes(100_000))
        (entry,) = archive.infolist()
        for number in range(50):
            other = copy.copy(entry)
            other.filename = f"a/data/{number}"
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
        archive._didModify = True
    Path("overlap.pt").write_bytes(contents.getvalue())
    assert "larger than the file" in refused_twice("overlap.pt")


def test_a_flipped_bit_of_a_weight(refused_twice):
    """PyTorch itself does not see it."""
    data = bytearray(OLD.read_bytes())
    with zipfile.ZipFile(OLD) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    data[entry.header_offset + 1000] ^= 1
    Path("flipped.pt").write_bytes(data)
    torch.load("flipped.pt", weights_only=True)
    assert f"{entry.filename} in it is damaged" in refused_twice("flipped.pt")


def test_two_archives_in_a_file(refused_twice):
    """Python finds the entries of the second, PyTorch those of the first, at the same offsets."""
    rewritten("good.pt", lambda name, data: data)
    epoch = b"epochq\x01K\x01"
    rewritten("other.pt", lambda name, data: data.replace(epoch, epoch[:-1] + b"c"))
    good, other = Path("good.pt").read_bytes(), Path("other.pt").read_bytes()
    assert read_checkpoint("good.pt").epoch == 1
    Path("two.pt").write_bytes(other[:-22] + good)  # 22: the end, which says where entries are
    with zipfile.ZipFile("two.pt") as archive:
        assert archive.testzip() is None
    assert torch.load("two.pt", weights_only=True)["epoch"] == ord("c")
    assert "more in it than a zip file" in refused_twice("two.pt")


def changed(**parts):
    """Write the old checkpoint with other parts."""
    torch.save(torch.load(OLD, weights_only=True) | parts, "changed.pt")


@pytest.mark.parametrize("part", ["state_dict", "momentum"])
def test_other_than_plain_tensors_of_the_right_shape(refused, part):
    tensors = torch.load(OLD, weights_only=True)[part]
    name, good = next(iter(tensors.items()))
    others = good.to(torch.complex64), good.to("meta"), good.to_sparse(), good[..., None], None
    for other in others:
        changed(**{part: tensors | {name: other}})
        refused("--resume", "changed.pt", "--output_dir", "run")
    assert not Path("run").exists()


def nested(levels):
    """A value that is small in a file, and takes forever to print or compare."""
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


ROW = {"epoch": 1, "test_error": 90.0, "samples_per_second": 10.0, "peak_memory_bytes": 1}
GOOD = {"losses": torch.zeros(2, dtype=torch.float64), "wrong": torch.zeros(2, dtype=torch.float64),
        "finite_steps": torch.zeros(2, dtype=torch.int64), "samples": 8, "steps": 2,
        "seconds": 0.5}  # fmt: skip
HOW = "live tensor storage counted by engine/memory.py in the first two full training steps"


@pytest.mark.parametrize(
    "parts",
    [
        {"epoch": -1}, {"epoch": True}, {"epoch": nested(60)},
        {"options": [1]}, {"options": {1: 2}}, {"options": {"layers": nested(60)}},
        {"classes": "abc"}, {"classes": [1]}, {"scalers": [{}]}, {"scalers": None},
        {"history": [1]}, {"history": [ROW | {"epoch": 2}]}, {"history": [{}]},
        {"history": [ROW | {"more": nested(60)}]},
        {"history": [ROW | {"test_error": float("nan")}]},
        {"totals": [1]}, {"totals": {"steps": 2}}, {"totals": GOOD | {"losses": torch.zeros(2)}},
        {"totals": GOOD | {"losses": torch.zeros(3, dtype=torch.float64)}},
        {"totals": GOOD | {"losses": torch.full((2,), float("nan"), dtype=torch.float64)}},
        {"totals": GOOD | {"steps": 2.0}}, {"totals": GOOD | {"steps": 99}},
        {"totals": GOOD | {"steps": 0}}, {"totals": GOOD | {"seconds": 0.0}},
        {"peak": {"bytes": 1}}, {"peak": {"bytes": "1", "largest": 1, "steps": 1, "how": HOW}},
        {"state_dict": torch.zeros(2)}, {"momentum": {"unknown": torch.zeros(1)}},
        {"more": 1}, {"format": "contsup-9"}, {"format": nested(60)},
    ],
    ids=lambda parts: next(iter(parts)),
)  # fmt: skip
def test_parts_that_are_not_what_they_should_be(refused, parts):
    changed(**parts)
    refused("--resume", "changed.pt", "--output_dir", "run", "--device", "cpu")
    assert [path.name for path in Path().iterdir()] == ["changed.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": "elsewhere"}, "'output_dir' 'elsewhere', which no run has"),
        ({"cuts": [["--output_dir=elsewhere", 1]]}, "which no run has"),
        ({"loss_scale": {"a": 1}}, "its options is not what it should be"),
        ({"checkpoint": "a/../../elsewhere"}, "a folder out of the run's"),
        ({"name": "../elsewhere"}, "no part of a folder's name"),
        ({"layers --output_dir": 1}, "which no run has"),
        ({"output_dir=elsewhere/a": "x"}, "which no run has"),
        ({"layers": "many"}, "'many' is not a whole number"),
        # A small file that asks for a large network
        ({"aux_net_widen": 1000.0, "aux_net_config": "1c2f"}, "of another architecture"),
        ({"layers": 99998}, "of another architecture"),
    ],
)
def test_options_in_a_file_lead_nowhere_else(refused_twice, options, message):
    changed(options=torch.load(OLD, weights_only=True)["options"] | options)
    assert message in refused_twice("changed.pt")
    assert [path.name for path in Path().iterdir()] == ["changed.pt"]
    assert not list(Path("..").glob("elsewhere"))


def test_scalers_of_another_number_of_modules(refused):
    scaler = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
              "_growth_tracker": 0}  # fmt: skip
    changed(scalers=[scaler])
    line = refused("--resume", "changed.pt", "--amp", "fp16", "--output_dir", "run")
    assert "another number of modules" in line


def test_the_middle_of_an_epoch_keeps_its_steps(refused):
    for option, value in (("--batch_size", "5"), ("--seed", "1"), ("--limit_per_class", "3")):
        line = refused("--resume", OLD, option, value, "--output_dir", "run")
        assert f"middle of epoch 2, so {option.strip('-')} must stay" in line
    assert not Path("run").exists()


def test_a_folder_or_nothing_is_no_checkpoint(here):
    for path in (here, here / "nothing", "\0"):
        with pytest.raises(InputError, match="there is no checkpoint"):
            read_checkpoint(path)


# The names of run folders


@pytest.mark.parametrize(
    "typed",
    [
        ["--context_mode", "../../../elsewhere"], ["--aux_net_config", "/../../elsewhere/1c2f"],
        ["--data_dir", "../.."], ["--name", ".."], ["--no", ".."],
    ],
)  # fmt: skip
def test_a_run_name_is_one_folder_below_runs(typed):
    name = run_name.run_name(read_options([*TINY, *typed, "--dataset", "folder"])[0])
    assert Path(name).name == name
    assert name not in ("", ".", "..")


def test_a_long_run_name_is_cut_and_told_apart(train_py, refused):
    names = set()
    for last in "ab":
        options, _ = read_options([*TINY, "--name", "é" * 63 + last, "--no", "é" * 64])
        names.add(run_name.run_name(options))
    assert len(names) == 2
    assert all(len(name.encode()) <= 110 for name in names)
    assert train_py(*TINY, "--name", "é" * 64, "--no", "é" * 64)[0] == 0
    assert "File name too long" in refused(*TINY, "--output_dir", "x" * 300)


# Which one a run continues from


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run folders of a run each, finished: the best epoch is the first with E, the last with R0."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few_test_images(patch)
        for mode, best in (("E", 1), ("R0", 2)):
            train.main([*TINY, "--context_mode", mode, "--output_dir", mode])
            assert read_checkpoint(f"{mode}/model_best.pt").epoch == best
    return folder


def unfinished(finished, mode, to="run"):
    """Copy a run folder without its summary; return the options that made it, and its end."""
    shutil.copytree(finished / mode, to)
    Path(to, "summary.json").unlink()
    return [*TINY, "--context_mode", mode, "--output_dir", to], end_of(finished / mode)


@pytest.mark.parametrize("left", [b"", b"half", None])
@pytest.mark.parametrize(("mode", "best"), [("E", 1), ("R0", 2)])
def test_auto_takes_the_newest_that_is_whole(train_py, finished, left, mode, best):
    method, expected = unfinished(finished, mode)
    damaged = Path("run/checkpoint.pt").read_bytes()[:-100] if left is None else left
    Path("run/checkpoint.pt").write_bytes(damaged)
    status, out, err = train_py(*method, "--resume", "auto")
    assert status == 0
    trained = [int(line[5:].split("/")[0]) for line in out if "  lr " in line]
    assert trained == list(range(best + 1, 3))
    assert end_of("run") == expected
    if damaged:
        assert Path("run/checkpoint.pt.damaged").read_bytes() == damaged
        assert "it is kept as checkpoint.pt.damaged" in err[0]


def test_a_hint_names_a_checkpoint_that_is_whole(train_py, finished):
    method, _ = unfinished(finished, "E")
    Path("run/checkpoint.pt").write_bytes(b"half")
    status, _, err = train_py(*method)
    assert status == 2 and "continue it with --resume run/model_best.pt" in err[0]


def test_auto_begins_again_where_none_is_whole(train_py, finished):
    method, expected = unfinished(finished, "R0")
    for name in ("checkpoint.pt", "model_best.pt"):
        Path("run", name).write_text("no checkpoint")
    Path("run/checkpoint.pt.damaged").write_text("an earlier one")
    status, _, err = train_py(*method, "--resume", "auto")
    assert (status, len(err)) == (0, 3) and "the run begins again" in err[2]
    assert end_of("run") == expected
    for name in ("checkpoint.pt.damaged-2", "model_best.pt.damaged"):
        assert Path("run", name).read_text() == "no checkpoint"
    assert Path("run/checkpoint.pt.damaged").read_text() == "an earlier one"


def test_an_older_best_is_not_what_a_run_goes_on_from(refused, finished):
    unfinished(finished, "E")
    line = refused("--resume", "run/model_best.pt", "--device", "cpu")
    assert "that run/model_best.pt is not the state of" in line


@pytest.mark.parametrize(
    ("checkpoint", "best", "newest"),
    [((1, 2), (1, 0), "checkpoint.pt"), ((1, 2), (2, 0), "model_best.pt"),
     ((1, 2), (1, 3), "model_best.pt"), ((2, 0), (2, 0), "checkpoint.pt")],
)  # fmt: skip
def test_the_newest_has_the_most_steps(here, checkpoint, best, newest):
    folder = run_folder.RunFolder(here, read_options(TINY)[0])
    for path, (epoch, step) in ((folder.checkpoint, checkpoint), (folder.best, best)):
        totals = GOOD | {"steps": step} if step else {}
        save_checkpoint(path, Checkpoint(epoch, {}, {}, {}, [], totals=totals))
    assert folder.read_checkpoints().name == newest


@pytest.mark.parametrize("resume", ["auto", "run/checkpoint.pt", "run/model_best.pt"])
def test_each_file_is_read_once_and_let_go(train_py, finished, monkeypatch, resume):
    method, _ = unfinished(finished, "R0")
    left, load, read = [], torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **how: read.append(path) or load(path, **how))

    def run(self):
        gc.collect()
        left.extend(c for c in gc.get_objects() if type(c) is Checkpoint and c.state_dict)

    monkeypatch.setattr(training.Training, "run", run)
    assert train_py(*method, "--resume", resume)[0] == 0
    assert sorted(path.name for path in read) == ["checkpoint.pt", "model_best.pt"]
    assert left == []


@pytest.mark.parametrize("why", ["memory", "disk", "later version"])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(refused, finished, monkeypatch, why):
    method, _ = unfinished(finished, "R0")
    error = {"memory": MemoryError(), "disk": OSError(5, "Input/output error")}.get(why)
    if error:
        monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    else:
        contents = torch.load("run/checkpoint.pt", weights_only=True)
        torch.save(contents | {"format": "contsup-2", "new": 1}, "run/checkpoint.pt")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    refused(*method, "--resume", "auto")
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_of_before_histories_goes_on(train_py, finished):
    """As early versions wrote them: its metrics are those of metrics.jsonl."""
    _, expected = unfinished(finished, "E")
    contents = torch.load("run/model_best.pt", weights_only=True)
    contents = {k: v for k, v in contents.items() if k not in ("history", "totals", "peak")}
    torch.save(contents, "run/checkpoint.pt")
    assert train_py("--resume", "run/checkpoint.pt", "--device", "cpu")[0] == 0
    assert end_of("run")["metrics"] == expected["metrics"]


# How files are written


def test_a_file_is_on_the_disk_before_it_has_its_name(here, monkeypatch):
    """In this order: the contents, the name, the folder that has the name."""
    done = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        done.append("folder" if is_folder else os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    files.write_text(here / "a", "12345")
    assert done == [5, "replace", "folder"]
    done.clear()
    save_checkpoint(here / "a.pt", Checkpoint(1, {"w": torch.zeros(10)}, {}, {}, []))
    assert done == [(here / "a.pt").stat().st_size, "replace", "folder"]


def test_an_error_of_the_machine_is_not_the_files(here, monkeypatch):
    """Too little memory does not make a file damaged, and a CUDA error is no full disk."""
    checkpoint = Checkpoint(1, {"w": torch.zeros(10)}, {}, {}, [])
    save_checkpoint(here / "a.pt", checkpoint)
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError("can't allocate memory")))
    with pytest.raises(Unreadable):
        read_checkpoint(here / "a.pt")
    monkeypatch.setattr(
        torch, "save", mock.Mock(side_effect=RuntimeError("CUDA error: misaligned"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_checkpoint(here / "a.pt", checkpoint)
