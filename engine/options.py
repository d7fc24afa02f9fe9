"""The command line of train.py: options, their types and defaults."""

import argparse
import difflib
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

from configs import DATASETS, Cut, InputError, balanced_cuts_are_equal
from engine.checkpoint import Checkpoint, read_checkpoint
from losses import LOCAL_LOSSES
from models.build import AMP

LOSS_SCALE_PARTS = ("ixx_1", "ixy_1", "ixx_2", "ixy_2")
"""Single options for the numbers of `loss_scale`, named as in the authors' release."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option for a typo."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        typo = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        near = typo and difflib.get_close_matches(typo[1], self._option_string_actions, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}{hint}\n")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, but `--option=--` is an error, where it takes [] for the value."""
        earlier = getattr(namespace, "loss_scale", None)
        found, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.nargs is None and value == [] and value is not action.default:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        self._join_loss_scale(found, earlier)
        return found, unknown

    def _join_loss_scale(self, options: argparse.Namespace, earlier: list[float] | None) -> None:
        """Make `loss_scale` of the four single options; `earlier` is one that was not typed."""
        parts = [vars(options).pop(name, None) for name in LOSS_SCALE_PARTS]
        if parts == [None] * 4:
            return
        names = " ".join(f"--{name}" for name in LOSS_SCALE_PARTS)
        if None in parts:
            self.error(f"{names} are one loss scale: give all four or none")
        if options.loss_scale is not earlier:
            self.error(f"{names} are another spelling of --loss_scale: give one of the two")
        options.loss_scale = parts


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says each option's default, but where it is None: there the help text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default is not None else action.help


def boolean(text: str) -> bool:
    """`True` or `False`, in any case; ArgumentTypeError for other text, here and below."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def negated(text: str) -> bool:
    """`True` for `False` and the other way round."""
    return not boolean(text)


def whole(at_least: int, at_most: int = 10**9) -> Callable[[str], int]:
    """A type for whole numbers from `at_least` to `at_most`."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not at_least <= int(text) <= at_most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of {at_least} to {at_most}"
            )
        return int(text)

    return convert


def positive(text: str) -> float:
    """A number above 0, 1000 at most."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 (and 1000 at most)")
    return value


def path(text: str) -> str:
    """The name of a file or folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError("no name has a NUL in it")
    return text


def path_or_none(text: str) -> str | None:
    """Return the name of a file, or None where it is empty, as in the authors' commands."""
    return path(text) if text else None


def cut(text: str) -> Cut:
    """`STAGE,BLOCK`."""
    match = re.fullmatch(r"([0-9]{1,6}),([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no STAGE,BLOCK such as 1,4")
    return int(match[1]), int(match[2])


def module_range(text: str) -> range:
    """`FIRST-LAST`, or one module."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of modules such as 0-7")
    return range(first, last + 1)


def device_name(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def label(text: str) -> str:
    """Part of a folder's name."""
    if not re.fullmatch(r"[\w.+-]{1,64}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part of a folder's name (letters, digits and _ . + -, 64 at most)"
        )
    return text


