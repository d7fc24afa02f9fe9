"""What runs leave in their folders, read into a DataFrame."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pandas as pd

from configs import InputError, choose_cuts, one_line, published_loss_scale
from engine.options import NON_TRAINING_OPTIONS, build_parser, data_name, fill_in
from engine.run_folder import read_metrics
from engine.run_name import unusual_options
from models.context import ContextMode

END_TO_END = "end to end"

KIND_OPTIONS = (
    "aux_net_config", "aux_net_depth", "aux_net_taper", "momentum_aux", "momentum_aux_mix",
    "overlap", "overlap_weight", "consistency", "patch_decoder", "loss_scale", "loss_scale_rule",
)  # fmt: skip
"""Options that `kind` names where they are not as by default."""

METHOD_OPTIONS = (
    "dataset", "layers", "local_module_num", "context_mode", "local_loss_mode",
    "h_reconstruct", "balanced_memory", "partition", "memory_budget", "cuts", "seed",
    *KIND_OPTIONS,
)  # fmt: skip
"""Options that SETUP has columns for, and the seed."""

SETUP = ["setting", "dataset", "layers", "K", "mode", "kind"]
"""Columns for all but the seed of a run:

    setting: data, and options with unpublished values, such as "digits, epochs 8, lr 0.1".
    dataset: `folder-NAME` for images of the user's own.
    mode: context mode; "end to end" for K = 1.
    kind: loss, decoders, what else makes the method, and cuts, such as "softmax with decoders,
        2c2f, balanced cuts"; "" for K = 1.
"""

METRICS = {"epoch", "test_error", "test_errors", "train_errors"}
"""What is read of each line of metrics.jsonl; lines without it are left out."""

IDENTITY = [*SETUP, "seed", "is_plan"]
"""Columns in which no two runs are the same."""

COLUMNS = [
    *IDENTITY, "error_last", "error_best", "peak_memory_bytes", "peak_memory_how",
    "metrics", "config", "parameters", "folder",
]  # fmt: skip
"""Columns of runs. Errors are in percent, NaN for plans; metrics are a list, config is a dict."""


def read_runs(roots: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Read every summary.json and plan.json below `roots`.

    Names in them need not be in this process's tables: a script may have added them to its own.

    Returns a row for each run, in the paper's order, and notes on what was left out. Of two runs
    with the same setup and seed the first by name counts.

    Raises InputError if a root is not a folder.
    """
    for root in roots:
        if not root.is_dir():
            raise InputError(f"there is no folder {root}")
    paths = [path for root in roots for path in sorted(root.rglob("*.json*"))]
    runs: dict[tuple, dict] = {}
    notes = []
    for path in {path.resolve(): path for path in paths}.values():
        try:
            if path.name in ("summary.json", "plan.json"):
                run = read_run(path)
                first = runs.setdefault(tuple(run[name] for name in IDENTITY), run)
                if first is not run:
                    notes.append(f"{path} is left out: {first['folder']} is the same run")
            elif path.name == "metrics.jsonl" and not path.with_name("summary.json").exists():
                epochs = len(read_metrics(path))
                notes.append(f"{path.parent} is not finished (epochs done: {epochs})")
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            notes.append(f"{path} is left out: {type(error).__name__}: {one_line(error)}")
    frame = pd.DataFrame(sorted(runs.values(), key=_order), columns=COLUMNS)
    return frame.astype({"error_last": float, "error_best": float, "is_plan": bool}), notes


