"""Train a ResNet by greedy local learning with context supply (ContSup, arXiv 2312.07636).

python train.py --dataset cifar10 --layers 32 --local_module_num 16 --context_mode E

From top to bottom: what is printed, and `run`, which goes through it all: options, network, data,
loop. What an epoch does is in engine.py.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs import DATASETS, InputError, one_line
from dataloaders import Batches, check_image_size, count_classes, epoch_seed, load_dataset
from engine import (
    Totals,
    evaluate,
    learning_rate,
    make_optimizers,
    reconstructions,
    train_one_epoch,
)
from memory import GIB, PeakMemory, readable
from models import ContSupNetwork, build_network
from models.checkpoint import (
    Checkpoint,
    load_momentum,
    load_weights,
    momentum_by_name,
    save_checkpoint,
)
from options import NETWORK_OPTIONS, read_options
from partition import fewest_modules, smallest_peak
from planner import make_plan, print_plan
from run_folder import RunFolder, read_metrics, run_folder
from speed import CompileTime, compile_errors, ready, set_switches

# ---------------------------------------------------------------------------------------------
# For people


class Progress:
    """A bar on a terminal, a line every `print_freq` steps elsewhere; use it with `with`.

    Says as well what a step compiled, and for how long.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        steps: int,
        print_freq: int,
        compile_time: CompileTime | None = None,
    ) -> None:
        self.compile_time = compile_time
        self.title = f"epoch {epoch:3}/{epochs}"
        self.steps, self.print_freq = steps, print_freq
        self.bar = tqdm(total=steps, desc=self.title, leave=False, disable=not sys.stdout.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def __call__(self, step: int, totals: Totals) -> None:
        """Show that `step`, from 1, is done; losses are read only where they are shown."""
        self.bar.update()
        if self.compile_time is not None and self.compile_time.is_news():
            self.bar.clear()
            print(self.compile_time.news(), flush=True)
        if step % self.print_freq and step != self.steps:
            return
        losses = totals.losses()
        text = f"loss {losses[-1]:.4f}, mean of the local losses {statistics.mean(losses):.4f}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            print(f"{self.title}  step {step:4}/{self.steps}  {text}", flush=True)


def headline(options: argparse.Namespace) -> str:
    """Net, data and method in a line."""
    loss = options.local_loss_mode + (" with decoders" if options.h_reconstruct else "")
    return (
        f"ResNet-{options.layers} on {options.dataset}: K={options.local_module_num}, "
        f"context {options.context_mode}, {loss}"
    )


def print_network(network: ContSupNetwork, options: argparse.Namespace) -> None:
    """What is to be trained, in three lines."""
    cuts = [list(module.unit_names[-1]) for module in network.local_modules[:-1]]
    counts = [f"{name} {n:,}" for name, n in network.parameter_counts().items()]
    print(headline(options))
    print("cuts after [stage, block]:", *(cuts or ["none"]))
    print("parameters:", ", ".join(counts), flush=True)


def print_epoch(metrics: dict, epochs: int) -> None:
    """The figures of an epoch, in two lines; with K > 1 the modules' in two more."""
    m = metrics
    print(f"epoch {m['epoch']:3}/{epochs}  lr {m['lr']:.4f}"
          f"  train loss {m['train_loss']:.4f} error {m['train_error']:.2f} %"
          f"  test loss {m['test_loss']:.4f} error {m['test_error']:.2f} %"
          f"  {m['samples_per_second']:.0f} samples/s"
          f"  peak {readable(m['peak_memory_bytes'])}")  # fmt: skip
    if len(m["local_losses"]) > 1:
        print("  local loss by module   " + " ".join(f"{x:6.3f}" for x in m["local_losses"]))
    if len(m["test_errors"]) > 1 and None not in m["test_errors"]:
        print("  test error by module % " + " ".join(f"{x:6.2f}" for x in m["test_errors"]))
    sys.stdout.flush()


def print_summary(summary: dict, folder: Path) -> None:
    """How the run ended and where its files are."""
    print(f"test error {summary['error_last']:.2f} % at the last epoch, "
          f"{summary['error_best']:.2f} % at the best")  # fmt: skip
    print(f"peak memory {readable(summary['peak_memory_bytes'])} ({summary['peak_memory_how']})")
    print(f"run folder {folder}; TensorBoard: tensorboard --logdir {folder}")


# ---------------------------------------------------------------------------------------------
# A run


def run(argv: list[str]) -> None:
    """Train, or evaluate a checkpoint, as the options say; InputError where they can't be met."""
    options, checkpoint = read_options(argv)
    if options.resume == "auto" and not options.dry_run:
        folder = RunFolder(run_folder(options), options)
        if folder.is_finished():
            print(f"{folder.path} is finished: all {options.epochs} epochs are done")
            return
        if folder.checkpoint.exists():
            options, checkpoint = read_options([*argv, "--resume", str(folder.checkpoint)])
    if options.save_plan and not options.json:
        folder = RunFolder(run_folder(options), options)
        if folder.is_planned():
            print(f"{folder.plan} is there already")
            return
    device = None if options.dry_run else choose_device(options.device)
    arguments, predicted_peak = network_arguments(options)
    compile_time = CompileTime() if options.compile else None
    if options.dry_run:
        plan = make_plan(arguments, options.batch_size)
        if options.save_plan:
            RunFolder(run_folder(options), options).add_plan(plan.as_json())
        if options.json:
            print(json.dumps(plan.as_json()))
        else:
            precision = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[options.amp]
            print(f"{headline(options)}; a step of {options.batch_size} samples in {precision}")
            print_plan(plan)
        return

    data_config = DATASETS[options.dataset]
    torch.manual_seed(options.seed)
    set_switches(
        device,
        cudnn_benchmark=options.cudnn_benchmark,
        tf32=options.tf32,
        keeps_heap=options.keep_heap,
    )
    network = ready(
        build_network(**arguments),
        device,
        channels_last=options.channels_last,
        compiled=options.compile,
    )
    if checkpoint is not None:
        load_weights(network, checkpoint)
    print_network(network, options)
    if predicted_peak:
        precision = "" if options.amp == "off" else " (in float32)"
        print(f"predicted peak {readable(predicted_peak)}{precision}", flush=True)

    if not options.evaluate:
        folder = RunFolder(run_folder(options), options)
        folder.check_free(options.resume, checkpoint)
        if checkpoint is not None and checkpoint.epoch >= options.epochs:
            done = f"{checkpoint.epoch} of {options.epochs} epochs are done"
            if folder.is_finished():
                print(f"{folder.path} is finished: {done}")
                return
            if not read_metrics(folder.metrics):  # else all that is left to do is the summary
                raise InputError(
                    f"{done} in {options.resume}: give more --epochs, or --evaluate it"
                )

    data = load_dataset(
        options.dataset,
        options.data_dir,
        options.image_size,
        options.limit_per_class,
        test_only=bool(options.evaluate),
    )
    if checkpoint is not None and checkpoint.classes not in ([], data.classes):
        raise InputError(
            f"{options.resume or options.evaluate} was trained on other classes "
            f"({', '.join(checkpoint.classes)}) than the data have ({', '.join(data.classes)})"
        )
    batches = partial(
        Batches,
        data=data_config,
        batch_size=options.batch_size,
        device=device,
        seed=options.seed,
        channels_last=options.channels_last,
        on_device=options.data_on_device,
    )
    test_batches = batches(data.test)
    if options.evaluate:
        totals = evaluate(network, test_batches.epoch(0), device)
        print(f"{options.evaluate}: test error {totals.errors()[-1]:.2f} %, "
              f"loss {totals.losses()[-1]:.4f}, {totals.samples} images, "
              f"after {checkpoint.epoch} epochs")  # fmt: skip
        return

    train_batches = batches(data.train, augment=not options.no_augment, shuffle=True)
    if options.data_on_device:
        kept = train_batches.device_bytes + test_batches.device_bytes
        print(f"images on the device: {readable(kept)}, not in the peak below", flush=True)
    try:
        train(
            network,
            options,
            checkpoint,
            folder,
            train_batches,
            test_batches,
            data.classes,
            compile_time,
        )
    except KeyboardInterrupt:
        how = f"continue with --resume {folder.checkpoint}" if folder.checkpoint.exists() else (
            "no epoch is complete, so there is nothing to continue from"
        )  # fmt: skip
        print(f"\ninterrupted; {how}", file=sys.stderr)
        sys.exit(130)


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
        print(f"train.py: note: the budget of {readable(budget)} is above the {readable(free)} "
              "that the device has free", file=sys.stderr)  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device of `--device`; InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here: "
            "use --device cpu or auto"
        )
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, or a CUDA device with its model."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def train(
    network: ContSupNetwork,
    options: argparse.Namespace,
    checkpoint: Checkpoint | None,
    folder: RunFolder,
    train_batches: Batches,
    test_batches: Batches,
    classes: list[str],
    compile_time: CompileTime | None,
) -> None:
    """All epochs that are left, from `checkpoint` where there is one, and the summary."""
    optimizers = make_optimizers(network)
    if checkpoint is not None:
        load_momentum(optimizers, network, checkpoint)
        for optimizer, state in zip(optimizers, checkpoint.scalers, strict=False):
            optimizer.scaler.load_state_dict(state)
    epochs_done = checkpoint.epoch if checkpoint is not None else 0
    data_bytes = train_batches.device_bytes + test_batches.device_bytes
    peak = PeakMemory(train_batches.device, compiled=options.compile, apart=data_bytes)
    folder.open(epochs_done)
    shown = test_batches.spread(8)

    for epoch in range(epochs_done + 1, options.epochs + 1):
        torch.manual_seed(epoch_seed(options.seed, epoch, stream=1))
        lr = learning_rate(epoch, options.epochs, options.lr, options.warmup_epochs, options.cos_lr)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr

        start = time.perf_counter()
        with Progress(
            epoch, options.epochs, len(train_batches), options.print_freq, compile_time
        ) as progress:
            trained = train_one_epoch(
                network, optimizers, train_batches.epoch(epoch), peak, progress
            )
        local_losses, train_errors = trained.losses(), trained.errors()
        seconds = time.perf_counter() - start
        tested = evaluate(network, test_batches.epoch(0), peak.device)
        test_errors = tested.errors()

        metrics = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": local_losses[-1],
            "train_error": train_errors[-1],
            "local_losses": local_losses,
            "train_errors": train_errors,
            "test_loss": tested.losses()[-1],
            "test_error": test_errors[-1],
            "test_errors": test_errors,
            "samples_per_second": trained.samples / seconds,
            "peak_memory_bytes": peak.bytes,
        }
        is_best = test_errors[-1] < folder.best_error()
        folder.add_epoch(metrics)
        folder.add_reconstructions(reconstructions(network, shown.to(peak.device)), epoch)
        print_epoch(metrics, options.epochs)
        state = Checkpoint(
            epoch=epoch,
            state_dict=network.state_dict(),
            momentum=momentum_by_name(optimizers, network),
            options=folder.options,
            classes=classes,
            scalers=[o.scaler.state_dict() for o in optimizers if o.scaler.is_enabled()],
        )
        if is_best:
            save_checkpoint(folder.best, state)
        save_checkpoint(folder.checkpoint, state)

    summary = folder.add_summary(
        peak, device_name(peak.device), network.parameter_counts(), data_bytes
    )
    print_summary(summary, folder.path)


def main() -> int:
    """Exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        run(sys.argv[1:])
    except InputError as error:
        print(f"train.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"train.py: error: out of memory, so take a smaller --batch_size, a larger "
              f"--local_module_num, a --memory_budget or --recompute ({one_line(error)})",
              file=sys.stderr)  # fmt: skip
        return 2
    except compile_errors() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"train.py: error: --compile failed, so leave it out or mend this: {reason}",
              file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
