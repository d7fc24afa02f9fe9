"""The paper's tables and figures, from what runs have left.

python report.py runs/

Reads every summary.json and plan.json, writes results/. From top to bottom: the paper's tables,
how a table is written, what the figures show, and `main`.
"""

import csv
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

import figures
from configs import DATASETS, InputError, choose_cuts, one_line
from dataloaders import count_classes
from memory import MIB
from models.checkpoint import replacing
from options import NETWORK_OPTIONS, Defaults, Parser
from planner import end_to_end_peaks
from results import (
    END_TO_END,
    Cell,
    Method,
    Record,
    Setting,
    Statistic,
    make_cell,
    read_records,
    statistic,
)

# ---------------------------------------------------------------------------------------------
# The paper's tables


class Row(NamedTuple):
    """A method as a table lists it."""

    label: str
    mode: str
    loss: str = "cross_entropy"
    decoders: bool = False
    layers: int = 32

    def method(self, dataset: str, K: int, balanced: bool) -> Method | None:
        """Its runs on this data; None where the paper has no cuts for it."""
        try:
            cuts = choose_cuts(self.layers, K, dataset, balanced)
        except InputError:
            return None
        return Method(dataset, self.layers, K, self.mode, self.loss, self.decoders, tuple(cuts))


@dataclass(frozen=True)
class Table:
    """Rows are methods, columns are K; where data sets are named, rows are repeated for each."""

    name: str
    title: str
    rows: list[Row]
    columns: list[int]
    balanced: bool = False
    datasets: tuple[str, ...] = ()

    def methods(self, dataset: str) -> set[Method]:
        """All of its cells' for this data set."""
        of_cells = {
            row.method(dataset, K, self.balanced) for row in self.rows for K in self.columns
        }
        return of_cells - {None}


MODES = ("R0", "E", "R1", "R1E")

TABLES = [
    Table("table1", "Table 1: context modes, ResNet-32", [Row(mode, mode) for mode in MODES], [16]),
    Table(
        "table2",
        "Table 2: local losses, ResNet-32",
        [
            Row(f"{mode}, {name}", mode, loss)
            for mode in ("E", "R1E")
            for name, loss in (("contrast", "contrast"), ("softmax", "cross_entropy"))
        ],
        [2, 4, 8, 16],
    ),
    Table(
        "table3",
        "Table 3: with decoders, ResNet-110",
        [
            Row("R1E, contrast", "R1E", "contrast", True, 110),
            Row("R1E, softmax", "R1E", "cross_entropy", True, 110),
        ],
        [2, 4, 8, 16],
        datasets=("cifar10", "stl10", "svhn"),
    ),
    Table(
        "figure4",
        "Figure 4: error against peak memory, E, contrast, balanced cuts",
        [
            Row("ResNet-32", "E", "contrast"),
            Row("ResNet-110", "E", "contrast", layers=110),
        ],
        [2, 3, 4, 8, 16],
        balanced=True,
    ),
    Table(
        "figure5",
        "Figure 5: error against K, ResNet-32",
        [Row(f"{mode}, softmax", mode) for mode in MODES]
        + [Row(f"{mode}, softmax with decoders", mode, decoders=True) for mode in MODES]
        + [Row(f"{mode}, contrast", mode, "contrast") for mode in MODES[1:]],
        [2, 4, 8, 16],
    ),
    Table(
        "table4",
        "Table 4: how many earlier features, ResNet-32",
        [Row(mode, mode) for mode in ("R0", "E", "R1", "R2", "R4", "R8", "R16")],
        [8, 16],
    ),
]

PUBLISHED = Setting("cifar10", ())


class Grid(NamedTuple):
    """A table filled in, for one setting: label and cell by K, row by row."""

    table: Table
    setting: Setting
    rows: list[tuple[str, dict[int, Cell | None]]]


def fill_grids(table: Table, records: list[Record]) -> list[Grid]:
    """A grid for each setting that has a run of this table; the published one if none has."""
    by_place = defaultdict(list)
    for record in records:
        by_place[record.setting, record.method].append(record)
    fitting = {s for s, method in by_place if method in table.methods(s.dataset)}
    if not table.datasets:
        return [
            Grid(table, setting, [_row(by_place, table, row, setting) for row in table.rows])
            for setting in sorted(fitting, key=_published_first) or [PUBLISHED]
        ]
    grids = []
    for options in sorted({s.options for s in fitting}) or [()]:
        others = {s.dataset for s in fitting if s.options == options} - {*table.datasets}
        rows = []
        for dataset in [*table.datasets, *sorted(others)]:
            for row in table.rows:
                _, cells = _row(by_place, table, row, Setting(dataset, options))
                rows.append((f"{dataset}, {row.label}", cells))
        grids.append(Grid(table, Setting("all data sets", options), rows))
    return grids


