"""The paper's tables: what is in them, statistics over seeds, and their Markdown and CSV."""

from collections.abc import Sequence
from itertools import product
from string import ascii_lowercase
from typing import NamedTuple

import pandas as pd

from configs import balanced_cuts_are_equal
from engine.console import MIB
from report.results import SETUP

MODES = ("R0", "E", "R1", "R1E")


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
        rows: label -> layers, mode and kind, as in the columns SETUP.
        columns: numbers of modules.
    """

    name: str
    title: str
    rows: dict[str, tuple[int, str, str]]
    columns: tuple[int, ...] = (2, 4, 8, 16)


TABLES = [
    Table(
        "table1", "Table 1: context modes, ResNet-32",
        {mode: (32, mode, "softmax") for mode in MODES}, (16,),
    ),
    Table(
        "table2", "Table 2: local losses, ResNet-32",
        {f"{mode}, {loss}": (32, mode, loss) for mode in ("E", "R1E")
         for loss in ("contrast", "softmax")},
    ),
    Table(
        "table3", "Table 3: with decoders, ResNet-110",
        {f"R1E, {loss}": (110, "R1E", f"{loss} with decoders") for loss in ("contrast", "softmax")},
    ),
    Table(
        "figure4", "Figure 4: error against peak memory, E, contrast, balanced cuts",
        {f"ResNet-{layers}": (layers, "E", "contrast, balanced cuts") for layers in (32, 110)},
        (2, 3, 4, 8, 16),
    ),
    Table(
        "figure5", "Figure 5: error against K, ResNet-32",
        {f"{mode}, {kind}": (32, mode, kind)
         for kind in ("softmax", "softmax with decoders", "contrast")
         for mode in MODES if (mode, kind) != ("R0", "contrast")},
    ),
    Table(
        "table4", "Table 4: how many earlier features, ResNet-32",
        {mode: (32, mode, "softmax") for mode in ("R0", "E", "R1", "R2", "R4", "R8", "R16")},
        (8, 16),
    ),
]  # fmt: skip


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each SETUP: means and sample standard deviations over n seeds.

    The peak is the largest of all seeds. Plans count only where no run is finished; there n is 0.
    """
    counts = ~runs.is_plan | runs.groupby(SETUP).is_plan.transform("all")
    setups = runs[counts].groupby(SETUP, sort=False)
    cells = setups[["error_last", "error_best"]].agg(["mean", "std"])
    cells.columns = map("_".join, cells.columns)
    cells["n"] = setups.error_last.count()
    largest = runs.loc[setups.peak_memory_bytes.idxmax()].set_index(SETUP)
    cells = cells.join(largest[["peak_memory_bytes", "peak_memory_how"]]).reset_index()
    cells["method"] = (cells["mode"] + ", " + cells["kind"]).str.removesuffix(", ")
    return cells


def fill(table: Table, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of a table; the column `method` has its labels.

    Each setting that has a run of the table gets all rows and columns, NaN where there is no run.
    """
    keys = []
    for setting, dataset in cells[["setting", "dataset"]].drop_duplicates().to_numpy():
        for (label, (layers, mode, kind)), K in product(table.rows.items(), table.columns):
            if balanced_cuts_are_equal(layers, K, dataset):
                kind = kind.removesuffix(", balanced cuts")
            keys.append((setting, dataset, layers, K, mode, kind, label))
    keys = pd.DataFrame(keys, columns=[*SETUP, "method"])
    filled = keys.merge(cells.drop(columns="method"), how="left", on=SETUP)
    return filled[filled.groupby("setting").peak_memory_bytes.transform("count") > 0]


STATISTICS = (
    "Errors are mean ± sample standard deviation over n seeds. The paper does not say of which "
    "epoch its errors are. The best epoch is chosen by the test error, so its error is optimistic; "
    "with val_fraction it is chosen by the validation error, and its test error is not. Memory is "
    "the largest peak of all seeds: measured, or planned where no run is finished."
)
ERROR_LAST = "Error at the last epoch, %"
ERROR_BEST = "Error at the best epoch, %"
PEAK = "Peak memory of a training step, MiB"


def table_markdown(title: str, filled: pd.DataFrame) -> str:
    """Return the file of a table: a section for each setting with errors and memory."""
    parts = [f"# {title}", STATISTICS]
    for setting, cells in filled.groupby("setting", sort=False):
        texts, footnotes = cell_texts(cells)
        parts.append(f"## {setting}")
        for caption in (ERROR_LAST, ERROR_BEST, PEAK):
            grid = texts.pivot(index="method", columns="K", values=caption)
            grid = grid.loc[cells.method.unique()].add_prefix("K=")
            parts += [caption, markdown(grid.reset_index())]
        parts.append(footnotes)
    return "\n\n".join(parts) + "\n"


def all_runs_markdown(cells: pd.DataFrame, notes: Sequence[str]) -> str:
    """Return the file of all runs: a table for each setting and net, and what was left out."""
    parts = ["# All runs", STATISTICS]
    for (setting, layers), group in cells.groupby(["setting", "layers"], sort=False):
        texts, footnotes = cell_texts(group)
        parts += [f"## ResNet-{layers}, {setting}", markdown(texts), footnotes]
    if notes:
        parts += ["## Not in the tables", "\n".join(f"* {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def cell_texts(cells: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return K, method, errors and peaks as texts, and the footnotes that the peaks refer to."""
    letters = dict(zip(cells.peak_memory_how.dropna().unique(), ascii_lowercase, strict=False))
    texts = cells[["K", "method"]].copy()
    texts[ERROR_LAST] = list(map(error_text, cells.error_last_mean, cells.error_last_std, cells.n))
    texts[ERROR_BEST] = list(map(error_text, cells.error_best_mean, cells.error_best_std, cells.n))
    texts[PEAK] = [
        f"{peak / MIB:,.0f} ({letters[how]})" if how in letters else "-"
        for peak, how in zip(cells.peak_memory_bytes, cells.peak_memory_how, strict=True)
    ]
    # Two spaces at the end of a line break it in Markdown.
    return texts, "\n".join(f"({letter}) {how}  " for how, letter in letters.items())


def error_text(mean: float, std: float, n: float) -> str:
    """Return an error, `-` if no run is finished."""
    if not n > 0:  # NaN without a run
        return "-"
    return f"{mean:.2f} ± {std:.2f} (n={n:.0f})" if n > 1 else f"{mean:.2f} (n=1)"


def markdown(frame: pd.DataFrame) -> str:
    """Return a Markdown table."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def csv_text(cells: pd.DataFrame, more: Sequence[str] = ()) -> str:
    """Return CSV with a line for each cell: errors in percent, `-` for what is missing.

    Args:
        more: columns to add.
    """
    columns = [
        "setting", "layers", "K", "method", "error_last_mean", "error_last_std", "error_best_mean",
        "error_best_std", "n", "peak_memory_bytes", "peak_memory_how",
        *more,
    ]  # fmt: skip
    cells = cells.dropna(subset="n")[columns].round(6)
    return cells.to_csv(index=False, na_rep="-", float_format="%.15g", lineterminator="\n")
