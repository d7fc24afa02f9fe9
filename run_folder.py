"""A run's folder: config.json, metrics.jsonl, TensorBoard events, checkpoints, summary.json."""

import argparse
import contextlib
import json
import math
import platform
import statistics
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from configs import InputError, one_line
from models.checkpoint import Checkpoint, replacing
from options import MEMORY_AND_SPEED, NOT_OF_THE_LEARNING, NOT_OF_THE_RUN, build_parser, fill_in


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

    def check_free(self, resumed: str | None, checkpoint: Checkpoint | None) -> None:
        """InputError if training here would overwrite or mix up an earlier run.

        Args:
            resumed, checkpoint: file and contents of what the run continues from, if it does.
        """
        elsewhere = "choose another --output_dir, --name or --no"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, so it can't be the run folder: {elsewhere}")
        kept = [p for p in (self.summary, self.checkpoint, self.best, self.metrics) if _holds(p)]
        if not kept:
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
        changed = [
            f"{name} {checkpoint.options.get(name)}, now {value}"
            for name, value in self.options.items()
            if name in checkpoint.options.keys() - {*NOT_OF_THE_LEARNING, *MEMORY_AND_SPEED}
            and checkpoint.options[name] != value
        ]
        if changed:
            raise InputError(f"{what} of other options ({'; '.join(changed)}): {elsewhere}")

    def open(self, epochs_done: int) -> None:
        """Make the folder; of a run that goes on, keep the metrics of the epochs done.

        Raises InputError if it cannot be written.
        """
        lines = [json.dumps(m) + "\n" for m in self.read_metrics() if m["epoch"] <= epochs_done]
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.config, self.options)
            with replacing(self.metrics) as unfinished:
                unfinished.write_text("".join(lines))
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.path}: {one_line(error)}"
            ) from error
        self.events = SummaryWriter(str(self.path), purge_step=epochs_done + 1)

    def read_metrics(self) -> list[dict]:
        """One dict an epoch; a line that was cut off is left out."""
        metrics = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                metrics.append(json.loads(line))
        return metrics

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
        self.events.flush()

    def best_error(self) -> float:
        """Lowest test error of the epochs so far in percent; infinite before the first."""
        return min((m["test_error"] for m in self.read_metrics()), default=math.inf)

    def add_summary(
        self, peak_memory_how: str, device: str, parameters: dict[str, int], data_bytes: int
    ) -> dict:
        """Close the events; write and return summary.json; errors in percent, memory in bytes."""
        self.events.close()
        metrics = self.read_metrics()
        summary = {
            "error_last": metrics[-1]["test_error"],
            "error_best": self.best_error(),
            "peak_memory_bytes": max(m["peak_memory_bytes"] for m in metrics),
            "peak_memory_how": peak_memory_how,
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
        write_json(self.summary, summary)
        return summary


def run_folder(options: argparse.Namespace) -> Path:
    """--output_dir, else the folder that a resumed run has, else one named by the options."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.resume:
        kept_in = Path(options.resume).parent
        for folder in (kept_in, *kept_in.parents):
            checkpoints = folder / options.checkpoint
            if (folder / "config.json").exists() and checkpoints.resolve() == kept_in.resolve():
                return folder
    return Path("runs") / run_name(options)


def run_name(options: argparse.Namespace) -> str:
    """Name of a run folder: data, net, method, each option that is not the usual one, index."""
    always = ["dataset", "model", "layers", "local_module_num", "context_mode", "local_loss_mode"]
    usual = build_parser().parse_args([])
    for deciding in ("dataset", "epochs", "cos_lr"):  # they decide the defaults of others
        setattr(usual, deciding, getattr(options, deciding))
    usual = vars(fill_in(usual)) | {"epochs": 160, "cos_lr": True}

    parts = [
        options.dataset, f"{options.model}{options.layers}", f"K{options.local_module_num}",
        options.context_mode, options.local_loss_mode,
    ]  # fmt: skip
    said = {*always, *NOT_OF_THE_LEARNING}
    if options.balanced_memory:
        said.add("partition")
    if options.partition == "auto" or options.memory_budget or not options.cuts:
        said.add("cuts")  # which were chosen, not typed
    for option, value in vars(options).items():
        if option == "cuts" and value:
            value = f"{zlib.crc32(str(value).encode()):08x}"  # the cuts themselves are too long
        if option not in said and value != usual[option]:
            values = value if isinstance(value, list) else [value]
            parts.append("-".join([option, *map(str, values)]) if value is not True else option)
    return "_".join([*parts, *filter(None, [options.name]), f"no_{options.no}"])


def write_json(path: Path, contents: dict) -> None:
    """Write a JSON file; an earlier one of that name stays until the new one is complete."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")


def _holds(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
