"""The report on a small committed grid: tables to the letter, figures by what was plotted.

tests/runs/ has round errors, so that the means and deviations in tests/expected/ can be worked out
by hand: R0 10, 11, 12 % (11 ± 1), its best epochs 9.5, 10.5, 11 % (10.33 ± 0.76), and so on.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from cli import main
from matplotlib.image import imread

import configs
from configs import choose_cuts
from engine.options import read_options
from report import __main__ as report
from report.figures import draw_figures, file_name, write_figures
from report.methods import add_published, csv_columns, method_cells, method_name, methods_markdown
from report.results import SETUP, read_runs, read_setup
from report.tables import csv_text, error_text, over_seeds

HERE = Path(__file__).parent
RUNS, EXPECTED = HERE / "runs", HERE / "expected"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the report on tests/runs."""
    folder = tmp_path_factory.mktemp("report")
    written, _ = report.write_report([RUNS], folder)
    assert sorted(written) == sorted(folder.iterdir())
    return folder


def a_run(folder, source="E-seed0", metrics=(), results=(), **config):
    """Make a copy of a run with other metrics, and some results and options changed."""
    summary = json.loads((RUNS / source / "summary.json").read_text()) | dict(results)
    summary["config"] |= config
    if config.get("seed"):  # the order of options does not matter
        summary["config"] = dict(reversed(summary["config"].items()))
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))


def cells_of(root):
    runs, notes = read_runs([root])
    return over_seeds(runs), notes


def figures_of(root):
    return draw_figures(read_runs([root])[0], cells_of(root)[0])


def test_tables_are_as_expected_to_the_letter(results):
    expected = {path.name: path.read_text() for path in EXPECTED.iterdir()}
    assert len(expected) == 14
    made = {path.name: path.read_text() for path in results.iterdir() if path.suffix != ".png"}
    assert {name: text.replace(str(RUNS), "runs") for name, text in made.items()} == expected


def test_what_is_left_out_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(report, "write_figures", lambda *_: [])  # the fixture's are enough
    roots = (RUNS, RUNS / "R16")  # R16 is read once
    status, out, err = main(monkeypatch, capsys, *roots, "--output_dir", tmp_path, script=report)
    assert (status, len(err)) == (0, 3)
    assert sorted(out) == sorted(map(str, tmp_path.iterdir()))
    broken, again, unfinished = sorted(err)
    assert "/broken/" in broken and "JSONDecodeError" in broken
    assert "/digits-E-seed0-again/" in again and "is the same run" in again
    assert "/unfinished is not finished (epochs done: 1)" in unfinished


