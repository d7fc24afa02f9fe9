"""train.py and report.py as tests call them, within the process."""

import sys
from pathlib import Path

import train


def main(monkeypatch, capsys, *arguments, script=train):
    """Exit status, output lines and error lines of train.py, or of another script."""
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *map(str, arguments)])
    try:
        status = script.main()
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def few_test_images(monkeypatch):
    """Have train.py see a test split of 40 images."""
    load = train.load_dataset

    def load_less(*args, **options):
        data = load(*args, **options)
        return data._replace(test=type(data.test)(data.test.images[:40], data.test.targets[:40]))

    monkeypatch.setattr(train, "load_dataset", load_less)
