"""The command line of train.py: parse it, check it, fill in the defaults that depend on others.

Importing this module imports no torch.
"""

import argparse
import difflib
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs import (
    AUGLOCAL,
    DATASETS,
    LOSS_SCALE_RULES,
    METHODS,
    MOMENTUM_MIXES,
    OVERLAP_WEIGHT,
    Cut,
    InputError,
    balanced_cuts_are_equal,
)

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

LOSS_SCALE_PARTS = ("ixx_1", "ixy_1", "ixx_2", "ixy_2")
"""Options for the single numbers of `loss_scale`, named as in the authors' release."""


PRESET_PARTS = {
    "aux_net_config": ("aux_net_depth", "aux_net_taper"),
    "h_reconstruct": ("loss_scale", "loss_scale_rule", "patch_decoder"),
    "overlap": ("overlap_weight",),
}
"""Option -> those of a --method that go when it is typed with another value."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option for a typo."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        typo = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        options = {option.lstrip("-"): option for option in self._option_string_actions}
        near = typo and difflib.get_close_matches(typo[1].lstrip("-"), options, n=1, cutoff=0.7)
        hint = f" (did you mean {options[near[0]]}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}{hint}\n")

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but refuse `--option=--`, of which some versions make []."""
        earlier = getattr(namespace, "loss_scale", None)
        args = self._with_method(sys.argv[1:] if args is None else args)
        for argument in args:
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument[:-3]}: expected one argument")
        options, unknown = super().parse_known_args(args, namespace)
        self._join_loss_scale(options, earlier)
        vars(options).pop("method", None)
        return options, unknown

    def _with_method(self, args: Sequence[str]) -> list[str]:
        """Return the arguments with the options of --method in front, where typed ones let them."""
        names = [word.partition("=")[0].lstrip("-") for word in args if word.startswith("--")]
        if "method" not in names or "--method" not in self._option_string_actions:
            return list(args)
        typed, _ = super().parse_known_args(args)
        preset = dict(METHODS[typed.method])
        for name, parts in PRESET_PARTS.items():
            if name in names and preset.get(name) != getattr(typed, name):
                preset = {option: x for option, x in preset.items() if option not in parts}
        if set(LOSS_SCALE_PARTS) & set(names):
            preset.pop("loss_scale", None)
        return [*as_arguments(preset, f"--method {typed.method} has"), *args]

    def _join_loss_scale(self, options: argparse.Namespace, earlier: list[float] | None) -> None:
        """Replace the four single numbers by `loss_scale`; `earlier` is one that was not typed."""
        parts = [vars(options).pop(name, None) for name in LOSS_SCALE_PARTS]
        if parts == [None] * 4:
            return
        names = " ".join(f"--{name}" for name in LOSS_SCALE_PARTS)
        if None in parts:
            self.error(f"{names} are one loss scale: give all four or none")
        if options.loss_scale is not earlier:
            self.error(f"{names} are another spelling of --loss_scale: give one of the two")
        options.loss_scale = parts


class ModuleIndices(argparse.Action):
    """Joins ranges of modules to a sorted list of their indices."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Set the option to the list."""
        setattr(namespace, self.dest, sorted({index for modules in values for index in modules}))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to the help text, except None: there the help text says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default is not None else action.help


# ---------------------------------------------------------------------------------------------
# Types of options: they convert text that was typed, or raise ArgumentTypeError


def boolean(text: str) -> bool:
    """Return the value of `True` or `False`, in upper or lower case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def integer_between(at_least: int, at_most: int = 10**9) -> Callable[[str], int]:
    """Return a type for integers from `at_least` to `at_most`, both included."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not at_least <= int(text) <= at_most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of {at_least} to {at_most}"
            )
        return int(text)

    return convert


def positive(text: str) -> float:
    """Return a number above 0 and at most 10^6."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 (and 1000000 at most)")
    return value


def fraction(text: str) -> float:
    """Return a number above 0 and below 1."""
    value = positive(text)
    if not value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def path(text: str) -> str:
    """Return the name of a file or folder, with `~` replaced by the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("no name has a NUL in it")
    return os.path.expanduser(text)


