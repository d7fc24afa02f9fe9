"""The README and docs/: examples run, and files, functions, options and tests they name exist."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from cli import main

import configs
import losses
from engine.options import build_parser, read_options
from models import auxiliary, context, resnet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = (configs.DATASETS, losses.LOCAL_LOSSES, auxiliary.HEADS, context.IMAGE_ENCODERS,
          resnet.BACKBONES)  # fmt: skip


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


EXAMPLES = {
    (re.search(r"# train\.py (--\w+)", block) or ["step"])[0].removeprefix("# train.py "): block
    for block in python_blocks(README)
}


@pytest.fixture
def tables():
    """Takes an example's entries out again."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


# ---------------------------------------------------------------------------------------------
# Examples


def test_there_is_an_example_of_each_part():
    assert sorted(EXAMPLES) == [
        "--aux_net_config", "--context_mode", "--dataset", "--local_loss_mode", "--model", "step",
    ]  # fmt: skip


def test_the_step_of_a_loop_of_ones_own_trains():
    names = {}
    exec(EXAMPLES["step"], names)
    assert names["logits"].shape == (4, 10)
    assert len(names["losses"]) == 3
    first = float(sum(names["losses"]))
    for _ in range(10):
        arguments = names["images"], names["targets"], names["after_backward"]
        _, after = names["network"].local_step(*arguments)
    assert float(sum(after)) < first


@pytest.mark.parametrize("option", sorted(EXAMPLES.keys() - {"step"}))
def test_an_example_adds_one_entry_that_the_command_line_knows(
    option, here, monkeypatch, capsys, tables
):
    value = re.search(rf"# train\.py {option} (\S+)", EXAMPLES[option])[1]
    arguments = [
        "--dataset", "digits", "--layers", "8", "--local_module_num", "3", "--epochs", "1",
        "--local_loss_mode", "cross_entropy", "--device", "cpu", "--limit_per_class", "2",
        "--batch_size", "8", "--output_dir", "run", option, value,
    ]  # fmt: skip
    status, _, errors = main(monkeypatch, capsys, *arguments)
    assert status == 2 and value in errors[0]  # not yet known
    sizes = [len(table) for table in TABLES]
    exec(EXAMPLES[option], {})
    assert sum(len(table) for table in TABLES) == sum(sizes) + 1
    status, _, errors = main(monkeypatch, capsys, *arguments)
    assert (status, errors) == (0, [])
    assert json.loads(Path("run/summary.json").read_text())["config"][option[2:]] == value


def test_names_that_examples_of_the_docs_import_are_there():
    found = 0
    for page in PAGES[2:]:
        for block in python_blocks(page.read_text()):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), page
                    found += 1
    assert found > 5


# ---------------------------------------------------------------------------------------------
# What the pages name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 260