def read_run(path: Path) -> dict[str, Any]:
    """Return the COLUMNS of a plan.json, or of a summary.json and the metrics.jsonl beside it.

    What it raises for other files, `read_runs` catches.
    """
    contents = json.loads(path.read_text())
    is_plan = path.name == "plan.json"
    if is_plan:
        how = "planned, by train.py --dry_run"
        contents |= {"peak_memory_bytes": contents["peak_bytes"], "peak_memory_how": how}
    metrics = [] if is_plan else read_metrics(path.with_name("metrics.jsonl"))
    metrics = [epoch for epoch in metrics if epoch.keys() >= METRICS]
    if metrics and metrics[0]["epoch"] != 1:
        raise ValueError(f"its epochs begin with {metrics[0]['epoch']}: it continues another run")
    return read_setup(contents["config"]) | {
        "seed": int(contents["config"]["seed"]),
        "is_plan": is_plan,
        "error_last": None if is_plan else float(contents["error_last"]),
        "error_best": None if is_plan else float(contents["error_best"]),
        "peak_memory_bytes": int(contents["peak_memory_bytes"]),
        "peak_memory_how": contents["peak_memory_how"],
        "metrics": metrics,
        "config": contents["config"],
        "parameters": contents.get("parameters", {}),
        "folder": path.parent,
    }


def read_setup(config: dict[str, Any]) -> dict[str, Any]:
    """Return the columns SETUP of a run with these options."""
    layers, K, dataset = config["layers"], config["local_module_num"], data_name(config)
    options = unusual_options(config, {*METHOD_OPTIONS, *NON_TRAINING_OPTIONS})
    options = [option.replace("-", " ", 1) for option in options] or ["published options"]
    kind = method_kind(config)
    # The same cuts by --cuts are another kind: with decoders they have other loss scales.
    balanced = config["balanced_memory"]
    cuts = config["cuts"] or choose_cuts(layers, K, dataset, balanced)
    if list(map(tuple, cuts)) != choose_cuts(layers, K, dataset):
        kind += ", balanced cuts" if balanced else f", cuts {' '.join(map(str, cuts))}"
    ContextMode.parse(config["context_mode"], ascii_uppercase)  # raises InputError if it is none
    mode, kind = (END_TO_END, "") if K == 1 else (config["context_mode"], kind)
    values = (", ".join([dataset, *options]), dataset, layers, K, mode, kind)
    return dict(zip(SETUP, values, strict=True))


def method_kind(config: dict[str, Any]) -> str:
    """Return the `kind` of a run with these options, without its cuts.

    Options of KIND_OPTIONS that are missing, as in files of earlier versions, are at the defaults.
    """
    loss = config["local_loss_mode"]
    kind = "softmax" if loss == "cross_entropy" else loss  # as the paper calls it
    if config["h_reconstruct"]:
        kind += " with decoders"
    usual = build_parser().parse_args([])
    for deciding in ("aux_net_config", "overlap"):  # they decide the defaults of others
        setattr(usual, deciding, config.get(deciding, getattr(usual, deciding)))
    usual = vars(fill_in(usual)) | {
        "aux_net_config": "1c2f", "overlap": 0, "loss_scale": _usual_loss_scale(config),
        "momentum_aux_mix": "fixed",
    }  # fmt: skip
    for option in KIND_OPTIONS:
        value = config.get(option)
        if value is None or value == usual[option]:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words = [f"{x:g}" if isinstance(x, float) else str(x) for x in values]
        kind += ", " + " ".join(words if option == "aux_net_config" else [option, *words])
    return kind


def _usual_loss_scale(config: dict[str, Any]) -> list[float] | None:
    """Return the published loss scale; images of the user's own have that of CIFAR-10."""
    dataset = "cifar10" if config["dataset"] == "folder" else config["dataset"]
    net = config["layers"], config["local_module_num"], dataset, config["balanced_memory"]
    try:
        return list(published_loss_scale(*net))
    except InputError:
        return None


def _order(run: dict[str, Any]) -> tuple:
    """Sort key: published options and softmax first, modes in the paper's order R0, E, R1, R1E."""
    is_unpublished = not run["setting"].endswith("published options")
    is_not_softmax = not run["kind"].startswith("softmax")
    mode = ContextMode.parse(run["config"]["context_mode"], ascii_uppercase)
    setting = (run["dataset"], is_unpublished, run["setting"], run["layers"])
    return *setting, run["K"], is_not_softmax, run["kind"], mode, run["seed"]
