"""Train a ResNet by greedy local learning with context supply (ContSup, arXiv 2312.07636).

python train.py --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E

`main` reads the options, and `train` builds the run. engine/training.py has the loop over epochs,
engine/step.py the step of a batch, and models/network.py the step of a module.
"""

from engine.errors import start_script
from engine.options import parse_options

if __name__ == "__main__":
    start_script(parse_options)  # before the imports that take seconds

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from configs import DATASETS, InputError
from dataloaders import Batches, ImageData, fingerprint, load_dataset
from engine.checkpoint import Checkpoint, check_weights, load_weights
from engine.console import count_of, print_data, print_network, readable, tolerant_output, watched
from engine.device import configure_backends, device_name
from engine.errors import CannotSave, Diverged, run_script
from engine.options import build_parser, read_options
from engine.run_folder import RunFolder
from engine.run_name import run_folder
from engine.signals import Interrupted
from engine.step import evaluate
from engine.strategy import Strategy
from engine.training import Training
from models import ContSupNetwork, build_network
from parallel.launch import first_speaks, make_strategy
from planning.dry_run import choose_network, dry_run
from planning.plan import accuracy_of_plan, planned_peak


@dataclass
class Job:
    """A run to train, or a checkpoint to evaluate, as rank 0 has read it from the command line.

    Attributes:
        options: with all defaults filled in.
        checkpoint: where to continue, or what to evaluate; None for a new run.
        folder: the run folder, locked by rank 0; None for an evaluation.
        arguments: of `build_network`.
        predicted_peak: bytes, where cuts were chosen for them.
    """

    options: argparse.Namespace
    checkpoint: Checkpoint | None
    folder: RunFolder | None
    arguments: dict[str, Any]
    predicted_peak: int | None


def main(argv: list[str]) -> None:
    """Plan, evaluate or train, as the options say; raise InputError where they can't be met."""
    with first_speaks():
        typed = build_parser().parse_args(argv)
        strategy = make_strategy(typed)
    if typed.dry_run:
        dry_run(read_options(argv)[0])
        return
    with strategy, ExitStack() as stack:
        job = strategy.on_first(lambda: prepare(argv, typed.resume, stack))
        if job is not None and job.options.evaluate:
            evaluate_checkpoint(job, strategy)
        elif job is not None:
            train(job, strategy)


def prepare(argv: list[str], resume: str | None, stack: ExitStack) -> Job | None:
    """Read options and checkpoint, choose the network, and lock the run folder.

    Args:
        resume: `--resume` as typed.
        stack: gives the lock back when the run ends.
    Returns:
        None where the run that is asked for is finished already.
    """
    before = last_written(resume)
    options, checkpoint = read_options(argv)
    if options.evaluate:
        return Job(options, checkpoint, None, *choose_network(options))
    is_auto = options.resume == "auto"
    if not is_auto:
        chosen = choose_network(options)  # first: the number of modules may name the folder
    folder = RunFolder(run_folder(options), options)
    if is_auto and folder.is_finished():
        print(f"{folder.path} is finished after {count_of(options.epochs, 'epoch')}")
        return None
    stack.enter_context(folder.locked())
    if not is_auto and last_written(options.resume) != before:
        # Another process has trained on since the file was read and before the folder was locked.
        options, checkpoint = read_options(argv)
        chosen = choose_network(options)
    newest = folder.read_checkpoints(options.resume, checkpoint)
    if is_auto:
        if newest is not None:
            checkpoint = folder.contents[newest]
            options, _ = read_options([*argv, f"--resume={newest}"], checkpoint)
        else:
            folder.note_other_epochs()
        chosen = choose_network(options)
    if not folder.prepare(options, checkpoint):
        done = f"{checkpoint.epoch} of {options.epochs} epochs are done"
        print(f"{folder.path} is finished: {done}")
        return None
    return Job(options, checkpoint, folder, *chosen)


def last_written(path: str | None) -> tuple[int, int] | None:
    """Return two numbers that change when a file is written or replaced; None if there is none."""
    if path is None or not os.path.exists(path):
        return None
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


