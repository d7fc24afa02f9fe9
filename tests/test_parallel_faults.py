"""A process of several that fails, dies or stands still ends the run, and one of them says why."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from fork_server import ROOT
from test_parallel import METHODS, TINY

from configs import InputError
from dataloaders import ImageData, Split
from engine.checkpoint import read_checkpoint
from engine.errors import ConnectionLost
from parallel import process_group
from parallel.heartbeat import HEARTBEAT_TIMEOUT, Heartbeat
from parallel.process_group import TorchrunGroup, rendezvous
from parallel.strategy import ParallelStrategy

RUN = [
    *TINY, *METHODS["R1E"], "--parallel", "modules", "--epochs", "1000", "--checkpoint_every", "2",
]  # fmt: skip
HALVES = ["--module_ranges", "0-1", "2-3"]
THIRDS = ["--module_ranges", "0-1", "2", "3"]
slow = pytest.mark.slow


def errors(ended):
    """Return all processes' lines that say what went wrong; torch has warnings of its own."""
    return [line for each in ended for line in each.err if line.startswith("train.py: error")]


def wait_for(path):
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.2)


# ---------------------------------------------------------------------------------------------
# In the middle of a step, after checkpoints


@pytest.mark.parametrize(("rank", "how", "ranges", "keeps_store"), [
    (1, "SIGKILL", HALVES, True),
    pytest.param(0, "SIGKILL", HALVES, False, marks=slow),  # as without torchrun
    pytest.param(0, "raise", THIRDS, True, marks=slow),
    pytest.param(2, "SIGKILL", THIRDS, True, marks=slow),
    pytest.param(1, "raise", THIRDS, True, marks=slow),
])  # fmt: skip
def test_one_dies_and_all_end(server, rank, how, ranges, keeps_store):
    folder, number = f"dies_{rank}_{how}_{len(ranges)}", len(ranges) - 1
    began = time.monotonic()
    ended = server.run_together(
        number, *RUN, *ranges, "--output_dir", folder, keeps_store=keeps_store,
        plans={rank: {"call": "train_step", "nth": 12, "send": [how]}},
    )  # fmt: skip
    assert time.monotonic() - began < 30
    assert all(each.status for each in ended)
    if how == "raise":
        assert ended[rank].err[-1] == "ArithmeticError: as planned"
        assert errors(ended) == []
    else:
        assert ended[rank].status == -signal.SIGKILL
        assert 1 <= len(errors(ended)) < number  # of those that notice at the same time
    state = read_checkpoint(server.folder / folder / "checkpoint.pt")
    assert (state.epoch, state.step) > (0, 0)


@slow
def test_one_that_stands_still(server):
    """Its sockets are open, and nothing comes from them."""
    pids = server.start_together(
        2, *RUN, *HALVES, "--output_dir", "stands", plans={0: {"heartbeat_timeout": 6.0}}
    )
    wait_for(server.folder / "stands" / "checkpoint.pt")
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    assert server.wait(pids[0]).status == 1
    assert 6 < time.monotonic() - began < 16
    os.kill(pids[1], signal.SIGKILL)
    server.wait(pids[1])
    said = (server.folder / "rank_0.err").read_text().splitlines()[-1]
    assert said == "train.py: error: rank 0: rank 1 has sent no heartbeat for 6 s"
    read_checkpoint(server.folder / "stands" / "checkpoint.pt")


