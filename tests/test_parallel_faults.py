"""A process of several that fails, dies or hangs takes the run with it, and says why."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fork_server import ROOT

from configs import InputError
from dataloaders import ImageData, Split
from engine.checkpoint import read_checkpoint
from engine.training import Lost
from parallel import process_group as team
from parallel.process_group import SILENCE, Team, Watch, meet
from parallel.training import Parallel

RUN = [
    "--dataset", "digits", "--limit_per_class", "3", "--layers", "8", "--local_module_num", "4",
    "--context_mode", "R1E", "--batch_size", "4", "--epochs", "1000", "--device", "cpu",
    "--local_loss_mode", "cross_entropy", "--parallel", "modules", "--checkpoint_every", "2",
]  # fmt: skip
HALVES = ["--module_ranges", "0-1", "2-3"]


def errors(ended):
    """Lines that say what went wrong, of all processes; torch's own warnings are left out."""
    return [line for each in ended for line in each.err if line.startswith("train.py: error")]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_one_dies_and_all_end(server, rank, how):
    """In the middle of a step, after checkpoints."""
    folder = f"dies_{rank}_{how}"
    # Rank 0 comes to so many lines later: it writes the checkpoints.
    plan = {rank: {"line": 3000 if rank else 4000, "files": ["engine/step.py"], "send": [how]}}
    began = time.monotonic()
    ended = server.run_together(
        3, *RUN, "--module_ranges", "0-1", "2", "3", "--output_dir", folder, plans=plan
    )
    assert time.monotonic() - began < 60
    assert all(each.status for each in ended)
    if how == "raise":
        assert ended[rank].err[-1] == "ArithmeticError: as planned"
        assert errors(ended) == []
    else:
        assert ended[rank].status == -signal.SIGKILL
        assert 1 <= len(errors(ended)) <= 2  # of those that noticed at the same time
    state = read_checkpoint(server.folder / folder / "checkpoint.pt")
    assert (state.epoch, state.step) > (0, 0)


def test_the_store_dies_with_rank_0(server):
    """As without torchrun, or where that dies too."""
    plan = {0: {"line": 4000, "files": ["engine/step.py"]}}
    began = time.monotonic()
    ended = server.run_together(
        2, *RUN, *HALVES, "--output_dir", "no_store", plans=plan, keeps_store=False
    )
    assert time.monotonic() - began < 60
    assert [each.status for each in ended] == [-signal.SIGKILL, 1]
    (said,) = errors(ended)
    assert said.startswith("train.py: error: rank 1")
    read_checkpoint(server.folder / "no_store" / "checkpoint.pt")


def test_one_that_gives_no_sign_of_life(server):
    """Its sockets are open, and nothing comes from them."""
    pids = server.start_together(
        2, *RUN, *HALVES, "--output_dir", "stands", plans={0: {"patience": 6.0}}
    )
    checkpoint = server.folder / "stands" / "checkpoint.pt"
    wait_for(checkpoint)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    assert server.wait(pids[0]).status == 1
    assert 6 < time.monotonic() - began < 60
    os.kill(pids[1], signal.SIGKILL)
    server.wait(pids[1])
    said = (server.folder / "rank_0.err").read_text().splitlines()[-1]
    assert said == "train.py: error: rank 0: rank 1 has given no sign of life for 6 s"
    read_checkpoint(checkpoint)


def test_a_loss_that_is_not_finite_on_another_rank(server):
    """The module is named by the rank that has it, and the run ends as in one process."""
    more = ["--lr", "1000", "--no-cos_lr", "-p", "1", "--output_dir", "diverges"]
    alone = server.run(*RUN[:-4], *more, "--output_dir", "diverges_alone")
    ended = server.run_together(2, *RUN[:-2], *HALVES, *more)
    assert alone.status == 3
    assert 3 in [each.status for each in ended]
    where = "the loss of module {} is not finite from step {} of epoch 1 on"
    module, step = (alone.err[0].split(f"{word} ")[1].split()[0] for word in ("module", "step"))
    assert where.format(module, step) in alone.err[0]
    (said,) = [line for line in errors(ended) if where.format(module, step) in line]
    assert ", or find the operation with --detect_anomaly;" in alone.err[0]
    assert ", or find the operation with --detect_anomaly in one process" in said


