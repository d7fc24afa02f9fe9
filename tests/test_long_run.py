"""A run of many steps takes no more of the machine at its end than near its beginning."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import ROOT

STEPS_AN_EPOCH, EPOCHS = 50, 40


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
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
