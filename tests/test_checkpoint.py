"""Checkpoint files that were handed in: what is damaged or meant to do harm is refused."""

import copy
import io
import os
import pickle
import stat
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from cli import end_of, few_test_images, main

from configs import InputError
from engine import files, run_folder, training
from engine.checkpoint import CannotSave, Checkpoint, read_checkpoint, save_checkpoint
from engine.options import read_options

TINY = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--local_module_num", "2",
    "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
    "--batch_size", "8", "--epochs", "2", "--device", "cpu",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few_test_images(patch)
        save = training.save_checkpoint
        kept = []
        patch.setattr(
            training, "save_checkpoint", lambda path, state: kept.append(copy.deepcopy(state))
        )
        import train

        train.run([*TINY, "--output_dir", "run", "--checkpoint_every", "2"])
        state = next(state for state in kept if (state.epoch, state.step) == (1, 2))
        save(folder / "middle.pt", state)
    return folder / "middle.pt"


def refused(monkeypatch, capsys, path, *options):
    """The line that a file is refused with, alike for both uses; nothing is made or run."""
    lines = []
    for use in ("--evaluate", "--resume"):
        before = sorted(Path().rglob("*"))
        status, out, err = main(monkeypatch, capsys, *options, use, path)
        assert (status, len(err)) == (2, 1), (use, err)
        assert err[0].startswith("train.py: error: ")
        assert not any("epoch" in line for line in out)
        assert sorted(Path().rglob("*")) == before
        lines.append(err[0])
    return lines[-1]