def matching(pattern: str, otherwise: str) -> Callable[[str], str]:
    """Return a type for text that matches a pattern; `otherwise` describes other text."""

    def convert(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is {otherwise}")
        return text

    return convert


def cut(text: str) -> Cut:
    """Return (stage, block) of `STAGE,BLOCK`."""
    stage, block = matching("[0-9]{1,6},[0-9]{1,6}", "no STAGE,BLOCK such as 1,4")(text).split(",")
    return int(stage), int(block)


def module_range(text: str) -> range:
    """Return the modules of `FIRST-LAST`, or of one number."""
    match = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    modules = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
    if not modules:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of modules such as 0-7")
    return modules


# ---------------------------------------------------------------------------------------------
# The options


# fmt: off
def build_parser() -> Parser:
    """Return the parser; a default is None where the data set or another option decides it."""
    parser = Parser(
        description="Greedy local learning with context supply (ContSup, arXiv 2312.07636).",
        epilog="A BOOL is True or False; without it the option is True.",
        formatter_class=HelpFormatter, allow_abbrev=False,
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": boolean, "metavar": "BOOL"}
    on = switch | {"default": True}
    off = {"action": "store_const", "const": False, "default": argparse.SUPPRESS}
    label = matching(
        r"[\w.+-]{1,64}", "no part of a folder's name (letters, digits and _ . + -, 64 at most)"
    )

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=list(METHODS),
        help="options of a published method; those that are typed win (default: contsup): "
        + "; ".join(f"{name}: " + ", ".join(f"{option} {value}" for option, value in preset.items())
                    for name, preset in METHODS.items()))
    add("--model", default="resnet", metavar="NAME", help="backbone; an entry of BACKBONES")
    add("--layers", type=integer_between(1, 100_000), default=32, metavar="N", help="depth, 6n+2")
    add("--local_module_num", type=integer_between(1), metavar="K",
        help="number of modules; 1 trains end to end (default: 1, or as --cuts or --memory_budget)")
    add("--local_loss_mode", default="contrast", metavar="LOSS",
        help="loss of the auxiliary heads: contrast or cross_entropy")
    add("--context_mode", default="E", metavar="MODE",
        help="context of a module: R0 none, Rn the inputs of n modules, E the image, RnE both")
    add("--balanced_memory", **switch, help="published memory-balanced cuts (--partition balanced)")
    add("--h_reconstruct", **switch, help="train a decoder at each cut to reconstruct the image")
    add("--loss_scale", nargs=4, type=float, metavar=("IXX_1", "IXY_1", "IXX_2", "IXY_2"),
        help="weights of reconstruction (IXX) and task loss (IXY) in the first and the last module "
        "that has a decoder (default: as published)")
    for name in LOSS_SCALE_PARTS:
        add(f"--{name}", type=float, metavar="W", default=argparse.SUPPRESS,
            help="one of the four numbers of --loss_scale; needs the other three")
    add("--loss_scale_rule", choices=LOSS_SCALE_RULES, default="module",
        help="what the weights between go by: a module's index, or (stage) the next unit's stage")
    add("--patch_decoder", **switch, help="a decoder for each quarter of the image")
    add("--aux_net_config", default="1c2f", metavar="HEAD",
        help="auxiliary head: AcBf for A convolutions and B linear layers, mlp-sr, mlp-sr-512, "
        "predsim, or auglocal")
    add("--aux_net_depth", type=integer_between(1, 100_000), metavar="D",
        help="residual blocks of the head auglocal after the first module (default: 6)")
    add("--aux_net_taper", type=share, metavar="TAU",
        help="AugLocal's pyramid coefficient: at the last cut this part of all blocks but one is "
        "left out (default: 0.5)")
    add("--aux_net_widen", type=positive, default=1.0, metavar="W",
        help="width factor of context encoders, decoders and the heads AcBf and mlp-sr*")
    add("--aux_net_feature_dim", type=integer_between(1, 65536), default=128, metavar="F",
        help="width of a head's hidden linear layers and of its embedding")
    add("--momentum_aux", type=share, metavar="M",
        help="before each auxiliary head put two blocks like the next module's first: one trained, "
        "one a moving average of it with this decay (default: none)")
    add("--momentum_aux_mix", choices=MOMENTUM_MIXES,
        help="add the two, or train their proportion (default: fixed)")
    add("--overlap", type=integer_between(0, 1), default=0, metavar="N",
        help="1: a module also trains on the loss of the module after it")
    add("--overlap_weight", type=share, metavar="W",
        help="weight of that loss; a module's own has 1-W (default: 0.999)")
    add("--consistency", type=share, metavar="A",
        help="all losses are A cross entropy + (1-A) KL to the prediction of the module before "
        "(default: cross entropy)")
    add("--droprate", type=float, default=0.0, metavar="P", help="dropout in the residual blocks")

    add = parser.add_argument_group("memory").add_argument
    add("--context_group", type=integer_between(0), default=16, metavar="C",
        help="channels of a context encoder to compute, and recompute, at a time; 0: all, kept")
    add("--recompute", **switch,
        help="keep only the inputs of a module's blocks; recompute the rest in the backward pass")
    add("--partition", choices=["equal", "balanced", "auto"],
        help="equal or published balanced cuts, or (auto) those with the least predicted peak in "
        "float32 (default: equal; auto with --memory_budget)")
    add("--memory_budget", type=positive, metavar="GIB",
        help="choose the fewest modules with a predicted peak of at most GIB (default: no limit)")
    add("--cuts", type=cut, nargs="*", metavar="S,B",
        help="cuts, each as the stage and block before it (default: as --partition)")
    add("--dry_run", **switch, help="print predicted memory and FLOPs of a training step, and exit")
    add("--json", **switch, help="print the plan of --dry_run as a JSON object")
    add("--save_plan", **switch, help="write the plan of --dry_run to plan.json in the run folder")

    add = parser.add_argument_group("speed").add_argument
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="autocast to bfloat16, or to float16 with loss scaling; losses are in float32")
    add("--compile", **switch,
        help="compile each module's training step; dropout masks differ from those of eager mode")
    add("--channels_last", **on, help="memory format of images, weights and features")
    add("--no-channels_last", dest="channels_last", **off, help="the same as --channels_last False")
    add("--cudnn_benchmark", **switch,
        help="on CUDA, use the fastest algorithms of cuDNN, which may need more memory")
    add("--tf32", **switch, help="on CUDA, allow TF32 in float32 convolutions and matrix products")
    add("--data_on_device", **switch,
        help="keep all images on the device, as bytes; the reported peak does not include them")
    add("--keep_heap", **on,
        help="on the CPU, keep freed memory in the process, which makes steps faster")

    add = parser.add_argument_group("parallel").add_argument
    add("--parallel", choices=["modules", "data"],
        help="train in the processes of torchrun: each has some of the modules, or (data) a part "
        "of each batch, which needs --sync_bn for the same results (default: one process)")
    add("--module_ranges", type=module_range, nargs="+", metavar="A-B",
        help="modules of each process, such as 0-7 8-15 (default: fastest, as measured at start)")
    add("--sync_bn", **switch, help="with --parallel data, BatchNorm over all of the batch")
    add("--nproc", type=integer_between(1, 100_000), nargs="+", metavar="P",
        help="processes to plan for with --dry_run --parallel modules (default: 1, 2, 4, ... K)")
    add("--device_tflops", type=positive, metavar="T",
        help="for this plan, speed of a device in 10^12 FLOPs per second (default: 5)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(DATASETS), default="cifar10", help="folder: images of your own")
    add("--data_dir", type=path, default="data", metavar="DIR",
        help="where the data are or are downloaded to; for --dataset folder it contains "
        "train/<class>/* and test/<class>/*, and its name appears in reports")
    add("--image_size", type=integer_between(8, 1024), metavar="S",
        help="size to which images of your own are resized (default: 32)")
    add("--limit_per_class", type=integer_between(1), metavar="N",
        help="train on the first N images of each class (default: all)")
    add("--limit_test", type=integer_between(1), metavar="N",
        help="evaluate on N test images, the first of each class in equal numbers (default: all)")
    add("--val_fraction", type=fraction, metavar="F",
        help="hold out this part of the training images, stratified, by --seed; the best epoch is "
        "then chosen on them (default: none held out; it is chosen on the test images)")
    add("--no-augment", **switch, help="no random crops and flips")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer_between(1), default=160, metavar="N", help="number of epochs")
    add("--batch_size", type=integer_between(2), metavar="N",
        help="samples per batch (default: 1024; 128 for stl10 and digits)")
    add("--lr", type=positive, metavar="LR",
        help="peak learning rate (default: 0.8; 0.1 for stl10 and digits)")
    add("--cos_lr", **on,
        help="cosine schedule; if False, divide the rate by 10 after 1/2 and 3/4 of the epochs")
    add("--no-cos_lr", dest="cos_lr", **off, help="the same as --cos_lr False")
    add("--warmup_epochs", type=integer_between(0), metavar="N",
        help="epochs in which the rate rises from 0.01 (default: epochs/16; 0 without --cos_lr)")
    add("--train_modules", type=module_range, nargs="+", action=ModuleIndices, metavar="A-B",
        help="train these modules alone, such as 4-7; the others stay as they are in the "
        "checkpoint of --resume, or untrained if there is none (default: all)")
    add("--seed", type=integer_between(0), default=0, metavar="N", help="seed of all randomness")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N",
        type=matching("auto|cpu|cuda(:[0-9]{1,3})?", "none of auto, cpu, cuda, cuda:N"))
    add("--output_dir", type=path, metavar="DIR", help="run folder (default: runs/<options>)")
    add("--name", type=label, help="part of the run folder's name (default: none)")
    add("--no", type=label, default="1", metavar="INDEX", help="last part of that name")
    add("--checkpoint", type=path, default=".", metavar="DIR",
        help="folder of checkpoint.pt and model_best.pt, relative to the run folder")
    add("--checkpoint_every", type=integer_between(1), metavar="N",
        help="also save a checkpoint every N steps (default: only after each epoch)")
    add("--resume", type=lambda text: path(text) if text else None, metavar="CKPT",
        help="continue from a checkpoint, also of the authors' release; options not given are "
        "those of the checkpoint. auto: the newest in the run folder, if there is one")
    add("--evaluate", type=path, metavar="CKPT",
        help="print the test error of a checkpoint, also of the authors' release, and exit")
    add("--print-freq", "-p", type=integer_between(1), default=10, metavar="N",
        help="print progress, and check that losses are finite, every N steps")
    add("--deterministic", **switch,
        help="same bits in every run on this machine; slower, and one thread on the CPU")
    add("--detect_anomaly", **switch,
        help="torch.autograd's anomaly mode: stop where a backward pass makes a NaN; slower")
    return parser
