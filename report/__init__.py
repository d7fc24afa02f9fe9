"""Tables and figures from what runs have left: `python -m report runs`."""
