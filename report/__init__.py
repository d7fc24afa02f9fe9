"""The paper's tables and figures, from the files of runs: `python -m report runs`."""
