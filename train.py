"""Train a ResNet by greedy local learning with context supply (ContSup, arXiv 2312.07636).

python train.py --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E

From top to bottom: what the options ask for (a plan, an evaluation, a run), a run's network and
data, and how the process ends. The epochs are in training.py, what an epoch does in engine.py.
"""

from engine.signals import INTERRUPTS, SIGNALS, Interrupted

if __name__ == "__main__":
    INTERRUPTS.install()  # before the imports that take seconds

import argparse
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs import DATASETS, InputError, one_line
from dataloaders import (
    Batches,
    ImageData,
    check_image_size,
    count_classes,
    load_dataset,
)
from engine.anomaly import Anomaly
from engine.checkpoint import CannotSave, Checkpoint, check_weights, load_weights
from engine.console import discard, headline, note, print_network, say, tolerant_output
from engine.device import (
    CompileTime,
    choose_device,
    compile_errors,
    device_name,
    ready,
    set_switches,
)
from engine.memory import GIB, readable
from engine.options import NETWORK_OPTIONS, build_parser, read_options
from engine.run_folder import RunFolder, run_folder
from engine.step import evaluate
from engine.training import Diverged, Elsewhere, Lost, Training
from models import ContSupNetwork, build_network
from planning.partition import fewest_modules, smallest_peak
from planning.plan import make_plan, print_plan

if TYPE_CHECKING:
    from parallel.training import Parallel

# ---------------------------------------------------------------------------------------------
# What is asked for


def run(argv: list[str]) -> None:
    """Plan, evaluate or train, as the options say; InputError where they can't be met."""
    with one_speaks(is_the_one(os.environ)):
        typed = build_parser().parse_args(argv)
        in_parallel = typed.parallel and not typed.dry_run
        if not in_parallel:
            check_alone(os.environ, plans=typed.dry_run)
    if in_parallel:
        run_in_parallel(argv, typed)
    else:
        start(argv)


def is_the_one(environment: Mapping[str, str]) -> bool:
    """Whether this is the only process, or the first of those that torchrun started here."""
    return environment.get("WORLD_SIZE", "1") == "1" or environment.get("LOCAL_RANK", "0") == "0"


@contextmanager
def one_speaks(this_one: bool) -> Iterator[None]:
    """What torchrun's processes on a machine find alike is said once."""
    if this_one:
        yield
        return
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except InputError as error:
            raise Elsewhere from error
        except SystemExit as ended:
            if ended.code:
                raise Elsewhere from ended
            raise


def run_in_parallel(argv: list[str], typed: argparse.Namespace) -> None:
    """`--parallel`: rank 0 does what is asked for, and has the others do it with it."""
    from parallel.training import Parallel  # which nothing else needs

    with Parallel(typed) as team:
        if team.is_first:
            start(argv, team)
            team.begin("")
        else:
            while (told := team.told())[0]:
                {"train": train, "evaluate": evaluate_in}[told[0]](*told[1], team)


def check_alone(environment: Mapping[str, str], plans: bool) -> None:
    """InputError if torchrun has started several processes, which would all do the same."""
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("WORLD_SIZE", "1") != "1":
        if plans:
            raise InputError("--dry_run plans in one process: leave torchrun out")
        raise InputError(f"torchrun started {environment['WORLD_SIZE']} processes: say how they "
                         "share the work, with --parallel modules or data")  # fmt: skip


def start(argv: list[str], team: "Parallel | None" = None) -> None:
    """What the options ask for, in this process and those of the team."""
    options, checkpoint = read_options(argv)
    if options.dry_run:
        plan(options)
    elif options.evaluate:
        evaluate_in(options, checkpoint, network_arguments(options)[0], team)
    elif options.resume == "auto":
        continue_or_start(argv, options, team)
    else:
        found = network_arguments(options)
        folder = RunFolder(run_folder(options), options)
        folder.check_free(options.resume, checkpoint)
        with folder.locked():
            if options.resume:  # which another process may have moved on, until it was locked
                options, checkpoint = read_options(argv)
                found = network_arguments(options)
            train(options, checkpoint, folder.path, *found, team)


