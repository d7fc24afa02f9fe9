"""The paper's tables and figures, from what runs have left.

python report.py runs/

Reads every summary.json and plan.json, writes results/. From top to bottom: how a table is written,
and `main`. Which tables there are is in grids.py, what the figures show in report_figures.py.
"""

from engine.signals import INTERRUPTS

if __name__ == "__main__":
    INTERRUPTS.install()  # before the imports that take seconds

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from configs import InputError, one_line
from engine.files import replacing, write_text
from engine.memory import MIB
from engine.options import HelpFormatter, Parser
from report.report_figures import draw_figures
from report.results import Cell, Setting, Statistic, make_cell, read_records
from report.tables import TABLES, Grid, Group, Table, fill_grids, group_records

# ---------------------------------------------------------------------------------------------
# Markdown and CSV

MISSING = "-"

ERROR_LAST = "Error at the last epoch, %"
ERROR_BEST = "Lowest error of any epoch, %: its epoch is picked on the test data, which flatters"
PEAK = "Peak memory of a training step, MiB"

STATISTICS = (
    "Errors: mean ± sample standard deviation over n seeds; the paper does not say which epoch its "
    "own are of. Memory: the most of all seeds; measured, or planned where nothing is trained yet."
)


class Footnotes:
    """Letters for how a peak was got."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def memory(self, cell: Cell | None) -> str:
        """A cell's peak with its letter."""
        if cell is None:
            return MISSING
        letter = self.letters.setdefault(cell.how, chr(ord("a") + len(self.letters)))
        return f"{cell.peak / MIB:,.0f} ({letter})"

    def __str__(self) -> str:
        return "\n".join(f"({letter}) {how}  " for how, letter in self.letters.items())


def markdown(table: Table, grids: list[Grid]) -> str:
    """A table's file: a section for each setting, in it errors, best errors and memory."""
    parts = [f"# {table.title}", STATISTICS]
    for grid in grids:
        notes = Footnotes()
        parts.append(f"## {grid.setting}")
        for caption, text in (
            (ERROR_LAST, lambda cell: _said(cell and cell.error_last)),
            (ERROR_BEST, lambda cell: _said(cell and cell.error_best)),
            (PEAK, notes.memory),
        ):
            header = ["method", *(f"K={K}" for K in table.columns)]
            rows = [[label, *map(text, cells.values())] for label, cells in grid.rows]
            parts += [caption, markdown_table(header, rows)]
        parts += [str(notes)] if notes.letters else []
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Header and rows between bars."""
    return "\n".join("| " + " | ".join(r) + " |" for r in (header, ["---"] * len(header), *rows))


def _said(value: Statistic | None) -> str:
    return MISSING if value is None else str(value)


QUANTITIES: dict[str, Callable[[Cell], object]] = {
    "error_last_mean": lambda cell: cell.error_last and cell.error_last.mean,
    "error_last_std": lambda cell: cell.error_last and cell.error_last.std,
    "error_best_mean": lambda cell: cell.error_best and cell.error_best.mean,
    "error_best_std": lambda cell: cell.error_best and cell.error_best.std,
    "n": lambda cell: cell.error_last and cell.error_last.n,
    "peak_memory_bytes": lambda cell: cell.peak,
    "peak_memory_how": lambda cell: cell.how,
}
"""Rows of a CSV file for each method; errors in percent."""


def csv_text(header: list[str], rows: Iterable[list[object]]) -> str:
    """A CSV file; None is written as `-`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_plain(value) for value in row])
    return file.getvalue()


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return MISSING if value is None else str(value)


def csv_rows(grids: list[Grid]) -> Iterator[list[object]]:
    """Setting, quantity and method, then a value for each K."""
    for grid in grids:
        for quantity, of in QUANTITIES.items():
            for label, cells in grid.rows:
                values = [cell and of(cell) for cell in cells.values()]
                yield [str(grid.setting), quantity, label, *values]


def all_runs_markdown(groups: dict[tuple[int, Setting], Group], notes: list[str]) -> str:
    """All runs: a table for each net and setting."""
    parts = ["# All runs", STATISTICS, f"{ERROR_BEST}."]
    for (layers, setting), group in groups.items():
        footnotes = Footnotes()
        rows = []
        for method, records in group.items():
            cell = make_cell(records)
            errors = [_said(cell.error_last), _said(cell.error_best)]
            rows.append([f"{method.K}", method.label, *errors, footnotes.memory(cell)])
        header = ["K", "method", "error at the last epoch, %", "lowest error, %", "peak, MiB"]
        parts += [f"## ResNet-{layers}, {setting}", markdown_table(header, rows), str(footnotes)]
    if notes:
        parts += ["## Not in the tables", "\n".join(f"* {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def all_runs_csv(groups: dict[tuple[int, Setting], Group]) -> str:
    """The same, a line a method."""
    header = ["setting", "layers", "K", "method", *QUANTITIES]
    rows = []
    for (layers, setting), group in groups.items():
        for method, records in group.items():
            cell = make_cell(records)
            values = [of(cell) for of in QUANTITIES.values()]
            rows.append([str(setting), layers, method.K, method.label, *values])
    return csv_text(header, rows)


# ---------------------------------------------------------------------------------------------
# Files


def write_report(roots: list[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """All tables and figures of the runs below `roots` into `folder`.

    Returns the files written, and notes on what was left out and on other figures in `folder`;
    InputError if there are no runs.
    """
    records, notes = read_records(roots)
    if not records and not notes:
        raise InputError(
            f"no summary.json or plan.json below {' '.join(map(str, roots))}: train something first"
        )
    written = []

    def write(name: str, text: str) -> None:
        write_text(folder / name, text)
        written.append(folder / name)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            grids = fill_grids(table, records)
            write(f"{table.name}.md", markdown(table, grids))
            header = ["setting", "quantity", "method", *(f"K={K}" for K in table.columns)]
            write(f"{table.name}.csv", csv_text(header, csv_rows(grids)))
        for name, figure in draw_figures(records, notes):
            with replacing(folder / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=120)
            written.append(folder / f"{name}.png")
        groups = group_records(records)
        write("all_runs.md", all_runs_markdown(groups, notes))
        write("all_runs.csv", all_runs_csv(groups))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {one_line(error)}") from error
    others = sorted({*folder.glob("*.png")} - {*written})
    return written, notes + [f"{path} is not of this report" for path in others]


def main() -> int:
    """Exit status: 0, or 2 for bad input."""
    parser = Parser(
        prog="report.py",
        description="The paper's tables and figures, from the summaries and plans of runs.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold run folders")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default="results",
        metavar="DIR",
        help="where the tables and figures go; files of an earlier report with these names are "
        "replaced",
    )
    options = parser.parse_args()
    try:
        written, notes = write_report(options.runs, options.output_dir)
    except InputError as error:
        print(f"report.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"report.py: note: {note}", file=sys.stderr)
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