@tolerant_output()
def train(job: Job, strategy: Strategy) -> None:
    """Train into the run folder, from the checkpoint if there is one; raise what Training does."""
    options, folder = job.options, job.folder
    folder.writes = strategy.is_first
    network, device = make_network(job, strategy)
    if job.predicted_peak:
        precision = "" if options.amp == "off" else " (in float32)"
        print(f"predicted peak {readable(job.predicted_peak)}{precision}", flush=True)
    data = load_data(job, strategy)
    make_batches = batches_of(options, device, strategy)
    test_batches = make_batches(data.test)
    train_batches = make_batches(data.train, augment=not options.no_augment, shuffle=True)
    training = Training(
        network, options, folder, train_batches, test_batches, data.classes, strategy,
        val_batches=data.val and make_batches(data.val), data=fingerprint(data),
    )  # fmt: skip
    if options.data_on_device:
        kept = readable(training.data_bytes)
        print(f"images on the device: {kept}, not in the peak below", flush=True)
    if job.checkpoint is not None:
        training.load(job.checkpoint)
    folder.open(job.checkpoint, device_name(device), strategy.describe())
    job.checkpoint = None  # lets go of its memory
    try:
        training.run()
    except (Interrupted, CannotSave) as error:
        if strategy.is_first:
            error.advice = f"; {how_to_continue(folder)}"
        raise
    except Diverged as error:
        can_find = not options.detect_anomaly and options.amp != "fp16"  # they exclude each other
        find = ", or find the operation with --detect_anomaly" if can_find else ""
        error.advice = f"; take a lower --lr and another --output_dir{find}"
        if checkpoints := folder.checkpoints():
            error.advice += f"; to begin from the last checkpoint, add --resume {checkpoints[0]}"
        raise
    if device.type == "cuda" and strategy.size == 1 and training.peak.bytes:  # of one process
        planned = planned_peak(job.arguments, train_batches.sizes()[0])
        print(accuracy_of_plan(planned, training.peak.bytes), flush=True)


def how_to_continue(folder: RunFolder) -> str:
    """Return how to continue a run that was ended early, in words."""
    if folder.is_finished():
        return "the run is finished"
    if not folder.checkpoints():
        return "no checkpoint has been written, so there is nothing to continue from"
    return f"continue with {folder.to_resume()}"


def evaluate_checkpoint(job: Job, strategy: Strategy) -> None:
    """Print the test error of a checkpoint."""
    network, device = make_network(job, strategy)
    test_batches = batches_of(job.options, device, strategy)(load_data(job, strategy).test)
    batches = watched(strategy.batches(test_batches, 0), "evaluating, batch", len(test_batches))
    totals = strategy.merge_totals(evaluate(network, batches, device))
    epoch, step = job.checkpoint.epoch, job.checkpoint.step
    print(f"{job.options.evaluate}: test error {totals.errors()[-1]:.2f} %, "
          f"loss {totals.losses()[-1]:.4f}, {totals.samples} images, "
          f"after {count_of(epoch, 'epoch')}"
          + (f" and {count_of(step, 'step')}" if step else ""))  # fmt: skip


def make_network(job: Job, strategy: Strategy) -> tuple[ContSupNetwork, torch.device]:
    """Return the network, with the checkpoint's weights, on its device; print what it is."""
    options, checkpoint = job.options, job.checkpoint
    device = strategy.device(options.device)
    configure_backends(device, options)
    strategy.divide(options, job.arguments, device)
    if checkpoint is not None:
        if len(checkpoint.classes) not in (0, job.arguments["num_classes"]):
            raise InputError(
                f"{options.resume or options.evaluate} was trained on {len(checkpoint.classes)} "
                f"classes ({', '.join(checkpoint.classes)}), and the data have "
                f"{job.arguments['num_classes']}"
            )
        check_weights(checkpoint, job.arguments)
    torch.manual_seed(options.seed)
    network = build_network(**job.arguments)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    print_network(network, options)
    strategy.place(network, options, device)
    return network, device


def load_data(job: Job, strategy: Strategy) -> ImageData:
    """Return the data set; raise InputError if the checkpoint was trained on other classes."""
    options, checkpoint = job.options, job.checkpoint
    data = strategy.load_data(
        lambda: load_dataset(
            options.dataset, options.data_dir, options.image_size, options.limit_per_class,
            test_only=bool(options.evaluate), limit_test=options.limit_test,
            val_fraction=options.val_fraction, seed=options.seed, watch=watched,
        )
    )  # fmt: skip
    if strategy.is_first:
        print_data(data)
    if checkpoint is not None and checkpoint.classes not in ([], data.classes):
        raise InputError(
            f"{options.resume or options.evaluate} was trained on other classes "
            f"({', '.join(checkpoint.classes)}) than the data have ({', '.join(data.classes)})"
        )
    return data


def batches_of(
    options: argparse.Namespace, device: torch.device, strategy: Strategy
) -> partial[Batches]:
    """Return a function that makes the Batches of a split."""
    return partial(
        Batches,
        data=DATASETS[options.dataset],
        batch_size=options.batch_size,
        device=device,
        seed=options.seed,
        channels_last=options.channels_last,
        on_device=options.data_on_device,
        share=strategy.share,
    )


if __name__ == "__main__":
    run_script(main)