def plan(options: argparse.Namespace) -> None:
    """Print what a training step would take, and keep it if that is asked for."""
    if options.save_plan and not options.json:
        folder = RunFolder(run_folder(options), options)
        if folder.is_planned(in_parallel=bool(options.parallel)):
            print(f"{folder.plan} is there already")
            return
    arguments, _ = network_arguments(options)
    made = make_plan(arguments, options.batch_size)
    contents = made.as_json()
    if options.parallel:
        from planning.pipeline_plan import plan_processes, print_parallel_plan

        parallel = plan_processes(options, made, arguments)
        contents["parallel"] = parallel.as_json()
    if options.save_plan:
        RunFolder(run_folder(options), options).add_plan(contents)
    if options.json:
        print(json.dumps(contents))
    else:
        precision = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[options.amp]
        print(f"{headline(options)}; a step of {options.batch_size} samples in {precision}")
        if options.parallel:
            print_parallel_plan(parallel)
        else:
            print_plan(made)


def evaluate_in(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    team: "Parallel | None",
) -> None:
    """Print the test error of a checkpoint."""
    if team is not None:
        team.begin("evaluate", options, checkpoint, arguments)
    device = set_up(options, arguments, team)
    network = make_network(options, device, arguments, checkpoint, team)
    data = load_data(options, checkpoint, team)
    batches = make_batches(options, device, team)(data.test)
    if team is None:
        totals = evaluate(network, batches.epoch(0), device)
    else:
        totals = team.evaluate(network, batches)
    print(f"{options.evaluate}: test error {totals.errors()[-1]:.2f} %, "
          f"loss {totals.losses()[-1]:.4f}, {totals.samples} images, "
          f"after {checkpoint.epoch} epochs"
          + (f" and {checkpoint.step} steps" if checkpoint.step else ""))  # fmt: skip


def continue_or_start(
    argv: list[str], options: argparse.Namespace, team: "Parallel | None" = None
) -> None:
    """`--resume auto`: say that the run is finished, go on from its newest checkpoint, or start."""
    folder = RunFolder(run_folder(options), options)
    if folder.is_finished():
        print(f"{folder.path} is finished: all {options.epochs} epochs are done")
        return
    with folder.locked():
        checkpoint, newest = None, folder.newest()
        if newest is not None:
            options, checkpoint = read_options([*argv, "--resume", str(newest)])
        train(options, checkpoint, folder.path, *network_arguments(options), team)


# ---------------------------------------------------------------------------------------------
# A run


@tolerant_output()
def train(
    options: argparse.Namespace,
    checkpoint: Checkpoint | None,
    path: Path,
    arguments: dict[str, Any],
    predicted_peak: int | None,
    team: "Parallel | None" = None,
) -> None:
    """Train into the run folder `path`, which is locked, after `checkpoint` where there is one.

    `arguments` and `predicted_peak` are those of `network_arguments`. Raises what Training does.
    """
    folder = RunFolder(path, options) if team is None else team.folder(path, options)
    if team is None or team.is_first:
        folder.check_free(options.resume, checkpoint)
        if checkpoint is not None and is_done(options, checkpoint, folder):
            print(f"{folder.path} is finished: {done(options, checkpoint)}")
            return
    if team is not None:
        team.begin("train", options, checkpoint, path, arguments, predicted_peak)
    device = set_up(options, arguments, team)
    compile_time = CompileTime() if options.compile else None
    network = make_network(options, device, arguments, checkpoint, team)
    if predicted_peak:
        precision = "" if options.amp == "off" else " (in float32)"
        print(f"predicted peak {readable(predicted_peak)}{precision}", flush=True)
    data, batches = load_data(options, checkpoint, team), make_batches(options, device, team)
    test_batches = batches(data.test)
    train_batches = batches(data.train, augment=not options.no_augment, shuffle=True)
    if options.data_on_device:
        kept = train_batches.device_bytes + test_batches.device_bytes
        print(f"images on the device: {readable(kept)}, not in the peak below", flush=True)
    training = (Training if team is None else team.training)(
        network, options, folder, train_batches, test_batches, data.classes, compile_time
    )
    if checkpoint is not None:
        training.load(checkpoint)
    folder.open(options.resume, checkpoint, device_name(device), team and team.describe())
    try:
        training.run()
    except (Interrupted, CannotSave) as error:
        if team is None or team.is_first:
            error.add_note(f"; {how_to_go_on(folder)}")
        raise
    except (Diverged, Anomaly) as error:
        find = "" if options.detect_anomaly else ", or find the operation with --detect_anomaly"
        find += " in one process" if options.parallel and find else ""
        error.add_note(f"; take a lower --lr and another --output_dir{find}")
        if team is None or team.is_first or folder.checkpoints():  # else they are elsewhere
            error.add_note(f"; {how_to_go_on(folder)}")
        raise


