"""planning/bench.py: the figures by hand, and the command as it is called."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from cli import main

from configs import InputError
from engine.checkpoint import Checkpoint, save_checkpoint
from planning import bench

ROOT = Path(bench.__file__).parent.parent
TINY = [
    "--layers", "8", "--local_module_num", "2", "--batch_size", "4", "--steps", "2",
    "--device", "cpu", "--dataset", "digits", "--local_loss_mode", "cross_entropy",
    "--context_mode", "R0",
]  # fmt: skip
START = {
    "batch_size": 8, "peak_bytes": 5, "loader_samples_per_second": 100.0, "machine": "a machine",
    "division": "",
}  # fmt: skip


def call(*arguments):
    """Run the command; return exit status, output and error lines."""
    done = subprocess.run(
        [sys.executable, "-m", "planning.bench", *TINY, *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_figures_by_hand():
    plain = ("plain", [START], [[(0.2, 100)], [(0.4, 100)], [(0.6, 100)]])
    half = ("half the batch", [START | {"batch_size": 4, "peak_bytes": 4}],
            [[(0.1, 100)], [(0.1, 100)], [(0.6, 100)]])  # fmt: skip
    first, row = bench.as_json([plain, half])
    assert (first["speedup_least"], first["speedup_most"]) == (1, 1)
    times = [row[key] for key in ("step_ms_least", "step_ms", "step_ms_most")]
    assert times == pytest.approx([100, 100, 600])
    assert row["samples_per_second"] == pytest.approx(40)
    ratios = [row[key] for key in ("speedup_least", "speedup", "speedup_most")]
    assert ratios == pytest.approx([0.5, 1, 2])  # 2, 4 and 1, of half as many samples
    assert row["peak_bytes"] == [4]


def test_a_turn_of_several_processes_is_that_of_the_slowest():
    """Two turns, in the second of which the machine is half as fast."""
    one = ("1 process", [START], [[(4.0, 100)], [(8.0, 100)]])
    ranks = [START | {"division": "halves", "peak_bytes": 3}, START | {"peak_bytes": 2}]
    two = ("2 processes", ranks, [[(1.0, 50), (2.0, 100)], [(2.0, 60), (4.0, 100)]])
    _, row = bench.as_json([one, two])
    assert (row["speedup_least"], row["speedup"], row["speedup_most"]) == (2, 2, 2)
    assert (row["step_ms"], row["division"]) == (3000, "halves")
    assert (row["busy_percent"], row["peak_bytes"]) == ([55, 100], [3, 2])


def test_the_table_has_a_line_a_row(capsys):
    plain, several = ("plain", [START], [[(0.2, 100)]]), START | {"division": "halves"}
    bench.print_table(bench.as_json([plain, ("two", [several] * 2, [[(0.1, 90), (0.1, 80)]])]))
    machine, head, first, second, division = capsys.readouterr().out.splitlines()
    assert machine == "a machine"
    assert "ms a step" in head
    assert first.split() == ["plain", "40", "200.0", "200.0-200.0", "1.00", "1.00-1.00", "100", "0"]
    assert "2.00" in second.split()
    assert division == "halves; busy 90.0, 80.0 %"


def test_a_process_times_its_steps():
    """`work` within this process: what it sends for two turns."""
    ours, theirs = multiprocessing.Pipe()
    for steps in (2, 1, 0):
        ours.send(steps)
    bench.work([*TINY[:6], *TINY[8:]], {}, 0, theirs)
    start, *turns = (ours.recv() for _ in range(3))
    assert (start["batch_size"], start["division"]) == (4, "")
    assert "device cpu" in start["machine"]
    assert start["loader_samples_per_second"] > 10
    assert start["peak_bytes"] > 2**20
    assert all(seconds > 0 and busy == 100 for seconds, busy in turns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "8"], "unrecognized arguments: --layer"),
        (["--steps", "0"], "--steps"),
        (["--versus=--amp half"], "--amp"),
        (["--versus=--amp bf16", "--versus=--no_such_thing"], "unrecognized arguments: --no_such"),
        (["--versus=--amp 'bf16"], "No closing quotation"),
        (["--resume", "none.pt"], "there is no checkpoint none.pt"),
        (["--resume", "kept.pt"], "leave --resume out"),
        (["--evaluate", "kept.pt"], "leave --evaluate out"),
        (["--dry_run"], "leave --dry_run out"),
        (["--parallel", "modules", "--versus=--amp bf16"], "leave --versus out"),
        (["--parallel", "modules", "--steps", "2"], "2 steps fill the pipeline: give more --steps"),
    ],
)
def test_bad_options_are_one_line_and_status_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "kept.pt", Checkpoint(0, {}, {}, {}, []))
    status, out, err = main(monkeypatch, capsys, *TINY, *arguments, script=bench)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


def test_what_a_process_finds_wrong_is_raised():
    ours, theirs = multiprocessing.Pipe()
    bench.work([*TINY[:6], *TINY[8:], "--layers", "9"], {}, 0, theirs)
    with pytest.raises(InputError, match="6n\\+2"):
        bench.receive([ours])
    theirs.close()
    with pytest.raises(InputError, match="ended early"):
        bench.receive([ours])


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


@pytest.mark.slow
def test_several_processes_are_timed_against_one():
    status, out, err = call("--parallel", "modules", "--steps", "4", "--turns", "2", "--json")
    assert (status, err) == (0, [])
    one, two = json.loads(out)
    assert two["division"].startswith("modules 0 on rank 0, 1 on rank 1")
    assert (len(one["peak_bytes"]), len(two["peak_bytes"])) == (1, 2)
    assert all(0 <= busy <= 100 for busy in two["busy_percent"])
    assert 0 < two["speedup_least"] <= two["speedup"] <= two["speedup_most"]
    status, out, err = call("--parallel", "modules", "--nproc", "3", "--steps", "4")
    assert (status, out) == (2, "")
    assert "3 processes for 2 modules" in err[0]
