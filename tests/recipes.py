"""A script of the user's own: the README's examples of each part, then train.py's command line."""

import re
from pathlib import Path

import train
from engine.errors import run_script

README = Path(__file__).parent.parent / "README.md"


def main(argv: list[str]) -> None:
    """Add the parts to the tables, then run train.py."""
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        if "# train.py" in block:
            exec(block, {})
    train.main(argv)


if __name__ == "__main__":
    run_script(main)
