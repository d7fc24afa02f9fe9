"""From torchrun's environment and `--parallel` to a strategy. Importing it imports no torch."""

import argparse
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

from configs import InputError
from engine.errors import PeerFailed

if TYPE_CHECKING:
    from engine.strategy import Strategy


@contextmanager
def first_speaks() -> Iterator[None]:
    """Have only the first of torchrun's processes on a machine say what they all find wrong.

    Raises PeerFailed in the others where they find an error.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except InputError as error:
            raise PeerFailed from error
        except SystemExit as ended:  # from the option parser
            if ended.code:
                raise PeerFailed from ended
            raise


def make_strategy(options: argparse.Namespace) -> "Strategy":
    """Return the strategy that `--parallel` asks for; `options` are as typed.

    Raises InputError unless torchrun has started the processes that it needs, and no others.
    """
    from engine.strategy import Strategy  # here, because it imports torch

    processes = os.environ.get("WORLD_SIZE", "1")
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and processes != "1"
    if options.dry_run:
        if by_torchrun:
            raise InputError("--dry_run plans in one process: leave torchrun out")
        return Strategy()
    if options.parallel == "modules":
        from parallel.pipeline import PipelineStrategy  # torch.distributed only where it is needed

        return PipelineStrategy(options)
    if options.parallel == "data":
        from parallel.data_parallel import DataParallelStrategy

        return DataParallelStrategy(options)
    if by_torchrun:
        raise InputError(f"torchrun started {processes} processes: say how they share the work, "
                         "with --parallel modules or data")  # fmt: skip
    return Strategy()
