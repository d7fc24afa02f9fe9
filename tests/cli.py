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