@slow
def test_a_loss_that_is_not_finite_on_another_rank(server):
    """The rank that has the module names it, in the words of a run in one process."""
    method = [*TINY, *METHODS["R0"], "--lr", "1000", "--no-cos_lr", "-p", "1", "--output_dir"]
    alone = server.run(*method, "diverges_alone")
    ended = server.run_together(2, *method, "diverges", "--parallel", "modules", *HALVES)
    assert alone.status == 3 and 3 in [each.status for each in ended]
    (said,) = errors(ended)
    assert "is not finite from step" in said
    assert said.split(" on;")[0] == alone.err[0].split(" on;")[0]


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(("more", "says"), [
    (["--local_module_num", "1"], "2 processes for 1 modules: take 1 at most, or a larger "
     "--local_module_num"),
    pytest.param(["--epochs", "0"], "argument --epochs: '0' is not a whole number of 1 to "
                 "1000000000", marks=slow),
    pytest.param(["--sync_bn"], "--sync_bn is for --parallel data: give that, or leave it out",
                 marks=slow),
    pytest.param(["--data_dir", "nowhere", "--dataset", "folder"], "cannot read the images in "
                 "nowhere", marks=slow),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(server, more, says):
    """Whether all processes find it, or the first."""
    ended = server.run_together(2, *RUN, *more, "--output_dir", "refused")
    assert sorted(each.status for each in ended) == [1, 2]
    (said,) = errors(ended)
    assert said.startswith(f"train.py: error: {says}")
    assert not (server.folder / "refused").exists()


@pytest.fixture
def one(monkeypatch):
    """The process group of one process, not entered."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    return TorchrunGroup(argparse.Namespace(device="cpu", lr=0.1))


def test_other_options_on_one_rank(one):
    one.options.device, one.device = "auto", torch.device("cpu")  # which is found to be the CPU
    typed = {"device": "'cpu'", "lr": "0.1", "data_dir": "None"}  # data may lie in other places
    one.all_gather = lambda own: [typed, own]
    one._check_options()
    one.all_gather = lambda own: [own, typed | {"device": "'cuda'"}]
    with pytest.raises(InputError, match="rank 1 was started with --device 'cuda'"):
        one._check_options()
    one.all_gather = lambda own: [own, typed | {"lr": "0.2"}]
    with pytest.raises(InputError, match=r"rank 1 was started with --lr 0.2, and rank 0 with 0.1"):
        one._check_options()


@pytest.mark.parametrize(("device", "missing", "says"), [
    ("cuda:0", None, "--device cuda:0 is one device, and each process has its own"),
    ("cpu", "gloo", "--parallel needs gloo, which this PyTorch does not have"),
    ("cuda", "nccl", "--parallel needs nccl, which this PyTorch does not have"),
    ("cuda", None, "each process has a GPU of its own, and there are 1 here"),
])  # fmt: skip
def test_a_device_or_backend_that_is_not_there(one, monkeypatch, device, missing, says):
    assert one._device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: backend != missing)
    one.options.device, one.local_rank = device, 1
    with pytest.raises(InputError, match=says):
        one._device()


def test_processes_without_torchrun_or_the_other_way_round(refused, monkeypatch):
    assert refused("--parallel", "modules").endswith(
        "--parallel modules is for processes that torchrun starts (RANK is not set): "
        "torchrun --nproc_per_node=P -- train.py ..."
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("--parallel", "modules", "--dry_run").endswith("leave torchrun out")
    assert refused("--dataset", "digits").endswith(
        "torchrun started 2 processes: say how they share the work, with --parallel modules or data"
    )


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_machine_loads_first_and_all_load_the_same(one, monkeypatch, local_rank):
    """Checksums are of contents: torchvision's images of SVHN lie in memory as here."""
    log, seen = [], []
    monkeypatch.setattr(dist, "barrier", lambda: log.append("barrier"))
    strategy = ParallelStrategy(one.options)
    strategy.group.local_rank = local_rank
    strategy.group.all_gather = lambda own: seen.append(own) or [seen[0], own]

    def load(pixel, contiguous=False):
        log.append("load")
        images = torch.full((4, 4, 3, 2), pixel, dtype=torch.uint8).permute(3, 2, 0, 1)
        split = Split(images.contiguous() if contiguous else images, torch.tensor([0, 1]))
        return ImageData(split, split, ["a", "b"])

    strategy.load_data(partial(load, 1))
    assert log == (["barrier", "load"] if local_rank else ["load", "barrier"])
    strategy.load_data(partial(load, 1, contiguous=True))
    with pytest.raises(InputError, match="rank 1 has other images than rank 0"):
        strategy.load_data(partial(load, 2))


def test_busy_percent_is_of_the_waits_of_an_epoch(one):
    """Those for rank 0's stop signal too, but none from before, as for reconstructed images."""
    log, seconds = [], iter([5.0, 0.0])
    strategy = ParallelStrategy(one.options)
    strategy.waits = contextlib.ExitStack()
    strategy.waits.seconds = lambda: next(seconds)
    strategy.waits.callback(log.append, "waited")
    strategy.group.store, strategy.group.stop_signal = None, lambda: log.append("stop signal") or 0
    batches = SimpleNamespace(sizes=lambda: [2], epoch=lambda epoch, skip: ["batch"])
    assert [*strategy.batches(batches, 1)] == ["batch"]
    assert (log, strategy.busy_percent) == (["stop signal", "waited"], 100)


# ---------------------------------------------------------------------------------------------
# By torchrun itself


@slow
@pytest.mark.parametrize(("name", "rank", "says"), [
    ("SIGKILL", 1, "Signal 9 (SIGKILL)"),
    ("SIGKILL", None, ""),
    ("SIGINT", None, "stopped by SIGINT; continue with --resume run/checkpoint.pt"),
    ("SIGTERM", 1, "stopped by SIGTERM; continue with --resume run/checkpoint.pt"),
])  # fmt: skip
def test_a_signal_to_torchrun_or_to_a_rank_ends_all(request, tmp_path, name, rank, says):
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
             ROOT / "train.py", *RUN, *HALVES, "--output_dir", "run"],
            cwd=tmp_path, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"},
            # It is ignored behind `pytest &`.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    request.addfinalizer(torchrun.kill)
    wait_for(tmp_path / "run" / "checkpoint.pt")
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = sorted(map(int, children))  # in the order of their start
    assert len(ranks) == 2
    os.kill(torchrun.pid if rank is None else ranks[rank], getattr(signal, name))
    assert torchrun.wait(timeout=60) != 0
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in ranks):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert says in (tmp_path / "said").read_text()
    read_checkpoint(tmp_path / "run" / "checkpoint.pt")