def test_tables_without_a_run_are_not_written(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(RUNS / "unfinished", runs / "unfinished")
    written, (note,) = report.write_report([runs], out)
    assert [path.name for path in written] == ["all_runs.md", "all_runs.csv"]
    assert note in written[0].read_text()
    a_run(runs / "R1", context_mode="R1")
    report.write_report([runs], out)
    assert {path.stem for path in out.glob("*.md")} == {"table1", "figure5", "table4", "all_runs"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no folder nowhere"), (["."], "train something first"),
        ([".", "--output-dir", "x"], "did you mean --output_dir?"),
        ([RUNS, "--output_dir", "file"], "cannot write to file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    status, out, err = main(monkeypatch, capsys, *arguments, script=report)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("report: error: ") and says in err[0]


def test_names_that_a_script_has_added_are_listed(tmp_path):
    """Of a context, a loss, a head, a backbone and a data set; this process knows none of them."""
    for name, config in {
        "context": {"context_mode": "R1S"},
        "others": {"local_loss_mode": "smooth", "aux_net_config": "pool2", "model": "plain"},
        "data": {"dataset": "noise", "image_size": 16, "batch_size": 8, "lr": 0.3},
    }.items():
        a_run(tmp_path / name, **config)
    written, notes = report.write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out/all_runs.md").read_text()
    assert notes == [] and written[0].exists()
    assert "| R1S, softmax |" in text and "| E, smooth, pool2 |" in text
    assert "noise, image_size 16, batch_size 8, lr 0.3" in text
    assert "cifar10, model plain\n" in text


@pytest.mark.parametrize(
    "damage",
    [
        {"results": {"error_last": "low"}}, {"results": {"peak_memory_bytes": None}},
        {"context_mode": "ER1"}, {"local_module_num": 99},
        {"seed": [0]}, {"cuts": 5},
    ],
)  # fmt: skip
def test_a_damaged_summary_is_left_out(tmp_path, damage):
    a_run(tmp_path / "run", **damage)
    runs, (note,) = read_runs([tmp_path])
    assert runs.empty
    assert note.startswith(f"{tmp_path}/run/summary.json is left out: ")


@pytest.mark.parametrize("line", [b"\xff\xfe", b"3", b'{"epoch": 1}', b'{"epoch": 3, "test_er'])
def test_a_damaged_line_of_metrics_is_left_out(tmp_path, line):
    shutil.copytree(RUNS / "digits-E-seed0", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(line)
    runs, notes = read_runs([tmp_path])
    assert ([m["test_error"] for m in runs.metrics[0]], notes) == ([8.0, 4.0], [])


def options_of(words):
    return vars(read_options(words.split())[0])


MAN = "softmax with decoders, 2c2f, momentum_aux 0.995, {}loss_scale 5 0.5 0 0"
KINDS = {
    "contsup": "softmax", "greedy": "softmax, 0c1f", "dgl": "softmax, mlp-sr",
    "infopro": "softmax with decoders", "predsim": "softmax, predsim",
    "auglocal": "softmax, auglocal", "sid": "softmax, consistency 0.5",
    "man": MAN.format("") + ", loss_scale_rule stage",
    "manpp": MAN.format("momentum_aux_mix learned, ") + ", loss_scale_rule stage",
    "hpff": "softmax with decoders, 2c2f, overlap 1, patch_decoder, loss_scale 5 0.5 0 0",
}  # fmt: skip


@pytest.mark.parametrize("name", configs.METHODS)
@pytest.mark.parametrize("mode", ["R0", "E"])
def test_the_kind_names_what_makes_a_method(name, mode):
    words = f"--local_loss_mode cross_entropy --local_module_num 4 --context_mode {mode} --method "
    setup = read_setup(config := options_of(words + name))
    assert (setup["setting"], setup["mode"], setup["kind"]) == (
        "cifar10, published options", mode, KINDS[name],
    )  # fmt: skip
    assert method_name(setup | {"config": config}) == name


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("--method auglocal --aux_net_depth 3", "auglocal, aux_net_depth 3"),
        ("--aux_net_config auglocal --aux_net_taper 0", "auglocal, aux_net_taper 0"),
        ("--overlap 1 --overlap_weight 0.5", "overlap 1, overlap_weight 0.5"),
        ("--method sid --consistency 1", "consistency 1"),
        ("--momentum_aux 0", "momentum_aux 0"),
        ("--method dgl --aux_net_config 2c2f", "2c2f"),
        ("--method man --loss_scale_rule module", MAN.format("")[len("softmax ") :]),
        # CIFAR-10's loss scales are those of the user's own images, and not of SVHN.
        ("--method infopro --loss_scale 6 0 1 2", "with decoders"),
        ("--method infopro --loss_scale 6 0 1 2 --dataset folder", "with decoders"),
        ("--method infopro --loss_scale 6 0 1 2 --dataset svhn",
         "with decoders, loss_scale 6 0 1 2"),
    ],
)  # fmt: skip
def test_the_kind_of_a_run_that_is_no_methods(words, kind):
    words = f"--local_module_num 4 --context_mode R0 {words} --local_loss_mode cross_entropy"
    setup = read_setup(config := options_of(words))
    assert setup["kind"].removeprefix("softmax").lstrip(", ") == kind
    is_method = kind == "with decoders"
    assert method_name(setup | {"config": config}) == ("infopro" if is_method else None)
    assert "published options" in setup["setting"]


CUTS = "[1, 1] [1, 2] [1, 3] [2, 1] [2, 2] [3, 1] [3, 2]"  # the balanced ones
DECODERS = {"local_module_num": 8, "h_reconstruct": True}
USUAL = "published options"


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"local_loss_mode": "hinge", "lr": 0.1, "batch_size": 64}] * 2,
         [("cifar10, batch_size 64, lr 0.1", "E, hinge", 2)]),
        ([{"dataset": "folder", "data_dir": "my/cats"}, {"dataset": "folder", "data_dir": "b"}],
         [(f"folder-{name}, {USUAL}", "E, softmax", 1) for name in ("b", "cats")]),
        # With decoders the same cuts have other loss scales.
        ([DECODERS | {"balanced_memory": True},
          DECODERS | {"cuts": choose_cuts(32, 8, "cifar10", True)}],
         [(f"cifar10, {USUAL}", "E, softmax with decoders, balanced cuts", 1),
          (f"cifar10, {USUAL}", f"E, softmax with decoders, cuts {CUTS}", 1)]),
        ([{"local_module_num": 1} | other for other in (
            {}, {"context_mode": "R0"}, {"local_loss_mode": "contrast"}, {"h_reconstruct": True})],
         [(f"cifar10, {USUAL}", "end to end", 4)]),
        # Published options come first.
        ([{"lr": 0.1}, {"dataset": "cifar100"}, {}],
         [(setting, "E, softmax", 1)
          for setting in (f"cifar10, {USUAL}", "cifar10, lr 0.1", f"cifar100, {USUAL}")]),
    ],
)  # fmt: skip
def test_runs_that_differ_in_their_seed_are_one_cell(tmp_path, configs, expected):
    for seed, config in enumerate(configs):
        a_run(tmp_path / str(seed), seed=seed, **config)
    cells, notes = cells_of(tmp_path)
    assert ([(c.setting, c.method, c.n) for c in cells.itertuples()], notes) == (expected, [])


