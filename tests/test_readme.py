"""The README's promises name tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def promises():
    text = (ROOT / "README.md").read_text()
    table = text.split("## What you can rely on\n")[1].split("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


def test_each_promise_is_held_by_a_test_that_is_there():
    assert len(promises()) > 10
    for promise in promises():
        _, what, held_by, _ = re.split(r" *\| *", promise)
        files = re.findall(r"`(test_\w+\.py)`((?:: (?:`test_\w+`(?: \([^)]*\))?,? ?)+)?)", held_by)
        assert files, what
        for file, tests in files:
            source = (ROOT / "tests" / file).read_text()
            for test in re.findall(r"`(\w+)`", tests):
                assert f"\ndef {test}(" in source, (file, test)
        named = {name for _, tests in files for name in re.findall(r"`(\w+)`", tests)}
        assert named == set(re.findall(r"`(test_\w+)`", held_by))


def test_a_test_that_is_not_there_would_be_seen(monkeypatch):
    import pytest

    monkeypatch.setattr(Path, "read_text", lambda path, real=Path.read_text: real(path).replace(
        "def test_killed_at_20_random_moments", "def test_gone"))  # fmt: skip
    with pytest.raises(AssertionError, match="test_killed_at_20_random_moments"):
        test_each_promise_is_held_by_a_test_that_is_there()
