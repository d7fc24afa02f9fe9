"""A run's folder: what is in it, who may write to it, and what it is called."""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import re
import socket
import statistics
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from configs import InputError, one_line
from engine.checkpoint import CannotSave, Checkpoint, Unreadable, read_checkpoint
from engine.console import note
from engine.files import write_json, write_text
from engine.memory import PeakMemory
from engine.options import (
    INVOCATION_OPTIONS,
    NON_TRAINING_OPTIONS,
    PERFORMANCE_OPTIONS,
    build_parser,
    data_name,
    fill_in,
)
from engine.provenance import git_state, versions
from engine.tensorboard import Board

LOCK = ".lock"
"""File in a run folder with the pid of the process that trains into it."""

LONGEST_NAME = 200
"""Bytes of a run folder's name; file systems take 255."""

ELSEWHERE = "choose another --output_dir, --name or --no"


class RunFolder:
    """config.json, metrics.jsonl, TensorBoard events, checkpoints and summary.json of one run.

    Attributes:
        options: those that make the run.
        history: the metrics of its epochs, one dict each; metrics.jsonl is made of them.
    """

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.options = {k: v for k, v in vars(options).items() if k not in INVOCATION_OPTIONS}
        self.checkpoint = path / options.checkpoint / "checkpoint.pt"
        self.best = path / options.checkpoint / "model_best.pt"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.environment = path / "environment.jsonl"
        self.summary = path / "summary.json"
        self.plan = path / "plan.json"
        self.history: list[dict] = []
        self._metrics_are_whole, self._told = True, False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains into it, or puts its checkpoints where this one does.

        Raises InputError if another does, or if it cannot be written, CannotSave if the disk is
        full.
        """
        with _locked(self.path):
            if self._keeps_checkpoints_within():
                yield
            else:
                with _locked(self.checkpoint.parent):
                    yield

    def check_free(self, resumed: str | None, checkpoint: Checkpoint | None) -> None:
        """InputError if training here would overwrite or mix up an earlier run.

        Args:
            resumed, checkpoint: file and contents of what the run continues from, if it does.
                `auto` is for a run that has no whole checkpoint, and is begun again.
        """
        try:
            is_file = self.path.exists() and not self.path.is_dir()
            kept = [p for p in (self.summary, self.checkpoint, self.best, self.metrics) if holds(p)]
        except OSError as error:  # such as a name that is too long
            raise InputError(f"{self.path} can't be the run folder: {one_line(error)}") from error
        if is_file:
            raise InputError(f"{self.path} is a file, so it can't be the run folder: {ELSEWHERE}")
        if not kept:
            return
        what = f"{self.path} holds {'a finished' if self.summary in kept else 'an unfinished'} run"
        if resumed == "auto":
            earlier = _json_in(self.config)
            if self.summary in kept or not earlier:
                raise InputError(f"{what} without a checkpoint to continue from: {ELSEWHERE}")
            self._check_same(earlier, what)
            if earlier.get("checkpoint") != self.options["checkpoint"]:
                raise InputError(f"{what} with --checkpoint {earlier.get('checkpoint')}: give that")
            return
        if not self.checkpoints():
            raise InputError(f"{what} without a checkpoint to continue from: {ELSEWHERE}")
        if resumed is None:
            how = f"continue it with {self.to_resume()}"
            if self.summary in kept:
                how = f"look at it with --evaluate {self.checkpoints()[0]}"
            raise InputError(f"{what}: {how}, or {ELSEWHERE}")
        if not is_same(resumed, self.checkpoint) and not self._is_newest(resumed, checkpoint):
            raise InputError(f"{what} that {resumed} is not the state of: {ELSEWHERE}")
        self._check_same(checkpoint.options, what)

    def checkpoints(self) -> list[Path]:
        """checkpoint.pt and model_best.pt, as far as they are there."""
        return [path for path in (self.checkpoint, self.best) if holds(path)]

    def to_resume(self) -> str:
        """The options that continue the run whose `checkpoints` are here."""
        options = f"--resume {self.checkpoints()[0]}"
        if self._keeps_checkpoints_within():
            return options
        return f"{options} --output_dir {self.path} --checkpoint {self.options['checkpoint']}"

    def _keeps_checkpoints_within(self) -> bool:
        checkpoints = self.checkpoint.parent.resolve()
        return self.path.resolve() in (checkpoints, *checkpoints.parents)

    def _is_newest(self, resumed: str, checkpoint: Checkpoint) -> bool:
        """Whether this is model_best.pt, and no fewer steps are in it than in checkpoint.pt."""
        newest = self.newest()
        if newest is None or not is_same(resumed, self.best):
            return False
        state = read_checkpoint(newest)
        return (checkpoint.epoch, checkpoint.step) >= (state.epoch, state.step)

    def _check_same(self, earlier: dict[str, object], what: str) -> None:
        if changed := self._changed(earlier):
            raise InputError(f"{what} of other options ({'; '.join(changed)}): {ELSEWHERE}")

    def newest(self) -> Path | None:
        """The whole checkpoint with the most steps, if there is one."""
        whole = [(s.epoch, s.step, p) for p, s in self._states() if isinstance(s, Checkpoint)]
        return max(whole, key=lambda each: each[:2])[2] if whole else None

    def _states(self) -> Iterator[tuple[Path, Checkpoint | InputError]]:
        """The files in the place of checkpoints, and what they hold or why they are none."""
        for path in self.checkpoints():
            try:
                yield path, read_checkpoint(path)
            except Unreadable:
                raise
            except InputError as error:
                yield path, error

    def is_finished(self) -> bool:
        """Whether a run with the same learning has left its summary here."""
        config = _config_in(self.summary)
        ended = isinstance((_json_in(self.summary) or {}).get("error_last"), int | float)
        return ended and bool(config) and not self._changed(config)

    def is_planned(self, in_parallel: bool = False) -> bool:
        """Whether the plan of a run with the same options is here, one for several processes."""
        config = _config_in(self.plan)
        return (
            bool(config)
            and config.keys() == self.options.keys()
            and not self._changed(config, but=NON_TRAINING_OPTIONS)
            and not (in_parallel and "parallel" not in _json_in(self.plan))
        )

    def _changed(
        self,
        earlier: dict[str, object],
        but: Collection[str] = (*NON_TRAINING_OPTIONS, *PERFORMANCE_OPTIONS),
    ) -> list[str]:
        """The options that differ from an earlier run's, `but` some, in words."""
        before, now = _comparable(earlier), _comparable(self.options)
        open_yet = set()  # what is chosen when the run begins
        if now["cuts"] is None and (now["partition"] == "auto" or now["memory_budget"]):
            open_yet = {"cuts", "local_module_num"} if now["memory_budget"] else {"cuts"}
        return [
            f"{name} {before[name]}, now {value}"
            for name, value in now.items()
            if name in before.keys() - {*but, *open_yet} and before[name] != value
        ]

    def history_of(self, resumed: str | None, checkpoint: Checkpoint | None) -> list[dict]:
        """The metrics of the epochs done of a run that goes on here; of one from elsewhere none."""
        if checkpoint is None or not (
            is_same(resumed, self.checkpoint) or is_same(resumed, self.best)
        ):
            return []
        if checkpoint.history:
            return list(checkpoint.history)
        written = {m.get("epoch"): m for m in read_metrics(self.metrics)}  # of an earlier version
        unbroken, epoch = [], checkpoint.epoch
        needed = {"test_error", "samples_per_second", "peak_memory_bytes"}
        while needed <= {*written.get(epoch, ())}:
            unbroken.insert(0, written[epoch])
            epoch -= 1
        return unbroken

    def open(
        self,
        resumed: str | None,
        checkpoint: Checkpoint | None,
        device: str,
        parallel: dict | None = None,
    ) -> None:
        """Make the folder and begin to write, after a `checkpoint` that was `resumed`, if one was.

        `parallel` is how several processes share the work. Raises InputError if it cannot be
        written, CannotSave if the disk is full.
        """
        self.history = self.history_of(resumed, checkpoint)
        self._made_by = {"git": git_state(), "versions": versions()}  # of what runs now
        if parallel:
            self._made_by["parallel"] = parallel
        done = checkpoint.epoch if checkpoint is not None else 0
        start = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "epoch": done,
            "step": checkpoint.step if checkpoint is not None else 0,
            "command": sys.argv,
            "host": socket.gethostname(),
            "device": device,
            "threads": torch.get_num_threads(),
            **self._made_by,
        }
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            for path, state in self._states():
                if isinstance(state, InputError):
                    kept = path.rename(_free_name(path))
                    note(f"{state}; it is kept as {kept.name}")
            write_json(self.config, self.options)
            self._write_metrics()
            before = self.environment.read_text() if self.environment.exists() else ""
            write_text(self.environment, before + json.dumps(start) + "\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.board = Board(self.path, done + 1, note)

    def add_epoch(self, metrics: dict, rows: dict[str, Tensor]) -> None:
        """Append to metrics.jsonl and to TensorBoard, there with rows of reconstructed images.

        If they cannot be written, that is said once and the run goes on.
        """
        self.history.append(metrics)
        try:
            if self._metrics_are_whole:
                self._metrics_are_whole = False
                with self.metrics.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
                self._metrics_are_whole = True
            else:
                self._write_metrics()
        except OSError as error:
            self._tell_of_metrics(error)
        self.board.add_epoch(metrics)
        self.board.add_reconstructions(rows, metrics["epoch"])

    def _tell_of_metrics(self, error: OSError) -> None:
        if not self._told:
            note(
                f"{self.metrics} can't be written ({one_line(error)}): the run goes on, and "
                "checkpoint.pt has the metrics"
            )
        self._told = True

    def _write_metrics(self) -> None:
        write_text(self.metrics, "".join(json.dumps(m) + "\n" for m in self.history))
        self._metrics_are_whole = True

    def best_error(self) -> float:
        """Lowest test error of the epochs so far in percent; infinite before the first."""
        return min((m["test_error"] for m in self.history), default=math.inf)

    def add_summary(
        self, peak: PeakMemory, device: str, parameters: dict[str, int], data_bytes: int
    ) -> dict:
        """Write and return summary.json, close TensorBoard; errors in percent, memory in bytes.

        The peak is that of the steps since options for memory and speed were last changed. Raises
        OSError.
        """
        last = self.history[-1]
        summary = {
            "error_last": last["test_error"],
            "error_best": self.best_error(),
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
        earlier = _config_in(self.plan) or {}
        if changed := self._changed(earlier, but=NON_TRAINING_OPTIONS):
            raise InputError(f"{self.plan} is of other options ({'; '.join(changed)}): {ELSEWHERE}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.plan, plan | {"config": self.options})
        except OSError as error:
            raise InputError(f"cannot write {self.plan}: {one_line(error)}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A folder, for this process alone.

    It is made for that where it is not there, and unmade if nothing is put into it. The system
    gives up the lock of a process that dies: a stale lock file is in nobody's way.
    """
    lock = FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{path} is in use by {_owner(path)}: wait, or {ELSEWHERE}") from error
    except FileExistsError as error:
        raise InputError(f"{path} is a file, so it can't be the run folder: {ELSEWHERE}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise _cannot_write(path, error) from error
        note(f"{path} can't be locked here: see to it that no other run goes there")
    try:
        with contextlib.suppress(OSError):
            (path / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with contextlib.suppress(OSError):
            if [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def _cannot_write(path: Path, error: OSError) -> InputError | CannotSave:
    """A full disk is no fault of what was asked for."""
    kind = CannotSave if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    return kind(f"cannot write the run folder {path}: {one_line(error)}")


def _owner(path: Path) -> str:
    try:
        return (path / LOCK).read_text().strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def run_folder(options: argparse.Namespace) -> Path:
    """--output_dir, else the folder that a resumed run has, else one named by the options."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.resume not in (None, "auto"):
        kept_in = Path(options.resume).parent
        for folder in (kept_in, *kept_in.parents):
            checkpoints = folder / options.checkpoint
            if (folder / "config.json").exists() and checkpoints.resolve() == kept_in.resolve():
                return folder
    return Path("runs") / run_name(options)


def run_name(options: argparse.Namespace) -> str:
    """Name of a run folder: data, net, method, each option that is not the usual one, index."""
    said = {
        "dataset", "model", "layers", "local_module_num", "context_mode", "local_loss_mode",
        *NON_TRAINING_OPTIONS,
    }  # fmt: skip
    if options.balanced_memory:
        said.add("partition")
    if options.partition == "auto" or options.memory_budget or not options.cuts:
        said.add("cuts")  # which were chosen, not typed
    parts = [
        data_name(vars(options)), f"{options.model}{options.layers}",
        f"K{options.local_module_num}", options.context_mode, options.local_loss_mode,
        *unusual_options(vars(options), said),
    ]  # fmt: skip
    name = "_".join([*parts, *filter(None, [options.name]), f"no_{options.no}"])
    name = re.sub(r"[^\w.+-]", "-", name)  # one folder, whatever was typed
    if len(name.encode()) > LONGEST_NAME:
        kept = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
        name = f"{kept}_{zlib.crc32(name.encode()):08x}"
    return name


def unusual_options(options: dict[str, object], but: Collection[str]) -> list[str]:
    """`name-value` of each option that is not as published (`name` where it is on), `but` some.

    Where the paper has no value, the default is meant.
    """
    usual = build_parser().parse_args([])
    for deciding in ("dataset", "epochs", "cos_lr"):  # they decide the defaults of others
        setattr(usual, deciding, options.get(deciding, getattr(usual, deciding)))
    usual = vars(fill_in(usual)) | {"epochs": 160, "cos_lr": True}
    parts = []
    for option in dict.fromkeys([*usual, *options]):  # in one order, however they were kept
        value = options.get(option, usual.get(option))
        if option == "cuts" and value:
            value = f"{zlib.crc32(str(value).encode()):08x}"  # the cuts themselves are too long
        if option not in but and value != usual.get(option):
            values = value if isinstance(value, list) else [value]
            parts.append("-".join([option, *map(str, values)]) if value is not True else option)
    return parts


def read_metrics(path: Path) -> list[dict]:
    """What a metrics.jsonl has, one dict an epoch; a line that was cut off is left out."""
    metrics = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            metrics.append(json.loads(line))
    return [m for m in metrics if isinstance(m, dict)]


def _config_in(path: Path) -> dict | None:
    """The options that a summary.json or plan.json is of; None if it is not one."""
    config = (_json_in(path) or {}).get("config")
    return config if isinstance(config, dict) else None


def _json_in(path: Path) -> dict | None:
    """The object in a JSON file; None if there is none."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return contents if isinstance(contents, dict) else None


def _comparable(options: dict[str, object]) -> dict[str, object]:
    """Options as JSON gives them back, the data set by its full name."""
    named = {"dataset": data_name(options)} if "dataset" in options else {}
    return json.loads(json.dumps(options | named))


def holds(path: Path) -> bool:
    """Whether a file is there, and not empty."""
    return path.exists() and path.stat().st_size > 0


def _free_name(path: Path) -> Path:
    """`path` with .damaged, or .damaged-2 and so on, after it."""
    names = (f"{path.name}.damaged" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return next(other for other in map(path.with_name, names) if not other.exists())


def is_same(a: str | Path | None, b: Path | None) -> bool:
    """Whether both are there, and one file."""
    return None not in (a, b) and Path(a).exists() and b.exists() and b.samefile(a)