# fmt: on


NETWORK_OPTIONS = (
    "model", "layers", "local_module_num", "context_mode", "local_loss_mode", "dataset",
    "image_size", "balanced_memory", "h_reconstruct", "loss_scale", "aux_net_config",
    "aux_net_widen", "aux_net_feature_dim", "droprate", "context_group", "recompute", "cuts", "amp",
    "train_modules", "aux_net_depth", "aux_net_taper", "momentum_aux", "momentum_aux_mix",
    "overlap", "overlap_weight", "consistency", "patch_decoder", "loss_scale_rule",
)  # fmt: skip
"""Options that are arguments of `build_network`."""

INVOCATION_OPTIONS = (
    "resume", "evaluate", "dry_run", "json", "save_plan", "output_dir", "device", "print_freq",
    "detect_anomaly", "parallel", "module_ranges", "sync_bn", "nproc", "device_tflops",
)  # fmt: skip
"""Options of one call of train.py: where and how to run. Checkpoints do not contain them."""

NON_TRAINING_OPTIONS = (
    *INVOCATION_OPTIONS, "data_dir", "checkpoint", "checkpoint_every", "name", "no",
)  # fmt: skip
"""Options that have no influence on what is learned."""

PERFORMANCE_OPTIONS = (
    "context_group", "recompute", "compile", "channels_last", "cudnn_benchmark", "data_on_device",
    "keep_heap", "deterministic",
)  # fmt: skip
"""Options that a resumed run may change. They change memory, speed and rounding, and `compile` also
changes dropout masks."""