# fmt: off
def build_parser() -> Parser:
    """All options with their defaults; None where the data set or another option decides."""
    parser = Parser(
        description="Greedy local learning with context supply (ContSup, arXiv 2312.07636).",
        epilog="Options that are on or off take nothing, True or False.",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": boolean, "metavar": "BOOL"}

    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--model", choices=["resnet"], default="resnet", help="backbone")
    add("--layers", type=whole(1, 100_000), default=32, metavar="N", help="depth, 6n+2")
    add("--local_module_num", type=whole(1), metavar="K",
        help="number of local modules; 1 trains end to end (default: 1, or what --cuts or "
        "--memory_budget make it)")
    add("--local_loss_mode", choices=list(LOCAL_LOSSES), default="contrast",
        help="loss of the auxiliary heads")
    add("--context_mode", default="E", metavar="MODE",
        help="Rn: the n latest module inputs (R0: no context), E: the image, RnE: both")
    add("--balanced_memory", **switch,
        help="the published memory-balanced cuts, as --partition balanced; where they are the "
        "equal ones, the run is named as that of the equal ones")
    add("--h_reconstruct", **switch, help="a decoder at each cut, trained to reconstruct the image")
    add("--loss_scale", nargs=4, type=float, metavar=("IXX_1", "IXY_1", "IXX_2", "IXY_2"),
        help="weights of reconstruction and task loss in the first and the last module that "
        "has a decoder (default: the published row)")
    for name in LOSS_SCALE_PARTS:
        add(f"--{name}", type=float, metavar="W", default=argparse.SUPPRESS,
            help="all four together are another spelling of --loss_scale")
    add("--aux_net_config", default="1c2f", metavar="AcBf",
        help="auxiliary head of A convs and B linear layers")
    add("--aux_net_widen", type=positive, default=1.0, metavar="W",
        help="widens auxiliary nets and context encoders")
    add("--aux_net_feature_dim", type=whole(1, 65536), default=128, metavar="F",
        help="width of an auxiliary head's hidden linear layers and of its embedding")
    add("--droprate", type=float, default=0.0, metavar="P", help="dropout in the blocks")

    memory = parser.add_argument_group("memory")
    add = memory.add_argument
    add("--context_group", type=whole(0), default=16, metavar="C",
        help="channels of a context encoder that are worked on at a time, its maps made again in "
        "the backward; 0: all at once, maps kept")
    add("--recompute", **switch,
        help="inside a module keep block inputs only, and make the rest again in the backward (the "
        "last block's rest is kept, for its backward comes first)")
    add("--partition", choices=["equal", "balanced", "auto"],
        help="cuts: equal layers, the published memory-balanced ones, or those with the smallest "
        "predicted peak, in float32 (default: equal; auto with --memory_budget)")
    add("--memory_budget", type=positive, metavar="GIB",
        help="take the fewest modules whose predicted peak is at most so many GiB (default: K is "
        "given instead)")
    add("--cuts", type=cut, nargs="*", metavar="S,B",
        help="the K-1 cuts, each by the [stage, block] that it lies right after (default: those "
        "of --partition)")
    add("--dry_run", **switch,
        help="print what a training step would take, module by module, and end")
    add("--json", **switch, help="print that as one JSON object")
    add("--save_plan", **switch,
        help="leave that as plan.json in the run folder, where report.py finds it")

    speed = parser.add_argument_group("speed")
    add = speed.add_argument
    on = switch | {"default": True}
    add("--amp", choices=list(AMP), default="off",
        help="autocast to bfloat16 or float16 (with scaled losses); losses stay float32")
    add("--compile", **switch,
        help="compile the training step of each module; identical modules share their code "
        "(dropout then draws other masks)")
    add("--channels_last", **on, help="images, weights and features in channels-last format")
    add("--no-channels_last", dest="channels_last", nargs="?", const=False, type=negated,
        metavar="BOOL", default=argparse.SUPPRESS, help="the same as --channels_last False")
    add("--cudnn_benchmark", **switch,
        help="on CUDA time cuDNN's algorithms and take the fastest, whatever memory it needs")
    add("--tf32", **switch,
        help="on CUDA let float32 convs and matrix products round their inputs to TF32")
    add("--data_on_device", **switch,
        help="keep the images on the device, as bytes; they are not counted in the peak")
    add("--keep_heap", **on,
        help="on the CPU keep freed memory in the process, where the C library would hand it to "
        "the kernel and get it back cleared, page by page, every step")

    parallel = parser.add_argument_group("parallel")
    add = parallel.add_argument
    add("--parallel", choices=["modules", "data"],
        help="train in the processes that torchrun starts, by the same numbers as in one (modules: "
        "each has some of the modules) or with each batch split among them (data, which is the "
        "same learning only with --sync_bn; default: one process)")
    add("--module_ranges", type=module_range, nargs="+", metavar="A-B",
        help="modules of each process, first to last, such as 0-7 8-15 (default: those with the "
        "smallest largest time of a step, which is measured)")
    add("--sync_bn", **switch,
        help="with --parallel data, BatchNorm takes its statistics of the whole batch, as in one "
        "process, and not of each process's part")
    add("--nproc", type=whole(1, 100_000), nargs="+", metavar="P",
        help="with --dry_run --parallel modules: numbers of processes to plan for (default: 1, 2, "
        "4, ... and K)")
    add("--device_tflops", type=positive, metavar="T",
        help="for that: 10^12 FLOPs a second that a device keeps up in these steps (default: 5)")
    add("--link_gbs", type=positive, metavar="GB",
        help="for that: 10^9 bytes a second from one device to the next (default: 12)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", choices=list(DATASETS), default="cifar10", help="folder: images of your own")
    add("--data_dir", type=path, default="data", metavar="DIR",
        help="where the data are or are downloaded to; of folder: holds train/<class>/* and "
        "test/<class>/*, and its name is that of the data in run folders and reports")
    add("--image_size", type=whole(8, 1024), metavar="S",
        help="side that the images of folder are resized to (default: 32)")
    add("--limit_per_class", type=whole(1), metavar="N",
        help="train on the first N images of each class (default: all)")
    add("--no-augment", **switch, help="no crop, no flip")

    optimisation = parser.add_argument_group("optimisation")
    add = optimisation.add_argument
    add("--epochs", type=whole(1), default=160, metavar="N", help="how often over the data")
    add("--batch_size", type=whole(2), metavar="N",
        help="samples a step (default: 1024; 128 for stl10 and digits)")
    add("--lr", type=positive, metavar="LR",
        help="highest learning rate (default: 0.8; 0.1 for stl10 and digits)")
    add("--cos_lr", **(switch | {"default": True}),
        help="cosine schedule; without it the rate falls to a tenth after 1/2 and after 3/4 of the "
        "epochs")
    add("--no-cos_lr", dest="cos_lr", nargs="?", const=False, type=negated,
        metavar="BOOL", default=argparse.SUPPRESS, help="the same as --cos_lr False")
    add("--warmup_epochs", type=whole(0), metavar="N",
        help="epochs in which the rate rises from 0.01, or from --lr if that is less (default: "
        "epochs/16, rounded up; 0 with --no-cos_lr)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of all that is random")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--device", type=device_name, default="auto", metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N")
    add("--output_dir", type=path, metavar="DIR",
        help="run folder (default: runs/<name made of the options>)")
    add("--name", type=label, help="goes into the name of the run folder (default: none)")
    add("--no", type=label, default="1", metavar="INDEX",
        help="index of the experiment; goes into the name of the run folder")
    add("--checkpoint", type=path, default=".", metavar="DIR",
        help="folder of checkpoint.pt and model_best.pt, seen from the run folder")
    add("--checkpoint_every", type=whole(1), metavar="N",
        help="steps between two checkpoints within an epoch (default: one when it ends)")
    add("--resume", type=path_or_none, metavar="CKPT",
        help="continue from a checkpoint of this project (with its options, where no others are "
        "given) or of the authors' release; auto: from the newest whole one in the run folder; "
        "starts where there is none, and says so where the run is finished")
    add("--evaluate", type=path, metavar="CKPT",
        help="print the test error of such a checkpoint, and end")
    add("--print-freq", "-p", type=whole(1), default=10, metavar="N",
        help="steps between two lines of output, and between two looks at whether the losses are "
        "finite")
    add("--deterministic", **switch,
        help="the same bits in every run on this machine; slower: on CUDA by deterministic "
        "algorithms, on the CPU by one thread")
    add("--detect_anomaly", **switch,
        help="look at the result of every operation, which takes time, and end at the first that "
        "makes a NaN or an infinity")
    return parser
