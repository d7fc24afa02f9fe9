"""report.py on a small committed grid: tables to the letter, figures by what was plotted.

tests/runs/ has round errors, so that the means and deviations in tests/expected/ can be worked out
by hand: R0 10, 11, 12 % (11 ± 1), its best epochs 9.5, 10.5, 11 % (10.33 ± 0.76), and so on.
"""

import csv
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cli import main
from matplotlib.image import imread

from configs import choose_cuts
from report import __main__ as report
from report import figures
from report.report_figures import draw_figures, file_name
from report.results import Setting, make_cell, read_records
from report.tables import TABLES, fill_grids, group_records

HERE = Path(__file__).parent
RUNS, EXPECTED = HERE / "runs", HERE / "expected"


report_main = partial(main, script=report)


@pytest.fixture
def results(monkeypatch, capsys, tmp_path):
    """The folder that report.py made of tests/runs, seen as `runs`."""
    (tmp_path / "runs").symlink_to(RUNS)
    monkeypatch.chdir(tmp_path)
    status, out, err = report_main(monkeypatch, capsys, "runs")
    assert status == 0
    assert sorted(out) == sorted(str(path) for path in Path("results").iterdir())
    assert len(err) == 3
    return tmp_path / "results"


# Tables


def test_tables_are_as_expected_to_the_letter(results):
    expected = {path.name: path.read_text() for path in EXPECTED.iterdir()}
    assert len(expected) == 14
    made = {p.name: p.read_text() for p in results.iterdir() if p.suffix in (".md", ".csv")}
    assert made == expected


def test_numbers_of_a_cell_by_hand(results):
    with (results / "table1.csv").open() as file:
        rows = {(r["quantity"], r["method"]): r["K=16"] for r in csv.DictReader(file)}
    best = [9.5, 10.5, 11.0]
    mean = sum(best) / 3
    std = math.sqrt(sum((b - mean) ** 2 for b in best) / 2)
    assert float(rows["error_best_mean", "R0"]) == pytest.approx(mean, rel=1e-5)
    assert float(rows["error_best_std", "R0"]) == pytest.approx(std, rel=1e-5)
    assert rows["n", "R0"] == "3"
    assert rows["error_last_std", "E"] == "-"  # of one run there is none
    assert rows["error_last_mean", "R1"] == "-"  # not finished
    assert rows["error_last_mean", "R1E"] == "-"  # only planned
    assert rows["peak_memory_how", "R1E"].startswith("planned")
    assert int(rows["peak_memory_bytes", "R1E"]) == 531 * 2**20
    assert (
        "planned" not in rows["peak_memory_how", "R0"]
    )  # there is a plan too: measured goes first


def test_what_is_left_out_is_said(monkeypatch, capsys, tmp_path):
    _, _, err = report_main(monkeypatch, capsys, RUNS, "--output_dir", tmp_path / "out")
    assert all(line.startswith("report.py: note: ") for line in err)
    for folder, reason in (
        ("broken", "JSONDecodeError"),
        ("digits-E-seed0-again", "is the same run"),
        ("unfinished", "not finished (epochs done: 1)"),
    ):
        assert sum(f"/{folder}" in line and reason in line for line in err) == 1


def test_an_empty_grid_has_but_missing_cells(monkeypatch, capsys, tmp_path):
    shutil.copytree(RUNS / "unfinished", tmp_path / "runs" / "unfinished")
    out = tmp_path / "out"
    status, _, _ = report_main(monkeypatch, capsys, tmp_path / "runs", "--output_dir", out)
    assert status == 0
    for table in TABLES:
        with (out / f"{table.name}.csv").open() as file:
            header, *rows = csv.reader(file)
        assert {cell for row in rows for cell in row[3:]} == {"-"}
        methods = len(table.rows) * max(1, len(table.datasets))
        assert len(rows) == len(report.QUANTITIES) * methods
        assert len(header) == 3 + len(table.columns)
    assert not list(out.glob("*.png"))