BATCH_OPTIONS = ("seed", "dataset", "batch_size", "image_size", "limit_per_class", "val_fraction")
"""Options that decide which images are in each batch of an epoch."""

DATA_OPTIONS = ("dataset", "image_size", "limit_per_class", "limit_test", "val_fraction")
"""Options that decide which images are read, with `seed` where there is a `val_fraction`."""

REQUIRED = {
    "json": {"dry_run": True},
    "save_plan": {"dry_run": True},
    "module_ranges": {"parallel": "modules"},
    "sync_bn": {"parallel": "data"},
    "aux_net_depth": {"aux_net_config": "auglocal"},
    "aux_net_taper": {"aux_net_config": "auglocal"},
    "overlap_weight": {"overlap": 1},
    "nproc": {"parallel": "modules", "dry_run": True},
    "device_tflops": {"parallel": "modules", "dry_run": True},
}
"""Option -> the values that other options must have where it is given."""

EXCLUSIVE = (
    ("resume", "evaluate"), ("dry_run", "evaluate"), ("deterministic", "cudnn_benchmark"),
    ("detect_anomaly", "compile"), ("detect_anomaly", "parallel"),
)  # fmt: skip
"""Pairs of options that exclude each other."""

EXCLUSIVE_TYPED = (
    ("memory_budget", "local_module_num"),
    ("cuts", "partition"), ("cuts", "balanced_memory"), ("cuts", "memory_budget"),
)  # fmt: skip
"""Pairs that exclude each other when typed. A checkpoint may have both: one led to the other."""