# fmt: on


NETWORK_OPTIONS = (
    "layers", "local_module_num", "context_mode", "local_loss_mode", "dataset", "image_size",
    "balanced_memory", "h_reconstruct", "loss_scale", "aux_net_config", "aux_net_widen",
    "aux_net_feature_dim", "droprate",
    "context_group", "recompute", "cuts", "amp",
)  # fmt: skip
"""Options that are arguments of `build_network`."""

NOT_OF_THE_RUN = (
    "resume", "evaluate", "dry_run", "json", "save_plan", "output_dir", "device", "print_freq",
    "detect_anomaly", "parallel", "module_ranges", "sync_bn", "nproc", "device_tflops", "link_gbs",
)  # fmt: skip
"""Options that say how and where to run, not what: a checkpoint does not hold them."""

NOT_OF_THE_LEARNING = (
    *NOT_OF_THE_RUN, "data_dir", "checkpoint", "checkpoint_every", "name", "no",
)  # fmt: skip
"""Options that say nothing of what is learned."""

MEMORY_AND_SPEED = (
    "context_group", "recompute",
    "compile", "channels_last", "cudnn_benchmark", "data_on_device", "keep_heap", "deterministic",
)  # fmt: skip
"""Options with the same learning but for memory and speed: a continuation may change them."""


