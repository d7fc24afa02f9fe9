"""bench.py as it is called."""

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
KEYS = {
    "options", "batch_size", "samples_per_second", "step_ms", "step_ms_least", "step_ms_most",
    "peak_bytes",
    "times_plain", "loader_samples_per_second",
}  # fmt: skip


def call(*arguments):
    """Exit status, output and error lines."""
    done = subprocess.run(
        [sys.executable, "-m", "planning.bench", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.fixture(scope="module")
def result():
    versus = ["--versus=--amp bf16", "--versus=--recompute --context_mode E"]
    status, out, err = call(*TINY, *versus, "--json")
    assert (status, err) == (0, [])
    return json.loads(out)


def test_json_has_all_rows_and_keys(result):
    assert result.keys() == {"machine", "steps", "rows"}
    assert ([row["batch_size"] for row in result["rows"]], result["steps"]) == ([4] * 4, 2)
    assert "device cpu" in result["machine"]
    names = ["plain", "as given", "--amp bf16", "--recompute --context_mode E"]
    assert [row["options"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row.keys() == KEYS
        assert 0 < row["step_ms_least"] <= row["step_ms"] <= row["step_ms_most"]
        assert row["samples_per_second"] == pytest.approx(4 / row["step_ms"] * 1000)
        assert row["peak_bytes"] > 2**20
        assert row["times_plain"] > 0
    assert result["rows"][0]["times_plain"] == 1


def test_rows_are_of_their_options(result):
    plain, given, narrow, context = (row["peak_bytes"] for row in result["rows"])
    assert plain == given  # the order of the same bytes
    assert narrow != given
    assert context != given


def test_the_loader_is_timed(result):
    assert all(row["loader_samples_per_second"] > 10 for row in result["rows"])


def test_figures_by_hand():
    plain = bench.Timed("plain", "cpu", 8, 5, 1.0, [0.2, 0.4, 0.6])
    other = bench.Timed("other", "cpu", 8, 4, 1.0, [0.1, 0.1, 0.6])
    row = bench.as_json([plain, other])["rows"][1]
    times = [row[key] for key in ("step_ms_least", "step_ms", "step_ms_most")]
    assert times == pytest.approx([100, 100, 600])
    assert row["times_plain"] == pytest.approx(2)  # median of 2, 4 and 1
    assert row["samples_per_second"] == pytest.approx(80)
    assert row["peak_bytes"] == 4


def test_table_has_a_line_a_row(result, capsys):
    bench.print_table(result)
    machine, head, plain, given, *more = capsys.readouterr().out.splitlines()
    assert machine.endswith("2 steps of 4 samples")
    assert "ms a step" in head
    assert plain.startswith("plain ")
    assert plain.split()[-2] == "1.00"
    assert given.startswith("as given ")
    assert len(more) == 2


def here(monkeypatch, capsys, *arguments):
    """The same within the process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, *arguments])
    try:
        status = bench.main()
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "8"], "unrecognized arguments: --layer"),
        (["--steps", "0"], "--steps"),
        (["--versus=--amp half"], "--amp"),
        (["--versus=--amp bf16", "--versus=--no_such_thing"], "unrecognized arguments: --no_such"),
        (["--versus=--amp 'bf16"], "No closing quotation"),
        (["--resume", "none.pt"], "there is no checkpoint none.pt"),
    ],
)
def test_bad_options_are_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    status, out, err = here(monkeypatch, capsys, *arguments)
    assert (status, out, len(err)) == (2, "", 1)
    assert message in err[0]


@pytest.mark.parametrize("option", ["--resume", "--evaluate", "--dry_run"])
def test_only_steps_of_a_new_run_are_timed(tmp_path, option):
    """What a started process finds wrong comes out the same way; it is called here, not started."""
    save_checkpoint(tmp_path / "kept.pt", Checkpoint(0, {}, {}, {}, []))
    given = [] if option == "--dry_run" else [str(tmp_path / "kept.pt")]
    ours, theirs = multiprocessing.Pipe()
    bench.serve([*(TINY[:6] + TINY[8:]), option, *given], theirs)
    with pytest.raises(InputError, match=f"leave {option} out"):
        bench.receive(ours)


def test_what_a_process_finds_wrong_is_one_line_and_status_2():
    status, out, err = call(*TINY, "--layers", "9")
    assert (status, out, len(err)) == (2, "", 1)
    assert "6n+2" in err[0]


def test_versus_may_be_left_out():
    assert bench.build_parser().parse_known_args(["--layers", "8"])[0].versus == []


# ---------------------------------------------------------------------------------------------
# Several processes against one


def test_several_processes_are_timed_against_one():
    status, out, err = call(
        *TINY, "--parallel", "modules", "--module_ranges", "0", "1", "--steps", "4",
        "--turns", "2", "--json",
    )  # fmt: skip
    assert (status, err) == (0, [])
    result = json.loads(out)
    assert result["way"] == "modules 0 on rank 0, 1 on rank 1"
    assert (result["processes"], result["steps"], result["turns"]) == (2, 4, 2)
    one, several = result["one"], result["several"]
    assert 0 < one["step_ms_least"] <= one["step_ms"] <= one["step_ms_most"]
    assert len(several["peak_bytes"]) == 2 and min(several["peak_bytes"]) > 0
    assert all(0 <= busy <= 100 for busy in several["busy_percent"])
    assert result["times_one_with_bubble"] > 0
    assert result["times_one_least"] <= result["times_one"] <= result["times_one_most"]


def test_a_ratio_is_of_the_slowest_process_and_turn_by_turn():
    """Two turns, in the second of which the machine is half as fast."""
    first = ("cpu", 128, 1000, 5.0)
    ranks = [("cpu", 128, 600, "halves"), ("cpu", 128, 500, "halves")]
    measured = [([4.0, 4.0, 9.0], [(1.0, 10.0, 50.0), (2.0, 8.0, 100.0)]),
                ([8.0, 8.0, 8.0], [(2.0, 20.0, 60.0), (4.0, 16.0, 100.0)])]  # fmt: skip
    result = bench.together_as_json(first, ranks, measured, steps=4)
    assert (result["times_one_least"], result["times_one"], result["times_one_most"]) == (2, 2, 2)
    assert result["times_one_with_bubble"] == pytest.approx(1.6)  # 4 s a step against 10 s in four
    assert (result["one"]["step_ms"], result["several"]["step_ms"]) == (6000, 3000)
    assert result["several"]["busy_percent"] == [55, 100]
    assert result["several"]["peak_bytes"] == [600, 500]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--versus=--amp bf16"], "--parallel is timed against one process: leave --versus out"),
        (["--steps", "2"], "the first 2 steps fill the pipeline: give more --steps"),
        (
            ["--module_ranges", "0-3", "--steps", "4"],
            "--module_ranges has 1 ranges for 2 processes",
        ),
    ],
)
def test_what_can_not_be_timed_together(monkeypatch, capsys, more, says):
    arguments = [*TINY, "--local_module_num", "4", "--parallel", "modules", *more]
    status, _, err = main(monkeypatch, capsys, *arguments, script=bench)
    assert status == 2
    assert f"bench.py: error: {says}" in err