def test_each_equation_names_code_that_is_there():
    rows = [line for line in README.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 12))
    for row in rows:
        named = re.findall(r"`([\w/]+\.py):([\w.]+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        for file, name in named:
            body = ast.parse((ROOT / file).read_text()).body
            for part in name.split("."):
                (node,) = (n for n in body if getattr(n, "name", None) == part)
                body = node.body


def test_the_file_tree_is_complete():
    tree = README.split("## Files\n")[1].split("```")[1]
    named = [line.split()[0] for line in tree.strip().splitlines()]
    code = [*ROOT.glob("*.py")]
    for package in ("models", "engine", "parallel", "planning", "report"):
        code += [path for path in ROOT.glob(f"{package}/*.py") if path.name != "__init__.py"]
    assert sorted(n for n in named if n.endswith(".py")) == sorted(
        str(path.relative_to(ROOT)) for path in code
    )


def test_each_option_is_in_the_table_of_its_group():
    rows = dict(re.findall(r"\| (\w+) \| (`--.*) \|", README))
    groups = {
        group.title: {name for action in group._group_actions for name in action.option_strings}
        for group in build_parser()._action_groups
        if group._group_actions and group.title not in ("options", "positional arguments")
    }
    assert {title: set(re.findall(r"`(-.*?)`", row)) for title, row in rows.items()} == groups


def test_options_of_the_commands_that_are_shown_are_right():
    shown = 0
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(
            r"^(?:\$ )?(?:python|torchrun .*--) (train\.py .*)", text, re.MULTILINE
        ):
            read_options(shlex.split(line)[1:])
            shown += 1
    assert shown >= 6


def test_links_lead_somewhere():
    def anchor(heading):
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            file, _, place = target.partition("#")
            if target.startswith("http"):
                continue
            path = page.parent / file if file else page
            assert path.exists(), (page.name, target)
            if place:
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
                assert place in map(anchor, headings), (page.name, target)


# ---------------------------------------------------------------------------------------------
# docs/guarantees.md: each promise has a fast test


def promises(text):
    """Return (promise, fast tests, slow tests) of each row, the tests as (file, name or None)."""
    rows = [row[1:-1].split("|") for row in text.splitlines() if re.match(r"\|.*\|.*\|.*\|$", row)]
    return [(what.strip(), *([*named_tests(cell)] for cell in cells)) for what, *cells in rows[2:]]


def named_tests(cell):
    for file, names in re.findall(r"`(test_\w+\.py)`((?:[:,] `test_\w+`)*)", cell):
        for name in re.findall(r"`(\w+)`", names) or [None]:
            yield file, name


def is_slow(path, name):
    """Return whether a test, or each of a file, is marked slow; raise KeyError if it is gone."""
    tree = ast.parse(path.read_text())
    statements = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    if "pytestmark = pytest.mark.slow" in statements:
        return True
    functions = {
        node.name: not {"pytest.mark.slow", "slow"}.isdisjoint(
            map(ast.unparse, node.decorator_list)
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    return functions[name] if name else all(functions.values())


def faults(text, tests=ROOT / "tests"):
    """Return what is wrong with a table of promises."""
    found = []
    for what, *columns in promises(text):
        if not columns[0]:
            found.append(f"no fast test: {what}")
        for column, in_slow_column in zip(columns, (False, True), strict=True):
            for file, name in column:
                try:
                    if is_slow(tests / file, name) != in_slow_column:
                        found.append(f"{name or file} is {'fast' if in_slow_column else 'slow'}")
                except (KeyError, FileNotFoundError):
                    found.append(f"{name or file} is not there")
    return found


def test_each_promise_has_a_fast_test_and_all_that_are_named_are_there():
    text = (ROOT / "docs/guarantees.md").read_text()
    assert len(promises(text)) > 10
    named = {name for _, *cells in promises(text) for tests in cells for _, name in tests}
    assert named - {None} == set(re.findall(r"`(test_\w+)`", text))
    assert faults(text) == []


MADE_UP = """
@pytest.mark.parametrize("x", [1])
def test_fast(x):
    pass

@pytest.mark.slow
def test_slow():
    pass

slow = pytest.mark.slow

@slow
def test_slow_too():
    pass
"""


@pytest.mark.parametrize(
    "row, found",
    [
        ("| a | `test_a.py`: `test_fast` | `test_a.py`: `test_slow` |", []),
        ("| a | `test_a.py`; `test_a.py`: `test_fast` | `test_b.py` |", []),
        ("| a | `test_a.py`: `test_fast`, `test_gone` | |", ["test_gone is not there"]),
        ("| a | `test_gone.py` | |", ["test_gone.py is not there"]),
        ("| a | | `test_b.py` |", ["no fast test: a"]),
        ("| a | `test_b.py` | |", ["test_b.py is slow"]),
        ("| a | `test_a.py`: `test_slow` | |", ["test_slow is slow"]),
        ("| a | `test_a.py`: `test_slow_too` | |", ["test_slow_too is slow"]),
        ("| a | `test_a.py` | `test_a.py`: `test_fast` |", ["test_fast is fast"]),
    ],
)
def test_a_fault_of_the_table_is_found(tmp_path, row, found):
    (tmp_path / "test_a.py").write_text(MADE_UP)
    (tmp_path / "test_b.py").write_text("pytestmark = pytest.mark.slow\n" + MADE_UP)
    table = f"| promise | fast tests | slow tests |\n|---|---|---|\n{row}\n"
    assert faults(table, tmp_path) == found
