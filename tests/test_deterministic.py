"""--deterministic: the same bits, and what makes a run is on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli import TINY as OF_2
from cli import end_of, summary_of
from fork_server import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import provenance
from engine.step import Totals, make_optimizers, train_step
from models import build_network
from models.context import pool

TINY = [
    *OF_2, "--local_module_num", "3", "--context_mode", "R1E", "--droprate", "0.1", "--epochs", "2"
]  # fmt: skip


@pytest.fixture(autouse=True)
def switched_off_again():
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def states_of(folder):
    return {name: tensors for name, (tensors, _, _) in end_of(folder)["states"].items()}


def test_settings_that_must_not_matter(train_py):
    settings = ["-p=1", "--checkpoint_every=1", "--data_on_device", "--keep_heap=False",
                "--detect_anomaly", "--data_dir=other", "--name=other"]  # fmt: skip
    for folder, more in (("usual", []), ("other", settings), ("seed", ["--seed", "1"])):
        assert train_py(*TINY, "--deterministic", *more, "--output_dir", folder)[0] == 0
    assert states_of("other") == states_of("usual") != states_of("seed")


def test_the_same_bits_whatever_the_threads(train_py):
    """A sum is split among threads, so one thread computes, however many there could be."""
    for number in (1, 2):
        torch.set_num_threads(number)
        assert train_py(*TINY, "--deterministic", "--output_dir", number)[0] == 0
        (start,) = Path(f"{number}/environment.jsonl").read_text().splitlines()
        assert json.loads(start)["threads"] == 1
    assert end_of("1") == end_of("2")


@pytest.mark.slow
def test_the_same_bits_in_processes_of_their_own(tmp_path):
    """Other threads, other hashes of Python, other lines of output; with decoders."""
    options = ["--deterministic", "--h_reconstruct", "--loss_scale", "5", "1", "5", "1"]
    for name, more in (("1", []), ("2", ["-p", "1"])):
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *TINY, *options, *more,
             "--output_dir", tmp_path / name],
            env=os.environ | {"OMP_NUM_THREADS": name, "PYTHONHASHSEED": name},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert end_of(tmp_path / "1") == end_of(tmp_path / "2")


@pytest.mark.parametrize("sizes", [(8, 4), (9, 5), (7, 7), (50, 13), (13, 25)])
def test_pooling_by_matrices_is_adaptive_pooling(sizes):
    """On CUDA the backward of adaptive pooling adds in any order: matrix products stand in."""
    big, small = sizes
    x = torch.randn(2, 3, big, big + 1, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, small, small, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x, (small, small))
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    torch.use_deterministic_algorithms(True)
    pooled = pool(x, (small, small))
    (pooled_grad,) = torch.autograd.grad(pooled, x, grad)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled_grad, expected_grad, rtol=1e-12, atol=1e-12)


class Names(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("group", [0, 16])
def test_no_step_adds_in_any_order_on_cuda(group):
    """The operations of a step on fake CUDA tensors: none of those that CUDA has no order for."""
    torch.use_deterministic_algorithms(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = build_network(
            layers=8, local_module_num=4, context_mode="R1E", dataset="folder", num_classes=3,
            image_size=50, context_group=group, h_reconstruct=True, loss_scale=(5, 1, 5, 1),
        )  # fmt: skip
        images, targets = torch.randn(4, 3, 50, 50), torch.zeros(4, dtype=torch.int64)
        with Names() as names:
            totals = Totals(network, images.device)
            train_step(network, make_optimizers(network), images, targets, totals)
    assert "convolution_backward" in names.seen
    # PyTorch's list (use_deterministic_algorithms), as far as a network could come by them. The
    # bilinear resizing of decoders is replaced by PyTorch itself, on CUDA.
    assert not names.seen & {
        "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward",
        "reflection_pad2d_backward", "replication_pad2d_backward", "upsample_bicubic2d_backward",
        "scatter_reduce", "put_", "histc", "bincount", "cumsum", "nll_loss2d_forward",
        "ctc_loss", "_embedding_bag", "grid_sampler_2d_backward", "max_unpool2d",
    }  # fmt: skip


def test_what_has_no_deterministic_algorithm_ends_the_run(refused, monkeypatch):
    def put(*_):
        torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr("engine.training.evaluate", put)
    line = refused(*TINY, "--deterministic")
    assert "--deterministic: put_ does not have a deterministic implementation, so leave" in line
    assert "--cudnn_benchmark" in refused(*TINY, "--deterministic", "--cudnn_benchmark")


# What made a run


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_and_whether_the_tree_is_dirty(tmp_path, monkeypatch):
    nothing = {"commit": None, "dirty": None}
    (tmp_path / "train.py").write_text("a")
    assert provenance.git_state(tmp_path) == nothing  # no repository
    git(tmp_path, "init")
    (tmp_path / "other").write_text("a")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "zero")
    assert provenance.git_state(tmp_path) == nothing  # the code is not tracked in it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "train.py").write_text("b")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(tmp_path) == nothing  # no git


def test_a_run_says_what_made_it(train_py, monkeypatch):
    state = {"commit": "c0ffee", "dirty": True}
    monkeypatch.setattr("engine.run_folder.git_state", lambda: state)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    method = [*TINY, "--output_dir", "run", "--seed", "7", "--deterministic"]
    assert train_py(*method)[0] == 0
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    Path("run/summary.json").unlink()
    assert train_py(*method, "--resume", "auto")[0] == 0
    lines = [json.loads(x) for x in Path("run/environment.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["step"], x["device"], x["git"]) for x in lines] == [
        (0, 0, "cpu", state), (2, 0, "cpu", state),
    ]  # fmt: skip
    assert lines[1]["command"] == ["train.py", *method, "--resume", "auto"]
    summary = summary_of("run")
    assert (summary["git"], summary["seed"]) == (state, 7)
    assert summary["versions"] == lines[0]["versions"]
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert json.loads(Path("run/config.json").read_text())["seed"] == 7