# ---------------------------------------------------------------------------------------------
# Start and heartbeats


def test_a_suspended_machine_is_not_silent():
    """Silence is counted in a process's own beats, however long those take."""
    store = dist.HashStore()
    heartbeat = Heartbeat(store, 0, 2)
    for beat in range(2 * int(HEARTBEAT_TIMEOUT)):
        heartbeat._beat = beat
        store.set("beat/1", str(beat // 10))
        assert heartbeat._why() is None
    heartbeat._beat += int(HEARTBEAT_TIMEOUT)
    assert heartbeat._why() == "rank 1 has sent no heartbeat for 20 s"
    Heartbeat(store, 1, 2).fail()
    assert heartbeat._why() == ""  # rank 1 says why


def test_a_silent_process_ends_the_others(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    heartbeat = Heartbeat(dist.HashStore(), 0, 2)
    heartbeat._done = Mock(wait=Mock(side_effect=[False] * 40))  # 40 beats that take no time
    with pytest.raises(SystemExit) as ended:
        heartbeat.run()
    assert ended.value.code == 1
    assert "rank 0: rank 1 has sent no heartbeat for 20 s" in capsys.readouterr().err


def test_processes_that_are_started_again_meet_anew():
    """The store keeps what was there before, and not all may know how often that was."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as processes:
        before = list(processes.map(partial(rendezvous, store, size=3), range(3)))
        others = [processes.submit(rendezvous, store, rank, 3) for rank in (1, 2)]
        time.sleep(0.3)
        assert not any(other.done() for other in others)
        now = rendezvous(store, 0, 3)
        assert [now, *(other.result() for other in others)] == [now] * 3
    assert before == [before[0]] * 3 and now != before[0]


def test_one_does_not_come(monkeypatch):
    monkeypatch.setattr(process_group, "START_TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(ConnectionLost, match=r"rank 0: of 2 processes only \[0\] have come"):
        rendezvous(dist.HashStore(), 0, 2)
