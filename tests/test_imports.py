"""The import rule (CONTRIBUTING.md): which part of the code may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = {
    "configs": 0, "losses": 1, "dataloaders": 1, "models": 2, "engine": 3, "parallel": 4,
    "planning": 5, "report": 6, "train": 7,
}  # fmt: skip
"""A part may import itself and the parts of lower levels."""

ROOT_FILES = {"configs.py", "dataloaders.py", "losses.py", "train.py"}


def breaches(root: Path) -> list[str]:
    """Return a line for each import below `root` that breaks the rule, and each stray file."""
    lines = [
        f"{path.name}: does not belong in the root"
        for path in sorted(root.glob("*.py"))
        if path.name not in ROOT_FILES
    ]
    for part, level in LEVELS.items():
        for path in sorted([*root.glob(f"{part}.py"), *root.glob(f"{part}/**/*.py")]):
            for name, line in imports(ast.parse(path.read_text())):
                if why := breach(part, level, name):
                    lines.append(f"{path.relative_to(root)}:{line}: {name}: {why}")
    return lines


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield dotted name and line of each import.

    `import torch` with `torch.distributed` in an expression counts as an import of that.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:  # a relative one is of itself
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno


def breach(part: str, level: int, name: str) -> str | None:
    """Return what is wrong with an import of `name` in `part`, or None."""
    other = name.split(".")[0]
    if f"{name}.".startswith("torch.distributed.") and part != "parallel":
        return "only parallel/ imports torch.distributed"
    if other == "matplotlib" and part != "report":
        return "only report/ imports matplotlib"
    if other not in LEVELS or other == part:
        return None
    if LEVELS[other] >= level:
        return f"{part} comes before {other}, or beside it"
    return None


def test_imports_point_one_way():
    assert (ROOT / "models").is_dir()
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    "file, source, why",
    [
        ("losses.py", "import dataloaders", "dataloaders"),
        ("models/a.py", "from engine.step import train_step", "engine"),
        ("models/a.py", "def f():\n    from engine import step", "engine"),
        ("models/deep/a.py", "import train", "train"),
        ("engine/a.py", "import report.figures as f", "report"),
        ("engine/a.py", "from parallel import pipeline", "parallel"),
        ("engine/a.py", "import torch.distributed as dist", "torch.distributed"),
        ("engine/a.py", "from torch import distributed", "torch.distributed"),
        ("planning/a.py", "from torch.distributed import rpc", "torch.distributed"),
        ("train.py", "import torch\n\ntorch.distributed.barrier()", "torch.distributed"),
        ("engine/a.py", "def f():\n    import matplotlib.pyplot", "matplotlib"),
        ("helpers.py", "", "root"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, source, why):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    (found,) = breaches(tmp_path)
    assert found.startswith(file) and why in found