def test_a_run_that_continues_another_is_left_out(tmp_path):
    for epoch in (1, 3):
        errors = {"test_error": 5.0, "test_errors": [5.0], "train_errors": [5.0]}
        a_run(tmp_path / f"{epoch}", seed=epoch, metrics=[{"epoch": epoch} | errors])
    runs, (note,) = read_runs([tmp_path])
    assert list(runs.seed) == [1]
    assert "epochs begin with 3: it continues another run" in note


def test_the_docs_show_what_the_runs_of_the_experiment_say():
    root = HERE.parent
    cells, notes = cells_of(root / "docs" / "evidence" / "runs")
    docs = "".join(path.read_text() for path in (root / "README.md", *root.glob("docs/*.md")))
    assert (len(cells), notes) == (5 + 4 + 3, [])
    for c in cells.itertuples():
        errors = error_text(c.error_last_mean, c.error_last_std, c.n)
        if "limit_per_class" not in c.setting:  # a longer run
            epochs = c.setting.split("epochs ")[1].split(",")[0]
            errors = f"{epochs} | {c.error_last_mean:.2f} | {c.error_best_mean:.2f}"
        assert f"| {c.K} | {c.method} | {errors} |" in docs


def test_the_docs_show_what_the_runs_of_methods_say():
    evidence = HERE.parent / "docs" / "evidence"
    runs, notes = read_runs([evidence / "runs", evidence / "methods"])
    assert notes == []
    docs = (HERE.parent / "docs" / "methods.md").read_text()
    cells = over_seeds(
        runs[runs.setting.str.contains("limit_per_class 1000, epochs 8, batch_size")]
    )
    cells = cells.join(runs.groupby(SETUP).config.first(), on=SETUP)
    cells["name"] = [method_name(cell) for cell in cells.to_dict("records")]
    cells = cells[cells.name.notna() & ~cells.setting.str.contains("warmup")]
    assert len(cells) > 8
    for c in cells.itertuples():
        errors, mode = error_text(c.error_last_mean, c.error_last_std, c.n), c.mode
        mode = "-" if mode == "end to end" else mode
        row = f"| {c.name} | {mode} | {errors} | {c.peak_memory_bytes / 2**20:,.0f} |"
        assert row in docs


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The runs and the cells of methods, K = 2; FLOPs are counted in the making."""
    root = tmp_path_factory.mktemp("methods")
    net = {"local_module_num": 2, "context_mode": "R0"}
    greedy, deep = net | {"aux_net_config": "0c1f"}, net | {"layers": 38}
    own = {"dataset": "folder", "data_dir": "my/cats", "image_size": 32, "batch_size": 8, "lr": 0.8}
    three_classes = {"parameters": {"backbone": 466_906 - 7 * 65}}
    for name, errors, speeds, results, config in (
        ("R0-seed0", (9.0, 8.5), (100, 300, 200), {}, net),
        ("R0-seed1", (11.0, 9.5), (400,), {}, net | {"seed": 1}),
        ("E", (8.0, 8.0), (50,), {}, net | {"context_mode": "E"}),
        ("deep", (8.5, 8.5), (), {}, deep),
        ("deeper", (1.0, 1.0), (), {}, net | {"layers": 44}),
        ("greedy", (12.0, 12.0), (), {"peak_memory_bytes": 100 << 20}, greedy),
        ("end", (7.0, 7.0), (), {}, {"local_module_num": 1}),
        ("own", (20.0, 20.0), (), three_classes, net | own),
        ("own-greedy", (30.0, 30.0), (), {}, greedy | own),
        ("alone", (2.0, 2.0), (), {}, greedy | {"lr": 0.1}),
        ("of-a-script", (2.0, 2.0), (), {}, net | {"lr": 0.1, "model": "plain"}),
        ("contrast", (2.0, 2.0), (), {}, net | {"local_loss_mode": "contrast"}),
        ("R1", (2.0, 2.0), (), {}, net | {"context_mode": "R1"}),
    ):
        metrics = [
            {"epoch": 1 + epoch, "test_error": 9.0, "test_errors": [9.0], "train_errors": [9.0],
             "samples_per_second": speed}
            for epoch, speed in enumerate(speeds)
        ]  # fmt: skip
        results = {"peak_memory_bytes": 200 << 20} | results
        results |= dict(zip(("error_last", "error_best"), errors, strict=True))
        a_run(root / name, metrics=metrics, results=results, **config)
    runs, notes = read_runs([root])
    assert notes == []
    return runs, method_cells(runs, over_seeds(runs))


def test_the_table_of_methods(compared):
    """Inference FLOPs are those of tests/test_planner.py; here, of training without context."""
    _, cells = compared
    backbone, encoder = 138_249_472, 7_741_440
    # Neither the images nor the second module's input need a gradient.
    without, head = 884_736 + 2 * 256 * 9 * 32 * 32, 2 * 32 * 10
    text = methods_markdown(cells)
    column = "published, %: InfoPro (ICLR 2021, table 2), 160 epochs"
    published, own = (part.splitlines() for part in text.split("## ")[1:])
    assert published[0] == "cifar10, published options" and published[2].endswith(f"| {column} |")
    rows = [line[2:-2].split(" | ") for line in published[4:] if line[:1] == "|"]
    assert [row[:6] + row[7:] for row in rows] == [
        ["1", "end to end", "-", "7.00 (n=1)", "7.00 (n=1)", "200 (a)", "138", "-",
         "7.37 ± 0.10 (end to end)"],
        ["2", "contsup", "R0", "10.00 ± 1.41 (n=2)", "9.00 ± 0.71 (n=2)", "200 (a)", "138", "300",
         "8.69 ± 0.12 (DGL)"],
        ["2", "contsup", "E", "8.00 (n=1)", "8.00 (n=1)", "200 (a)", "146", "50", "-"],
        ["2", "contsup, ResNet-38", "R0", "8.50 (n=1)", "8.50 (n=1)", "200 (a)", "167", "-", "-"],
        ["2", "greedy", "R0", "12.00 (n=1)", "12.00 (n=1)", "100 (a)", "138", "-",
         "10.30 ± 0.20 (Greedy SL)"],
    ]  # fmt: skip
    by_method = cells.set_index(["setting", "method", "mode"])
    flops = by_method.loc["cifar10, published options"]
    assert flops.train_flops_per_sample["greedy", "R0"] == 3 * (backbone + head) - without
    assert flops.inference_flops_per_sample["contsup", "E"] == backbone + encoder
    # Of three classes: the others' weights of the real head are not there.
    assert own[0].startswith("folder-cats, ") and "published, %" not in own[2]
    flops = by_method.loc[own[0]]
    assert flops.inference_flops_per_sample["contsup", "R0"] == backbone - 7 * 128
    assert math.isnan(flops.inference_flops_per_sample["greedy", "R0"])  # classes are not known
    assert len(cells) == 5 + 2


def test_the_csv_of_methods(compared):
    _, cells = compared
    first, *lines = csv_text(cells, csv_columns(cells)).splitlines()
    assert first.split(",")[11:15] == [
        "mode",
        "train_flops_per_sample",
        "inference_flops_per_sample",
        "samples_per_second",
    ]
    assert first.endswith(',"published, %: InfoPro (ICLR 2021, table 2), 160 epochs"')
    assert lines[1].startswith('"cifar10, published options",32,2,contsup,10,1.414214,9,0.7071')
    assert lines[1].endswith(",138249472,300,8.69 ± 0.12 (DGL)")
    assert len(lines) == len(cells)


def test_the_figure_of_methods(compared):
    runs, cells = compared
    figures = draw_figures(runs, over_seeds(runs), cells)
    assert {"methods", "methods_folder-cats_batch_size-8"} <= figures.keys()
    (axes,) = figures["methods"].axes
    assert axes.get_title() == "K=2"
    assert [(note.get_text(), *note.xy) for note in axes.texts] == [
        ("end to end", 200.0, 7.0), ("contsup", 200.0, 10.0), ("contsup", 200.0, 8.0),
        ("contsup, ResNet-38", 200.0, 8.5), ("greedy", 100.0, 12.0),
    ]  # fmt: skip
    markers = {bars.lines[0].get_marker() for bars in axes.containers}
    assert markers == {"*", "o", "s"} and len(axes.containers) == 5
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["end to end", "R0", "E"]


INFOPRO, AUGLOCAL = (
    f"published, %: {source} epochs"
    for source in (
        "InfoPro (ICLR 2021, table 2), 160",
        "AugLocal's re-run (ICLR 2024), as quoted in notes on MAN and HPFF, 400",
    )
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {INFOPRO: "16.21 ± 0.36 (DGL)"}),
        ("--method greedy", {INFOPRO: "24.59 ± 0.83 (Greedy SL)"}),
        ("--method infopro", {INFOPRO: "14.23 ± 0.42 (InfoPro)"}),
        ("--method dgl", {}),  # another head than the one that InfoPro's paper calls so
        ("--method dgl --epochs 400 --warmup_epochs 10", {AUGLOCAL: "14.08 (DGL)"}),
        ("--method dgl --epochs 400", {}),
        ("--epochs 400", {}), ("--amp bf16", {}), ("--dataset svhn", {}), ("--layers 110", {}),
        ("--limit_per_class 1000", {}), ("--context_mode E", {}), ("--local_module_num 15", {}),
    ],
)  # fmt: skip
def test_published_errors_are_beside_equal_setups_only(words, expected):
    usual = "--context_mode R0 --local_module_num 16 --local_loss_mode cross_entropy"
    cells = add_published(pd.DataFrame([read_setup(options_of(f"{usual} {words}"))]))
    cell = cells.filter(like="published, %").iloc[0].to_dict()
    assert cell == expected


@pytest.fixture(scope="module")
def drawn():
    """Name -> figure, of tests/runs."""
    figures = figures_of(RUNS)
    assert len(figures) == 5
    return figures


def lines_of(axes):
    """Label -> points of the lines in the legend."""
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in axes.lines}
    return {label: (x, y) for label, (x, y) in lines.items() if x and not label.startswith("_")}


def vertical_lines(axes):
    """(color, style) -> MiB of Figure 4's vertical lines."""
    lines = [line for line in axes.lines if [*line.get_ydata()] == [0, 1]]
    return {(line.get_color(), line.get_linestyle()): line.get_xdata()[0] for line in lines}


