"""--deterministic: the same bits, and what makes a run is on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli import end_of, main
from fork_server import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import dataloaders
from engine import provenance
from models.context import pool

TINY = [
    "--dataset", "digits", "--limit_per_class", "3", "--layers", "8", "--local_module_num", "3",
    "--context_mode", "R1E", "--droprate", "0.1", "--batch_size", "16", "--epochs", "2",
    "--local_loss_mode", "cross_entropy", "--device", "cpu",
]  # fmt: skip


def train_in_a_process(folder, *options, **environment):
    command = [sys.executable, ROOT / "train.py", *TINY, "--output_dir", folder, *options]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return end_of(folder)


@pytest.mark.parametrize("options", [[], ["--h_reconstruct", "--loss_scale", "5", "1", "5", "1"]])
def test_the_same_bits_whatever_the_threads(tmp_path, options):
    """Processes of their own: other threads, other hashes of Python, other lines of output."""
    options = ["--deterministic", *options]
    one = train_in_a_process(
        tmp_path / "one", *options, OMP_NUM_THREADS="1", PYTHONHASHSEED="1", MKL_NUM_THREADS="1"
    )
    two = train_in_a_process(
        tmp_path / "two", *options, "-p", "1", OMP_NUM_THREADS="2", PYTHONHASHSEED="2"
    )
    assert one == two
    threads = [json.loads((tmp_path / name / "environment.jsonl").read_text())["threads"]
               for name in ("one", "two")]  # fmt: skip
    assert threads == [1, 1]


@pytest.fixture(autouse=True)
def switched_off_again():
    yield
    torch.use_deterministic_algorithms(False)


def bits_of(folder):
    end = end_of(folder)
    return {name: tensors for name, (tensors, _, _) in end["states"].items()}


def test_settings_that_must_not_matter(here, monkeypatch, capsys):
    method = [*TINY, "--deterministic"]
    settings = [[], ["-p", "1"], ["--checkpoint_every", "1"], ["--data_on_device"],
                ["--keep_heap", "False"], ["--detect_anomaly"], ["--data_dir", "other"],
                ["--name", "other"]]  # fmt: skip
    found = []
    for number, more in enumerate(settings):
        assert main(monkeypatch, capsys, *method, *more, "--output_dir", str(number))[0] == 0
        found.append(bits_of(here / str(number)))
    assert all(bits == found[0] for bits in found[1:])
    assert main(monkeypatch, capsys, *method, "--seed", "1", "--output_dir", "seed")[0] == 0
    assert bits_of(here / "seed") != found[0]


def test_threads_that_decode_images_do_not_matter(here, monkeypatch):
    from PIL import Image

    for number in range(40):
        path = here / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 2 * number, 255 - number)).save(path)
    (here / "test").symlink_to(here / "train")
    found = []
    for threads in (1, 7):
        monkeypatch.setattr(
            dataloaders.os, "sched_getaffinity", lambda _, n=threads: range(n), raising=False
        )
        found.append(dataloaders.load_dataset("folder", here, 8))
    assert torch.equal(found[0].train.images, found[1].train.images)
    assert torch.equal(found[0].train.targets, found[1].train.targets)


@pytest.mark.parametrize("sizes", [(8, 4), (9, 5), (7, 7), (50, 13), (13, 25)])
def test_pooling_by_matrices_is_adaptive_pooling(here, sizes):
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


@pytest.mark.parametrize("group", ["0", "16"])
def test_no_step_adds_in_any_order_on_cuda(here, group):
    """The operations of a step on fake CUDA tensors: none of those that CUDA has no order for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from engine.step import Totals, make_optimizers, train_step
    from models import build_network

    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = build_network(
            layers=8, local_module_num=4, context_mode="R1E", dataset="folder", num_classes=3,
            image_size=50, context_group=int(group), h_reconstruct=True, loss_scale=(5, 1, 5, 1),
        )  # fmt: skip
        images, targets = torch.randn(4, 3, 50, 50), torch.zeros(4, dtype=torch.int64)
        with Names():
            list(train_step(network, make_optimizers(network), images, targets,
                            Totals(network, images.device)))  # fmt: skip
    assert "convolution_backward" in seen
    # PyTorch's list (use_deterministic_algorithms), as far as a network could come by them. The
    # bilinear resizing of decoders is replaced by PyTorch itself, on CUDA.
    assert not seen & {
        "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward",
        "reflection_pad2d_backward", "replication_pad2d_backward", "upsample_bicubic2d_backward",
        "scatter_reduce", "put_", "histc", "bincount", "cumsum", "nll_loss2d_forward",
        "ctc_loss", "_embedding_bag", "grid_sampler_2d_backward", "max_unpool2d",
    }  # fmt: skip


def test_what_has_no_deterministic_algorithm_ends_the_run(here, monkeypatch, capsys):
    def put(*_):
        torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr("engine.training.evaluate", put)
    status, _, err = main(monkeypatch, capsys, *TINY, "--deterministic")
    assert status == 2
    assert err == [
        "train.py: error: --deterministic: put_ does not have a deterministic implementation, so "
        "leave it out"
    ]


def test_deterministic_and_benchmark_exclude_each_other(here, monkeypatch, capsys):
    status, _, err = main(monkeypatch, capsys, *TINY, "--deterministic", "--cudnn_benchmark")
    assert (status, len(err)) == (2, 1)
    assert "--cudnn_benchmark" in err[0]


def test_switches_are_set(here, monkeypatch, capsys):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for more, on in ((["--deterministic"], True), ([], False)):
        assert main(monkeypatch, capsys, *TINY, *more, "--output_dir", f"run_{on}")[0] == 0
        assert torch.are_deterministic_algorithms_enabled() == on
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# What made a run


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_and_whether_the_tree_is_dirty(tmp_path):
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
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "untracked").write_text("")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "train.py").write_text("b")
    assert provenance.git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == {"commit": None, "dirty": None}


def test_a_run_says_what_made_it(here, monkeypatch, capsys):
    state = {"commit": "c0ffee", "dirty": True}
    monkeypatch.setattr("engine.run_folder.git_state", lambda: state)
    method = [*TINY, "--output_dir", "run", "--seed", "7"]
    assert main(monkeypatch, capsys, *method)[0] == 0
    Path("run/summary.json").unlink()
    assert main(monkeypatch, capsys, *method, "--resume", "auto")[0] == 0
    lines = [json.loads(x) for x in Path("run/environment.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["step"], x["device"], x["git"]) for x in lines] == [
        (0, 0, "cpu", state), (2, 0, "cpu", state),
    ]  # fmt: skip
    assert lines[1]["command"] == ["train.py", *method, "--resume", "auto"]
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["git"], summary["seed"]) == (state, 7)
    assert summary["versions"] == lines[0]["versions"]
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert json.loads(Path("run/config.json").read_text())["seed"] == 7
