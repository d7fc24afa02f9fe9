"""The paper's tables as grids of runs: rows are methods, columns are K."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from configs import InputError, balanced_cuts_are_equal, choose_cuts
from report.results import Cell, Method, Record, Setting, make_cell


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
        balanced = balanced and not balanced_cuts_are_equal(self.layers, K, dataset)
        return Method(
            dataset, self.layers, K, self.mode, self.loss, self.decoders, tuple(cuts), balanced
        )


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
            for setting in sorted(fitting) or [PUBLISHED]  # PUBLISHED is the least
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


Group = dict[Method, list[Record]]


def group_records(records: list[Record]) -> dict[tuple[int, Setting], Group]:
    """Runs that can be compared with each other: by (layers, setting), then by method."""
    groups: dict[tuple[int, Setting], Group] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (r.method.order, r.seed)):
        groups[record.method.layers, record.setting][record.method].append(record)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])))