def data_name(options: Mapping[str, object]) -> str:
    """Return the name of the data set; for `folder`, with the name of the user's folder."""
    if options["dataset"] != "folder":
        return str(options["dataset"])
    folder = re.sub(r"[^\w.+-]", "-", Path(str(options.get("data_dir", ""))).name)
    return "-".join(filter(None, ["folder", folder]))


# ---------------------------------------------------------------------------------------------
# Parse, check, fill in


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Return the options as typed, with None where `complete_options` finds the default.

    Raises InputError for options that contradict each other; exits for others that are wrong.
    """
    options = build_parser().parse_args(argv)
    _check_typed(options)
    return options


def complete_options(
    argv: list[str], checkpoint_options: Mapping[str, object] | None = None
) -> argparse.Namespace:
    """Return all options: those typed, else those of a checkpoint, else the defaults.

    Args:
        argv: the command line, which names the checkpoint if there is one.
        checkpoint_options: empty or None for a checkpoint of the authors' release.
    Raises:
        InputError: options contradict each other, or the checkpoint's are not those of a run.
    """
    typed = options = _rename_equal_cuts(parse_options(argv))
    if checkpoint_options:
        for name in ("partition", "memory_budget", "balanced_memory"):
            value = getattr(typed, name)
            if value and value != checkpoint_options.get(name):
                raise InputError(f"the checkpoint has cuts of its own: leave --{name} out")
        if any(word.partition("=")[0] == "--method" for word in argv):  # as a whole, not in parts
            of_methods = {name for preset in METHODS.values() for name in preset}
            kept = {k: v for k, v in checkpoint_options.items() if k not in of_methods}
            checkpoint_options = kept
        parser = build_parser()
        options = parser.parse_args(argv, parser.parse_args(as_arguments(checkpoint_options)))
        if "checkpoint" in checkpoint_options and typed.checkpoint == ".":
            _check_checkpoint_folder(options)
    _check_exclusive(options, EXCLUSIVE)
    if options.overlap and options.parallel == "modules":
        raise InputError(
            "--overlap needs the gradients of the next module, which --parallel modules does not "
            "send back: leave one of them out"
        )
    return fill_in(_rename_equal_cuts(options))


def read_options(
    argv: list[str], checkpoint: "Checkpoint | None" = None
) -> tuple[argparse.Namespace, "Checkpoint | None"]:
    """Return all options, and the checkpoint that they name.

    Args:
        argv: the command line.
        checkpoint: the contents of that file, if it was read already.
    Raises:
        InputError: options contradict each other, or the file is no checkpoint.
    """
    typed = parse_options(argv)
    file = typed.evaluate or (typed.resume if typed.resume != "auto" else None)
    if file and checkpoint is None:
        from engine.checkpoint import read_checkpoint  # here, because it imports torch

        checkpoint = read_checkpoint(file)
    return complete_options(argv, checkpoint and checkpoint.options), checkpoint


def _rename_equal_cuts(options: argparse.Namespace) -> argparse.Namespace:
    """Return options that call balanced cuts equal where the published ones are the same.

    So a run has one name, whichever of the paper's experiments asks for it.
    """
    cuts_of = options.layers, options.local_module_num, options.dataset
    balanced = options.balanced_memory or options.partition == "balanced"
    if not (balanced and balanced_cuts_are_equal(*cuts_of)):
        return options
    return argparse.Namespace(**vars(options) | {"balanced_memory": False, "partition": "equal"})


def _check_typed(options: argparse.Namespace) -> None:
    """Raise InputError if options, as typed, contradict each other."""
    _check_exclusive(options, (*EXCLUSIVE, *EXCLUSIVE_TYPED))
    for name, required in REQUIRED.items():
        for other, value in required.items():
            is_typed = not (getattr(options, name) is None or getattr(options, name) is False)
            if is_typed and getattr(options, other) != value:
                needed = f"--{other}" if value is True else f"--{other} {value}"
                raise InputError(f"--{name} is for {needed}: give that, or leave it out")
    if options.momentum_aux_mix and options.momentum_aux is None:
        raise InputError("--momentum_aux_mix is for --momentum_aux: give that, or leave it out")
    if options.detect_anomaly and options.amp == "fp16":
        raise InputError("--detect_anomaly would stop at steps that --amp fp16 skips: leave one of "
                         "them out")  # fmt: skip
    if options.balanced_memory and options.partition not in (None, "balanced"):
        raise InputError(f"--balanced_memory is not --partition {options.partition}: give one")
    if options.dry_run and options.parallel == "data":
        raise InputError("--dry_run plans --parallel modules; with data, plan a smaller batch")
    if options.resume == "auto" and options.memory_budget and not options.output_dir:
        raise InputError(
            "--memory_budget finds the number of modules, which names the run folder, so --resume "
            "auto needs an --output_dir"
        )


def _check_exclusive(options: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise InputError if both options of a pair are given."""
    for one, other in pairs:
        if getattr(options, one) and getattr(options, other):
            raise InputError(f"--{one} and --{other} exclude each other: leave one of them out")