# ---------------------------------------------------------------------------------------------
# What is refused, in one line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--local_module_num", "1"], "2 processes for 1 modules: take 1 at most, or a larger "
         "--local_module_num"),
        (["--module_ranges", "0-3"], "--module_ranges has 1 ranges for 2 processes"),
        (["--module_ranges", "0", "2-3"], "--module_ranges: 2-3 should begin with module 1"),
        (["--module_ranges", "0-1", "2"], "--module_ranges ends with module 2, and the last of 4 "
         "is 3"),
        (["--module_ranges", "0-2", "2-3"], "--module_ranges: 2-3 should begin with module 3"),
        (["--device", "cuda:0"], "--device cuda:0 is one device, and each process has its own: "
         "give --device cuda"),
        (["--sync_bn"], "--sync_bn is for --parallel data: give that, or leave it out"),
        (["--detect_anomaly"], "--detect_anomaly and --parallel exclude each other"),
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of 1 to 1000000000"),
        (["--data_dir", "nowhere", "--dataset", "folder"], "cannot read the images in nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(server, more, says):
    ended = server.run_together(2, *RUN, *more, "--output_dir", "refused")
    assert {each.status for each in ended} <= {1, 2}
    assert 2 in {each.status for each in ended}
    (said,) = errors(ended)
    assert said.startswith(f"train.py: error: {says}")
    assert not (server.folder / "refused").exists()


def test_other_options_on_one_rank(server):
    ended = server.run_together(
        2, *RUN, *HALVES, "--output_dir", "other", plans={1: {"more": ["--lr", "0.2"]}}
    )
    assert errors(ended) == [
        "train.py: error: rank 1 was started with --lr 0.2, and rank 0 with None: give all the "
        "same options"
    ]
    assert not (server.folder / "other").exists()


def test_a_backend_that_is_missing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    one = Team(argparse.Namespace(device="cpu"))
    assert one._device() == torch.device("cpu")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(InputError, match="on the CPU needs Gloo, which this PyTorch has not"):
        one._device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    one.options.device = "cuda"
    with pytest.raises(InputError, match="on CUDA needs NCCL and Gloo, which this PyTorch has not"):
        one._device()


def test_processes_that_do_not_know_how_to_share(monkeypatch, capsys, here):
    from cli import main

    assert main(monkeypatch, capsys, "--parallel", "modules")[::2] == (
        2, ["train.py: error: --parallel modules is for processes that torchrun starts (RANK is "
            "not set): torchrun --nproc_per_node=P -- train.py ..."],
    )  # fmt: skip
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(monkeypatch, capsys, "--parallel", "modules", "--dry_run")[::2] == (
        2, ["train.py: error: --dry_run plans in one process: leave torchrun out"],
    )  # fmt: skip
    assert main(monkeypatch, capsys, "--dataset", "digits")[::2] == (
        2, ["train.py: error: torchrun started 2 processes: say how they share the work, with "
            "--parallel modules or data"],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# By torchrun itself


@pytest.fixture
def torchrun(tmp_path):
    """Starts a run of two, the output of which goes to a file."""
    started = []

    def start(*arguments):
        with (tmp_path / "said").open("w") as said:
            started.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                 "--standalone", ROOT / "train.py", *arguments],
                cwd=tmp_path, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"},
                # It is ignored behind `pytest &`.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.2)


def children(pid):
    """Processes of torchrun by rank."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as stat:
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{entry}/environ", "rb") as environ:
                variables = dict(v.split(b"=", 1) for v in environ.read().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if parent == pid and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(entry)
    return found


def test_torchrun_ends_the_job_when_one_is_killed(torchrun, tmp_path):
    process = torchrun(*RUN, *HALVES, "--output_dir", "run")
    wait_for(tmp_path / "run" / "checkpoint.pt")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert process.wait(timeout=30) != 0
    said = (tmp_path / "said").read_text()
    assert "rank      : 1 (local_rank: 1)" in said and "Signal 9 (SIGKILL)" in said
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (state.epoch, state.step) > (0, 0)


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", None), ("SIGINT", None),
                                            ("SIGTERM", 0), ("SIGTERM", 1)])  # fmt: skip
def test_torchrun_hands_on_what_stops_a_run(torchrun, tmp_path, name, rank):
    """A signal to torchrun, or to one of the processes."""
    process = torchrun(*RUN, *HALVES, "--output_dir", "run")
    wait_for(tmp_path / "run" / "checkpoint.pt")
    reached = process.pid if rank is None else children(process.pid)[rank]
    os.kill(reached, getattr(signal, name))
    assert process.wait(timeout=60) != 0
    said = (tmp_path / "said").read_text()
    assert f"stopped by {name}; continue with --resume run/checkpoint.pt" in said
    environment = json.loads((tmp_path / "run" / "environment.jsonl").read_text().splitlines()[0])
    assert environment["parallel"]["ranges"] == ["0-1", "2-3"]


def test_processes_end_with_their_torchrun(torchrun, tmp_path):
    process = torchrun(*RUN, *HALVES, "--output_dir", "run")
    wait_for(tmp_path / "run" / "checkpoint.pt")
    left = set(children(process.pid).values())
    assert len(left) == 2
    process.kill()
    end = time.monotonic() + 30
    while left:
        assert time.monotonic() < end
        time.sleep(0.2)
        left = {pid for pid in left if os.path.exists(f"/proc/{pid}/exe")}
    read_checkpoint(tmp_path / "run" / "checkpoint.pt")


def test_what_started_a_process_may_end_and_its_store_not(monkeypatch):
    """As with torchrun on another machine than that of the store."""
    watch = Watch(dist.HashStore(), 0, 1)
    assert watch._why() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert watch._why() == "what started this process has ended"


def test_a_suspended_machine_is_no_silence():
    """Silence is counted in one's own beats, and each other's beat ends it."""
    store = dist.HashStore()
    watch = Watch(store, 0, 2)
    for beat in range(int(SILENCE) + 1):  # however long that takes
        watch._beat = beat
        assert watch._why() is None
    store.set("beat/1", "1")
    for _ in range(int(SILENCE) + 1):
        watch._beat += 1
        assert watch._why() is None
    watch._beat += 1
    assert watch._why() == "rank 1 has given no sign of life for 20 s"


def test_processes_that_are_started_again_meet_anew():
    """The store has what was there before, and not all may know how often that was."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as processes:
        before = list(processes.map(partial(meet, store, size=3), range(3)))
        meetings = [processes.submit(meet, store, rank, 3) for rank in (1, 2)]
        time.sleep(0.3)
        assert not any(meeting.done() for meeting in meetings)
        now = meet(store, 0, 3)
        assert [now, *(meeting.result() for meeting in meetings)] == [now] * 3
    assert before == [before[0]] * 3 and now != before[0]


def test_one_does_not_come(monkeypatch):
    monkeypatch.setattr(team, "WELCOME", timedelta(seconds=0.2))
    with pytest.raises(Lost, match=r"rank 0: of 2 processes only \[0\] have come"):
        meet(dist.HashStore(), 0, 2)


def test_the_wait_for_the_word_of_rank_0_counts_as_a_stall(monkeypatch):
    """It comes when rank 0 begins with a batch, which a faster process is ready for before."""
    log = []

    @contextlib.contextmanager
    def waiting():
        log.append("waits")
        yield
        log.append("goes on")

    monkeypatch.setattr(Team, "signal", lambda self: log.append("asks") or 15)
    one = Alone(0)
    one.way = SimpleNamespace(waiting=waiting())
    assert one.signal() == 15
    assert log == ["waits", "asks", "goes on"]


@pytest.mark.parametrize(("machines", "seconds"), [("1", []), ("2", [2])])
def test_who_fails_stays_until_other_machines_know(monkeypatch, machines, seconds):
    """With it may go the store."""
    slept, store = [], dist.HashStore()
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setattr(time, "sleep", slept.append)
    Watch(store, 1, 2).fail()
    assert (slept, store.get("failed")) == (seconds, b"1")
    assert Watch(store, 0, 2)._why() == ""


# ---------------------------------------------------------------------------------------------
# What all processes should have alike


class Alone(Parallel):
    """A process of two whose other one says what a test has it say."""

    def __init__(self, local_rank, others=None):
        self.local_rank, self.others = local_rank, others

    def gather_all(self, value):
        return [value if self.others is None else self.others, value]


def some_images(pixel):
    """Both splits; the images lie in memory as torchvision's of SVHN do."""
    images = torch.full((4, 4, 3, 2), pixel, dtype=torch.uint8).permute(3, 2, 0, 1)
    split = Split(images, torch.tensor([0, 1]))
    return ImageData(split, split, ["a", "b"])


def test_other_images_on_one_rank(monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda: None)
    seen = []
    first = Alone(0)
    first.gather_all = lambda value: seen.append(value) or [value]
    first.loaded(lambda: some_images(1))
    assert Alone(1, seen[0]).loaded(lambda: some_images(1)).classes == ["a", "b"]
    with pytest.raises(InputError, match="rank 1 has other images than rank 0"):
        Alone(1, seen[0]).loaded(lambda: some_images(2))


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_machine_loads_before_the_others(monkeypatch, local_rank):
    log = []
    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    Alone(local_rank).loaded(lambda: log.append("load") or some_images(1))
    assert log == (["barrier", "load"] if local_rank else ["load", "barrier"])
