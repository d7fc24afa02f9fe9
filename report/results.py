"""What runs have left, read back: summaries and plans, and their statistics over seeds."""

import json
import math
import operator
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs import (
    DATASETS,
    Cut,
    InputError,
    balanced_cuts_are_equal,
    check_cuts,
    choose_cuts,
    one_line,
)
from engine.options import NON_TRAINING_OPTIONS, data_name
from engine.run_folder import read_metrics, unusual_options
from models.context import ContextMode

LOSSES = {"cross_entropy": "softmax", "contrast": "contrast"}
"""The paper's names of the local losses."""

END_TO_END = "end to end"

SPLITS = ("test", "train")


class Method(NamedTuple):
    """What the paper's tables and figures vary.

    `balanced` are cuts by --balanced_memory that are not the equal ones: the same cuts typed would
    train decoders with other loss scales.
    """

    dataset: str
    layers: int
    K: int
    mode: str
    loss: str
    decoders: bool
    cuts: tuple[Cut, ...]
    balanced: bool = False

    @property
    def label(self) -> str:
        """All of it but data, net and K, in words."""
        if self.K == 1:
            return END_TO_END
        return ", ".join([self.mode, self.kind])

    @property
    def kind(self) -> str:
        """Loss, decoders and unusual cuts in words; for K = 1 nothing of it matters."""
        if self.K == 1:
            return END_TO_END
        words = [LOSSES[self.loss] + (" with decoders" if self.decoders else "")]
        if self.balanced:
            words.append("balanced cuts")
        elif self.own_cuts:
            words.append("cuts " + " ".join(str(list(cut)) for cut in self.cuts))
        return ", ".join(words)

    @property
    def own_cuts(self) -> bool:
        """Whether they are not the equal ones."""
        return self.cuts != tuple(choose_cuts(self.layers, self.K, self.dataset))

    @property
    def order(self) -> tuple:
        """Sorts by K, then kind, then as the paper's tables do: R0, E, R1, R1E, R2, ..."""
        kind = (self.loss == "contrast", self.decoders, self.own_cuts, self.balanced, self.cuts)
        return self.K, *kind, ContextMode.parse(self.mode)


METHOD_OPTIONS = (
    "dataset", "model", "layers", "local_module_num", "context_mode", "local_loss_mode",
    "h_reconstruct", "balanced_memory", "partition", "memory_budget", "cuts", "seed",
)  # fmt: skip
"""Options that a Method, or the seed, stands for."""


class Setting(NamedTuple):
    """What runs must share to stand in one table: data, and the options that the paper fixes.

    `options` are those that are not as published, as they stand in a run folder's name.
    """

    dataset: str
    options: tuple[str, ...]

    def __str__(self) -> str:
        options = ", ".join(part.replace("-", " ", 1) for part in self.options)
        return f"{self.dataset}, {options or 'published options'}"


@dataclass(frozen=True)
class Record:
    """A summary.json or plan.json: errors in percent, None for a plan; memory in bytes."""

    folder: Path
    method: Method
    setting: Setting
    seed: int
    config: dict[str, Any]
    error_last: float | None
    error_best: float | None
    peak: float
    how: str

    @property
    def is_plan(self) -> bool:
        """Whether nothing has been trained."""
        return self.error_last is None

    def metrics(self) -> list[dict]:
        """metrics.jsonl, a dict an epoch; without the lines that are not such."""
        return [
            metrics
            for metrics in read_metrics(self.folder / "metrics.jsonl")
            if isinstance(metrics.get("epoch"), int)
            and _is_error(metrics.get("test_error"))
            and all(_are_errors(metrics.get(f"{s}_errors"), self.method.K) for s in SPLITS)
        ]


UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
"""What `read_record` may raise on a file that is no summary or plan."""