def _row(
    by_place: dict[tuple[Setting, Method], list[Record]], table: Table, row: Row, setting: Setting
) -> tuple[str, dict[int, Cell | None]]:
    cells = {
        K: make_cell(by_place.get((setting, row.method(setting.dataset, K, table.balanced)), []))
        for K in table.columns
    }
    return row.label, cells


def _published_first(setting: Setting) -> tuple:
    return setting != PUBLISHED, setting


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


# ---------------------------------------------------------------------------------------------
# All runs, by net and setting

Group = dict[Method, list[Record]]


def group_records(records: list[Record]) -> dict[tuple[int, Setting], Group]:
    """Runs that can be compared with each other: by (layers, setting), then by method."""
    groups: dict[tuple[int, Setting], Group] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (r.method.order, r.seed)):
        groups[record.method.layers, record.setting][record.method].append(record)
    return dict(sorted(groups.items(), key=lambda item: (_published_first(item[0][1]), item[0][0])))


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
# What the figures show


def mean_line(label: str, runs: list[dict[float, float]], dashed: bool = False) -> figures.Line:
    """Mean and spread at each x of some runs, each given as x -> y."""
    xs = sorted({x for run in runs for x in run})
    at_x = [statistic([run[x] for run in runs if x in run]) for x in xs]
    means, spreads = [s.mean for s in at_x], [s.std or 0.0 for s in at_x]
    return figures.Line(label, xs, means, spreads, dashed=dashed)


def by_panel(
    group: Group, lines_of: Callable[[Method, list[Record], int], list[figures.Line]]
) -> dict[str, list[figures.Line]]:
    """A panel for each K and loss with a line a context mode, and the end-to-end net in each.

    `lines_of` gets a method, its finished runs and the panel's K.
    """
    trained = {method: [r for r in records if not r.is_plan] for method, records in group.items()}
    panels: dict[tuple, str] = {}
    for method, records in trained.items():
        if records:
            place = (method.K, method.kind)
            panels[place] = END_TO_END if method.K == 1 else f"K={method.K}, {method.kind}"
    if len(panels) > 1:
        panels.pop((1, END_TO_END), None)
    drawn = {}
    for (K, kind), name in panels.items():
        lines = [
            line
            for method, records in trained.items()
            if method.K == 1 or (method.K, method.kind) == (K, kind)
            for line in lines_of(method, records, K)
        ]
        if lines:
            drawn[name] = lines
    return drawn


def _mode(method: Method) -> str:
    return END_TO_END if method.K == 1 else method.mode


def learning_curve(method: Method, records: list[Record], K: int) -> list[figures.Line]:
    """Test error by epoch."""
    runs = [{m["epoch"]: m["test_error"] for m in record.metrics()} for record in records]
    runs = [run for run in runs if run]
    return [mean_line(_mode(method), runs)] if runs else []


def errors_by_module(method: Method, records: list[Record], K: int) -> list[figures.Line]:
    """Error of each module's head at the last epoch, test and train; a level line for K = 1."""
    lasts = [metrics[-1] for record in records if (metrics := record.metrics())]
    lines = []
    for name in ("test_errors", "train_errors"):
        runs = [errors for last in lasts if None not in (errors := last[name])]
        if runs:
            modules = [0, K - 1] if method.K == 1 else range(K)
            runs = [dict(zip(modules, e * 2 if method.K == 1 else e, strict=True)) for e in runs]
            lines.append(mean_line(_mode(method), runs, dashed=name == "train_errors"))
    return lines


def figure5_lines(grid: Grid, group: Group) -> dict[str, list[figures.Line]]:
    """Error against K: a panel a loss, a line a mode."""
    end_to_end = [make_cell(records) for method, records in group.items() if method.K == 1]
    panels = defaultdict(list)
    for label, cells in grid.rows:
        mode, kind = label.split(", ", 1)
        known = {K: cell.error_last for K, cell in cells.items() if cell and cell.error_last}
        if known:
            panels[kind].append(_errors_line(mode, list(known), list(known.values())))
    for kind in panels:
        for cell in end_to_end:
            if cell.error_last:
                panels[kind].append(_errors_line(END_TO_END, [1], [cell.error_last]))
    return dict(panels)


