"""train.py as tests call it, within the process."""

import sys

import train


def main(monkeypatch, capsys, *arguments):
    """Exit status, output lines and error lines of train.py."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        status = train.main()
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
