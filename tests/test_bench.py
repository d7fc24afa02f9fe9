"""planning/bench.py: the figures by hand, and the command as it is called."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import main

from configs import InputError
from engine.checkpoint import Checkpoint, save_checkpoint
from planning import bench

ROOT = Path(bench.__file__).parent.parent
NET = [
    "--layers", "8", "--local_module_num", "2", "--batch_size", "4", "--device", "cpu",
    "--dataset", "digits", "--local_loss_mode", "cross_entropy", "--context_mode", "R0",
]  # fmt: skip
START = {"batch_size": 8, "peak_bytes": 2**20, "loader_samples_per_second": 100, "machine": "ours"}


def test_figures_and_table_by_hand(capsys):
    plain = SimpleNamespace(name="plain", seconds=[0.2, 0.4, 0.6], starts=[START])
    starts = [START | {"batch_size": 4}, START | {"peak_bytes": 3 * 2**20}]
    half = SimpleNamespace(name="half the batch", seconds=[0.1, 0.1, 0.6], starts=starts)
    rows = bench.figures([plain, half])
    bench.print_table(rows)
    half = rows[1]
    assert half["samples_per_second"] == pytest.approx(40)
    times = [half[key] for key in ("step_ms_least", "step_ms", "step_ms_most")]
    assert times == pytest.approx([100, 100, 600])
    ratios = [half[key] for key in ("speedup_least", "speedup", "speedup_most")]
    assert ratios == pytest.approx([0.5, 1, 2])  # 2, 4 and 1, of half as many samples
    machine, head, first, second = capsys.readouterr().out.splitlines()
    assert (machine, head.split()[0]) == ("ours", "samples/s")
    assert first.split() == ["plain", "20", "400.0", "200.0-600.0", "1.00", "1.00-1.00", "100", "1"]
    assert second.split()[-3:] == ["100", "1,", "3"]


def test_a_step_of_several_processes_is_that_of_the_slowest():
    timed = bench.Row.__new__(bench.Row)
    timed.name, timed.seconds = "two", []
    timed.pipes, others = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    for seconds, other in zip((0.5, 0.25), others, strict=True):
        other.send(seconds)
    timed.time_step()
    assert timed.seconds == [0.5]
    others[0].close()
    others[1].send(InputError("it can't be"))
    with pytest.raises(InputError, match="it can't be"):  # the other one ended because of that
        timed.time_step()
    others[1].close()
    with pytest.raises(InputError, match="'two' ended early"):
        timed.time_step()


def test_a_process_times_its_steps():
    steps = bench.timed_steps(NET, {}, 2)
    start, *seconds = (next(steps) for _ in range(3))
    assert start["batch_size"] == 4
    assert "device cpu" in start["machine"]
    assert start["loader_samples_per_second"] > 10
    assert start["peak_bytes"] > 2**20
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "8"], "unrecognized arguments: --layer"),
        (["--versus=--amp bf16", "--versus=--no_such_thing"], "unrecognized arguments: --no_such"),
        (["--versus=--amp 'bf16"], "No closing quotation"),
        (["--resume", "none.pt"], "there is no checkpoint none.pt"),
        (["--resume", "kept.pt"], "leave --resume out"),
        (["--dry_run"], "leave --dry_run out"),
        (["--versus=--parallel modules"], "leave --parallel out"),
    ],
)
def test_bad_options_are_one_line_and_status_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "kept.pt", Checkpoint(0, {}, {}, {}, []))
    status, out, err = main(monkeypatch, capsys, *NET, *arguments, script=bench)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


def call(*arguments):
    """Run the command; return exit status, output and error lines."""
    command = [sys.executable, "-m", "planning.bench", *NET, "--steps", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.slow
def test_rows_have_processes_of_their_own():
    status, out, err = call("--versus=--recompute --context_mode E", "--json")
    assert (status, err) == (0, [])
    plain, given, context = json.loads(out)
    names = ["plain", "as given", "--recompute --context_mode E"]
    assert [row["options"] for row in (plain, given, context)] == names
    assert plain["peak_bytes"] == given["peak_bytes"]  # the same bytes in another order
    assert context["peak_bytes"] != given["peak_bytes"]
    status, out, err = call("--layers", "9")
    assert (status, out, len(err)) == (2, "", 1)
    assert "6n+2" in err[0]


@pytest.mark.slow
def test_several_processes_are_timed_against_one():
    status, out, err = call("--nproc", "2", "--json")
    assert (status, len(err)) == (0, 1)
    assert err[0].startswith("modules 0 on rank 0, 1 on rank 1; measured ms a step: ")
    one, two = json.loads(out)
    assert (len(one["peak_bytes"]), len(two["peak_bytes"])) == (1, 2)
    assert 0 < two["speedup_least"] <= two["speedup"] <= two["speedup_most"]
    status, out, err = call("--nproc", "3")
    assert (status, out, len(err)) == (2, "", 1)
    assert "3 processes for 2 modules" in err[0]