def read_records(roots: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Every summary.json and plan.json below `roots`, and notes on what could not be used.

    Of two runs with one method, setting and seed the first by name counts.

    Raises InputError if a root is no folder.
    """
    records: dict[tuple, Record] = {}
    notes = []
    for root in roots:
        if not root.is_dir():
            raise InputError(f"there is no folder {root}")
        for path in sorted([*root.rglob("summary.json"), *root.rglob("plan.json")]):
            try:
                record = read_record(path)
            except UNREADABLE as error:
                notes.append(f"{path} is left out: {type(error).__name__}: {one_line(error)}")
                continue
            key = (record.method, record.setting, record.seed, record.is_plan)
            first = records.setdefault(key, record)
            if first is not record and not first.folder.samefile(record.folder):
                notes.append(f"{path} is left out: {first.folder} is the same run")
        for path in sorted(root.rglob("metrics.jsonl")):
            if not path.with_name("summary.json").exists():
                epochs = len(read_metrics(path))
                notes.append(f"{path.parent} is not finished (epochs done: {epochs})")
    return list(records.values()), list(dict.fromkeys(notes))


def read_record(path: Path) -> Record:
    """A summary.json or plan.json.

    Raises one of UNREADABLE if it is not one.
    """
    contents = json.loads(path.read_text())
    config = contents["config"]
    layers, K = operator.index(config["layers"]), operator.index(config["local_module_num"])
    if config["dataset"] not in DATASETS:
        raise ValueError(f"unknown data set {config['dataset']!r}")
    dataset = data_name(config)
    balanced = bool(config.get("balanced_memory"))
    cuts = config.get("cuts") or choose_cuts(layers, K, dataset, balanced)
    check_cuts(cuts, layers, K)
    method = Method(
        dataset, layers, K, config["context_mode"], config["local_loss_mode"],
        bool(config.get("h_reconstruct")), tuple(tuple(cut) for cut in cuts),
        balanced and not balanced_cuts_are_equal(layers, K, dataset),
    )  # fmt: skip
    if K == 1:
        method = method._replace(mode="R0", loss="cross_entropy", decoders=False, balanced=False)
    method.order, method.label  # noqa: B018  # an unknown mode or loss shows here
    options = unusual_options(config, {*METHOD_OPTIONS, *NON_TRAINING_OPTIONS})
    trained = path.name == "summary.json"
    epochs = read_metrics(path.with_name("metrics.jsonl"))
    if trained and epochs and epochs[0].get("epoch") != 1:
        raise ValueError(
            f"its epochs begin with {epochs[0].get('epoch')}: it continues another run"
        )
    how = contents["peak_memory_how"] if trained else "planned, by train.py --dry_run"
    return Record(
        folder=path.parent,
        method=method,
        setting=Setting(dataset, tuple(options)),
        seed=operator.index(config["seed"]),
        config=config,
        error_last=_error(contents["error_last"]) if trained else None,
        error_best=_error(contents["error_best"]) if trained else None,
        peak=_bytes(contents["peak_memory_bytes" if trained else "peak_bytes"]),
        how=str(how),
    )


def _bytes(value: object) -> float:
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _error(value: object) -> float:
    if not _is_error(value):
        raise ValueError(f"{value!r} is no error rate in percent")
    return value


def _is_error(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100


def _are_errors(values: object, K: int) -> bool:
    """Whether there is one for each of K modules, or None for its head."""
    return (
        isinstance(values, list)
        and len(values) == K
        and all(value is None or _is_error(value) for value in values)
    )


# ---------------------------------------------------------------------------------------------
# Statistics


class Statistic(NamedTuple):
    """Mean and sample standard deviation of n runs; of one run the latter is None."""

    mean: float
    std: float | None
    n: int

    @property
    def spread(self) -> float:
        """`std` for a figure: nan where there is none."""
        return math.nan if self.std is None else self.std

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread} (n={self.n})"


def statistic(values: list[float]) -> Statistic | None:
    """Of at least one value; None of none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Statistic(statistics.fmean(values), std, len(values))


@dataclass(frozen=True)
class Cell:
    """One method in one setting, over its seeds.

    Attributes:
        error_last, error_best: percent; None where no run is finished.
        peak: bytes, the most of all seeds; measured where a run is finished, else planned.
        how: how it was got.
    """

    error_last: Statistic | None
    error_best: Statistic | None
    peak: float
    how: str


def make_cell(records: list[Record]) -> Cell | None:
    """The cell of records that differ in their seed only; None of no records."""
    if not records:
        return None
    trained = [r for r in records if not r.is_plan]
    most = max(trained or records, key=lambda record: record.peak)
    return Cell(
        error_last=statistic([r.error_last for r in trained]),
        error_best=statistic([r.error_best for r in trained]),
        peak=most.peak,
        how=most.how,
    )
