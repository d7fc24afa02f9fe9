"""The run folder: its files, and what a run there continues from."""

import argparse
import contextlib
import itertools
import json
import math
import shlex
import socket
import statistics
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from configs import InputError, one_line
from engine.checkpoint import Checkpoint, Unreadable, read_checkpoint
from engine.console import count_of, note
from engine.files import write_json, write_text
from engine.folder_lock import ELSEWHERE, cannot_write, locked
from engine.memory import PeakMemory
from engine.options import (
    INVOCATION_OPTIONS,
    NON_TRAINING_OPTIONS,
    PERFORMANCE_OPTIONS,
    build_parser,
    data_name,
)
from engine.provenance import git_state, versions
from engine.tensorboard import Board

DEFAULTS = vars(build_parser().parse_args([]))


class RunFolder:
    """config.json, metrics.jsonl, TensorBoard events, checkpoints and summary.json of one run.

    A run calls `locked`, and inside that `read_checkpoints`, `prepare` and `open`, in this order.
    Nothing that was in the folder changes before `open`.

    Attributes:
        options: those that a checkpoint keeps, complete.
        history: the metrics of the epochs done, a dict each; metrics.jsonl is written from them.
        contents: of the checkpoint files that were read, or why a file is damaged.
        writes: whether this process writes the files; of several, rank 0 does.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.options = _kept_options(options)
        self.checkpoint = path / options.checkpoint / "checkpoint.pt"
        self.best = path / options.checkpoint / "model_best.pt"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.environment = path / "environment.jsonl"
        self.summary = path / "summary.json"
        self.plan = path / "plan.json"
        self.history: list[dict] = []
        self.contents: dict[Path, Checkpoint | str] = {}
        self.writes, self._metrics_failed = True, False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into the folder, or writing checkpoints to its place.

        Raises InputError if another process does or the folder cannot be written, CannotSave if the
        disk is full.
        """
        with locked(self.path):
            if self._has_checkpoints_within():
                yield
            else:
                with locked(self.checkpoint.parent):
                    yield

    # What a run continues from

    def checkpoints(self) -> list[Path]:
        """Return checkpoint.pt and model_best.pt, if they are there and not known to be damaged."""
        damaged = {path for path, error in self.contents.items() if isinstance(error, str)}
        return [p for p in (self.checkpoint, self.best) if p not in damaged and _has_content(p)]

    def read_checkpoints(
        self, resumed: str | None = None, checkpoint: Checkpoint | None = None
    ) -> Path | None:
        """Read the checkpoint files here into `contents`; return the newest undamaged one, if any.

        Args:
            resumed, checkpoint: a file that was read already, and its contents.
        Raises:
            Unreadable: a file could not be read, and may be undamaged.
        """
        for path in self.checkpoints():
            try:
                same = checkpoint is not None and same_file(resumed, path)
                self.contents[path] = checkpoint if same else read_checkpoint(path)
            except Unreadable:
                raise
            except InputError as error:
                self.contents[path] = one_line(error)  # its traceback would keep what was read
        steps = {p: c.done for p, c in self.contents.items() if isinstance(c, Checkpoint)}
        return max(steps, key=steps.get, default=None)

    def prepare(self, options: argparse.Namespace, checkpoint: Checkpoint | None) -> bool:
        """Return whether anything is left to do for this run; let go of the checkpoints read.

        Args:
            options: complete, with cuts. Their `resume` is the file that the run continues from,
                None for a new run, or auto where no undamaged checkpoint was found.
            checkpoint: the contents of that file.
        Raises:
            InputError: training here would overwrite or mix up an earlier run; or the
                checkpoint is of another folder and leaves no epochs to train.
        """
        self.options, resumed = _kept_options(options), options.resume
        self._check_free(resumed, checkpoint)
        if same_file(resumed, self.checkpoint) or same_file(resumed, self.best):
            self.history = list(checkpoint.history)
            if not self.history:  # checkpoints of early versions have none
                rows = read_metrics(self.metrics)
                self.history = [m for m in rows if m.get("epoch", math.inf) <= checkpoint.epoch]
        self.contents = {p: e for p, e in self.contents.items() if isinstance(e, str)}
        if checkpoint is None or checkpoint.epoch < options.epochs:
            return True
        if self.is_finished():
            return False
        if not self.history:
            raise InputError(
                f"{checkpoint.epoch} of {options.epochs} epochs are done in {resumed}: give more "
                "--epochs, or --evaluate it"
            )
        return True  # all epochs are trained, but the summary is not written

    def _check_free(self, resumed: str | None, checkpoint: Checkpoint | None) -> None:
        files = (self.summary, self.checkpoint, self.best, self.metrics)
        if not any(map(_has_content, files)):
            return
        finished = _has_content(self.summary)
        what = f"{self.path} holds {'a finished' if finished else 'an unfinished'} run"
        config = _read_json(self.config)
        can_continue = self.checkpoints() if resumed != "auto" else config and not finished
        if not can_continue:
            raise InputError(f"{what} without a checkpoint to continue from: {ELSEWHERE}")
        if resumed is None:
            how = f"continue it with {self.to_resume()}"
            if finished:
                how = f"look at it with --evaluate {self.checkpoints()[0]}"
            raise InputError(f"{what}: {how}, or {ELSEWHERE}")
        if resumed != "auto" and not self._is_newest(resumed, checkpoint):
            raise InputError(f"{what} that {resumed} is not the state of: {ELSEWHERE}")
        earlier = config if resumed == "auto" else checkpoint.options
        if changed := self._changed(earlier):
            raise InputError(f"{what} of other options ({'; '.join(changed)}): {ELSEWHERE}")
        if resumed == "auto" and config.get("checkpoint") != self.options["checkpoint"]:
            raise InputError(f"{what} with --checkpoint {config.get('checkpoint')}: give that")

    def _is_newest(self, resumed: str, checkpoint: Checkpoint) -> bool:
        """Return whether it is checkpoint.pt, or a model_best.pt that has no fewer steps."""
        if same_file(resumed, self.checkpoint):
            return True
        last = self.contents.get(self.checkpoint)
        newer = isinstance(last, Checkpoint) and last.done > checkpoint.done
        return same_file(resumed, self.best) and not newer

    def to_resume(self) -> str:
        """Return the options that continue the run whose `checkpoints` are here."""
        options = f"--resume {self.checkpoints()[0]}"
        if self._has_checkpoints_within():
            return options
        return f"{options} --output_dir {self.path} --checkpoint {self.options['checkpoint']}"

    def _has_checkpoints_within(self) -> bool:
        folder = self.checkpoint.parent.resolve()
        return self.path.resolve() in (folder, *folder.parents)

    def is_finished(self) -> bool:
        """Return whether a run with the same learning has left its summary here."""
        summary = _read_json(self.summary)
        return isinstance(summary.get("error_last"), int | float) and self._has_options_of(summary)

    def note_other_epochs(self) -> None:
        """Note a run beside this new one that is the same with fewer --epochs, and how to go on."""
        ignored = {*NON_TRAINING_OPTIONS, *PERFORMANCE_OPTIONS, "epochs", "warmup_epochs"}
        shorter: dict[Path, int] = {}
        for config in self.path.parent.glob("*/config.json"):
            earlier = _read_json(config)
            checkpoint = config.parent / str(earlier.get("checkpoint", ".")) / "checkpoint.pt"
            epochs = earlier.get("epochs")
            if (
                isinstance(epochs, int)
                and epochs < self.options["epochs"]
                and not self._changed(earlier, ignoring=ignored - {"name", "no"})
                and checkpoint.exists()
            ):
                shorter[checkpoint] = epochs
        if shorter:
            longest = max(shorter, key=shorter.get)
            folder = shlex.quote(f"{self.path}-continued")
            note(
                f"this run begins at its start. Another is the same with --epochs "
                f"{shorter[longest]}: to go on from there in a third folder, "
                f"--resume {shlex.quote(str(longest))} --output_dir {folder}"
            )

    def is_planned(self, in_parallel: bool = False) -> bool:
        """Return whether the plan of the same options is here, for several processes if asked."""
        plan = _read_json(self.plan)
        return (
            self._has_options_of(plan, ignoring=NON_TRAINING_OPTIONS)
            and plan["config"].keys() == self.options.keys()
            and ("parallel" in plan or not in_parallel)
        )

    def _has_options_of(self, contents: dict, **ignoring: Collection[str]) -> bool:
        """Return whether the contents of a summary.json or plan.json are of these options."""
        config = contents.get("config")
        return isinstance(config, dict) and bool(config) and not self._changed(config, **ignoring)

    def _changed(
        self,
        earlier: dict[str, object],
        ignoring: Collection[str] = (*NON_TRAINING_OPTIONS, *PERFORMANCE_OPTIONS),
    ) -> list[str]:
        """Return in words which options differ from an earlier run's, without `ignoring`.

        Options that it lacks, being of an earlier version, had today's defaults.
        """
        before, now = _comparable(earlier), _comparable(self.options)
        if before:
            before = {k: v for k, v in DEFAULTS.items() if k in now} | before
        not_chosen = set()  # options that --partition auto or --memory_budget have yet to decide
        if now["cuts"] is None and (now["partition"] == "auto" or now["memory_budget"]):
            not_chosen = {"cuts", "local_module_num"} if now["memory_budget"] else {"cuts"}
        return [
            f"{name} {before[name]}, now {value}"
            for name, value in now.items()
            if name in before.keys() - {*ignoring, *not_chosen} and before[name] != value
        ]

    # What a run writes

    def open(
        self, checkpoint: Checkpoint | None, device: str, parallel: dict | None = None
    ) -> None:
        """Make the folder, move damaged checkpoints aside, and begin to write.

        Args:
            checkpoint: where the run continues.
            device: its name.
            parallel: how several processes divide the work.
        Raises:
            InputError: the folder cannot be written.
            CannotSave: the disk is full.
        """
        if not self.writes:
            return
        epoch, step = checkpoint.done if checkpoint is not None else (0, 0)
        self._made_by = {"git": git_state(), "versions": versions()}
        if parallel:
            self._made_by["parallel"] = parallel
        start = {
            "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "epoch": epoch,
            "step": step,
            "command": sys.argv,
            "host": socket.gethostname(),
            "device": device,
            "threads": torch.get_num_threads(),
            **self._made_by,
        }
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            for path, error in self.contents.items():
                kept = path.rename(_free_name(path))
                note(f"{error}; it is kept as {kept.name}")
            if self.contents and checkpoint is None:
                note("no checkpoint here is undamaged: the run begins again")
            self.contents = {}
            write_json(self.config, self.options)
            self._write_metrics()
            before = self.environment.read_text() if self.environment.exists() else ""
            write_text(self.environment, before + json.dumps(start) + "\n")
            if checkpoint is not None and device == "cpu":
                _compare_threads(before)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.board = Board(self.path, epoch + 1, note)

    def add_epoch(self, metrics: dict, rows: dict[str, Tensor]) -> None:
        """Add an epoch to metrics.jsonl and TensorBoard, there with rows of reconstructed images.

        If they cannot be written, one note says so and the run goes on.
        """
        self.history.append(metrics)
        if not self.writes:
            return
        try:
            self._write_metrics()
        except OSError as error:
            if not self._metrics_failed:
                note(
                    f"{self.metrics} can't be written ({one_line(error)}): the run goes on, and "
                    "checkpoint.pt has the metrics"
                )
            self._metrics_failed = True
        self.board.add_epoch(metrics)
        self.board.add_reconstructions(rows, metrics["epoch"])

    def _write_metrics(self) -> None:
        write_text(self.metrics, "".join(json.dumps(m) + "\n" for m in self.history))

    def best_epoch(self) -> dict | None:
        """Return the metrics of the epoch with the lowest `deciding_error`; None before any."""
        return min(self.history, key=deciding_error, default=None)

    def add_summary(
        self, peak: PeakMemory, device: str, parameters: dict[str, int], data_bytes: int
    ) -> dict:
        """Write and return summary.json, and close TensorBoard; raise OSError.

        `error_last` and `error_best` are test errors, of the last and of the best epoch. Errors are
        in percent, memory in bytes. The peak is that of the steps since options for memory and
        speed were last changed.
        """
        last, best = self.history[-1], self.best_epoch()
        of_validation = {"val_error_best": best["val_error"]} if "val_error" in best else {}
        summary = {
            "error_last": last["test_error"],
            "error_best": best["test_error"],
            "epoch_best": best["epoch"],
            **of_validation,
            "peak_memory_bytes": peak.bytes or last["peak_memory_bytes"],
            "peak_memory_how": peak.how,
            "data_on_device_bytes": data_bytes,
            "samples_per_second": statistics.harmonic_mean(
                m["samples_per_second"] for m in self.history
            ),
            "device": device,
            "parameters": parameters,
            "epochs": last["epoch"],
            "seed": self.options["seed"],
            "config": self.options,
            **self._made_by,
        }
        of_learning = {k: v for k, v in self.options.items() if k not in NON_TRAINING_OPTIONS}
        self.board.add_hparams(of_learning, summary)
        self._write_metrics()
        write_json(self.summary, summary)
        return summary

    def add_plan(self, plan: dict) -> None:
        """Write plan.json: what `--dry_run --json` prints, and the options it is of.

        Raises InputError if it cannot be written or a plan of other options is there.
        """
        earlier = _read_json(self.plan).get("config") or {}
        if changed := self._changed(earlier, ignoring=NON_TRAINING_OPTIONS):
            raise InputError(f"{self.plan} is of other options ({'; '.join(changed)}): {ELSEWHERE}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.plan, plan | {"config": self.options})
        except OSError as error:
            raise InputError(f"cannot write {self.plan}: {one_line(error)}") from error


def deciding_error(metrics: dict) -> float:
    """Return the error that decides which epoch is the best, in percent.

    It is that of the validation images if there are any, else of the test images.
    """
    return metrics.get("val_error", metrics["test_error"])


def read_metrics(path: Path) -> list[dict]:
    """Return the epochs in a metrics.jsonl, a dict each; skip lines that are not such."""
    metrics = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            metrics.append(json.loads(line))
    return [m for m in metrics if isinstance(m, dict)]


def same_file(a: str | Path | None, b: Path | None) -> bool:
    """Return whether both are there, and one file."""
    return None not in (a, b) and Path(a).exists() and b.exists() and b.samefile(a)


def _compare_threads(environment: str) -> None:
    """Note that a resumed run has another number of threads than before.

    Args:
        environment: contents of its environment.jsonl, whose last line is of the last start.
    """
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError):
        before, now = json.loads(environment.splitlines()[-1])["threads"], torch.get_num_threads()
        if before != now:
            note(
                f"the run had {count_of(before, 'thread')} and has {now} now, so sums are rounded "
                f"differently from here on; OMP_NUM_THREADS={before} keeps the bits"
            )


def _kept_options(options: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(options).items() if name not in INVOCATION_OPTIONS}


def _comparable(options: dict[str, object]) -> dict[str, object]:
    """Return options as JSON gives them back, the data set by its full name."""
    named = {"dataset": data_name(options)} if "dataset" in options else {}
    return json.loads(json.dumps(options | named))


def _read_json(path: Path) -> dict:
    """Return the object in a JSON file, empty if there is none."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _free_name(path: Path) -> Path:
    """Return `path` with .damaged, or .damaged-2 and so on, after it."""
    names = (f"{path.name}.damaged" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return next(other for other in map(path.with_name, names) if not other.exists())
