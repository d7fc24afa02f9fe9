"""How runs end that cannot go on: by signals, full disks, divergence, and other runs."""

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
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
import torch
from cli import TINY as OF_16
from cli import end_of, metrics_of
from fork_server import ROOT
from torch.utils.tensorboard import SummaryWriter

import train
from engine import folder_lock, run_folder, training
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.errors import exit_status
from engine.signals import INTERRUPTS, SIGNALS, Interrupts
from engine.step import LocalSGD, Totals
from losses import LOCAL_LOSSES, TaskLoss
from models.torch_internals import compile_errors

TINY = [*OF_16, "--context_mode", "E", "--batch_size", "4", "--seed", "0"]
STEPS = 5
"""Of an epoch."""

STEP_3 = {"call": "train_step", "nth": 3}


@pytest.fixture(scope="module")
def expected(server):
    assert server.run(*TINY, "--output_dir", "expected").status == 0
    return end_of(server.folder / "expected")


def stopped_early(server, name):
    """Stop a run in its first epoch; return its checkpoint."""
    assert server.run(*TINY, "--output_dir", name, **STEP_3, send=["SIGTERM"]).status == 143
    checkpoint = server.folder / name / "checkpoint.pt"
    assert read_checkpoint(checkpoint).done == (0, 3)
    return checkpoint


# Signals


def test_a_second_signal_stops_at_once(server):
    checkpoint = stopped_early(server, "twice")
    before = checkpoint.read_bytes()
    ended = server.run(
        *TINY, "--output_dir", "twice", "--resume", "auto",
        call="train_step", send=["SIGINT", 0.6, "SIGTERM"],
    )  # fmt: skip
    assert (ended.status, ended.err[-1]) == (143, "stopped at once")
    assert checkpoint.read_bytes() == before


def test_the_same_signal_by_two_ways_is_one(server, expected):
    """As command.sh hands it on, and a scheduler sends it to all processes of a job."""
    method = [*TINY, "--output_dir", "both_ways", "--resume", "auto"]
    ended = server.run(*method, **STEP_3, send=["SIGTERM", "SIGTERM"])
    assert (ended.status, len(ended.err)) == (143, 3), ended.err
    assert "continue with --resume both_ways/checkpoint.pt" in ended.err[-1]
    assert server.run(*method).status == 0
    assert end_of(server.folder / "both_ways") == expected


def test_a_signal_before_the_first_step_and_after_the_last(server, expected):
    method = [*TINY, "--output_dir", "last"]
    ended = server.run(*method, call="git_state", files=["engine/provenance.py"], send=["SIGINT"])
    assert (ended.status, ended.err[-1]) == (130, "interrupted")  # there is nothing to save
    assert not (server.folder / "last" / "checkpoint.pt").exists()
    ended = server.run(*method, call="add_summary", send=["SIGINT"])
    assert ended.status == 130
    assert ended.err[-1] == "train.py: note: stopped by SIGINT; the run is finished"
    assert end_of(server.folder / "last") == expected


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_python_imports(name, status):
    command = [sys.executable, ROOT / "train.py", "--evaluate", "nothing"]
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


def test_signals_that_are_ignored_stay_so():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        Interrupts().install()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_while_the_first_step_compiles_ends_at_once(monkeypatch, name):
    ends, number = [], getattr(signal, name)
    monkeypatch.setattr("engine.signals.os._exit", ends.append)
    monkeypatch.setattr("engine.signals.os.write", lambda *_: 0)
    interrupts = Interrupts()
    with interrupts.deferred(from_start=False):
        interrupts.handle(number)
        assert (ends, interrupts.asked) == ([143], None)
        interrupts.defer()
        interrupts.handle(number)
        assert (ends, interrupts.asked) == ([143], signal.SIGTERM)


def test_a_compiler_that_ctrl_c_reached_too(train_py, monkeypatch):
    def broken(*_, **__):
        INTERRUPTS.asked = signal.SIGINT
        raise compile_errors()[0]("the compiler was killed")

    monkeypatch.setattr(training, "train_step", broken)
    status, _, err = train_py(*TINY, "--output_dir", "run")
    assert (status, len(err)) == (130, 1)
    assert not Path("run/checkpoint.pt").exists()


# Full disks and unwritable folders


def test_a_checkpoint_that_cannot_grow_leaves_the_last_one(server, expected):
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
    assert end_of(checkpoint.parent) == expected


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


