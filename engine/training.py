"""A run's training, from where it stands to its summary: the epochs, and how nothing is lost."""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs import InputError, one_line
from dataloaders import Batches, epoch_seed
from engine.anomaly import FirstAnomaly
from engine.checkpoint import (
    CannotSave,
    Checkpoint,
    load_momentum,
    momentum_by_name,
    save_checkpoint,
)
from engine.console import Progress, print_epoch, print_summary
from engine.device import CompileTime, compile_errors, device_name
from engine.memory import PeakMemory
from engine.options import MEMORY_AND_SPEED, OF_THE_STEPS
from engine.run_folder import RunFolder, is_same
from engine.signals import INTERRUPTS, Interrupted
from engine.step import (
    Totals,
    evaluate,
    learning_rate,
    make_optimizers,
    reconstructions,
    state_of,
    train_one_epoch,
)
from models import ContSupNetwork


class Diverged(Exception):
    """A loss, or what a checkpoint would keep, is NaN or infinite."""


class Elsewhere(Exception):
    """Another process of the run has failed, and says why; nothing is to be said here."""


class Lost(Exception):
    """The connection to another process of the run broke."""


class Training:
    """Where a run's training stands, and how it goes on.

    Args:
        network: on its device.
        options: complete.
        folder: what the run leaves, opened before `run`.
        train_batches, test_batches: augmented and shuffled; plain.
        classes: their names, in the order of the targets.
        compile_time: tells of compilations, with --compile.
    Attributes:
        epoch: epochs done.
        totals: of the epoch under way.
        is_saved: whether checkpoint.pt is of this run as it goes on.
    """

    def __init__(
        self,
        network: ContSupNetwork,
        options: argparse.Namespace,
        folder: RunFolder,
        train_batches: Batches,
        test_batches: Batches,
        classes: list[str],
        compile_time: CompileTime | None,
    ) -> None:
        self.network, self.options, self.folder = network, options, folder
        self.train_batches, self.test_batches, self.classes = train_batches, test_batches, classes
        self.compile_time = compile_time
        self.device = train_batches.device
        self.data_bytes = train_batches.device_bytes + test_batches.device_bytes
        self.optimizers = make_optimizers(network)
        self.peak = self.meter()
        self.epoch = 0
        self.is_saved = False
        self.totals = Totals(network, self.device)
        self.shown = test_batches.spread(8)

    def meter(self) -> PeakMemory:
        """Of the training steps."""
        return PeakMemory(self.device, compiled=self.options.compile, apart=self.data_bytes)

    # Where it stands

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose weights the network has.

        Raises InputError if it is not of this network, or in the middle of an epoch of other steps.
        """
        load_momentum(self.optimizers, self.network, checkpoint)
        scalers = [o.scaler for o in self.optimizers if o.scaler.is_enabled()]
        if scalers and checkpoint.scalers:
            if len(scalers) != len(checkpoint.scalers):
                raise InputError("the checkpoint's loss scalers are of another number of modules")
            for scaler, state in zip(scalers, checkpoint.scalers, strict=True):
                scaler.load_state_dict(state)
        self.epoch = checkpoint.epoch
        self.is_saved = is_same(self.options.resume, self.folder.checkpoint)
        if checkpoint.totals:
            self._check_steps(checkpoint)
        try:
            if checkpoint.totals:
                self.totals.load(checkpoint.totals)
            if checkpoint.peak and not self._changed(checkpoint, MEMORY_AND_SPEED):
                self.peak.load(checkpoint.peak)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the checkpoint's sums are of another run: {one_line(error)}"
            ) from error

    def _check_steps(self, checkpoint: Checkpoint) -> None:
        where = f"the checkpoint is in the middle of epoch {self.epoch + 1}"
        if changed := self._changed(checkpoint, OF_THE_STEPS):
            raise InputError(f"{where}, so {', '.join(changed)} must stay as it was")
        if not 0 < checkpoint.step <= len(self.train_batches):
            raise InputError(
                f"{where}, after step {checkpoint.step} of the {len(self.train_batches)} "
                "that the data make: are they the same?"
            )

    def _changed(self, checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
        return [n for n in names if checkpoint.options.get(n) != getattr(self.options, n)]

    def save(self) -> None:
        """Put checkpoint.pt in the place of the last; raises CannotSave, and Diverged before."""
        self.check_state()
        self.write(self.folder.checkpoint, self.checkpoint())
        self.is_saved = True

    def write(self, path: Path, checkpoint: Checkpoint) -> None:
        """Put a checkpoint file in the place of the last; raises CannotSave."""
        save_checkpoint(path, checkpoint)

    def checkpoint(self) -> Checkpoint:
        """All that it takes to go on from here to the same bits."""
        return Checkpoint(
            epoch=self.epoch,
            state_dict=self.network.state_dict(),
            momentum=momentum_by_name(self.optimizers, self.network),
            options=self.folder.options,
            classes=self.classes,
            scalers=[o.scaler.state_dict() for o in self.optimizers if o.scaler.is_enabled()],
            totals=self.totals.state() if self.totals.steps else {},
            history=self.folder.history,
            peak=self.peak.state(),
        )

    # Whether it is sound

    def check_losses(self, losses: list[float]) -> None:
        """Raise Diverged unless the mean losses are finite; then only, the device is asked more."""
        if not all(map(math.isfinite, losses)):
            module, step = self.totals.first_not_finite()
            raise Diverged(
                f"the loss of module {module} is not finite from step {step} of epoch "
                f"{self.epoch + 1} on"
            )

    def check_state(self) -> None:
        """Raise Diverged unless the losses, and all that a checkpoint keeps, are finite."""
        if self.totals.steps:
            self.check_losses(self.totals.losses())
        for module, optimizer in zip(self.network.held, self.optimizers, strict=True):
            kept = state_of([module], [optimizer])
            if not torch.stack([tensor.isfinite().all() for tensor in kept]).all():
                steps = f"step {self.totals.steps} of " if self.totals.steps else ""
                epoch = self.epoch + bool(steps)
                raise Diverged(f"module {module.index} is not finite after {steps}epoch {epoch}")

    # How it goes on

    def run(self) -> None:
        """All steps that are left, and the summary.

        Raises Interrupted when that was asked for, after a checkpoint; Diverged and CannotSave,
        either of which leaves the last checkpoint as it was.
        """
        # Compiling takes a minute or more, and until the first step there is nothing to save.
        with INTERRUPTS.held(at_once=not self.options.compile):
            try:
                while self.epoch < self.options.epochs:
                    self.run_epoch(self.epoch + 1)
                if not self.is_saved:  # it went on from model_best.pt, which was the last
                    self.save()
            except Interrupted:
                self.save()
                raise
            except compile_errors() as error:  # Ctrl-C reaches the compiler too
                if INTERRUPTS.asked is None:
                    raise
                raise Interrupted(INTERRUPTS.asked) from error
            self.finish()
            self.check_asked()  # nothing is left to do here, but there may be in command.sh

    def finish(self) -> None:
        """The summary; raises CannotSave."""
        try:
            summary = self.folder.add_summary(
                self.peak, device_name(self.device), self.network.parameter_counts(),
                self.data_bytes,
            )  # fmt: skip
        except OSError as error:
            what = f"cannot write {self.folder.summary}: {one_line(error)}"
            raise CannotSave(what) from error
        print_summary(summary, self.folder.path)

    def run_epoch(self, epoch: int) -> None:
        """The steps of an epoch that are left, its evaluation, its line and its checkpoint."""
        o = self.options
        lr = learning_rate(epoch, o.epochs, o.lr, o.warmup_epochs, o.cos_lr)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
        self.train(epoch)
        tested, trained = self.evaluated(), self.whole(self.totals)
        local_losses, train_errors, test_errors = (
            trained.losses(), trained.errors(), tested.errors()
        )  # fmt: skip
        if bad := tested.first_not_finite():
            raise Diverged(f"the test loss of module {bad[0]} is not finite after epoch {epoch}")
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
            **self.figures(trained),
        }
        self.check_state()
        is_best = test_errors[-1] < self.folder.best_error()
        self.folder.add_epoch(metrics, self.reconstructed())
        print_epoch(metrics, o.epochs)
        self.epoch, self.totals = epoch, Totals(self.network, self.device)
        if is_best:  # first: were it second, a run cut off between the two would never write it
            self.write(self.folder.best, self.checkpoint())
        self.save()

    def figures(self, trained: Totals) -> dict[str, object]:
        """What the steps of an epoch took."""
        return {
            "samples_per_second": trained.samples / trained.seconds,
            "peak_memory_bytes": self.peak.bytes,
        }

    def evaluated(self) -> Totals:
        """Of the test data."""
        return evaluate(self.network, unless_asked(self.test_batches.epoch(0)), self.device)

    def whole(self, totals: Totals) -> Totals:
        """The same of all modules and samples, whoever had them."""
        return totals

    def reconstructed(self) -> dict[str, Tensor]:
        """`reconstructions` of the images shown."""
        return reconstructions(self.network, self.shown.to(self.device))

    def train(self, epoch: int) -> None:
        """The steps of an epoch that are left."""
        steps, every = len(self.train_batches), self.options.checkpoint_every
        earlier, start = self.totals.seconds, time.perf_counter()

        def after_step(step: int, totals: Totals) -> None:
            is_last = step == steps
            progress.took()
            if is_last or step % self.options.print_freq == 0:
                self.look(step, totals, progress)
            totals.seconds = earlier + time.perf_counter() - start
            INTERRUPTS.hold()
            self.check_asked()
            if every and step % every == 0 and not is_last:
                self.save()

        with (
            Progress(
                epoch, self.options.epochs, steps, self.compile_time, done=self.totals.steps
            ) as progress,
            self.watched(),
        ):
            train_one_epoch(
                self.network, self.optimizers,
                self.batches(self.train_batches, epoch, skip=self.totals.steps),
                self.peak, after_step, self.totals,
                seed_of=self.seed_of(epoch),
            )  # fmt: skip
            self.trained(progress)

    def batches(
        self, batches: Batches, epoch: int, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of an epoch, without the first `skip`."""
        return batches.epoch(epoch, skip)

    def look(self, step: int, totals: Totals, progress: Progress) -> None:
        """Read the losses so far, show them, and raise Diverged where they are not finite."""
        losses = totals.losses()
        self.check_losses(losses)
        progress.show(step, losses)

    def check_asked(self) -> None:
        """Raise Interrupted if the process is asked to stop."""
        INTERRUPTS.check()

    def trained(self, progress: Progress) -> None:
        """The steps of the epoch are done."""

    def seed_of(self, epoch: int) -> Callable[[int, int], int] | None:
        """Seed of what (step, module) draws; None where nothing is drawn."""
        return partial(epoch_seed, self.options.seed, epoch) if self.options.droprate else None

    def watched(self) -> AbstractContextManager:
        """With --detect_anomaly each operation is; losses scaled for float16 may overflow."""
        if not self.options.detect_anomaly:
            return nullcontext()
        return FirstAnomaly(self.network, backward=self.options.amp != "fp16")


def unless_asked(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, until the process is asked to stop: then Interrupted."""
    for batch in batches:
        INTERRUPTS.check()
        yield batch
