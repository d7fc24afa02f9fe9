"""What a script does before torch is imported, and how it depends on what it is started from."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import TINY, interrupt_after, main

import train

ROOT = Path(train.__file__).parent

NO_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # an import of it raises ImportError
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""

ONLY_WRITES = """
import sys
class Cell:
    def write(self, text):
        open("written", "a").write(text)
    def flush(self):
        pass
sys.path.insert(0, {root!r})
import train
from engine.errors import exit_status
sys.stdout = sys.stderr = Cell()
sys.argv = ["train.py", *{argv!r}]
raise SystemExit(exit_status(train.main))
"""


def python(code, **environment):
    spin = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    plain = {name: value for name, value in os.environ.items() if name not in spin}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain | environment
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "--local_module_num"),
        (["--epochs", "0"], 2, "'0' is not a whole number"),
        (["--bogus"], 2, "unrecognized arguments: --bogus\n"),
        (["--json"], 2, "--json is for --dry_run"),
    ],
)
def test_help_and_wrong_options_need_no_torch(arguments, status, says):
    script = str(ROOT / "train.py")
    done = python(NO_TORCH.format(argv=[script, *arguments], script=script), PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr.count("\n")) == (status, 1 if status else 0)
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize("module", ["planning.bench", "report"])
def test_help_of_the_others_needs_no_torch(module):
    code = NO_TORCH.replace("run_path({script!r},", "run_module({script!r}, alter_sys=True,")
    done = python(code.format(argv=["x", "--help"], script=module), PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout[:6], done.stderr) == (0, "usage:", "")


def test_a_closed_reader_of_the_help_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'train.py'} --help | head -1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout[:6], done.stderr) == ("usage:", "")


def test_an_output_that_only_writes_and_flushes(here):
    argv = [*TINY, "--epochs", "1", "--output_dir", "run"]
    done = python(ONLY_WRITES.format(root=str(ROOT), argv=argv))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "run folder run" in Path("written").read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "1000 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
    ],
)
def test_openmp_threads_sleep_soon_unless_the_user_says_otherwise(environment, expected):
    code = """
from engine.errors import start_script
import os, sys
start_script(lambda argv: None)
assert "torch" not in sys.modules  # whose OpenMP reads the variables once
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""
    done = python(code, PYTHONPATH=str(ROOT), **environment)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_another_number_of_threads_is_said_when_a_run_continues(here, monkeypatch, capsys):
    run = [*TINY, "--output_dir", "run"]
    with interrupt_after(1):
        assert main(monkeypatch, capsys, *run)[0] == 130
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    status, _, err = main(monkeypatch, capsys, *run, "--resume", "auto")
    assert status == 0
    assert err == [
        "train.py: note: the run had 1 thread and has 7 now, so sums are rounded differently from "
        "here on; OMP_NUM_THREADS=1 keeps the bits"
    ]


def test_more_epochs_with_auto_say_that_a_shorter_run_is_there(train_py):
    run = [*TINY, "--resume", "auto"]
    for epochs in (2, 1):
        assert train_py(*run, "--epochs", epochs)[::2] == (0, [])
    assert train_py(*run, "--no", "2", "--epochs", "3")[::2] == (0, [])  # named as another run
    Path("runs", "other").mkdir()
    Path("runs", "other", "config.json").write_text('{"epochs": "2"}')  # of no run
    status, _, err = train_py(*run, "--epochs", "4")
    (line,) = err
    assert status == 0
    assert "Another is the same with --epochs 2: to go on from there in a third folder, " in line
    status, out, _ = train_py(*TINY, "--epochs", "4", *shlex.split(line.split("folder, ")[1]))
    assert status == 0
    assert next(line for line in out if line.startswith("epoch"))[:11] == "epoch   3/4"
