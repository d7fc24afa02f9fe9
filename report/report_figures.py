"""What the report's figures show: lines from runs, drawn by figures.py."""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator

from matplotlib.figure import Figure

from configs import DATASETS, one_line
from engine.memory import MIB
from engine.options import NETWORK_OPTIONS
from planning.plan import end_to_end_peaks
from report import figures
from report.results import END_TO_END, Method, Record, Setting, Statistic, make_cell, statistic
from report.tables import PUBLISHED, TABLES, Grid, Group, fill_grids, group_records


def mean_line(label: str, runs: list[dict[float, float]], dashed: bool = False) -> figures.Line:
    """Mean and spread at each x of some runs, each given as x -> y."""
    xs = sorted({x for run in runs for x in run})
    at_x = [statistic([run[x] for run in runs if x in run]) for x in xs]
    means, spreads = [s.mean for s in at_x], [s.spread for s in at_x]
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
    for place, name in panels.items():
        lines, own = [], []
        for method, records in trained.items():
            if method.K == 1 or (method.K, method.kind) == place:
                lines += (of_method := lines_of(method, records, place[0]))
                own += of_method if (method.K, method.kind) == place else []
        if own:
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
    means, spreads = [e.mean for e in errors], [e.spread for e in errors]
    return figures.Line(label, x, means, spreads, notes or [])


def planned_lines(records: list[Record], nets: list[str]) -> list[tuple[str, float]]:
    """Planned peaks in MiB of the nets trained end to end, without and with checkpointing.

    Args:
        records: of one setting.
        nets: which nets, as `ResNet-N`.
    Raises:
        KeyError, TypeError, ValueError, RuntimeError: an option is missing, or no such net or batch
            can be.
    """
    lines = []
    for net in nets:
        config = next(r.config for r in records if f"ResNet-{r.method.layers}" == net)
        arguments = {name: config[name] for name in NETWORK_OPTIONS if name in config}
        arguments["num_classes"] = DATASETS[config["dataset"]].classes
        plain, checkpointed = end_to_end_peaks(arguments, config["batch_size"])
        lines.append((f"{net}, end to end, planned", plain / MIB))
        lines.append((f"{net}, end to end with --recompute, planned", checkpointed / MIB))
    return lines


def file_name(name: str, setting: Setting, layers: int | None = None) -> str:
    """`name`, then net, data and options as a run folder's name has them; not the published."""
    parts = [name, *([f"resnet{layers}"] if layers else [])]
    if setting.dataset != PUBLISHED.dataset or layers:
        parts.append(setting.dataset)
    whole = re.sub(r"[^\w.+-]", "-", "_".join([*parts, *setting.options]))
    return whole if len(whole) <= 200 else f"{whole[:190]}_{zlib.crc32(whole.encode()):08x}"


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
                except (KeyError, TypeError, ValueError, RuntimeError) as error:
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