def test_the_tables_have_the_cells_of_the_paper():
    counts = {}
    for table in TABLES:
        methods = [table.methods(dataset) for dataset in table.datasets or ("cifar10",)]
        counts[table.name] = sum(map(len, methods))
    # 7 runs in Figure 4; choose_cuts has no balanced cuts for the other cells. R16 at K=8 is one
    # cell of Table 4 that can't be run.
    assert counts == dict(table1=4, table2=16, table3=24, figure4=7, figure5=44, table4=13 + 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "train something first"),
        ([], "required: runs"),
        ([".", "--output-dir", "x"], "did you mean --output_dir?"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, out, err = report_main(monkeypatch, capsys, *arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert says in err[0]


def test_an_unwritable_folder_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = report_main(monkeypatch, capsys, RUNS, "--output_dir", tmp_path / "file")
    assert status == 2
    assert "cannot write to" in err[-1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.update(error_last="low"),
        lambda s: s.update(error_last=float("nan")),
        lambda s: s.update(peak_memory_bytes=None),
        lambda s: s.update(peak_memory_bytes=-1),
        lambda s: s.update(peak_memory_bytes=10**400),
        lambda s: s.pop("config"),
        lambda s: s["config"].update(dataset="imagenet"),
        lambda s: s["config"].update(context_mode="Q"),
        lambda s: s["config"].update(local_loss_mode="hinge"),
        lambda s: s["config"].update(local_module_num=99),
        lambda s: s["config"].pop("seed"),
        lambda s: s["config"].update(local_module_num=16.0),
        lambda s: s["config"].update(seed=None),
        lambda s: s["config"].update(seed=[0]),
        lambda s: s["config"].update(cuts=[[1, [2]]] * 15),
        lambda s: s["config"].update(context_mode="ER1"),
        lambda s: s.update(error_last=-5),
        lambda s: s.update(error_best=True),
    ],
)
def test_a_damaged_summary_is_left_out(tmp_path, damage):
    summary = json.loads((RUNS / "E-seed0" / "summary.json").read_text())
    damage(summary)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    records, notes = read_records([tmp_path])
    assert records == []
    assert len(notes) == 1
    assert "is left out" in notes[0]


def test_a_summary_nested_too_deep_is_left_out(tmp_path):
    (tmp_path / "summary.json").write_text("[" * 100_000)
    records, notes = read_records([tmp_path])
    assert (records, len(notes)) == ([], 1)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"3", b'{"epoch": 1}', b'{"epoch": 3, "test_er'])
def test_a_damaged_line_of_metrics_is_left_out(tmp_path, line):
    shutil.copytree(RUNS / "digits-E-seed0", tmp_path / "run")
    shutil.copytree(RUNS / "unfinished", tmp_path / "unfinished")
    for folder in ("run", "unfinished"):
        with (tmp_path / folder / "metrics.jsonl").open("ab") as file:
            file.write(line)
    (record,), notes = read_records([tmp_path])
    assert [m["test_error"] for m in record.metrics()] == [8.0, 4.0]
    assert "is not finished (epochs done: 1)" in notes[0] or line == b'{"epoch": 1}'


def a_run(folder, source="E-seed0", error=None, **config):
    """A copy of a run with some options, and its error at the last epoch, changed."""
    summary = json.loads((RUNS / source / "summary.json").read_text())
    summary["config"].update(config)
    if error is not None:
        summary["error_last"] = error
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_images_of_ones_own_are_told_apart_by_their_folder(tmp_path):
    for name, error in (("cats", 10.0), ("birds", 50.0)):
        a_run(tmp_path / name, error=error, dataset="folder", data_dir=f"my/{name}")
    records, notes = read_records([tmp_path])
    assert notes == []
    assert {r.setting.dataset: r.error_last for r in records} == {
        "folder-cats": 10.0, "folder-birds": 50.0,
    }  # fmt: skip


def test_balanced_cuts_are_not_the_same_cuts_typed(tmp_path):
    cuts = [list(cut) for cut in choose_cuts(32, 8, "cifar10", True)]
    for seed, how in enumerate(
        (dict(balanced_memory=True, cuts=None), dict(balanced_memory=False, cuts=cuts))
    ):
        a_run(tmp_path / str(seed), "E-K8-decoders", seed=seed, **how)
    records, _ = read_records([tmp_path])
    labels = ["E, softmax with decoders, balanced cuts", "E, softmax with decoders, cuts [1, 1]"]
    assert [r.method.label[: len(s)] for r, s in zip(records, labels, strict=True)] == labels
    assert records[0].method.cuts == records[1].method.cuts