def figure4_lines(grid: Grid) -> list[figures.Line]:
    """Error against peak memory: a line a net, a point a K."""
    lines = []
    for net, cells in grid.rows:
        known = {K: cell for K, cell in cells.items() if cell and cell.error_last}
        if known:
            peaks = [cell.peak / MIB for cell in known.values()]
            notes = [f"K={K}" for K in known]
            errors = [cell.error_last for cell in known.values()]
            lines.append(_errors_line(net, peaks, errors, notes))
    return lines


def _errors_line(
    label: str, x: list[float], errors: list[Statistic], notes: list[str] | None = None
) -> figures.Line:
    means, spreads = [e.mean for e in errors], [e.std or 0.0 for e in errors]
    return figures.Line(label, x, means, spreads, notes or [])


def planned_lines(records: list[Record], nets: list[str]) -> list[tuple[str, float]]:
    """Planned peaks in MiB of the nets trained end to end, without and with checkpointing.

    Args:
        records: of one setting.
        nets: which nets, as `ResNet-N`.
    Raises:
        InputError: the number of classes is not known, since the images are not there.
    """
    lines = []
    for net in nets:
        config = next(r.config for r in records if f"ResNet-{r.method.layers}" == net)
        arguments = {name: config[name] for name in NETWORK_OPTIONS if name in config}
        arguments["num_classes"] = DATASETS[config["dataset"]].classes or count_classes(
            config["data_dir"]
        )
        plain, checkpointed = end_to_end_peaks(arguments, config["batch_size"])
        lines.append((f"{net}, end to end, planned", plain / MIB))
        lines.append((f"{net}, end to end with --recompute, planned", checkpointed / MIB))
    return lines


# ---------------------------------------------------------------------------------------------
# Files


def file_name(name: str, setting: Setting, layers: int | None = None) -> str:
    """`name`, then net, data and options as a run folder's name has them; not the published."""
    parts = [name, *([f"resnet{layers}"] if layers else [])]
    if setting.dataset != PUBLISHED.dataset or layers:
        parts.append(setting.dataset)
    return "_".join([*parts, *setting.options])[:200]


def draw_figures(records: list[Record], notes: list[str]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of all that there are runs for; what is left out goes to `notes`."""
    groups = group_records(records)
    for table in TABLES:
        for grid in fill_grids(table, records):
            of_setting = [r for r in records if r.setting == grid.setting]
            name, title = file_name(table.name, grid.setting), f"{table.title}\n{grid.setting}"
            if table.name == "figure4" and (lines := figure4_lines(grid)):
                try:
                    peaks = planned_lines(of_setting, [line.label for line in lines])
                except (InputError, KeyError, TypeError) as error:
                    notes.append(f"{name}: end-to-end peaks can't be planned: {one_line(error)}")
                    peaks = []
                yield name, figures.error_by_memory(lines, peaks, title)
            group = groups.get((32, grid.setting), {})
            if table.name == "figure5" and (panels := figure5_lines(grid, group)):
                yield name, figures.error_by_modules(panels, title)
    for (layers, setting), group in groups.items():
        for name, lines_of, draw in (
            ("learning_curves", learning_curve, figures.learning_curves),
            ("error_by_depth", errors_by_module, figures.error_by_depth),
        ):
            if lines := by_panel(group, lines_of):
                yield file_name(name, setting, layers), draw(lines, f"ResNet-{layers}, {setting}")


def write_report(roots: list[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """All tables and figures of the runs below `roots` into `folder`.

    Returns the files written and notes on what was left out; InputError if there are no runs.
    """
    records, notes = read_records(roots)
    if not records and not notes:
        raise InputError(
            f"no summary.json or plan.json below {' '.join(map(str, roots))}: train something first"
        )
    written = []

    def write(name: str, text: str) -> None:
        with replacing(folder / name) as unfinished:
            unfinished.write_text(text)
        written.append(folder / name)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            grids = fill_grids(table, records)
            write(f"{table.name}.md", markdown(table, grids))
            header = ["setting", "quantity", "method", *(f"K={K}" for K in table.columns)]
            write(f"{table.name}.csv", csv_text(header, csv_rows(grids)))
        for name, figure in draw_figures(records, notes):
            with replacing(folder / f"{name}.png") as unfinished:
                figure.savefig(unfinished, format="png", dpi=120)
            written.append(folder / f"{name}.png")
        groups = group_records(records)
        write("all_runs.md", all_runs_markdown(groups, notes))
        write("all_runs.csv", all_runs_csv(groups))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {one_line(error)}") from error
    return written, notes


def main() -> int:
    """Exit status: 0, or 2 for bad input."""
    parser = Parser(
        prog="report.py",
        description="The paper's tables and figures, from the summaries and plans of runs.",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold run folders")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default="results",
        metavar="DIR",
        help="where the tables and figures go; those of an earlier report are replaced",
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