def test_a_full_disk_leaves_the_last_checkpoint(server, expected):
    """A disk that the first epoch's two checkpoints fit on, and no third beside them."""
    disk = server.folder / "disk"
    with small_disk(disk, "2m"):
        method = [*TINY, "--resume", "auto", "--output_dir"]
        ended = server.run(*method, "disk/run")
        assert ended.status == 1
        assert "No space left on device; continue with --resume disk/run/" in ended.err[-1]
        assert read_checkpoint(disk / "run/checkpoint.pt").epoch == 1
        assert not list(disk.rglob("*.tmp"))
        shutil.copytree(disk / "run", server.folder / "moved")  # to where there is room
    assert server.run(*method, "moved").status == 0
    assert end_of(server.folder / "moved") == expected


def test_tensorboard_and_metrics_may_fail_but_not_the_summary(train_py, monkeypatch):
    """Metrics are made up for as soon as they can be written, not at the end."""
    full, write, found = OSError(28, "No space left on device"), run_folder.write_text, []

    def fail_at_first(path, text):
        if path.name == "metrics.jsonl":
            found.append([json.loads(line)["epoch"] for line in text.splitlines()])
            if found[-1] == [1]:
                raise full
        write(path, text)

    monkeypatch.setattr(run_folder, "write_text", fail_at_first)
    monkeypatch.setattr(SummaryWriter, "add_scalar", Mock(side_effect=full))
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "add_summary", Mock(side_effect=full))
        status, _, err = train_py(*TINY, "--output_dir", "run")
    assert (status, len(err)) == (1, 3)
    assert "run/metrics.jsonl can't be written" in err[0]
    assert "TensorBoard's events can't be written" in err[1]
    assert err[2].startswith("train.py: error: cannot write run/summary.json")
    assert found == [[], [1], [1, 2], [1, 2, 3]]
    assert train_py(*TINY, "--output_dir", "run", "--resume", "auto")[0] == 0
    assert [row["epoch"] for row in metrics_of("run")] == [1, 2, 3]
    assert Path("run/summary.json").exists()


def test_output_that_cannot_be_written(server, expected):
    ended = server.run(*TINY, "--output_dir", "silent", stdout="/dev/full")
    assert ended.status == 0
    (line,) = ended.err
    assert "the output can't be written ([Errno 28] No space left on device)" in line
    assert end_of(server.folder / "silent") == expected
    for other in (["--dry_run"], ["--evaluate", "silent/checkpoint.pt"]):
        ended = server.run(*TINY, *other, stdout="/dev/full")
        assert (ended.status, len(ended.err)) == (1, 1), other
        assert "No space left on device" in ended.err[0]