def test_end_to_end_runs_are_one_method_whatever_else_they_say(tmp_path):
    for seed, other in enumerate(
        (dict(), dict(context_mode="E"), dict(local_loss_mode="contrast"), dict(h_reconstruct=True))
    ):
        a_run(
            tmp_path / str(seed), **dict(local_module_num=1, context_mode="R0", seed=seed) | other
        )
    records, _ = read_records([tmp_path])
    assert len(records) == 4
    assert len({record.method for record in records}) == 1


def test_a_run_below_two_roots_is_read_once(tmp_path):
    a_run(tmp_path / "run")
    records, notes = read_records([tmp_path, tmp_path / "run"])
    assert (len(records), notes) == (1, [])
    (tmp_path / "run" / "summary.json").write_text("")
    assert len(read_records([tmp_path, tmp_path / "run"])[1]) == 1


@pytest.mark.parametrize("first", [1, 3])
def test_a_run_that_continues_another_is_left_out(tmp_path, first):
    a_run(tmp_path / "run")
    lines = [json.dumps({"epoch": epoch, "test_error": 5.0}) + "\n" for epoch in (first, first + 1)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    records, notes = read_records([tmp_path])
    assert len(records) == (first == 1)
    assert ["epochs begin with 3: it continues another run" in note for note in notes] == (
        [] if first == 1 else [True]
    )


def test_options_in_another_order_are_the_same_setting(tmp_path):
    a_run(tmp_path / "run", batch_size=64, lr=0.1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["config"] = dict(reversed(summary["config"].items())) | {"seed": 1}
    (tmp_path / "reversed").mkdir()
    (tmp_path / "reversed" / "summary.json").write_text(json.dumps(summary))
    records, _ = read_records([tmp_path])
    assert [record.seed for record in records] == [1, 0]
    assert (
        records[0].setting == records[1].setting == Setting("cifar10", ("batch_size-64", "lr-0.1"))
    )


def test_published_settings_come_first(tmp_path):
    for name, dataset in (("a", "cifar10"), ("b", "cifar100"), ("c", "cifar10")):
        a_run(tmp_path / name, dataset=dataset, lr=0.1 if name == "a" else 0.8)
    records, _ = read_records([tmp_path])
    table = next(table for table in TABLES if table.name == "table1")
    settings = [str(grid.setting) for grid in fill_grids(table, records)]
    assert settings == [
        "cifar10, published options", "cifar10, lr 0.1", "cifar100, published options",
    ]  # fmt: skip


def test_table3_shows_further_data_sets_too(tmp_path):
    svhn = json.loads((RUNS / "svhn" / "summary.json").read_text())
    a_run(tmp_path / "run", "svhn", dataset="cifar100")
    records, _ = read_records([tmp_path])
    (grid,) = fill_grids(next(table for table in TABLES if table.name == "table3"), records)
    rows = {label: [cell.error_last.mean for cell in cells.values() if cell]
            for label, cells in grid.rows}  # fmt: skip
    assert rows.pop("cifar100, R1E, contrast") + rows.pop("cifar100, R1E, softmax") == [
        svhn["error_last"]
    ]
    assert len(rows) == 6
    assert not any(rows.values())


def test_the_readme_shows_what_the_runs_of_its_experiment_say():
    root = HERE.parent
    records, notes = read_records([root / "docs" / "evidence" / "runs"])
    assert notes == []
    readme = (root / "README.md").read_text()
    shown = 0
    for (_, setting), group in group_records(records).items():
        for method, of_method in group.items():
            cell = make_cell(of_method)
            if any(option.startswith("limit_per_class") for option in setting.options):
                parts = [method.K, method.label, cell.error_last, cell.error_best,
                         f"{cell.peak / 2**20:.0f}"]  # fmt: skip
            else:
                parts = [method.K, method.label, of_method[0].config["epochs"],
                         f"{cell.error_last.mean:.2f}", f"{cell.error_best.mean:.2f}"]  # fmt: skip
            assert f"| {' | '.join(map(str, parts))} |" in readme
            shown += 1
    assert shown == 5 + 4 + 3


# Figures


@pytest.fixture(scope="module")
def drawn():
    """Name -> figure, of tests/runs."""
    records, notes = read_records([RUNS])
    by_name = dict(draw_figures(records, notes))
    assert len(notes) == 3  # as above: nothing about figures
    return by_name


def lines_of(axes):
    """Label -> points of the lines that are drawn, with the error bars' own left out."""
    lines = {}
    for line in axes.lines:
        x, y = line.get_data()
        if len(x) and line.get_linestyle() != "None":
            label = line.get_label()
            for container in axes.containers:
                if container.lines[0] is line:
                    label = container.get_label()
            lines[label] = (list(x), list(y))
    return lines


def test_figure4_shows_error_against_peak_memory(drawn):
    (axes,) = drawn["figure4"].axes
    lines = lines_of(axes)
    assert lines["ResNet-32"] == ([1040.0, 460.0], [7.25, 9.0])
    assert lines["ResNet-110"] == ([4394.0], [6.0])
    notes = [(note.get_text(), note.xy) for note in axes.texts]
    assert notes == [("K=4", (1040.0, 7.25)), ("K=16", (460.0, 9.0)), ("K=2", (4394.0, 6.0))]
    (bars,) = axes.containers[0].lines[2]
    two_seeds, one_seed = bars.get_segments()
    assert two_seeds[:, 1] == pytest.approx([7.25 - math.sqrt(0.125), 7.25 + math.sqrt(0.125)])
    assert len(one_seed) == 0  # no bar: one of 0 would look like a result
    # The README's peaks of end-to-end training, which the meter took on real steps too.
    for net, peak in (("ResNet-32", 2464), ("ResNet-110", 8297)):
        x, _ = lines[f"{net}, end to end, planned"]
        assert x[0] == x[1] == pytest.approx(peak, abs=0.5)
        again, _ = lines[f"{net}, end to end with --recompute, planned"]
        assert again[0] < peak / 2
    assert len(lines) == 6
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    for net, colour in (("ResNet-32", "tab:blue"), ("ResNet-110", "tab:red")):
        assert looks[f"{net}, end to end, planned"] == (colour, ":")
        assert looks[f"{net}, end to end with --recompute, planned"] == (colour, "--")
    assert axes.get_xlabel() == "peak memory, MiB"
    assert axes.get_ylabel() == "test error at the last epoch, %"


def test_peaks_of_end_to_end_training_are_those_of_the_figures_runs(tmp_path):
    a_run(tmp_path / "large", "E-contrast-K4-balanced-seed0")
    a_run(tmp_path / "small", "E-contrast-K4-balanced-seed0", batch_size=64)
    by_name = dict(draw_figures(read_records([tmp_path])[0], []))
    large, small = (
        lines_of(by_name[name].axes[0])["ResNet-32, end to end, planned"][0][0]
        for name in ("figure4", "figure4_batch_size-64")
    )
    assert large == pytest.approx(2464, abs=0.5)
    assert small < large / 10


def test_a_figure_without_peaks_that_can_be_planned_says_so(tmp_path):
    a_run(tmp_path / "run", "E-contrast-K4-balanced-seed0", batch_size=-1)
    notes = []
    by_name = dict(draw_figures(read_records([tmp_path])[0], notes))
    assert list(lines_of(by_name["figure4_batch_size--1"].axes[0])) == ["ResNet-32"]
    assert len(notes) == 1
    assert "end-to-end peaks can't be planned" in notes[0]


def test_figure5_shows_error_against_K_by_mode(drawn):
    by_title = {axes.get_title(): lines_of(axes) for axes in drawn["figure5"].axes}
    assert by_title == {
        "softmax": {"R0": ([16], [11.0]), "E": ([16], [8.25])},
        "softmax with decoders": {"E": ([8], [7.75])},
        "contrast": {"E": ([4, 16], [6.75, 9.0])},
    }
    (axes,) = drawn["figure5_digits_epochs-2"].axes
    assert lines_of(axes) == {"E": ([2], [5.0]), "end to end": ([1], [3.0])}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "test error at the last epoch, %"


def test_learning_curves_are_means_over_seeds(drawn):
    (axes,) = drawn["learning_curves_resnet32_digits_epochs-2"].axes
    assert axes.get_title() == "K=2, softmax"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "test error, %")
    assert lines_of(axes) == {
        "end to end": ([1, 2], [7.0, 3.0]),
        "E": ([1, 2], [6.5, 5.0]),  # 8 and 5, then 4 and 6
    }
    (band,) = axes.collections
    low, high = band.get_datalim(axes.transData).intervaly
    assert high == pytest.approx(6.5 + math.sqrt(4.5))
    assert low == pytest.approx(5 - math.sqrt(2))


def test_error_by_depth_has_test_and_train(drawn):
    (axes,) = drawn["error_by_depth_resnet32_digits_epochs-2"].axes
    lines = lines_of(axes)
    assert lines == {
        "end to end": ([0, 1], [3.0, 3.0]),
        "_end to end": ([0, 1], [2.0, 2.0]),
        "E": ([0, 1], [8.5, 5.0]),  # 9 and 8, 4 and 6
        "_E": ([0, 1], [6.5, 2.0]),  # 7 and 6, 3 and 1
    }
    dashed = {line.get_label(): line.get_linestyle() == "--" for line in axes.lines}
    assert dashed == {"end to end": False, "_end to end": True, "E": False, "_E": True}
    assert {text.get_text() for text in drawn["figure5"].legends[0].texts} == {"R0", "E"}


def test_each_line_has_a_colour_of_its_own():
    modes = ["R0", "E", "R3", "R5", "R6", "R7", "R8", "R12", "R16E"]
    lines = {side: [figures.Line(m, [1], [2.0]) for m in modes] for side in ("left", "right")}
    left, right = figures.learning_curves(lines, "").axes
    colours = [line.get_color() for line in left.lines]
    assert len(set(colours)) == len(modes)
    assert [line.get_color() for line in right.lines] == colours


def test_figures_of_an_earlier_report_are_said(monkeypatch, capsys, tmp_path):
    (tmp_path / "figure4.png").write_text("")
    (tmp_path / "figure4_earlier.png").write_text("")
    _, _, err = report_main(monkeypatch, capsys, RUNS, "--output_dir", tmp_path)
    assert err[-1] == f"report.py: note: {tmp_path}/figure4_earlier.png is not of this report"
    assert len(err) == 4
    assert "earlier" not in (tmp_path / "all_runs.md").read_text()


def test_figures_are_written_as_pictures(results):
    names = sorted(path.stem for path in results.glob("*.png"))
    assert names == [
        "error_by_depth_resnet32_digits_epochs-2",
        "figure4",
        "figure5",
        "figure5_digits_epochs-2",
        "learning_curves_resnet32_digits_epochs-2",
    ]
    for name in names:
        picture = imread(results / f"{name}.png")
        assert picture.shape[0] > 400
        assert np.ptp(picture) > 0.9


def test_heads_without_an_error_have_no_depth_figure(tmp_path):
    shutil.copytree(RUNS / "digits-E-seed0", tmp_path / "run")
    metrics = {"epoch": 1, "test_error": 4.0, "test_errors": [None, 4.0], "train_errors": [None, 3]}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(metrics))
    names = [name for name, _ in draw_figures(read_records([tmp_path])[0], [])]
    assert any(name.startswith("learning_curves") for name in names)
    assert not any(name.startswith("error_by_depth") for name in names)


def test_a_depth_figure_of_the_end_to_end_net_alone_is_none(tmp_path):
    shutil.copytree(RUNS / "digits-end-to-end", tmp_path / "whole")
    shutil.copytree(RUNS / "digits-E-seed0", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["config"]["local_loss_mode"] = "contrast"
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    metrics = {"epoch": 1, "test_error": 4.0, "test_errors": [None, 4.0], "train_errors": [None, 3]}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(metrics))
    drawn = dict(draw_figures(read_records([tmp_path])[0], []))
    assert [name.split("_resnet")[0] for name in drawn if "resnet" in name] == ["learning_curves"]


def test_names_of_figures_are_names_of_files_and_differ():
    long = [Setting("digits", (*["an_option-of_the_run"] * 12, last)) for last in ("lr-1", "lr-2")]
    names = {file_name("figure5", setting) for setting in long}
    assert len(names) == 2
    assert all(len(name) <= 200 for name in names)
    assert "/" not in file_name("figure5", Setting("digits", ("aux_net_config-../../x",)))
