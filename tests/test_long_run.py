"""A run of many steps takes no more of the machine at its end than near its beginning."""

import gc
import operator
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import TINY
from fork_server import ROOT

from engine import training
from engine.memory import LiveBytes

STEPS_AN_EPOCH, EPOCHS = 50, 40

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


def tensors():
    """Return how many tensors Python has, and how many of them keep the graph they come from."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(found), sum(tensor.grad_fn is not None for tensor in found)


def test_no_step_leaves_anything_behind(train_py, monkeypatch):
    """Bytes, tensors, graphs and open files after each step of the second epoch and of the last."""
    meter, train_step, seen = LiveBytes(), training.train_step, {2: [], 6: []}

    def step_and_count(*arguments, before_module, **how):
        train_step(*arguments, before_module=before_module, **how)
        epoch, *_ = before_module.args
        if epoch in seen:
            files = len(list(Path("/proc/self/fd").iterdir()))
            seen[epoch].append((meter.live, *tensors(), files))

    monkeypatch.setattr(training, "train_step", step_and_count)
    method = [*TINY, "--context_mode", "R1E", "--batch_size", "4", "--epochs", "6"]
    _, graphs_before = tensors()
    with meter:
        assert train_py(*method, "--checkpoint_every", "2", "--output_dir", "run")[0] == 0
    assert len(seen[2]) == 5
    live = {epoch: [bytes_alive for bytes_alive, *_ in steps] for epoch, steps in seen.items()}
    assert all(map(operator.le, live[6], live[2]))  # less where a cycle has gone, as in Python 3.10
    assert [rest for _, *rest in seen[6]] == [rest for _, *rest in seen[2]]
    assert len({count for _, count, _, _ in seen[6]}) == 1
    assert {graphs for _, _, graphs, _ in seen[6]} == {graphs_before}


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_2000_steps(tmp_path):
    """Seen from outside, at each line that says a step is done."""
    command = [
        sys.executable, ROOT / "train.py", "--dataset", "digits", "--limit_per_class", "10",
        "--layers", "8", "--local_module_num", "2", "--context_mode", "R1E", "--batch_size", "2",
        "--local_loss_mode", "cross_entropy",
        "--epochs", str(EPOCHS), "--device", "cpu", "--output_dir", tmp_path / "run", "-p", "10",
        "--checkpoint_every", "20",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    proc, seen = Path(f"/proc/{process.pid}"), []
    for line in process.stdout:
        if line.startswith("epoch") and " step " in line:
            pages = int((proc / "statm").read_text().split()[1])
            seen.append((pages, len(list((proc / "fd").iterdir()))))
    assert process.wait() == 0
    assert len(seen) == EPOCHS * STEPS_AN_EPOCH // 10
    memory, files = zip(*seen, strict=True)
    assert max(memory[20:]) <= 1.02 * memory[19]  # after 200 steps
    # A checkpoint that is being written is open too, now and then: so the usual number counts.
    usual = [statistics.median(files[start : start + 20]) for start in range(0, len(files), 20)]
    assert max(usual[1:]) <= 1.02 * usual[0]
