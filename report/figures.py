"""What is drawn, with matplotlib: plain numbers go in, a Figure comes out."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

COLOURS = {"end to end": "black", "R0": "tab:gray", "E": "tab:blue", "R1": "tab:orange",
           "R1E": "tab:red", "R2": "tab:green", "R4": "tab:purple", "R8": "tab:brown",
           "R16": "tab:pink", "R2E": "darkgreen", "R4E": "orchid", "R8E": "gold",
           "R16E": "tab:cyan", "test": "tab:blue", "train": "tab:blue",
           "ResNet-32": "tab:blue", "ResNet-110": "tab:red"}  # fmt: skip
"""By label, so that a line has its colour whatever else is there; others get `OTHERS`."""

OTHERS = ("tab:olive", "navy", "limegreen", "salmon", "teal", "indigo")
"""For lines with other labels, in turn."""

NOTE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
"""What a note at a point stands on, so that no line strikes it through."""


@dataclass(frozen=True)
class Line:
    """A line of a figure; error rates are in percent.

    Attributes:
        label: for the legend, and the colour's key.
        x, y: its points.
        spread: standard deviation of each y, nan where there is but one run; empty: none is known.
        notes: written at the points, if any.
        dashed: drawn so, and left out of the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    notes: Sequence[str] = ()
    dashed: bool = False


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label of a figure."""
    others = cycle(OTHERS)
    return {label: COLOURS.get(label) or next(others) for label in dict.fromkeys(labels)}


def draw(axes: Axes, line: Line, colour: str, points: bool) -> None:
    """One line: with `points`, marks and bars of its spread; without, a band of its spread."""
    how = {
        "color": colour,
        "linestyle": "--" if line.dashed else "-",
        "label": "_" + line.label if line.dashed else line.label,
    }
    spread = line.spread or [math.nan] * len(line.y)
    if points:
        axes.errorbar(line.x, line.y, yerr=spread, marker="o", markersize=4, capsize=3, **how)
    else:
        mark = "o" if len(line.x) == 1 else ""
        axes.plot(line.x, line.y, linewidth=1.4, marker=mark, **how)
        if np.isfinite(spread).any():
            low, high = np.subtract(line.y, spread), np.add(line.y, spread)
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
    for x, y, note in zip(line.x, line.y, line.notes, strict=False):
        axes.annotate(
            note, (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small", bbox=NOTE
        )


def panels(
    title: str, x_label: str, y_label: str, lines: dict[str, list[Line]], points: bool = False
) -> Figure:
    """Axes side by side, one for each entry of `lines` and titled by its name."""
    across = min(len(lines), 4)
    down = -(-len(lines) // across)
    width = max(7, 4 * across)
    figure = Figure(figsize=(width, 1 + 3.6 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    colour = colours(line.label for drawn in lines.values() for line in drawn)
    for axes, (name, drawn) in zip(grid.flat, lines.items(), strict=False):
        for line in drawn:
            draw(axes, line, colour[line.label], points)
        axes.set(title=name, xlabel=x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(lines) :]:
        axes.remove()
    for row in grid:
        row[0].set_ylabel(y_label)
    figure.suptitle(wrapped(title, width), fontsize="medium")
    legend(figure, columns=6)
    return figure


def wrapped(title: str, inches: float) -> str:
    """The title in lines that fit a figure of that width."""
    return "\n".join(textwrap.fill(line, int(inches * 11)) for line in title.splitlines())


def legend(figure: Figure, columns: int) -> None:
    """One for all axes, below them; each label once."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legends.clear()
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, fontsize="small"
    )


def error_by_depth(lines: dict[str, list[Line]], title: str) -> Figure:
    """Error rate of each module's head, by panel; dashed lines are those of the training data."""
    return panels(
        title, "module", "error of the module's head, %\n(test; dashed: train)", lines
    )  # fmt: skip


def learning_curves(lines: dict[str, list[Line]], title: str) -> Figure:
    """Test error by epoch, by panel."""
    return panels(title, "epoch", "test error, %", lines)


def error_by_modules(lines: dict[str, list[Line]], title: str) -> Figure:
    """Figure 5 of the paper: error against K, a line a context mode, a panel a loss."""
    figure = panels(
        title, "K, number of modules", "test error at the last epoch, %", lines, points=True
    )
    every_k = sorted({x for drawn in lines.values() for line in drawn for x in line.x})
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(every_k, labels=[f"{x:g}" for x in every_k])
        axes.minorticks_off()
    return figure


def error_by_memory(lines: list[Line], peaks: Iterable[tuple[str, float]], title: str) -> Figure:
    """Figure 4 of the paper: error against peak memory in MiB, a line a net.

    Args:
        peaks: label and MiB of each vertical line.
    """
    figure = panels(
        title, "peak memory, MiB", "test error at the last epoch, %", {"": lines}, points=True
    )
    (axes,) = figure.axes
    colour = colours(line.label for line in lines)
    for label, peak in peaks:
        net = label.split(",")[0]
        style = "--" if "recompute" in label else ":"
        axes.axvline(peak, color=colour[net], linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(0.12)  # for the notes at the points
    legend(figure, columns=2)
    return figure


def image_rows(rows: dict[str, Tensor], title: str) -> Figure:
    """Rows of images, each a label and a tensor (N, 3, H, W) in [0, 1]."""
    count, _, height, _ = next(iter(rows.values())).shape
    border = 2
    grid = make_grid(torch.cat([row.cpu() for row in rows.values()]), nrow=count, padding=border)
    inches = min(1 / 45, 10 / max(grid.shape))  # of a pixel
    width = 1.2 + grid.shape[2] * inches
    figure = Figure(figsize=(width, 0.8 + grid.shape[1] * inches), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # else the labels touch the edge
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy())
    middles = border + height / 2 + (height + border) * np.arange(len(rows))
    axes.set_yticks(middles, labels=list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    figure.suptitle(wrapped(title, width), fontsize="medium")
    return figure