OF_THE_STEPS = ("seed", "dataset", "batch_size", "image_size", "limit_per_class")
"""Options that say which images are in which step of an epoch."""


def data_name(options: dict[str, object]) -> str:
    """The data set; images of one's own are known by the name of their folder."""
    if options["dataset"] != "folder":
        return str(options["dataset"])
    folder = re.sub(r"[^\w.+-]", "-", Path(str(options.get("data_dir", ""))).name)
    return "-".join(filter(None, ["folder", folder]))


def read_options(argv: list[str]) -> tuple[argparse.Namespace, Checkpoint | None]:
    """Options, complete, and the checkpoint that they name.

    The options that a checkpoint holds stand before those of the command line, as if typed.

    Raises InputError for a file that is no checkpoint; ends the process for options that are wrong.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    check_together(options)
    call_equal_cuts_equal(options)
    checkpoint = None
    if options.resume not in (None, "auto") or options.evaluate:
        checkpoint = read_checkpoint(options.resume or options.evaluate)
        if checkpoint.options:
            check_cuts_stay(options, checkpoint.options)
        earlier = parser.parse_args(as_arguments(checkpoint.options))
        options = parser.parse_args(argv, earlier)
        if "checkpoint" in checkpoint.options and parser.parse_args(argv).checkpoint == ".":
            check_folder_stays(options)
        call_equal_cuts_equal(options)
    check_ways(options)
    return fill_in(options), checkpoint


def call_equal_cuts_equal(options: argparse.Namespace) -> None:
    """Have balanced cuts be called equal where the published ones are the same, in place.

    So a run has one name, whichever of the paper's experiments asks for it.
    """
    if not (options.balanced_memory or options.partition == "balanced"):
        return
    if balanced_cuts_are_equal(options.layers, options.local_module_num, options.dataset):
        options.balanced_memory, options.partition = False, "equal"


def check_cuts_stay(options: argparse.Namespace, kept: dict[str, object]) -> None:
    """InputError if options, as typed, ask for another way to cut than a checkpoint's options."""
    for name in ("partition", "memory_budget", "balanced_memory"):
        typed = getattr(options, name)
        if typed and typed != kept.get(name):
            raise InputError(f"the checkpoint has cuts of its own: leave --{name} out")


def check_folder_stays(options: argparse.Namespace) -> None:
    """InputError if a file's own options would have checkpoints written out of the run folder.

    An absolute one that the file lies in is as good.
    """
    folder, lies_in = Path(options.checkpoint), Path(options.resume or options.evaluate).parent
    inside = not folder.is_absolute() and ".." not in folder.parts
    if not inside and not (folder.is_absolute() and folder.resolve() == lies_in.resolve()):
        raise InputError(
            f"the checkpoint's options name a folder out of the run's, {options.checkpoint}: "
            "say with --checkpoint where checkpoints are to go"
        )


def check_ways(options: argparse.Namespace) -> None:
    """InputError if options, typed or a checkpoint's, are ways to run that exclude each other."""
    if options.deterministic and options.cudnn_benchmark:
        raise InputError("--cudnn_benchmark takes what is fastest at the time, so not with "
                         "--deterministic: leave one of them out")  # fmt: skip
    if options.detect_anomaly and options.compile:
        raise InputError("--detect_anomaly sees into no compiled step: give --compile False")
    if options.detect_anomaly and options.parallel:
        raise InputError("--detect_anomaly looks at one process: leave --parallel out")


