"""The paper's tables and figures, and methods compared, from runs: `python -m report runs`."""

import os

from engine import options
from engine.errors import start_script


def build_parser() -> options.Parser:
    """Return the parser of the command line."""
    parser = options.Parser(
        prog="report",
        description="The paper's tables and figures, from the summaries and plans of runs.",
        formatter_class=options.HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=options.path, help="folders with run folders")
    parser.add_argument(
        "--output_dir", type=options.path, default="results", metavar="DIR",
        help="where the tables and figures go; files with the same names are replaced",
    )  # fmt: skip
    return parser


if __name__ == "__main__":  # before the imports that take seconds
    start_script(lambda argv: build_parser().parse_args(argv))
    # Only files are drawn, and matplotlib refuses a notebook's backend where it is not installed.
    os.environ.pop("MPLBACKEND", None)

import sys
from collections.abc import Sequence
from pathlib import Path

from configs import InputError, one_line
from engine.files import write_text

try:
    from report import methods, tables
    from report.figures import write_figures
    from report.results import read_runs
except ModuleNotFoundError as error:
    package = (error.name or "").split(".")[0]
    if package not in ("matplotlib", "pandas"):
        raise
    print(f"report: error: {package} is not installed: pip install {package}", file=sys.stderr)
    sys.exit(2)


def write_report(roots: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Write all tables and figures of the runs below `roots` into `folder`.

    Returns the files written, and notes on what was left out. Raises InputError if there are no
    runs, or if the folder cannot be written.
    """
    runs, notes = read_runs(roots)
    if runs.empty and not notes:
        raise InputError(f"no runs below {' '.join(map(str, roots))}: train something first")
    cells = tables.over_seeds(runs)
    texts = {
        "all_runs.md": tables.all_runs_markdown(cells, notes),
        "all_runs.csv": tables.csv_text(cells),
    }
    for table in tables.TABLES:
        filled = tables.fill(table, cells)
        if not filled.empty:
            texts[f"{table.name}.md"] = tables.table_markdown(table.title, filled)
            texts[f"{table.name}.csv"] = tables.csv_text(filled)
    compared = methods.method_cells(runs, cells)
    if not compared.empty:
        texts["methods.md"] = methods.methods_markdown(compared)
        texts["methods.csv"] = tables.csv_text(compared, methods.csv_columns(compared))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(folder / name, text)
        images = write_figures(runs, cells, folder, compared)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {one_line(error)}") from error
    return [*(folder / name for name in texts), *images], notes


def main() -> int:
    """Run the command line; return the exit status, 0 or 2 for bad input."""
    arguments = build_parser().parse_args()
    try:
        written, notes = write_report([*map(Path, arguments.runs)], Path(arguments.output_dir))
    except InputError as error:
        print(f"report: error: {one_line(error)}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"report: note: {note}", file=sys.stderr)
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
