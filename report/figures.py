"""The figures: error against memory and K as in the paper, methods, learning curves, depth."""

import re
import textwrap
import zlib
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from configs import DATASETS, InputError
from engine.console import MIB
from engine.files import replacing
from engine.options import NETWORK_OPTIONS
from planning.plan import end_to_end_peaks
from report.results import END_TO_END
from report.tables import TABLES, fill

ERROR_LAST = "test error at the last epoch, %"

COLORS = {END_TO_END: "black", "R0": "tab:gray", "E": "tab:blue", "R1": "tab:orange",
          "R1E": "tab:red", "ResNet-32": "tab:blue", "ResNet-110": "tab:red"}  # fmt: skip
MARKERS = {END_TO_END: "*", "R0": "o", "E": "s"}
METHOD_COLORS = [c for name in ("Dark2", "tab10") for c in matplotlib.colormaps[name].colors]
OTHER_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")

Panels = dict[str, dict[str, pd.DataFrame]]
"""Title of a panel -> label of a line -> points.

Points are indexed by x. Columns: `mean`, `std` (NaN for one seed), and `train` for a dashed line.
"""


# A user's matplotlibrc does not change the figures, nor make them need LaTeX.
@matplotlib.rc_context(matplotlib.rcParamsDefault)
def write_figures(
    runs: pd.DataFrame, cells: pd.DataFrame, folder: Path, methods: pd.DataFrame | None = None
) -> list[Path]:
    """Write PNG files of all figures that there are finished runs for; raise OSError."""
    paths = []
    for name, figure in draw_figures(runs, cells, methods).items():
        paths.append(folder / f"{name}.png")
        with replacing(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=120)
    return paths


def draw_figures(
    runs: pd.DataFrame, cells: pd.DataFrame, methods: pd.DataFrame | None = None
) -> dict[str, Figure]:
    """Return name -> figure, from what `read_runs`, `over_seeds` and `method_cells` return."""
    runs, cells = runs[~runs.is_plan], cells[cells.n > 0]
    figures = {}
    for table in TABLES:
        if draw := {"figure4": figure4, "figure5": figure5}.get(table.name):
            for setting, filled in fill(table, cells).groupby("setting", sort=False):
                inputs = filled.dropna(subset="n"), runs[runs.setting == setting]
                figure = draw(f"{table.title}\n{setting}", *inputs)
                figures[file_name(table.name, setting)] = figure
    if methods is not None:
        for setting, group in methods[methods.n > 0].groupby("setting", sort=False):
            figures[file_name("methods", setting)] = methods_figure(setting, group)
    for (setting, layers), group in runs.groupby(["setting", "layers"], sort=False):
        for name, points_of, labels in (
            ("learning_curves", by_epoch, ("epoch", "test error, %")),
            ("error_by_depth", by_module, ("module", "error of its head, %\n(dashed: train)")),
        ):
            if panels := panels_by_loss(group, points_of):
                figure = draw_panels(f"ResNet-{layers}, {setting}", *labels, panels)
                figures[file_name(f"{name}_resnet{layers}", setting)] = figure
    for figure in figures.values():
        add_legend(figure)
    return figures


def file_name(name: str, setting: str) -> str:
    """Return `name` with the data and options, unless they are CIFAR-10 and as published."""
    setting = setting.removesuffix(", published options")
    if setting != "cifar10":
        name = f"{name}_{setting}".replace(", ", "_")
    name = re.sub(r"[^\w.+-]", "-", name)
    return name if len(name) <= 200 else f"{name[:190]}_{zlib.crc32(name.encode()):08x}"


