"""A run in several processes: `--parallel modules` and `--parallel data`."""