def check_together(options: argparse.Namespace) -> None:
    """InputError if options, as typed, contradict each other."""
    if options.resume and options.evaluate:
        raise InputError("--resume continues a run and --evaluate trains none: give one of them")
    if options.dry_run and options.evaluate:
        raise InputError("--dry_run plans a training and --evaluate is none: give one of them")
    if options.resume == "auto" and options.memory_budget and not options.output_dir:
        raise InputError(
            "--memory_budget finds the number of modules, which names the run folder, so --resume "
            "auto needs an --output_dir"
        )
    if options.json and not options.dry_run:
        raise InputError("--json is how --dry_run prints its plan: give --dry_run as well")
    if options.save_plan and not options.dry_run:
        raise InputError("--save_plan keeps the plan of --dry_run: give --dry_run as well")
    of_modules = ("module_ranges", "nproc", "device_tflops", "link_gbs")
    for name in (*of_modules, "sync_bn"):
        wanted = "modules" if name in of_modules else "data"
        if getattr(options, name) and options.parallel != wanted:
            raise InputError(f"--{name} is for --parallel {wanted}: give that, or leave it out")
    if options.dry_run and options.parallel == "data":
        raise InputError("--dry_run plans --parallel modules; with data, plan a smaller batch")
    for name in ("nproc", "device_tflops", "link_gbs"):
        if getattr(options, name) and not options.dry_run:
            raise InputError(f"--{name} is for --dry_run; a run has what torchrun starts")
    if options.memory_budget and options.local_module_num:
        raise InputError(
            "--memory_budget finds the number of modules: leave --local_module_num out"
        )
    if options.cuts and (options.partition or options.balanced_memory or options.memory_budget):
        raise InputError(
            "--cuts are a partition: leave --partition, --balanced_memory and --memory_budget out"
        )
    if options.balanced_memory and options.partition not in (None, "balanced"):
        raise InputError(f"--balanced_memory is not --partition {options.partition}: give one")


def as_arguments(options: dict[str, object]) -> list[str]:
    """Options as they would be typed.

    Raises InputError for what is no value of an option, or an option that is not a run's: they may
    come from a file that was handed in.
    """
    arguments = []
    known = vars(build_parser().parse_args([])).keys() - {*NOT_OF_THE_RUN}
    for name, value in options.items():
        if name not in known or not _is_value(value):
            raise InputError(
                f"the checkpoint's options have {reprlib.repr(name)} {reprlib.repr(value)}, which "
                "no run has"
            )
        if value is not None:
            dashed = f"--{name.replace('_', '-')}" if name == "no_augment" else f"--{name}"
            if isinstance(value, list):
                arguments += [dashed, *map(_as_typed, value)]
            else:
                arguments.append(f"{dashed}={value}")
    return arguments


def _is_value(value: object) -> bool:
    """Plain, or a list of numbers and cuts: no text that could be taken for another option."""
    if isinstance(value, list):
        flat = [x for item in value for x in (item if isinstance(item, list | tuple) else [item])]
        return all(type(x) in (int, float) for x in flat)
    return value is None or isinstance(value, bool | int | float | str)


def _as_typed(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def fill_in(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the defaults that depend on the data set or on each other."""
    data = DATASETS[options.dataset]
    defaults = {
        "image_size": data.image_size,
        "batch_size": data.batch_size,
        "lr": data.lr,
        "warmup_epochs": math.ceil(options.epochs / 16) if options.cos_lr else 0,
        "partition": "balanced"
        if options.balanced_memory
        else ("auto" if options.memory_budget else "equal"),
        "local_module_num": len(options.cuts or []) + 1,
    }
    given = {name: value for name, value in vars(options).items() if value is not None}
    filled = argparse.Namespace(**(vars(options) | defaults | given))
    filled.balanced_memory = filled.partition == "balanced"
    return filled