def is_done(options: argparse.Namespace, checkpoint: Checkpoint, folder: RunFolder) -> bool:
    """Whether nothing is left of the run; InputError if a folder of its own has none of it."""
    if checkpoint.epoch < options.epochs:
        return False
    if folder.is_finished():
        return True
    if not folder.history_of(options.resume, checkpoint):  # else the summary is left to do
        raise InputError(
            f"{done(options, checkpoint)} in {options.resume}: give more --epochs, or --evaluate it"
        )
    return False


def done(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """How far a run is."""
    return f"{checkpoint.epoch} of {options.epochs} epochs are done"


def how_to_go_on(folder: RunFolder) -> str:
    """What is left of a run that was ended, in a few words."""
    if folder.is_finished():
        return "the run is finished"
    if not folder.checkpoints():
        return "no checkpoint has been written, so there is nothing to continue from"
    return f"continue with {folder.to_resume()}"


def set_up(
    options: argparse.Namespace, arguments: dict[str, Any], team: "Parallel | None"
) -> torch.device:
    """The device of this process, which is set up for the options; the team's work is split."""
    device = choose_device(options.device) if team is None else team.device
    set_switches(
        device,
        cudnn_benchmark=options.cudnn_benchmark,
        tf32=options.tf32,
        keeps_heap=options.keep_heap,
        deterministic=options.deterministic,
    )
    if team is not None:
        team.choose_way(options, arguments)
    return device


def make_network(
    options: argparse.Namespace,
    device: torch.device,
    arguments: dict[str, Any],
    checkpoint: Checkpoint | None,
    team: "Parallel | None" = None,
) -> ContSupNetwork:
    """The network of a run, on its device and as it was in `checkpoint`; what it is, printed."""
    if checkpoint is not None:
        check_weights(checkpoint, arguments)
    torch.manual_seed(options.seed)
    network = build_network(**arguments)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    print_network(network, options)
    if team is not None:
        print(team.way, flush=True)
        team.way.prepare(network)
    ready(network, device, channels_last=options.channels_last, compiled=options.compile)
    if team is not None:
        team.way.ready(network)
    return network


def load_data(
    options: argparse.Namespace, checkpoint: Checkpoint | None, team: "Parallel | None" = None
) -> ImageData:
    """The data set; InputError if `checkpoint` was trained on other classes."""
    load = partial(
        load_dataset,
        options.dataset,
        options.data_dir,
        options.image_size,
        options.limit_per_class,
        test_only=bool(options.evaluate),
    )
    data = load() if team is None else team.loaded(load)
    if checkpoint is not None and checkpoint.classes not in ([], data.classes):
        raise InputError(
            f"{options.resume or options.evaluate} was trained on other classes "
            f"({', '.join(checkpoint.classes)}) than the data have ({', '.join(data.classes)})"
        )
    return data


def make_batches(
    options: argparse.Namespace, device: torch.device, team: "Parallel | None" = None
) -> "partial[Batches]":
    """Makes Batches of a split, as the options say."""
    return partial(
        Batches,
        data=DATASETS[options.dataset],
        batch_size=options.batch_size,
        device=device,
        seed=options.seed,
        channels_last=options.channels_last,
        on_device=options.data_on_device,
        share=(0, 1) if team is None else team.way.share,
    )


def network_arguments(options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """Arguments of `build_network`, and the peak in bytes that was predicted when choosing cuts.

    Cuts that --partition auto and --memory_budget ask for are chosen here, unless the options have
    cuts already, and put into the options. InputError if something does not fit.
    """
    arguments = {name: getattr(options, name) for name in NETWORK_OPTIONS}
    arguments["num_classes"] = DATASETS[options.dataset].classes or count_classes(
        options.data_dir, "test" if options.evaluate else "train"
    )
    check_image_size(options.dataset, options.image_size)
    if options.cuts is not None:
        return arguments, None
    if options.memory_budget:
        budget = int(options.memory_budget * GIB)
        note_if_above_free(budget, options.device)
        found = fewest_modules(arguments, options.batch_size, options.partition, budget)
    elif options.partition == "auto":
        found = smallest_peak(arguments, options.batch_size)
    else:
        return arguments, None
    options.local_module_num = arguments["local_module_num"] = len(found.cuts) + 1
    options.cuts = arguments["cuts"] = found.cuts
    return arguments, found.peak


def note_if_above_free(budget: int, device: str) -> None:
    """On CUDA, a line on stderr if the device has fewer bytes free than the budget."""
    if device == "cpu" or not torch.cuda.is_available():
        return
    index = 0 if device == "auto" else torch.device(device).index or 0
    if index >= torch.cuda.device_count():  # a plan for another machine
        return
    free, _ = torch.cuda.mem_get_info(index)
    if free < budget:
        note(f"the budget of {readable(budget)} is above the {readable(free)} that the device has "
             "free")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# How the process ends


def main() -> int:
    """Exit status: 0, 1 for what could not be written, 2 for bad input, 3 for a run that diverged,
    130 and 143 after SIGINT and SIGTERM.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as some daemons have it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        status = attempt(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has seen enough
        discard(sys.stdout)
        return 1
    except OSError as error:
        discard(sys.stdout)
        what = "" if error.filename else "the output can't be written: "
        return fail(1, f"{what}{one_line(error)}")
    return status


def attempt(argv: list[str]) -> int:
    """Do what is asked for; where that fails say why on stderr, in a line, and give the status."""
    try:
        run(argv)
    except SystemExit as ended:  # of the option parser
        return ended.code
    except InputError as error:
        return fail(2, error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return fail(2, "out of memory, so take a smaller --batch_size, a larger "
                    "--local_module_num, a --memory_budget or --recompute "
                    f"({one_line(error)})")  # fmt: skip
    except compile_errors() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return fail(2, f"--compile failed, so leave it out or mend this: {reason}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the CPU's way to be out of it
            return fail(2, f"out of memory: {one_line(error)[-300:]}")
        if "deterministic" not in str(error):
            raise
        return fail(2, f"--deterministic: {str(error).split(',')[0]}, so leave it out")
    except (CannotSave, Lost) as error:
        return fail(1, error)
    except Elsewhere:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(5)  # torchrun ends the others when the first ends: that should be who says why
        return 1
    except (Diverged, Anomaly) as error:
        return fail(3, error)
    except Interrupted as error:
        how = getattr(error, "__notes__", [])
        if how:
            note(f"stopped by {error}{how[0]}")
        else:  # rank 0 says it, and torchrun would end it when another ends
            time.sleep(1)
        return error.status
    return 0


def fail(status: int, reason: Exception | str) -> int:
    """Say why on stderr, in a line; gives the status."""
    text = "".join([one_line(reason), *getattr(reason, "__notes__", [])])
    say(f"train.py: error: {text}")
    return status


def end(status: int) -> None:
    """End the process; one of several that has failed, without waiting for its connections."""
    if status and "parallel.training" in sys.modules:
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        if "parallel.training" not in sys.modules:
            raise
        traceback.print_exc()
        status = 1
    end(status)