def figure4(title: str, cells: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Draw error against peak memory: a line for each net, a point for each K.

    Vertical lines are the planned peaks of end-to-end training with the options of `runs`.
    """
    cells = cells.assign(peak=cells.peak_memory_bytes / MIB)
    panels = {"": error_points(cells, "method", "peak")}
    figure = draw_panels(title, "peak memory, MiB", ERROR_LAST, panels, with_points=True)
    (axes,) = figure.axes
    for K, *point in cells[["K", "peak", "error_last_mean"]].to_numpy():
        axes.annotate(f"K={K:g}", point, (5, 5), textcoords="offset points", fontsize="small")
    colors = choose_colors(cells.method)
    styles = {":": "end to end, planned", "--": "end to end with --recompute, planned"}
    for style, label in styles.items():  # of the legend
        axes.plot([], [], color="black", linestyle=style, label=label)
    for net, group in cells.groupby("method", sort=False):
        config = runs.config[runs.layers == group.layers.iloc[0]].iloc[0]
        arguments = {name: config[name] for name in NETWORK_OPTIONS if name in config}
        try:
            arguments["num_classes"] = DATASETS[config["dataset"]].classes
            peaks = end_to_end_peaks(arguments, config["batch_size"])
        except (InputError, KeyError):  # a value that was removed since, or added by a script
            continue
        for peak, style in zip(peaks, styles, strict=True):
            axes.axvline(peak / MIB, color=colors[net], linestyle=style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(0.12)  # room for the texts at the points
    return figure


def figure5(title: str, cells: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Draw error against K: a panel for each loss, a line for each mode, a point for K = 1."""
    kinds = cells.groupby("kind", sort=False)
    panels = {kind: error_points(group, "mode", "K") for kind, group in kinds}
    end_to_end = runs[(runs.layers == 32) & (runs.K == 1)]
    for lines in panels.values():
        lines[END_TO_END] = end_to_end.groupby("K").error_last.agg(["mean", "std"])
    figure = draw_panels(title, "K, number of modules", ERROR_LAST, panels, with_points=True)
    every_K = sorted({*cells.K, *end_to_end.K})
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(every_K, labels=map(str, every_K))
        axes.set_xlim(every_K[0] / 1.2, every_K[-1] * 1.2)
        axes.minorticks_off()
    return figure


def methods_figure(setting: str, cells: pd.DataFrame) -> Figure:
    """Draw error against peak memory: a panel for each K, a point for each method and mode.

    A line joins the points of a method, without and with the image.
    """
    end_to_end = cells["mode"] == END_TO_END
    every_K = cells.K[~end_to_end].unique()
    title = f"Methods: error against peak memory, ResNet-32\n{setting}"
    panels: Panels = {f"K={K}": {} for K in every_K}
    figure = draw_panels(title, "peak memory, MiB", ERROR_LAST, panels)
    figure.set_size_inches(1.6 * figure.get_size_inches())  # room for the texts at the points
    colors = dict(zip(cells.method.unique(), cycle(METHOD_COLORS), strict=False))
    for axes, K in zip(figure.axes, every_K, strict=True):
        shown = cells[(cells.K == K) | end_to_end]
        for method, group in shown.groupby("method", sort=False):
            peaks, errors = group.peak_memory_bytes / MIB, group.error_last_mean
            axes.plot(peaks, errors, color=colors[method], linewidth=0.7, alpha=0.6)
            for peak, error, std, mode in zip(
                peaks, errors, group.error_last_std, group["mode"], strict=True
            ):
                bar = None if np.isnan(std) else std
                axes.errorbar(peak, error, bar, color=colors[method], fmt=MARKERS[mode], capsize=3)
                axes.annotate(
                    method, (peak, error), (6, 4), textcoords="offset points",
                    fontsize="small", color=colors[method],
                )  # fmt: skip
        for mode in shown["mode"].unique():  # of the legend
            axes.plot([], [], MARKERS[mode], color="black", label=mode)
        axes.margins(0.12)
    return figure


def error_points(cells: pd.DataFrame, label: str, x: str) -> dict[str, pd.DataFrame]:
    """Return label -> errors at the last epoch, given the columns of labels and x."""
    cells = cells.rename(columns={"error_last_mean": "mean", "error_last_std": "std"})
    groups = cells.set_index(x).groupby(label, sort=False)
    return {name: group[["mean", "std"]] for name, group in groups}


def panels_by_loss(
    runs: pd.DataFrame, points_of: Callable[[pd.Series, int], pd.DataFrame]
) -> Panels:
    """Return a panel for each K and loss, with a line for each mode and one for end to end.

    `points_of` makes points of the metrics of some runs and the panel's K.
    """
    end_to_end = runs.metrics[runs.K == 1]
    panels: Panels = {}
    for (K, kind), group in runs[runs.K > 1].groupby(["K", "kind"], sort=False):
        lines = {mode: points_of(r.metrics, K) for mode, r in group.groupby("mode", sort=False)}
        if any(len(points) for points in lines.values()):
            panels[f"K={K}, {kind}"] = {END_TO_END: points_of(end_to_end, K)} | lines
    if not panels and len(points := points_of(end_to_end, 1)):
        panels[END_TO_END] = {END_TO_END: points}
    return panels


def by_epoch(metrics: pd.Series, K: int) -> pd.DataFrame:
    """Return points of the test error by epoch."""
    epochs = [epoch for run in metrics for epoch in run]
    errors = pd.DataFrame(epochs, columns=["epoch", "test_error"], dtype=float)
    return errors.groupby("epoch").test_error.agg(["mean", "std"])


def by_module(metrics: pd.Series, K: int) -> pd.DataFrame:
    """Return points of the error by module at the last epoch; the end-to-end net's one is level."""
    last = [run[-1] for run in metrics if run]
    test, train = (
        pd.DataFrame([epoch[name] * (K // len(epoch[name])) for epoch in last], dtype=float)
        for name in ("test_errors", "train_errors")
    )
    if K == 1 or test.empty or test.isna().any(axis=None):  # no depth, or heads do not classify
        return pd.DataFrame()
    return test.agg(["mean", "std"]).T.assign(train=train.mean())


def draw_panels(
    title: str, x_label: str, y_label: str, panels: Panels, with_points: bool = False
) -> Figure:
    """Draw axes side by side; `with_points` marks points with error bars, else there are bands."""
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    width = max(7, 4 * across)
    figure = Figure(figsize=(width, 1 + 3.6 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    colors = choose_colors(label for lines in panels.values() for label in lines)
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for label, points in lines.items():
            draw_line(axes, label, points, colors[label], with_points)
        axes.set(title=textwrap.fill(name, 36), xlabel=x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    wrapped = [textwrap.fill(line, width * 12) for line in title.splitlines()]
    figure.suptitle("\n".join(wrapped), fontsize="medium")
    return figure


def choose_colors(labels: Iterable[str]) -> dict[str, str]:
    """Return a color for each label."""
    others = [label for label in dict.fromkeys(labels) if label not in COLORS]
    return COLORS | dict(zip(others, cycle(OTHER_COLORS), strict=False))


def draw_line(axes: Axes, label: str, points: pd.DataFrame, color: str, with_points: bool) -> None:
    """Draw a line with its standard deviations, and the second line if there is one."""
    if points.empty:
        return
    x = points.index.to_numpy(float)
    mean, std = points["mean"].to_numpy(float), points["std"].to_numpy(float)
    marker = "o" if with_points or len(x) == 1 else ""
    axes.plot(x, mean, color=color, marker=marker, markersize=4, label=label)
    if not with_points:
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    elif (several := ~np.isnan(std)).any():
        some = x[several], mean[several], std[several]
        axes.errorbar(*some, fmt="none", color=color, capsize=3)
    if "train" in points:
        axes.plot(x, points["train"], color=color, linestyle="--")


def add_legend(figure: Figure) -> None:
    """Add a legend below all axes, with each label once."""
    by_label = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    handles = by_label.values()
    figure.legend(handles, by_label, loc="outside lower center", ncols=6, fontsize="small")