def _check_checkpoint_folder(options: argparse.Namespace) -> None:
    """Raise InputError if a checkpoint's options would write outside the run folder.

    An absolute path is accepted if the checkpoint is in that folder.
    """
    folder, lies_in = Path(options.checkpoint), Path(options.resume or options.evaluate).parent
    inside = not folder.is_absolute() and ".." not in folder.parts
    if not inside and not (folder.is_absolute() and folder.resolve() == lies_in.resolve()):
        raise InputError(
            f"the checkpoint's options name a folder out of the run's, {options.checkpoint}: "
            "say with --checkpoint where checkpoints are to go"
        )


def as_arguments(
    options: Mapping[str, object], source: str = "the checkpoint's options have"
) -> list[str]:
    """Return options as one would type them; `source` begins the message of an error.

    Raises InputError for a name or value that no run has: a file made by others may have any.
    """
    arguments = []
    known = vars(build_parser().parse_args([])).keys() - {*INVOCATION_OPTIONS}
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        words = [",".join(map(str, x)) if isinstance(x, list | tuple) else str(x) for x in values]
        plain = isinstance(value, list | bool | int | float | str | None)
        # In a list, a text such as --output_dir would be taken for another option.
        numbers = all(re.fullmatch("-?[0-9][0-9.,e+-]*|nan|inf", word) for word in words)
        if name not in known or not plain or (isinstance(value, list) and not numbers):
            raise InputError(
                f"{source} {reprlib.repr(name)} {reprlib.repr(value)}, which no run has"
            )
        option = "--no-augment" if name == "no_augment" else f"--{name}"
        arguments += (
            [option, *words] if isinstance(value, list) else [f"{option}={w}" for w in words]
        )
    return arguments


def fill_in(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the defaults that depend on the data set or on other options."""
    data = DATASETS[options.dataset]
    partition = "auto" if options.memory_budget else "equal"
    defaults = {
        "image_size": data.image_size,
        "batch_size": data.batch_size,
        "lr": data.lr,
        "warmup_epochs": math.ceil(options.epochs / 16) if options.cos_lr else 0,
        "partition": "balanced" if options.balanced_memory else partition,
        "local_module_num": len(options.cuts or []) + 1,
    }
    if options.aux_net_config == "auglocal":
        defaults |= AUGLOCAL
    if options.momentum_aux is not None:
        defaults["momentum_aux_mix"] = MOMENTUM_MIXES[0]
    if options.overlap:
        defaults["overlap_weight"] = OVERLAP_WEIGHT
    given = {name: value for name, value in vars(options).items() if value is not None}
    filled = argparse.Namespace(**(vars(options) | defaults | given))
    filled.balanced_memory = filled.partition == "balanced"
    return filled