def test_the_status_is_the_same_where_nothing_can_be_said(server):
    diverging = [*TINY, "--no-cos_lr", "--lr", "1000", "--output_dir", "unsaid"]
    assert server.run(*diverging, stderr="/dev/full", stdout="/dev/full").status == 3
    assert server.run("--layers", "7", stderr="/dev/full").status == 2


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream(here, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--output_dir", "run"])
    monkeypatch.setattr(sys, name, None)
    assert exit_status(train.main) == 0
    assert Path("run/summary.json").exists()


# Divergence


@pytest.mark.parametrize(("lr", "print_freq"), [("1000", 1), ("1000", 3), ("30", 1), ("30", 3)])
def test_a_loss_that_is_not_finite_ends_the_run(train_py, monkeypatch, lr, print_freq):
    found, add = {}, Totals.add  # the losses as floats by (step, module), however they are summed

    def note(self, module, loss, *others):
        found[self.steps + 1, module.index] = float(loss)
        add(self, module, loss, *others)

    monkeypatch.setattr(Totals, "add", note)
    method = [*TINY, "--limit_per_class", "4", "--local_module_num", "3", "--context_mode", "R1E"]
    status, _, err = train_py(
        *method, "--no-cos_lr", "--lr", lr, "-p", print_freq, "--output_dir", "run"
    )
    assert (status, len(err)) == (3, 1)
    step, module = next(where for where, loss in found.items() if not math.isfinite(loss))
    assert f"the loss of module {module} is not finite from step {step} of epoch 1 on" in err[0]
    last = max(step for step, _ in found)
    assert last == min(10, math.ceil(step / print_freq) * print_freq)  # of 10 an epoch
    assert not Path("run/checkpoint.pt").exists()
    assert err[0].endswith("another --output_dir, or find the operation with --detect_anomaly")


@pytest.mark.parametrize("print_freq", [1, 4])
def test_a_module_that_float16_keeps_from_stepping_ends_the_run(train_py, monkeypatch, print_freq):
    """Its loss stays finite. After 26 skipped steps the scale is 65536 / 2^26 = 2^-10."""

    def overflowing(logits, targets):
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return torch.nn.functional.cross_entropy(logits, targets)

    monkeypatch.setitem(LOCAL_LOSSES, "overflowing", TaskLoss(overflowing, classifies=True))
    method = ["--amp", "fp16", "--local_loss_mode", "overflowing", "--epochs", "7"]
    status, _, err = train_py(*TINY, *method, "-p", print_freq, "--output_dir", "run")
    assert (status, len(err)) == (3, 1)
    step = {1: 1, 4: 4}[print_freq]  # 26 is the first of epoch 6
    assert f"module 0 does not train: after step {step} of epoch 6 its gradients" in err[0]
    assert "a loss scale of 0.0" in err[0] and "--amp bf16" in err[0]
    assert read_checkpoint("run/checkpoint.pt").done == (5, 0)


def poison(monkeypatch, step, change):
    """After so many steps of module 1, change its optimizer."""
    count, take = [0], LocalSGD.step_and_free

    def take_and_poison(self):
        take(self)
        if self.param_groups[0]["params"][0].shape[0] == 32:  # module 1 begins at stage 2
            count[0] += 1
            if count[0] == step:
                change(self)

    monkeypatch.setattr(LocalSGD, "step_and_free", take_and_poison)


def spoil_weight(value):
    @torch.no_grad()
    def change(optimizer):
        optimizer.param_groups[0]["params"][-1][0] = value

    return change


def spoil_momentum(optimizer):
    """The losses and the test are fine yet: the next step would not be."""
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"][0] = math.inf


def spoil_and_stop(optimizer):
    spoil_weight(math.nan)(optimizer)
    INTERRUPTS.asked = signal.SIGTERM


@pytest.mark.parametrize(
    ("step", "change", "options", "message"),
    [
        (10, spoil_weight(math.nan), [], "the test loss of module 1 is not finite after epoch 2"),
        (7, spoil_weight(math.inf), ["--checkpoint_every", "2"],
         "module 1 is not finite after step 2 of epoch 2"),
        (6, spoil_weight(math.nan), ["--checkpoint_every", "3", "-p", "100"],
         "of module 1 is not finite from step 2 of"),
        (10, spoil_momentum, [], "module 1 is not finite after step 5 of epoch 2"),
        (6, spoil_and_stop, [], "module 1 is not finite after step 1 of epoch 2"),
    ],
    ids=["tested", "saved", "looked at", "momentum", "stopped"],
)  # fmt: skip
def test_bad_weights_take_no_good_ones_place(train_py, monkeypatch, step, change, options, message):
    poison(monkeypatch, step, change)
    method = [*TINY, "--context_mode", "R0", "--cuts", "1,0", *options]
    status, _, err = train_py(*method, "--output_dir", "run")
    assert (status, len(err)) == (3, 1)
    assert message in err[0]
    assert err[0].endswith("to begin from the last checkpoint, add --resume run/checkpoint.pt")
    assert len(metrics_of("run")) == 1
    for name in ("checkpoint.pt", "model_best.pt"):
        state = read_checkpoint(f"run/{name}")
        assert state.done == (1, 0)
        tensors = [*state.state_dict.values(), *state.momentum.values()]
        assert all(t.isfinite().all() for t in tensors)


def test_losses_are_read_where_they_are_shown_and_no_sooner(train_py, monkeypatch):
    """Reading waits for the device. Of 10 steps, with a line every 4: after 4, 8 and 10."""
    reads = []
    for name in ("losses", "errors", "first_not_finite"):
        real = getattr(Totals, name)

        def read(self, real=real):
            if torch.is_grad_enabled():
                reads.append(self.steps)
            return real(self)

        monkeypatch.setattr(Totals, name, read)
    method = [*TINY, "--limit_per_class", "4", "--epochs", "1", "-p", "4"]
    status, out, _ = train_py(*method, "--output_dir", "run")
    shown = [int(line.split(" step ")[1].split("/")[0]) for line in out if " step " in line]
    assert (status, {*reads}, shown) == (0, {4, 8, 10}, [4, 8, 10])


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")  # the stack of the forward
def test_detect_anomaly_names_the_operation_and_its_module(train_py, refused):
    method = [*TINY, "--no-cos_lr", "--lr", "1000", "--output_dir", "run"]
    status, _, err = train_py(*method, "--detect_anomaly")
    assert (status, len(err)) == (3, 1)
    assert re.search(r"module [01], step [2-5] of epoch 1: .*Backward0' returned nan", err[0])
    line = refused(*TINY, "--detect_anomaly", "--compile")
    assert "--detect_anomaly and --compile exclude each other" in line


# Two runs in one folder


def start_and_stop(server, *arguments):
    """Start a run, and stop it in its third step; return its pid."""
    owner = server.start(*arguments, **STEP_3, send=["SIGSTOP"])
    state, deadline = Path(f"/proc/{owner}/stat"), time.monotonic() + 60
    while state.read_text().split()[2] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return owner


def named(owner):
    """How the process that has a lock is named. Early filelocks empty the file where it says so."""
    return "another process" if filelock.__version__.startswith("3.") else f"process {owner} on "


def test_a_second_run_into_a_folder_is_refused(server, expected):
    method = [*TINY, "--output_dir", "shared"]
    owner = start_and_stop(server, *method)
    for resume in ([], ["--resume", "auto"]):
        ended = server.run(*method, *resume)
        assert (ended.status, len(ended.err)) == (2, 1)
        assert f"shared is in use by {named(owner)}" in ended.err[0]
    os.kill(owner, signal.SIGKILL)
    assert server.wait(owner).status == -signal.SIGKILL
    lock = server.folder / "shared" / folder_lock.LOCK
    assert lock.exists()  # of one that is dead: it is in nobody's way
    assert server.run(*method, "--resume", "auto").status == 0
    assert end_of(server.folder / "shared") == expected


def test_runs_that_share_their_checkpoints_folder(server):
    """Another run folder, but the same --checkpoint."""
    shared = ["--checkpoint", str(server.folder / "both")]
    owner = start_and_stop(server, *TINY, "--output_dir", "first", *shared)
    ended = server.run(*TINY, "--output_dir", "second", *shared)
    assert (ended.status, len(ended.err)) == (2, 1)
    assert f"both is in use by {named(owner)}" in ended.err[0]
    assert not (server.folder / "second").exists()
    os.kill(owner, signal.SIGKILL)
    server.wait(owner)


def test_a_run_that_does_not_begin_leaves_no_folder(refused, here):
    Path("kept").mkdir()
    for folder in ("new/run", "kept"):
        refused(
            *TINY, "--dataset", "folder", "--data_dir", "nowhere", "--local_module_num", "99",
            "--output_dir", folder, "--resume", "auto",
        )  # fmt: skip
    assert [path.name for path in here.rglob("*")] == ["kept"]


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_what_is_in_the_way_of_a_run_folder(refused, resume):
    line = refused(*TINY, "--output_dir", "/proc/version/run", *resume)
    assert "cannot write the run folder /proc/version/run" in line
    Path("file").write_text("kept")
    line = refused(*TINY, "--output_dir", "file", *resume)
    assert "file is a file, so it can't be the run folder" in line
    for name in ("model_best.pt", "metrics.jsonl"):
        Path(name).mkdir()
        Path(name, name).write_text("of no run that is known")
        line = refused(*TINY, "--output_dir", name, *resume)
        assert "without a checkpoint to continue from" in line or "continue it with" in line
        assert Path(name, name).read_text() == "of no run that is known"


# What each step draws, and how long an epoch took


def test_each_module_draws_from_a_seed_of_its_own_in_each_step(train_py, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "seed_generators", lambda seed, _: drawn.append(seed))
    for seed in ("0", "1"):
        method = [*TINY, "--seed", seed, "--output_dir", seed]  # a head may have dropout, too
        assert train_py(*method)[0] == 0
    assert len(drawn) == len({*drawn}) == 2 * 3 * STEPS * 2  # seeds, epochs, steps, modules


def test_the_time_of_an_epoch_is_that_of_its_parts(server):
    """Of an epoch whose first steps took 1,000 s, as the checkpoint has it."""
    path = stopped_early(server, "timed")
    state = read_checkpoint(path)
    assert 0 < state.totals["seconds"] < 100
    save_checkpoint(path, state._replace(totals=state.totals | {"seconds": 1000.0}))
    assert server.run(*TINY, "--output_dir", "timed", "--resume", "auto").status == 0
    assert metrics_of(path.parent)[0]["samples_per_second"] == pytest.approx(0.02, rel=0.1)
    began = (path.parent / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in began] == [0, 3]
