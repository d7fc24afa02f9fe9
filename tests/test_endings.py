"""How runs end that can't go on: by signals, full disks, divergence, and other runs."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cli import end_of, main
from fork_server import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import train
from engine import run_folder
from engine import step as engine
from engine import tensorboard as board
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.device import compile_errors
from engine.signals import INTERRUPTS, Interrupts

TINY = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--local_module_num", "2",
    "--local_loss_mode", "cross_entropy", "--context_mode", "E",
    "--batch_size", "4", "--epochs", "3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(server):
    assert server.run(*TINY, "--output_dir", "whole").status == 0
    return end_of(server.folder / "whole")


def stopped_early(server, name):
    """A run that was stopped in its first epoch or soon after; gives its checkpoint."""
    ended = server.run(
        *TINY, "--output_dir", name, line=300, files=["engine/step.py"], send=["SIGTERM"]
    )
    assert ended.status == 143
    checkpoint = server.folder / name / "checkpoint.pt"
    assert read_checkpoint(checkpoint).epoch <= 1
    return checkpoint


# Signals


def test_a_second_signal_stops_at_once(server):
    checkpoint = stopped_early(server, "twice")
    before = checkpoint.read_bytes()
    for first, second, status in (("SIGINT", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)):
        ended = server.run(
            *TINY, "--output_dir", "twice", "--resume", "auto",
            line=300, files=["engine/step.py"], send=[first, 0.6, second],
        )  # fmt: skip
        assert (ended.status, ended.err[-1]) == (status, "stopped at once")
        assert checkpoint.read_bytes() == before


def test_the_same_signal_by_two_ways_is_one(server, whole):
    """As command.sh hands it on, and a scheduler sends it to all processes of a job."""
    method = [*TINY, "--output_dir", "both_ways", "--resume", "auto"]
    both = {"line": 300, "files": ["engine/step.py"], "send": ["SIGTERM", "SIGTERM"]}
    ended = server.run(*method, **both)
    assert (ended.status, len(ended.err)) == (143, 3)
    assert "continue with --resume both_ways/checkpoint.pt" in ended.err[-1]
    assert server.run(*method).status == 0
    assert end_of(server.folder / "both_ways") == whole


def test_a_signal_after_the_last_step_stops_what_comes_next(server, whole):
    method = [*TINY, "--output_dir", "last"]
    ended = server.run(*method, line=1, files=["engine/provenance.py"], send=["SIGINT"])
    assert ended.status == 130  # before the first step: nothing there
    shutil.rmtree(server.folder / "last")
    lines = server.run(*method, line=0, files=["engine/files.py"]).lines
    shutil.rmtree(server.folder / "last")
    ended = server.run(
        *method, line=lines - 5, files=["engine/files.py"], send=["SIGINT"]
    )  # summary.json
    assert ended.status == 130
    assert ended.err[-1] == "train.py: note: stopped by SIGINT; the run is finished"
    assert end_of(server.folder / "last") == whole


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_python_imports(name, status):
    command = [sys.executable, ROOT / "train.py", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in `pytest &`
    )  # fmt: skip
    caught = Path(f"/proc/{process.pid}/status")
    if not caught.exists():
        process.communicate()
        pytest.skip("/proc does not say which signals a process handles")
    bit = 1 << (signal.SIGTERM - 1)
    while not int(re.search(r"SigCgt:\s+(\w+)", caught.read_text())[1], 16) & bit:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.split()) == (status, "", ["interrupted"])


# Full disks and unwritable folders


def test_a_checkpoint_that_cannot_grow_leaves_the_last_one(server, whole):
    checkpoint = stopped_early(server, "limited")
    before = checkpoint.read_bytes()
    method = [*TINY, "--output_dir", "limited", "--resume", "auto"]
    ended = server.run(*method, limit=500_000)
    assert ended.status == 1
    (line,) = ended.err
    assert re.match(r"train.py: error: cannot write limited/\S+\.pt: .*File too large", line)
    assert line.endswith("continue with --resume limited/checkpoint.pt")
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("*.tmp"))
    assert server.run(*method).status == 0
    assert end_of(checkpoint.parent) == whole


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(server, whole):
    """A disk that the first epoch's two checkpoints fit on, and no third beside them."""
    disk = server.folder / "disk"
    with small_disk(disk, "2m"):
        method = [*TINY, "--output_dir", "disk/run", "--resume", "auto"]
        ended = server.run(*method)
        assert ended.status == 1
        assert "No space left on device; continue with --resume disk/run/" in ended.err[-1]
        assert read_checkpoint(disk / "run/checkpoint.pt").epoch == 1
        assert not list(disk.rglob("*.tmp"))
        shutil.copytree(disk / "run", server.folder / "moved")  # to where there is room
    assert server.run(*method[:-4], "--output_dir", "moved", "--resume", "auto").status == 0
    assert end_of(server.folder / "moved") == whole