def test_figure4_shows_error_against_peak_memory(drawn):
    (axes,) = drawn["figure4"].axes
    assert lines_of(axes) == {
        "ResNet-32": ([1040.0, 460.0], [7.25, 9.0]), "ResNet-110": ([4394.0], [6.0])
    }  # fmt: skip
    notes = {(note.get_text(), *note.xy) for note in axes.texts}
    assert notes == {("K=4", 1040.0, 7.25), ("K=16", 460.0, 9.0), ("K=2", 4394.0, 6.0)}
    (bars,) = axes.containers[0].lines[2]
    (two_seeds,) = bars.get_segments()  # none for one seed: one of 0 would look like a result
    assert two_seeds[:, 1] == pytest.approx([7.25 - math.sqrt(0.125), 7.25 + math.sqrt(0.125)])
    # The README's peaks of end-to-end training, which the meter took on real steps too.
    peaks = vertical_lines(axes)
    assert len(peaks) == 4
    for color, peak in (("tab:blue", 2464), ("tab:red", 8297)):
        assert peaks[color, ":"] == pytest.approx(peak, abs=0.5)
        assert peaks[color, "--"] < peak / 2


def test_peaks_of_end_to_end_training_are_those_of_the_figures_runs(tmp_path):
    balanced = "E-contrast-K4-balanced-seed0"
    a_run(tmp_path / "large", balanced)
    a_run(tmp_path / "small", balanced, batch_size=64)
    a_run(tmp_path / "removed", balanced, model="a backbone that is no more")
    large, small, removed = (
        vertical_lines(figure.axes[0]).get(("tab:blue", ":"))
        for name, figure in figures_of(tmp_path).items()
        if name.startswith("figure4")
    )
    assert large == pytest.approx(2464, abs=0.5)
    assert small < large / 10 and removed is None


