"""A run's folder: config.json, metrics.jsonl, TensorBoard events, checkpoints, summary.json."""

import argparse
import contextlib
import json
import math
import platform
import statistics
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import torchvision
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import figures
from configs import InputError, one_line
from memory import MIB, PeakMemory
from models.checkpoint import Checkpoint, replacing
from options import (
    MEMORY_AND_SPEED,
    NOT_OF_THE_LEARNING,
    NOT_OF_THE_RUN,
    build_parser,
    data_name,
    fill_in,
)

FIRST_HPARAMS = ("context_mode", "layers", "local_loss_mode", "local_module_num", "seed")
"""TensorBoard shows five options unasked: these, not the first five of the alphabet."""


class RunFolder:
    """config.json, metrics.jsonl, TensorBoard events, checkpoints and summary.json of one run."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.options = {k: v for k, v in vars(options).items() if k not in NOT_OF_THE_RUN}
        self.checkpoint = path / options.checkpoint / "checkpoint.pt"
        self.best = path / options.checkpoint / "model_best.pt"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.json"
        self.summary = path / "summary.json"
        self.plan = path / "plan.json"

    def check_free(self, resumed: str | None, checkpoint: Checkpoint | None) -> None:
        """InputError if training here would overwrite or mix up an earlier run.

        Args:
            resumed, checkpoint: file and contents of what the run continues from, if it does. With
                `auto`, a first epoch that was cut off before its checkpoint is not in the way.
        """
        elsewhere = "choose another --output_dir, --name or --no"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, so it can't be the run folder: {elsewhere}")
        kept = [p for p in (self.summary, self.checkpoint, self.best, self.metrics) if _holds(p)]
        no_state = {self.summary, self.checkpoint}.isdisjoint(kept)
        cut_off = no_state and len(read_metrics(self.metrics)) < 2
        if not kept or (resumed == "auto" and cut_off):
            return
        what = f"{self.path} holds {'a finished' if self.summary in kept else 'an unfinished'} run"
        if not self.checkpoint.exists():
            raise InputError(f"{what} without a checkpoint to continue from: {elsewhere}")
        if resumed is None:
            how = "continue it with" if self.summary not in kept else "look at it with"
            option = "--resume" if self.summary not in kept else "--evaluate"
            raise InputError(f"{what}: {how} {option} {self.checkpoint}, or {elsewhere}")
        if not Path(resumed).samefile(self.checkpoint):
            raise InputError(f"{what} that {resumed} is not the state of: {elsewhere}")
        if changed := self._changed(checkpoint.options):
            raise InputError(f"{what} of other options ({'; '.join(changed)}): {elsewhere}")

    def is_finished(self) -> bool:
        """Whether a run with the same learning has left its summary here."""
        config = _config_in(self.summary)
        return config is not None and not self._changed(config)

    def is_planned(self) -> bool:
        """Whether the plan of a run with the same options is here."""
        config = _config_in(self.plan)
        return (
            config is not None
            and config.keys() == self.options.keys()
            and not self._changed(config, but=NOT_OF_THE_LEARNING)
        )

    def _changed(
        self,
        earlier: dict[str, object],
        but: Collection[str] = (*NOT_OF_THE_LEARNING, *MEMORY_AND_SPEED),
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

    def open(self, epochs_done: int) -> None:
        """Make the folder; of a run that goes on, keep the metrics of the epochs done.

        Raises InputError if it cannot be written.
        """
        kept = [m for m in read_metrics(self.metrics) if m["epoch"] <= epochs_done]
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.config, self.options)
            with replacing(self.metrics) as unfinished:
                unfinished.write_text("".join(json.dumps(m) + "\n" for m in kept))
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.path}: {one_line(error)}"
            ) from error
        self.events = SummaryWriter(str(self.path), purge_step=epochs_done + 1)

    def add_epoch(self, metrics: dict) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name == "epoch":
                continue
            if isinstance(value, list):
                scalars = {f"{name}/module_{index:02}": v for index, v in enumerate(value)}
            else:
                scalars = {f"epoch/{name}": value}
            for tag, scalar in scalars.items():
                if scalar is not None:
                    self.events.add_scalar(tag, scalar, metrics["epoch"])
        errors = {"test": metrics["test_errors"], "train": metrics["train_errors"]}
        if len(errors["test"]) > 1 and None not in errors["test"]:
            modules = range(len(errors["test"]))
            lines = [figures.Line("test", modules, errors["test"]),
                     figures.Line("train", modules, errors["train"], dashed=True)]  # fmt: skip
            drawn = figures.error_by_depth({"": lines}, f"epoch {metrics['epoch']}")
            self.events.add_figure("error_by_depth", drawn, metrics["epoch"])
        self.events.flush()

    def add_reconstructions(self, rows: dict[str, Tensor], epoch: int) -> None:
        """Rows of images (N, 3, H, W) in [0, 1] by their label, to TensorBoard; none: nothing."""
        if not rows:
            return
        title = f"epoch {epoch}: what the decoder at each cut makes of its features"
        self.events.add_figure("reconstructions", figures.image_rows(rows, title), epoch)
        self.events.flush()

    def add_hparams(self, summary: dict) -> None:
        """Options and how it ended to TensorBoard's HParams tab."""
        options = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in self.options.items()
            if name not in NOT_OF_THE_LEARNING
        }
        results = {
            "final/error_last": summary["error_last"],
            "final/error_best": summary["error_best"],
            "final/peak_memory_MiB": summary["peak_memory_bytes"] / MIB,
        }
        columns, start, end = hparams(options, results)
        plugin_data = columns.value[0].metadata.plugin_data
        described = HParamsPluginData.FromString(plugin_data.content)
        for option in described.experiment.hparam_infos:
            option.differs = option.name in FIRST_HPARAMS  # TensorBoard lists such ones first
        plugin_data.content = described.SerializeToString()
        for entry in (columns, start, end):
            self.events.file_writer.add_summary(entry)
        for name, value in results.items():
            self.events.add_scalar(name, value, summary["epochs"])

    def best_error(self) -> float:
        """Lowest test error of the epochs so far in percent; infinite before the first."""
        return min((m["test_error"] for m in read_metrics(self.metrics)), default=math.inf)

    def add_summary(
        self, peak: PeakMemory, device: str, parameters: dict[str, int], data_bytes: int
    ) -> dict:
        """Write and return summary.json, close the events; errors in percent, memory in bytes.

        The peak is that of the steps since the run was last continued, as the options are: those
        before may have had others for memory and speed.
        """
        metrics = read_metrics(self.metrics)
        summary = {
            "error_last": metrics[-1]["test_error"],
            "error_best": self.best_error(),
            "peak_memory_bytes": peak.bytes or metrics[-1]["peak_memory_bytes"],
            "peak_memory_how": peak.how,
            "data_on_device_bytes": data_bytes,
            "samples_per_second": statistics.harmonic_mean(
                m["samples_per_second"] for m in metrics
            ),
            "device": device,
            "parameters": parameters,
            "epochs": metrics[-1]["epoch"],
            "seed": self.options["seed"],
            "config": self.options,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
        }
        self.add_hparams(summary)
        self.events.close()
        write_json(self.summary, summary)
        return summary

    def add_plan(self, plan: dict) -> None:
        """Write plan.json: what `--dry_run --json` prints, and the options it is of.

        Raises InputError if it cannot be written or a plan of other options is there.
        """
        earlier = _config_in(self.plan) or {}
        if changed := self._changed(earlier, but=NOT_OF_THE_LEARNING):
            raise InputError(
                f"{self.plan} is of other options ({'; '.join(changed)}): choose another "
                "--output_dir, --name or --no"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.plan, plan | {"config": self.options})
        except OSError as error:
            raise InputError(f"cannot write {self.plan}: {one_line(error)}") from error


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
        *NOT_OF_THE_LEARNING,
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
    return "_".join([*parts, *filter(None, [options.name]), f"no_{options.no}"])


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


def write_json(path: Path, contents: dict) -> None:
    """Write a JSON file; an earlier one of that name stays until the new one is complete."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")


def _config_in(path: Path) -> dict | None:
    """The options that a summary.json or plan.json is of; None if it is not one."""
    try:
        config = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if isinstance(config, dict) else None


def _comparable(options: dict[str, object]) -> dict[str, object]:
    """Options as JSON gives them back, the data set by its full name."""
    named = {"dataset": data_name(options)} if "dataset" in options else {}
    return json.loads(json.dumps(options | named))


def _holds(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