def test_tensorboard_and_metrics_may_fail_but_not_the_summary(server, whole):
    """A disk that takes the options, and then next to nothing; the checkpoints are elsewhere."""
    disk, checkpoints = server.folder / "tiny_disk", server.folder / "checkpoints"
    with small_disk(disk, "16k"):
        method = [*TINY, "--output_dir", "tiny_disk", "--checkpoint", str(checkpoints)]
        ended = server.run(*method)
        assert ended.status == 1
        metrics_note, board_note, summary_error = ended.err
        assert re.match("train.py: note: TensorBoard's events can't be written", board_note)
        assert re.match(r"train.py: note: tiny_disk/metrics.jsonl can't be written", metrics_note)
        assert re.match(r"train.py: error: cannot write tiny_disk/summary.json", summary_error)
        assert sum(line.startswith("epoch   3/3  lr") for line in ended.out) == 1
        for path in disk.glob("events*"):
            path.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert server.run(*method, "--resume", "auto").status == 0
        shutil.copytree(disk, server.folder / "room")
    for path in checkpoints.iterdir():
        shutil.copy(path, server.folder / "room")
    end = end_of(server.folder / "room")
    assert end["metrics"] == whole["metrics"]
    assert end["states"]["checkpoint.pt"][0] == whole["states"]["checkpoint.pt"][0]


def test_a_failing_board_is_said_once(here, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board.SummaryWriter, "add_scalar", fail)
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert (status, len(err)) == (0, 1)
    assert "TensorBoard's events can't be written" in err[0]


def test_metrics_that_failed_are_made_up_for(here, monkeypatch, capsys):
    whole_open, failed = Path.open, []

    def fail_once(path, mode="r", *args, **options):
        if path.name == "metrics.jsonl" and mode == "a" and not failed:
            failed.append(path)
            with whole_open(path, "a") as file:
                file.write('{"epoch": 1, "tr')  # and then the disk is full
            raise OSError(28, "No space left on device")
        return whole_open(path, mode, *args, **options)

    after_two, add_epoch = [], run_folder.RunFolder.add_epoch

    def add_and_look(self, metrics, rows):
        add_epoch(self, metrics, rows)
        if metrics["epoch"] == 2:
            found = self.metrics.read_text().splitlines()
            after_two.append([json.loads(line)["epoch"] for line in found])

    monkeypatch.setattr(run_folder.RunFolder, "add_epoch", add_and_look)
    monkeypatch.setattr(Path, "open", fail_once)
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert (status, len(err), len(failed)) == (0, 1, 1)
    assert "run/metrics.jsonl can't be written" in err[0]
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert after_two == [[1, 2]]  # as soon as it can be written, not at the end


def test_output_that_cannot_be_written(server, whole):
    ended = server.run(*TINY, "--output_dir", "silent", stdout="/dev/full")
    assert ended.status == 0
    (line,) = ended.err
    assert "the output can't be written ([Errno 28] No space left on device)" in line
    assert end_of(server.folder / "silent") == whole
    for other in (["--dry_run"], ["--evaluate", "silent/checkpoint.pt"]):
        ended = server.run(*TINY, *other, stdout="/dev/full")
        assert (ended.status, len(ended.err)) == (1, 1), other
        assert "No space left on device" in ended.err[0]


def test_a_folder_that_cannot_be_made(here, monkeypatch, capsys):
    for resume in ([], ["--resume", "auto"]):
        folder = ["--output_dir", "/proc/version/run"]
        status, _, err = main(monkeypatch, capsys, *TINY, *folder, *resume)
        assert (status, len(err)) == (2, 1)
        assert "cannot write the run folder /proc/version/run" in err[0]


# Divergence


