"""Where a run goes: its folder, and the name that its options give it."""

import argparse
import re
import zlib
from collections.abc import Collection
from pathlib import Path

from configs import DATASETS
from engine.options import NON_TRAINING_OPTIONS, build_parser, data_name, fill_in

LONGEST_NAME = 110
"""Bytes of a run folder's name."""

SHORT = {
    "epochs": "ep", "batch_size": "bs", "limit_per_class": "n", "warmup_epochs": "warmup",
    "aux_net_config": "head", "aux_net_widen": "widen", "aux_net_feature_dim": "dim",
    "h_reconstruct": "decoder",
}  # fmt: skip
"""Options that have a shorter name in that of a run folder."""


def run_folder(options: argparse.Namespace) -> Path:
    """Return --output_dir, else the folder of a resumed run, else one named by the options."""
    if options.output_dir:
        return Path(options.output_dir)
    if options.resume not in (None, "auto"):
        checkpoints = Path(options.resume).parent
        for folder in (checkpoints, *checkpoints.parents):
            expected = folder / options.checkpoint
            if (folder / "config.json").exists() and expected.resolve() == checkpoints.resolve():
                return folder
    return Path("runs") / run_name(options)


def run_name(options: argparse.Namespace) -> str:
    """Return a run folder's name: data, net, method, each option that is not as usual, index."""
    named = {
        "dataset", "model", "layers", "local_module_num", "context_mode", "local_loss_mode",
        *NON_TRAINING_OPTIONS,
    }  # fmt: skip
    if options.balanced_memory:
        named.add("partition")
    if options.partition == "auto" or options.memory_budget or not options.cuts:
        named.add("cuts")  # which were chosen, not typed
    unusual = (part.partition("-") for part in unusual_options(vars(options), named))
    parts = [
        data_name(vars(options)), f"{options.model}{options.layers}",
        f"K{options.local_module_num}", options.context_mode, options.local_loss_mode,
        *(SHORT.get(option, option) + dash + value for option, dash, value in unusual),
    ]  # fmt: skip
    name = "_".join([*parts, *filter(None, [options.name]), f"no_{options.no}"])
    name = re.sub(r"[^\w.+-]", "-", name)  # one folder, whatever was typed
    if len(name.encode()) > LONGEST_NAME:
        start = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
        name = f"{start}_{zlib.crc32(name.encode()):08x}"
    return name


def unusual_options(options: dict[str, object], ignoring: Collection[str]) -> list[str]:
    """Return `name-value` of each option that is not as published, or `name` of one that is on.

    Where the paper has no value, the default counts as published. A data set of the user's own that
    this process does not know has none.

    Args:
        ignoring: options that are left out.
    """
    usual = build_parser().parse_args([])
    for deciding in ("dataset", "epochs", "cos_lr"):  # they decide the defaults of others
        setattr(usual, deciding, options.get(deciding, getattr(usual, deciding)))
    is_known = usual.dataset in DATASETS
    usual = vars(fill_in(usual) if is_known else usual) | {"epochs": 160, "cos_lr": True}
    parts = []
    for option in dict.fromkeys([*usual, *options]):  # in one order, whatever file they are from
        value = options.get(option, usual.get(option))
        if option == "cuts" and value:
            value = f"{zlib.crc32(str(value).encode()):08x}"  # the cuts themselves are too long
        if option not in ignoring and value != usual.get(option):
            values = value if isinstance(value, list) else [value]
            parts.append("-".join([option, *map(str, values)]) if value is not True else option)
    return parts