def test_figure5_shows_error_against_K_by_mode(drawn):
    by_title = {axes.get_title(): lines_of(axes) for axes in drawn["figure5"].axes}
    assert by_title == {
        "softmax": {"R0": ([16], [11.0]), "E": ([16], [8.25])},
        "softmax with decoders": {"E": ([8], [7.75])},
        "contrast": {"E": ([4, 16], [6.75, 9.0])},
    }
    (axes,) = drawn["figure5_digits_epochs-2"].axes
    assert lines_of(axes) == {"E": ([2], [5.0]), "end to end": ([1], [3.0])}


def test_learning_curves_are_means_over_seeds(drawn):
    (axes,) = drawn["learning_curves_resnet32_digits_epochs-2"].axes
    assert lines_of(axes) == {
        "end to end": ([1, 2], [7.0, 3.0]),
        "E": ([1, 2], [6.5, 5.0]),  # 8 and 5, then 4 and 6
    }
    (band,) = (collection for collection in axes.collections if len(collection.get_paths()))
    low, high = band.get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((5 - math.sqrt(2), 6.5 + math.sqrt(4.5)))


def test_error_by_depth_has_test_and_train(drawn):
    (axes,) = drawn["error_by_depth_resnet32_digits_epochs-2"].axes
    assert lines_of(axes) == {
        "end to end": ([0, 1], [3.0, 3.0]),
        "E": ([0, 1], [8.5, 5.0]),  # 9 and 8, 4 and 6
    }
    dashed = [[*line.get_ydata()] for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == [[2.0, 2.0], [6.5, 2.0]]  # end to end; 7 and 6, 3 and 1


def test_heads_without_an_error_have_no_depth_figure(tmp_path):
    metrics = [{"epoch": 1, "test_error": 4, "test_errors": [None, 4], "train_errors": [None, 3]}]
    a_run(tmp_path / "run", "digits-E-seed0", metrics=metrics, local_loss_mode="contrast")
    shutil.copytree(RUNS / "digits-end-to-end", tmp_path / "end-to-end")
    names = [name.split("_resnet")[0] for name in figures_of(tmp_path) if "resnet" in name]
    assert names == ["learning_curves"]


def test_names_of_figures_are_names_of_files_and_differ():
    long = "digits, " + "an_option of the run, " * 12
    names = {file_name("figure5", long + last) for last in ("lr 1", "lr 2", "aux_net_config ../x")}
    assert len(names) == 3
    assert all(len(name) <= 200 and "/" not in name for name in names)


def test_figures_are_pictures_whatever_the_users_style(tmp_path):
    shutil.copytree(RUNS / "digits-E-seed0", tmp_path / "run")
    runs, _ = read_runs([tmp_path])
    pictures = []
    for style in ({}, {"text.usetex": True, "lines.linewidth": 9, "savefig.dpi": 10}):
        with matplotlib.rc_context(style):
            paths = write_figures(runs, over_seeds(runs), tmp_path)
        pictures.append([imread(path) for path in paths])
    assert len(pictures[0]) == 3
    for plain, styled in zip(*pictures, strict=True):
        assert plain.shape[0] > 400 and np.ptp(plain) > 0.9
        assert np.array_equal(plain, styled)


def test_a_notebooks_backend_does_not_matter():
    done = subprocess.run(
        [sys.executable, "-m", "report", "--help"], cwd=HERE.parent, capture_output=True,
        env=os.environ | {"MPLBACKEND": "not_installed"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