def loss_by_loss(monkeypatch):
    """Every loss of the training, as floats by (epoch, step, module), however it is summed."""
    found, add = {}, engine.Totals.add

    def note(self, module, loss, *others):
        if torch.is_grad_enabled():
            epoch = 1 + (len(found) // len(self.modules)) // 10
            found[epoch, self.steps + 1, module.index] = float(loss)
        add(self, module, loss, *others)

    monkeypatch.setattr(engine.Totals, "add", note)
    return found


@pytest.mark.parametrize("lr", ["1000", "100", "30"])
@pytest.mark.parametrize("print_freq", [1, 3])
def test_a_loss_that_is_not_finite_ends_the_run(here, monkeypatch, capsys, lr, print_freq):
    found = loss_by_loss(monkeypatch)
    method = [*TINY, "--limit_per_class", "4", "--local_module_num", "3", "--context_mode", "R1E"]
    status, _, err = main(
        monkeypatch, capsys, *method, "--no-cos_lr", "--lr", lr, "-p", print_freq,
        "--output_dir", "run",
    )  # fmt: skip
    assert (status, len(err)) == (3, 1)
    (_, step, module) = next(where for where, loss in found.items() if not math.isfinite(loss))
    assert f"the loss of module {module} is not finite from step {step} of epoch 1 on" in err[0]
    last = max(step for _, step, _ in found)
    assert last == min(10, math.ceil(step / print_freq) * print_freq)  # of 10 an epoch
    assert not Path("run/checkpoint.pt").exists()
    assert err[0].endswith("no checkpoint has been written, so there is nothing to continue from")


def poison(monkeypatch, step, infinity):
    """After so many steps of module 1, have a weight of it be not finite."""
    count, take = [0], engine.LocalSGD.step_and_free

    def take_and_poison(self):
        take(self)
        if self.param_groups[0]["params"][0].shape[0] == 32:  # module 1 begins at stage 2
            count[0] += 1
            if count[0] == step:
                with torch.no_grad():
                    self.param_groups[0]["params"][-1][0] = infinity

    monkeypatch.setattr(engine.LocalSGD, "step_and_free", take_and_poison)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (10, [], "the test loss of module 1 is not finite after epoch 2"),
        (7, ["--checkpoint_every", "2"], "module 1 is not finite after step 2 of epoch 2"),
        (6, ["--checkpoint_every", "3", "-p", "100"], "of module 1 is not finite from step 2 of"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_take_no_good_ones_place(
    here, monkeypatch, capsys, step, options, message, value
):
    poison(monkeypatch, step, value)
    method = [*TINY, "--context_mode", "R0", "--cuts", "1,0", *options]
    status, _, err = main(monkeypatch, capsys, *method, "--output_dir", "run")
    assert (status, len(err)) == (3, 1)
    assert message in err[0]
    assert "continue with --resume run/checkpoint.pt" in err[0]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1
    for name in ("checkpoint.pt", "model_best.pt"):
        state = read_checkpoint(f"run/{name}")
        assert state.epoch == 1
        assert all(t.isfinite().all() for t in state.state_dict.values())


def test_momentum_that_is_not_finite_is_neither_logged_nor_kept(here, monkeypatch, capsys):
    """The losses and the test are fine yet: the next step would not be."""
    take, count = engine.LocalSGD.step_and_free, [0]

    def take_and_poison(self):
        take(self)
        count[0] += 1
        if count[0] == 20:  # the last of the second epoch: 2 modules, 5 steps an epoch
            self.state[self.param_groups[0]["params"][0]]["momentum_buffer"][0] = math.inf

    monkeypatch.setattr(engine.LocalSGD, "step_and_free", take_and_poison)
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "run")
    assert (status, len(err)) == (3, 1)
    assert "module 1 is not finite after step 5 of epoch 2" in err[0]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1
    assert {read_checkpoint(f"run/{n}.pt").epoch for n in ("checkpoint", "model_best")} == {1}


def test_losses_are_read_where_they_are_shown_and_no_sooner(here, monkeypatch, capsys):
    """Reading waits for the device. Of 10 steps, with a line every 4: after 4, 8 and 10."""
    reads = []
    for name in ("losses", "errors", "first_not_finite"):
        real = getattr(engine.Totals, name)

        def read(self, real=real, name=name):
            if torch.is_grad_enabled():
                reads.append((name, self.steps))
            return real(self)

        monkeypatch.setattr(engine.Totals, name, read)
    counted, by_step = [], engine.train_step

    def count_waits(*arguments):
        with Waits() as waits:
            yield from by_step(*arguments)
        counted.append(waits.count)

    monkeypatch.setattr(engine, "train_step", count_waits)
    method = [*TINY, "--limit_per_class", "4", "--epochs", "1", "-p", "4"]
    assert main(monkeypatch, capsys, *method, "--output_dir", "run")[0] == 0
    assert {steps for _, steps in reads} == {4, 8, 10}
    assert counted == [0] * 10


class Waits(TorchDispatchMode):
    """Counts the operations that would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


def test_a_stopped_run_that_has_diverged_saves_nothing(here, monkeypatch, capsys):
    poison(monkeypatch, 6, math.nan)
    take = engine.LocalSGD.step_and_free

    def take_and_stop(self):
        take(self)
        if not torch.isfinite(self.param_groups[0]["params"][-1]).all():
            INTERRUPTS.asked = signal.SIGTERM

    monkeypatch.setattr(engine.LocalSGD, "step_and_free", take_and_stop)
    method = [*TINY, "--context_mode", "R0", "--cuts", "1,0"]
    status, _, err = main(monkeypatch, capsys, *method, "--output_dir", "run")
    assert (status, len(err)) == (3, 1)
    assert read_checkpoint("run/checkpoint.pt").epoch == 1
    assert read_checkpoint("run/checkpoint.pt").step == 0


def test_anomaly_is_found_from_the_last_checkpoint(here, monkeypatch, capsys):
    method = [*TINY, "--no-cos_lr", "--lr", "1000", "--output_dir", "run"]
    assert main(monkeypatch, capsys, *method)[0] == 3
    status, _, err = main(monkeypatch, capsys, *method, "--detect_anomaly")
    assert (status, len(err)) == (3, 1)
    assert re.search(r"aten\.\w+ makes .* of finite inputs, in the (forward|backward)", err[0])
    assert "local_modules." in err[0]
    status, _, err = main(monkeypatch, capsys, *TINY, "--detect_anomaly", "--compile")
    assert (status, len(err)) == (2, 1)
    assert "--detect_anomaly and --compile exclude each other" in err[0]


def test_detect_anomaly_changes_no_run(here, monkeypatch, capsys):
    for folder, more in (("plain", []), ("watched", ["--detect_anomaly"])):
        assert main(monkeypatch, capsys, *TINY, *more, "--output_dir", folder)[0] == 0
    assert end_of(here / "plain") == end_of(here / "watched")


# Two runs in one folder


def test_a_second_run_into_a_folder_is_refused(server, whole):
    method = [*TINY, "--output_dir", "shared"]
    owner = server.start(*method, line=300, files=["engine/step.py"], send=["SIGSTOP"])
    state = Path(f"/proc/{owner}/stat")
    deadline = time.monotonic() + 60
    while state.read_text().split()[2] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for resume in ([], ["--resume", "auto"]):
        ended = server.run(*method, *resume)
        assert (ended.status, len(ended.err)) == (2, 1)
        assert f"shared is in use by process {owner} on " in ended.err[0]
    os.kill(owner, signal.SIGKILL)
    assert server.wait(owner).status == -signal.SIGKILL
    lock = server.folder / "shared" / run_folder.LOCK
    assert str(owner) in lock.read_text()  # of one that is dead: it is in nobody's way
    assert server.run(*method, "--resume", "auto").status == 0
    assert end_of(server.folder / "shared") == whole


def test_runs_that_share_their_checkpoints_folder(server):
    """Another run folder, but the same --checkpoint."""
    shared = ["--checkpoint", str(server.folder / "both")]
    hold = {"line": 300, "files": ["engine/step.py"], "send": ["SIGSTOP"]}
    owner = server.start(*TINY, "--output_dir", "first", *shared, **hold)
    state, deadline = Path(f"/proc/{owner}/stat"), time.monotonic() + 60
    while state.read_text().split()[2] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ended = server.run(*TINY, "--output_dir", "second", *shared)
    assert (ended.status, len(ended.err)) == (2, 1)
    assert f"both is in use by process {owner} on " in ended.err[0]
    assert not (server.folder / "second").exists()
    os.kill(owner, signal.SIGKILL)
    server.wait(owner)


def test_a_stale_lock_whose_pid_another_process_has(here, monkeypatch, capsys):
    Path("run").mkdir()
    Path("run", run_folder.LOCK).write_text(f"process {os.getppid()} on here\n")
    assert main(monkeypatch, capsys, *TINY, "--output_dir", "run")[0] == 0


def test_a_run_that_does_not_begin_leaves_no_folder(here, monkeypatch, capsys):
    Path("kept").mkdir()
    for folder in ("new/run", "kept"):
        status, _, _ = main(
            monkeypatch, capsys, *TINY, "--dataset", "folder", "--data_dir", "nowhere",
            "--local_module_num", "99", "--output_dir", folder, "--resume", "auto",
        )  # fmt: skip
        assert status == 2
    assert [path.name for path in here.rglob("*")] == ["kept"]


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_what_is_in_the_way_of_a_run_folder(here, monkeypatch, capsys, resume):
    Path("file").write_text("kept")
    status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", "file", *resume)
    assert (status, len(err)) == (2, 1)
    assert "file is a file, so it can't be the run folder" in err[0]
    for name in ("model_best.pt", "metrics.jsonl"):
        Path(name).mkdir()
        Path(name, name).write_text("of no run that is known")
        status, _, err = main(monkeypatch, capsys, *TINY, "--output_dir", name, *resume)
        assert (status, len(err)) == (2, 1)
        assert "without a checkpoint to continue from" in err[0] or "continue it with" in err[0]
        assert Path(name, name).read_text() == "of no run that is known"


# Streams that are closed or full


def test_the_status_is_the_same_where_nothing_can_be_said(server):
    diverging = [*TINY, "--no-cos_lr", "--lr", "1000", "--output_dir", "unsaid"]
    assert server.run(*diverging, stderr="/dev/full", stdout="/dev/full").status == 3
    assert server.run("--layers", "7", stderr="/dev/full").status == 2


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream(here, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--output_dir", "run"])
    monkeypatch.setattr(sys, name, None)
    assert train.main() == 0
    assert Path("run/summary.json").exists()


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        Interrupts().install()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def test_a_compiler_that_ctrl_c_reached_too(here, monkeypatch, capsys):
    def broken(*_):
        INTERRUPTS.asked = signal.SIGINT
        raise compile_errors()[0]("the compiler was killed")

    method = [*TINY, "--output_dir", "run"]
    monkeypatch.setattr(engine, "train_step", broken)
    status, _, err = main(monkeypatch, capsys, *method)
    assert (status, len(err)) == (130, 1)
    assert not Path("run/checkpoint.pt").exists()


def test_a_signal_while_the_first_step_compiles_ends_at_once(monkeypatch):
    ends = []
    monkeypatch.setattr("engine.signals.os._exit", ends.append)
    monkeypatch.setattr("engine.signals.os.write", lambda *_: 0)
    interrupts = Interrupts()
    with interrupts.deferred(at_once=False):
        interrupts.handle(signal.SIGTERM)
        assert (ends, interrupts.asked) == ([143], None)
        interrupts.defer()
        interrupts.handle(signal.SIGTERM)
        assert (ends, interrupts.asked) == ([143], signal.SIGTERM)


# What each step draws


def test_each_module_draws_from_a_seed_of_its_own_in_each_step(here, monkeypatch, capsys):
    seeds, method = {}, [*TINY, "--local_module_num", "2", "--droprate", "0.1"]
    for folder, more in (("one", []), ("two", []), ("other", ["--seed", "1"])):
        seeds[folder] = []
        note = partial(lambda drawn, seed, _: drawn.append(seed), seeds[folder])
        monkeypatch.setattr(engine, "seed_generators", note)
        assert main(monkeypatch, capsys, *method, *more, "--output_dir", folder)[0] == 0
    assert seeds["one"] == seeds["two"]
    assert len({*seeds["one"], *seeds["other"]}) == 2 * 3 * 5 * 2  # epochs, steps, modules


def test_the_time_of_an_epoch_is_that_of_its_parts(server):
    """Of an epoch whose first steps took 1,000 s, as the checkpoint has it."""
    method = [*TINY, "--output_dir", "timed", "--resume", "auto"]
    ended = server.run(*method, line=200, files=["engine/step.py"], send=["SIGTERM"])
    assert ended.status == 143
    path = server.folder / "timed/checkpoint.pt"
    state = read_checkpoint(path)
    assert state.epoch == 0 < state.step
    assert 0 < state.totals["seconds"] < 100
    save_checkpoint(path, state._replace(totals=state.totals | {"seconds": 1000.0}))
    assert server.run(*method).status == 0
    first = json.loads((server.folder / "timed/metrics.jsonl").read_text().splitlines()[0])
    assert first["samples_per_second"] == pytest.approx(20 / 1000, rel=0.1)
    began = (server.folder / "timed/environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in began] == [0, state.step]