class Malicious:
    """Runs code where it is unpickled as any object."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def rewritten(path, to, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip file whose entries are `change(name, data)`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_pickle_that_runs_code(monkeypatch, capsys, trained):
    code = pickle.dumps({"state_dict": Malicious()}, protocol=2)
    rewritten(trained, "bad.pt", lambda name, data: code if name.endswith("data.pkl") else data)
    line = refused(monkeypatch, capsys, "bad.pt")
    assert "holds more than tensors and plain values, and might run code" in line
    assert "weights_only" not in line  # no advice to load it in spite of that
    Path("plain.pt").write_bytes(code)
    refused(monkeypatch, capsys, "plain.pt")
    assert not Path("executed").exists()
    pickle.loads(code)  # it would have
    assert Path("executed").exists()


def test_a_zip_bomb(monkeypatch, capsys, trained):
    zeros = bytes(200 * 2**20)
    rewritten(
        trained, "bomb.pt", lambda name, data: zeros if name.endswith("data/0") else data,
        zipfile.ZIP_DEFLATED,
    )  # fmt: skip
    assert Path("bomb.pt").stat().st_size < 2 * 2**20
    monkeypatch.setattr(torch, "load", None)  # it does not get there
    assert "it is compressed" in refused(monkeypatch, capsys, "bomb.pt")


def test_entries_that_overlap(monkeypatch, capsys, trained):
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
    assert "larger than the file" in refused(monkeypatch, capsys, "overlap.pt")


def test_a_flipped_bit_of_a_weight(monkeypatch, capsys, trained):
    """PyTorch itself does not see it."""
    data = bytearray(trained.read_bytes())
    with zipfile.ZipFile(trained) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    data[entry.header_offset + 1000] ^= 1
    Path("flipped.pt").write_bytes(data)
    torch.load("flipped.pt", weights_only=True)
    line = refused(monkeypatch, capsys, "flipped.pt")
    assert entry.filename in line
    assert "damaged" in line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(monkeypatch, capsys, trained, share):
    data = trained.read_bytes()
    Path("cut.pt").write_bytes(data[: int(len(data) * share)])
    refused(monkeypatch, capsys, "cut.pt")


def changed(trained, **parts):
    contents = torch.load(trained, weights_only=True)
    torch.save(contents | parts, "changed.pt")
    return contents


@pytest.mark.parametrize(
    "bad",
    [
        lambda t: t.to(torch.complex64),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: t[..., None],
        lambda t: t.tolist(),
        lambda t: None,
    ],
    ids=["complex", "meta", "sparse", "shape", "list", "none"],
)
@pytest.mark.parametrize("part", ["state_dict", "momentum"])
def test_other_than_plain_tensors_of_the_right_shape(monkeypatch, capsys, trained, part, bad):
    contents = torch.load(trained, weights_only=True)
    name = next(iter(contents[part]))
    contents[part][name] = bad(contents[part][name])
    torch.save(contents, "changed.pt")
    status, _, err = main(monkeypatch, capsys, "--resume", "changed.pt", "--output_dir", "run")
    assert (status, len(err)) == (2, 1)
    assert not Path("run").exists()


ROW = {"epoch": 1, "test_error": 90.0, "samples_per_second": 10.0, "peak_memory_bytes": 1}
GOOD = {"losses": torch.zeros(2, dtype=torch.float64), "wrong": torch.zeros(2, dtype=torch.float64),
        "finite_steps": torch.zeros(2, dtype=torch.int64), "samples": 16, "steps": 2, "full": 8,
        "seconds": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "parts",
    [
        {"epoch": -1}, {"epoch": True}, {"epoch": 1.0}, {"epoch": "1"},
        {"options": None}, {"options": [1]}, {"options": {1: 2}},
        {"classes": "abc"}, {"classes": [1]},
        {"history": [1]}, {"history": [ROW | {"epoch": 2}]}, {"history": [ROW, ROW]},
        {"history": [ROW | {"test_error": float("nan")}]}, {"history": [{}]},
        {"scalers": [{}]}, {"scalers": [1]}, {"scalers": None},
        {"totals": {"steps": -1}}, {"totals": [1]}, {"totals": {"steps": 2}},
        {"totals": GOOD | {"losses": torch.zeros(3, dtype=torch.float64)}},
        {"totals": GOOD | {"losses": torch.zeros(2)}},
        {"totals": GOOD | {"steps": 2.0}}, {"totals": GOOD | {"steps": 99}},
        {"totals": GOOD | {"steps": 0}}, {"totals": GOOD | {"samples": "16"}},
        {"peak": {"bytes": 1}}, {"peak": {"bytes": None, "largest": 1, "steps": 1, "how": ""}},
        {"more": 1}, {"format": "contsup-9"},
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_are_not_what_they_should_be(monkeypatch, capsys, trained, parts):
    changed(trained, **parts)
    before = sorted(Path().iterdir())
    status, _, err = main(monkeypatch, capsys, "--resume", "changed.pt", "--output_dir", "run")
    assert (status, len(err)) == (2, 1), err
    assert sorted(Path().iterdir()) == before


def test_the_unchanged_file_is_taken(monkeypatch, capsys, trained):
    changed(trained)
    status, _, err = main(monkeypatch, capsys, "--resume", "changed.pt", "--output_dir", "run")
    assert (status, err) == (0, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": "elsewhere"}, "'output_dir' 'elsewhere', which no run has"),
        ({"resume": "auto"}, "which no run has"),
        ({"cuts": ["--output_dir=elsewhere"]}, "which no run has"),
        ({"cuts": [["--output_dir=elsewhere", 1]]}, "which no run has"),
        ({"loss_scale": {"a": 1}}, "which no run has"),
        ({"checkpoint": "../elsewhere"}, "a folder out of the run's, ../elsewhere"),
        ({"checkpoint": "/elsewhere"}, "a folder out of the run's, /elsewhere"),
        ({"checkpoint": "a/../../elsewhere"}, "a folder out of the run's"),
        ({"name": "../elsewhere"}, "no part of a folder's name"),
        ({"no": "a/../../elsewhere"}, "no part of a folder's name"),
        ({"unheard_of": 1}, "have 'unheard_of' 1, which no run has"),
        ({"layers --output_dir": 1}, "which no run has"),
        ({"output_dir=elsewhere/a": []}, "which no run has"),
        ({"output_dir=elsewhere/a": "x"}, "which no run has"),
        ({"print-freq": 1}, "which no run has"),
        ({"layers": "many"}, "'many' is not a whole number"),
        ({"context_mode": "../../E"}, "unknown context_mode"),
        ({"aux_net_config": "../../1c2f"}, "unknown aux_net_config"),
    ],
)
def test_options_in_a_file_lead_nowhere_else(monkeypatch, capsys, trained, options, message):
    contents = torch.load(trained, weights_only=True)
    changed(trained, options=contents["options"] | options)
    assert message in refused(monkeypatch, capsys, "changed.pt")
    assert [path.name for path in Path().iterdir()] == ["changed.pt"]
    assert not list(Path("..").glob("elsewhere"))


@pytest.mark.parametrize(
    "typed",
    [
        ["--context_mode", "../../../elsewhere"], ["--aux_net_config", "/../../elsewhere/1c2f"],
        ["--data_dir", "../.."], ["--name", ".."], ["--no", ".."],
    ],
)  # fmt: skip
def test_a_run_name_is_one_folder_below_runs(typed):
    name = run_folder.run_name(read_options([*TINY, *typed, "--dataset", "folder"])[0])
    assert Path(name).name == name
    assert name not in ("", ".", "..")
    assert "/" not in name


def test_a_long_run_name_is_cut_and_told_apart(monkeypatch, capsys):
    names = set()
    for last in "ab":
        name = run_folder.run_name(
            read_options([*TINY, "--name", "é" * 63 + last, "--no", "é" * 64])[0]
        )
        assert len(name.encode()) <= 200
        names.add(name)
    assert len(names) == 2
    assert main(monkeypatch, capsys, *TINY, "--name", "é" * 64, "--no", "é" * 64)[0] == 0
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "x" * 300)
    assert (status, len(err)) == (2, 1)
    assert "File name too long" in err[0]


# Which one a run goes on from


def run_to(monkeypatch, capsys, folder, mode="R0"):
    method = [*TINY, "--context_mode", mode, "--output_dir", folder]
    assert main(monkeypatch, capsys, *method)[0] == 0
    return end_of(Path(folder))


@pytest.mark.parametrize("left", [b"", b"half", None])
@pytest.mark.parametrize(("mode", "best"), [("E", 1), ("R0", 2)])
def test_auto_takes_the_newest_that_is_whole(monkeypatch, capsys, left, mode, best):
    whole = run_to(monkeypatch, capsys, "whole", mode)
    run_to(monkeypatch, capsys, "run", mode)
    Path("run/summary.json").unlink()
    damaged = Path("run/checkpoint.pt").read_bytes()[:-100] if left is None else left
    Path("run/checkpoint.pt").write_bytes(damaged)
    assert read_checkpoint("run/model_best.pt").epoch == best
    method = [*TINY, "--context_mode", mode, "--output_dir", "run", "--resume", "auto"]
    status, out, err = main(monkeypatch, capsys, *method)
    assert status == 0
    trained = [int(line[5:].split("/")[0]) for line in out if "  lr " in line]
    assert trained == list(range(best + 1, 3))
    assert end_of(Path("run")) == whole
    if damaged:
        assert Path("run/checkpoint.pt.damaged").read_bytes() == damaged
        assert "it is kept as checkpoint.pt.damaged" in err[0]


def test_auto_begins_again_where_none_is_whole(monkeypatch, capsys):
    whole = run_to(monkeypatch, capsys, "whole")
    run_to(monkeypatch, capsys, "run")
    Path("run/summary.json").unlink()
    for name in ("checkpoint.pt", "model_best.pt"):
        Path("run", name).write_text("no checkpoint")
    method = [*TINY, "--output_dir", "run", "--resume", "auto"]
    status, _, err = main(monkeypatch, capsys, *method)
    assert (status, len(err)) == (0, 2)
    assert end_of(Path("run")) == whole
    for name in ("checkpoint.pt", "model_best.pt"):
        assert Path("run", f"{name}.damaged").read_text() == "no checkpoint"


def test_the_middle_of_an_epoch_keeps_its_steps(monkeypatch, capsys, trained):
    for option, value in (("--batch_size", "4"), ("--seed", "1"), ("--limit_per_class", "3")):
        status, _, err = main(
            monkeypatch, capsys, "--resume", trained, option, value, "--output_dir", "run"
        )
        assert (status, len(err)) == (2, 1)
        assert f"middle of epoch 2, so {option.strip('-')} must stay" in err[0]
    assert not Path("run").exists()
    status, _, _ = main(
        monkeypatch, capsys, "--resume", trained, "--lr", "0.01", "--output_dir", "run"
    )
    assert status == 0


def test_a_checkpoint_of_before_histories_goes_on(monkeypatch, capsys):
    """As earlier versions wrote them: its metrics are those of metrics.jsonl."""
    whole = run_to(monkeypatch, capsys, "whole")
    run_to(monkeypatch, capsys, "run")
    Path("run/summary.json").unlink()
    contents = torch.load("run/model_best.pt", weights_only=True)
    contents = {k: v for k, v in contents.items() if k not in ("history", "totals", "peak")}
    torch.save(contents, "run/checkpoint.pt")
    assert main(monkeypatch, capsys, "--resume", "run/checkpoint.pt")[0] == 0
    assert end_of(Path("run"))["metrics"] == whole["metrics"]


def test_what_cannot_be_saved_leaves_what_was_there(here):
    before = Checkpoint(1, {"a": torch.zeros(2)}, {}, {}, [])
    save_checkpoint(here / "a.pt", before)
    with pytest.raises(CannotSave, match=r"cannot write .*missing/a.pt: .*No such file"):
        save_checkpoint(here / "missing" / "a.pt", before)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(here / "a.pt", before._replace(options={"a": lambda: None}))
    assert read_checkpoint(here / "a.pt").epoch == 1
    assert [path.name for path in here.iterdir()] == ["a.pt"]


def test_a_folder_or_nothing_is_no_checkpoint(here):
    for path in (here, here / "nothing", "\0"):
        with pytest.raises(InputError, match="there is no checkpoint"):
            read_checkpoint(path)


def test_an_older_best_is_not_what_a_run_goes_on_from(monkeypatch, capsys):
    run_to(monkeypatch, capsys, "run", "E")
    Path("run/summary.json").unlink()
    assert read_checkpoint("run/model_best.pt").epoch == 1
    status, _, err = main(monkeypatch, capsys, "--resume", "run/model_best.pt")
    assert (status, len(err)) == (2, 1)
    assert "that run/model_best.pt is not the state of" in err[0]


class StopHere(Exception):
    """Stands for a power cut."""


def test_auto_after_a_cut_between_the_two_files_of_the_last_epoch(monkeypatch, capsys):
    whole = run_to(monkeypatch, capsys, "whole")
    save = training.save_checkpoint

    def save_or_stop(path, state):
        if path.name == "checkpoint.pt" and state.epoch == 2:
            raise StopHere
        save(path, state)

    monkeypatch.setattr(training, "save_checkpoint", save_or_stop)
    with pytest.raises(StopHere):
        run_to(monkeypatch, capsys, "run")
    monkeypatch.setattr(training, "save_checkpoint", save)
    states = [read_checkpoint(f"run/{name}.pt").epoch for name in ("checkpoint", "model_best")]
    assert states == [1, 2]
    method = [*TINY, "--output_dir", "run", "--resume", "auto"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    assert end_of(Path("run")) == whole


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
    assert folder.newest().name == newest


def test_a_second_damaged_file_is_kept_too(monkeypatch, capsys):
    run_to(monkeypatch, capsys, "run")
    for number, name in enumerate(("checkpoint.pt.damaged", "checkpoint.pt.damaged-2")):
        Path("run/summary.json").unlink()
        Path("run/checkpoint.pt").write_text(f"damage {number}")
        assert main(monkeypatch, capsys, *TINY, "--output_dir", "run", "--resume", "auto")[0] == 0
        assert Path("run", name).read_text() == f"damage {number}"
    assert Path("run/checkpoint.pt.damaged").read_text() == "damage 0"


@pytest.mark.parametrize("why", ["memory", "disk", "later version"])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(monkeypatch, capsys, why):
    run_to(monkeypatch, capsys, "run")
    Path("run/summary.json").unlink()
    error = {"memory": MemoryError(), "disk": OSError(5, "Input/output error")}.get(why)
    if error:
        monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    else:
        contents = torch.load("run/checkpoint.pt", weights_only=True)
        torch.save(contents | {"format": "contsup-2", "new": 1}, "run/checkpoint.pt")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run", "--resume", "auto")
    assert (status, len(err)) == (2, 1)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_gap_in_the_metrics_of_an_earlier_version(monkeypatch, capsys):
    """What is before it is left out: the run that goes on can be read again."""
    method = [*TINY, "--epochs", "4", "--output_dir", "run"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    contents = torch.load("run/checkpoint.pt", weights_only=True)
    kept = {k: v for k, v in contents.items() if k not in ("history", "totals", "peak")}
    torch.save(kept | {"epoch": 3}, "run/checkpoint.pt")
    Path("run/summary.json").unlink()
    lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text(lines[0] + lines[2])
    assert main(monkeypatch, capsys, *method, "--resume", "auto")[0] == 0
    assert [row["epoch"] for row in read_checkpoint("run/checkpoint.pt").history] == [3, 4]


def test_two_directories_in_one_zip_file(monkeypatch, capsys, trained):
    """Python would read the one that ends at the end, PyTorch the one where the end says it is."""
    good = trained.read_bytes()
    for shift in (-1, 1, 100):
        data = bytearray(good)
        for at in (len(good) - 6, len(good) - 50):  # the offset of the directory, twice
            number = int.from_bytes(data[at : at + 4], "little") + shift
            data[at : at + 4] = number.to_bytes(4, "little")
        Path("two.pt").write_bytes(data)
        refused(monkeypatch, capsys, "two.pt")
    Path("two.pt").write_bytes(b"more in front" + good)
    refused(monkeypatch, capsys, "two.pt")
    Path("two.pt").write_bytes(good + b"more behind")
    refused(monkeypatch, capsys, "two.pt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_takes_memory(monkeypatch, capsys, trained, protocol):
    """weights_only lets it make an array of any size."""

    class Large:
        def __reduce__(self):
            return bytearray, (2**40,)

    code = pickle.dumps({"state_dict": Large()}, protocol=protocol)
    rewritten(trained, "bad.pt", lambda name, data: code if name.endswith("data.pkl") else data)
    assert "might run code" in refused(monkeypatch, capsys, "bad.pt")


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "parts",
    [
        {"format": nested(60)}, {"history": [ROW | {"more": nested(60)}]}, {"epoch": nested(60)},
        {"options": {"layers": nested(60)}},
        {"totals": GOOD | {"samples": nested(60)}}, {"history": [ROW | {"more": torch.zeros(1)}]},
        {"state_dict": torch.zeros(2)}, {"state_dict": [1]}, {"momentum": None},
        {"totals": GOOD | {"samples": 0}}, {"totals": GOOD | {"seconds": 0.0}},
        {"totals": GOOD | {"losses": torch.full((2,), float("nan"), dtype=torch.float64)}},
        {"totals": GOOD | {"steps": "2"}},
        {"peak": {"bytes": "1", "largest": 1, "steps": 1, "how":
                  "live tensor storage counted by engine/memory.py in the first "
                  "two full training steps"}},
        {"peak": {"bytes": 1e308, "largest": 1, "steps": 1, "how": ""}},
        {"momentum": {"unknown": torch.zeros(1)}},
    ],
    ids=lambda parts: next(iter(parts)),
)  # fmt: skip
def test_crafted_parts_end_in_a_line(monkeypatch, capsys, trained, parts):
    """What loads slowly, or is of the wrong type somewhere deep, gets no further than the check."""
    changed(trained, **parts)
    status, _, err = main(monkeypatch, capsys, "--resume", "changed.pt", "--output_dir", "run")
    assert (status, len(err)) == (2, 1), err
    assert not Path("run").exists()


def test_a_small_file_that_asks_for_a_large_network(monkeypatch, capsys, trained):
    contents = torch.load(trained, weights_only=True)
    huge = {"aux_net_widen": 1000.0, "aux_net_feature_dim": 65536}
    for options in (huge, {"layers": 99998}):
        changed(trained, options=contents["options"] | options)
        line = refused(monkeypatch, capsys, "changed.pt")
        assert "the checkpoint is of another architecture" in line


def test_scalers_of_another_number_of_modules(monkeypatch, capsys):
    half = [*TINY, "--amp", "fp16"]
    assert main(monkeypatch, capsys, *half, "--output_dir", "half")[0] == 0
    contents = torch.load("half/checkpoint.pt", weights_only=True)
    torch.save(contents | {"scalers": contents["scalers"][:1]}, "changed.pt")
    method = ["--resume", "changed.pt", "--epochs", "3", "--output_dir", "run"]
    status, _, err = main(monkeypatch, capsys, *method)
    assert (status, len(err)) == (2, 1)
    assert "another number of modules" in err[0]


# How files are written


def test_a_file_is_on_the_disk_before_it_has_its_name(here, monkeypatch):
    """In this order: the contents, the name, the folder that has the name."""
    done = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        size = os.fstat(handle).st_size
        done.append((kind, size if kind == "file" else None))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    files.write_text(here / "a", "12345")
    assert done == [("file", 5), "replace", ("folder", None)]
    done.clear()
    save_checkpoint(here / "a.pt", Checkpoint(1, {"w": torch.zeros(10)}, {}, {}, []))
    assert done == [("file", (here / "a.pt").stat().st_size), "replace", ("folder", None)]
