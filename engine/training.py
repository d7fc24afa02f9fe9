"""A run's training: the epochs, from a checkpoint or the start to the summary."""

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import InputError, one_line
from dataloaders import Batches, changes, epoch_seed, share_sizes
from engine.checkpoint import (
    Checkpoint,
    load_momentum,
    momentum_by_name,
    save_checkpoint,
)
from engine.console import Progress, note, print_epoch, print_summary, watched
from engine.device import device_name
from engine.errors import CannotSave, Diverged
from engine.memory import PeakMemory
from engine.options import BATCH_OPTIONS, DATA_OPTIONS, PERFORMANCE_OPTIONS
from engine.run_folder import RunFolder, deciding_error, same_file
from engine.signals import INTERRUPTS, Interrupted
from engine.step import (
    SMALLEST_SCALE,
    Totals,
    evaluate,
    learning_rate,
    make_optimizers,
    reconstructions,
    seed_generators,
    state_of,
    tensors_alive,
    train_step,
)
from engine.strategy import Strategy
from models import ContSupNetwork, LocalModule
from models.torch_internals import compile_errors


class Training:
    """A run's training: the loop over epochs, and the state that it changes.

    Args:
        network: on its device.
        options: with all defaults filled in.
        folder: the run folder, to be opened before `run`.
        train_batches: augmented and shuffled.
        test_batches: plain.
        classes: their names, in the order of the targets.
        strategy: how the work is divided among processes.
        val_batches: plain; the best epoch is chosen on them, if there are any.
        data: `dataloaders.fingerprint` of the images.
    Attributes:
        epoch: epochs done.
        totals: sums of the epoch in progress.
        has_checkpoint: whether checkpoint.pt is of this run: written, or continued from.
        compiling: whether the first step, which compiles, is still to come.
    """

    def __init__(
        self,
        network: ContSupNetwork,
        options: argparse.Namespace,
        folder: RunFolder,
        train_batches: Batches,
        test_batches: Batches,
        classes: list[str],
        strategy: Strategy,
        val_batches: Batches | None = None,
        data: Mapping[str, Mapping] = {},
    ) -> None:
        self.network, self.options, self.folder = network, options, folder
        self.val_batches, self.data = val_batches, data
        self.train_batches, self.test_batches, self.classes = train_batches, test_batches, classes
        self.strategy, self.device = strategy, train_batches.device
        every = filter(None, (train_batches, val_batches, test_batches))
        self.data_bytes = sum(batches.device_bytes for batches in every)
        self.optimizers = make_optimizers(network)
        self.peak = PeakMemory(
            self.device, compiled=options.compile, apart=self.data_bytes, steps=strategy.warm_up
        )
        self.peak.how += strategy.peak_note
        self.epoch = self.current_module = 0
        self.has_checkpoint, self.compiling = False, options.compile
        self.totals = Totals(network, self.device)
        self.shown = test_batches.spread(8)
        self._check_batch_sizes()

    def _check_batch_sizes(self) -> None:
        """Raise InputError if a head normalises over a batch's samples and a batch has but one."""
        rank, size = self.strategy.share
        parts = [share_sizes(n, size)[rank] for n in self.train_batches.sizes()]
        trained = (m for m in self.network.stage if not m.frozen)
        norms = {type(layer) for module in trained for layer in module.modules()}
        if nn.BatchNorm1d in norms and 1 in parts:
            raise InputError(
                f"a head ({self.options.aux_net_config}) normalises over the samples of a batch, "
                "and a batch, or a process's part of it, has one: take another --batch_size"
            )

    # The loop

    def run(self) -> None:
        """Train what is left of the run, and write its summary.

        Raises:
            Interrupted: a signal asked for it. A checkpoint has been written, unless the signal
                interrupted the compiler.
            Diverged, CannotSave: the last checkpoint is as it was.
        """
        # Compiling takes a minute or more, and until the first step there is nothing to save.
        with INTERRUPTS.deferred(from_start=not self.options.compile):
            try:
                while self.epoch < self.options.epochs:
                    self.run_epoch(self.epoch + 1)
                if not self.has_checkpoint:  # it continued from model_best.pt, the newest
                    self.save()
            except Interrupted:
                self.save()
                raise
            except compile_errors() as error:  # Ctrl-C reaches the compiler too
                if INTERRUPTS.asked is None:
                    raise
                raise Interrupted(INTERRUPTS.asked) from error
            self.finish()

    def run_epoch(self, epoch: int) -> None:
        """Train an epoch, evaluate, and write its metrics and checkpoint."""
        o = self.options
        lr = learning_rate(epoch, o.epochs, o.lr, o.warmup_epochs, o.cos_lr)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
        self.train_epoch(epoch)
        trained = self.strategy.merge_totals(self.totals)
        figures = self.strategy.figures(self.totals, trained, self.peak)
        evaluated = {}
        for name, batches in (("val", self.val_batches), ("test", self.test_batches)):
            if batches is not None:
                totals = self.evaluate(epoch, name, batches)
                evaluated |= {
                    f"{name}_loss": totals.losses()[-1],
                    f"{name}_error": totals.errors()[-1],
                    f"{name}_errors": totals.errors(),
                }
        metrics = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": trained.losses()[-1],
            "train_error": trained.errors()[-1],
            "local_losses": trained.losses(),
            "train_errors": trained.errors(),
            **evaluated,
            **figures,
        }
        self.check_state()
        best = self.folder.best_epoch()
        is_best = best is None or deciding_error(metrics) < deciding_error(best)
        self.folder.add_epoch(metrics, self.reconstruct())
        print_epoch(metrics, o.epochs)
        self.epoch, self.totals = epoch, Totals(self.network, self.device)
        checkpoint = self.checkpoint()
        if is_best:  # first, so that a run that is killed between the two does not lose it
            self.write(self.folder.best, checkpoint)
        self.write(self.folder.checkpoint, checkpoint)
        self.has_checkpoint = True

    def train_epoch(self, epoch: int) -> None:
        """Train on the batches of an epoch that are left."""
        steps, totals = len(self.train_batches), self.totals
        seconds_before, start = totals.seconds, time.perf_counter()
        progress = Progress(epoch, self.options.epochs, steps, done=totals.steps)
        batches = self.strategy.batches(self.train_batches, epoch, skip=totals.steps)
        rank, world_size = self.strategy.share
        largest_batch = share_sizes(self.train_batches.sizes()[0], world_size)[rank]
        self.network.train()
        with progress, self.anomaly_mode():
            for step, (images, targets) in enumerate(batches, start=totals.steps + 1):
                alive = partial(tensors_alive, self.network, self.optimizers, images, targets)
                # A smaller last batch runs eagerly: compiling it would cost more than it saves.
                is_small = len(targets) < largest_batch
                with (
                    self.network.eagerly() if is_small else nullcontext(),
                    self.peak.step(len(targets), alive),
                ):
                    train_step(
                        self.network, self.optimizers, images, targets, totals,
                        before_module=partial(self.before_module, epoch, step, progress),
                    )  # fmt: skip
                self.compiling = False
                progress.update()
                if step == steps or step % self.options.print_freq == 0:
                    self.check_losses(totals)
                    self.check_loss_scales(step)
                    has_last = self.network.stage[-1] is self.network.local_modules[-1]
                    progress.show(step, totals.losses(), has_last)
                totals.seconds = seconds_before + time.perf_counter() - start
                INTERRUPTS.defer()
                every = self.options.checkpoint_every
                if every and step % every == 0 and step < steps:
                    self.save()

    def before_module(self, epoch: int, step: int, progress: Progress, module: LocalModule) -> None:
        """Seed dropout by step and module, so that it is the same wherever a run is resumed.

        Without --droprate too: heads and backbones of the user's own may draw numbers.
        """
        self.current_module = module.index
        if self.compiling:
            progress.show_compiling(module.index, len(self.network.local_modules))
        part, parts = self.strategy.share
        seeds = (step, module.index, *([part] if parts > 1 else []))
        seed_generators(epoch_seed(self.options.seed, epoch, *seeds), self.device)

    @contextmanager
    def anomaly_mode(self) -> Iterator[None]:
        """With --detect_anomaly, have torch name the operation whose backward makes a NaN.

        Raises Diverged; torch prints the stack of the forward call before that.
        """
        if not self.options.detect_anomaly:
            yield
            return
        with torch.autograd.set_detect_anomaly(True):
            try:
                yield
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                where = f"module {self.current_module}, step {self.totals.steps + 1}"
                raise Diverged(f"{where} of epoch {self.epoch + 1}: {one_line(error)}") from error

    def evaluate(self, epoch: int, name: str, batches: Batches) -> Totals:
        """Return the sums of a split after an epoch; raise Diverged unless they are finite."""
        title = f"epoch {epoch:3}/{self.options.epochs}  evaluating, {name} batch"
        shown = watched(self.strategy.batches(batches, 0), title, len(batches))
        totals = self.strategy.merge_totals(evaluate(self.network, shown, self.device))
        if bad := totals.first_not_finite():
            raise Diverged(f"the {name} loss of module {bad[0]} is not finite after epoch {epoch}")
        return totals

    def reconstruct(self) -> dict[str, Tensor]:
        """Return the decoders' images of a few test images, on rank 0."""
        if all(module.decoder is None for module in self.network.local_modules):
            return {}
        return self.strategy.gather_images(
            lambda: reconstructions(self.network, self.shown.to(self.device)), len(self.shown)
        )

    def finish(self) -> None:
        """Write the summary, on rank 0; raise CannotSave, or Interrupted if a signal has come."""
        self.peak.bytes = max(self.strategy.all_gather(self.peak.bytes))
        if self.strategy.is_first:
            try:
                summary = self.folder.add_summary(
                    self.peak, device_name(self.device), self.network.parameter_counts(),
                    self.data_bytes,
                )  # fmt: skip
            except OSError as error:
                what = f"cannot write {self.folder.summary}: {one_line(error)}"
                raise CannotSave(what) from error
            print_summary(summary, self.folder.path)
        self.strategy.end_run()

    # Checkpoints

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whose weights the network has already.

        Raises InputError if it is of another network, or in the middle of an epoch of other steps.
        """
        try:
            checkpoint = self.strategy.own_part(checkpoint)
        except (KeyError, TypeError) as error:
            raise InputError(f"the checkpoint's sums are of another run: {error}") from error
        load_momentum(self.optimizers, self.network, checkpoint)
        scalers = [o.scaler for o in self.optimizers if o.scaler.is_enabled()]
        if scalers and checkpoint.scalers:
            if len(scalers) != len(checkpoint.scalers):
                raise InputError("the checkpoint's loss scalers are of another number of modules")
            for scaler, state in zip(scalers, checkpoint.scalers, strict=True):
                scaler.load_state_dict(state)
        self.epoch = checkpoint.epoch
        self.has_checkpoint = self.strategy.broadcast(
            same_file(self.options.resume, self.folder.checkpoint)
        )
        self._compare_data(checkpoint)
        if checkpoint.totals:
            self._check_steps(checkpoint)
        try:
            if checkpoint.totals:
                self.totals.load(checkpoint.totals)
            of_memory = (*PERFORMANCE_OPTIONS, "amp", "batch_size", "tf32", "train_modules")
            if checkpoint.peak and not self._changed(checkpoint, of_memory):
                self.peak.load(checkpoint.peak)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the checkpoint's sums are of another run: {one_line(error)}"
            ) from error

    def _compare_data(self, checkpoint: Checkpoint) -> None:
        """Say which images are not those that the checkpoint was trained and evaluated on.

        Raises InputError where the rest of an epoch would repeat some images and leave out others.
        """
        by_seed = ["seed"] if self.options.val_fraction else []
        if self._changed(checkpoint, [*DATA_OPTIONS, *by_seed]):
            return  # other images were asked for
        words = {"train": "training", "val": "validation", "test": "test"}
        deciding = "val" if "val" in self.data else "test"
        for split, text in changes(checkpoint.data, self.data, self.classes).items():
            text = f"the {words[split]} images are not those of the checkpoint: {text}"
            counts = [data[split]["images"] for data in (checkpoint.data, self.data)]
            if split == "train" and checkpoint.totals and counts[0] != counts[1]:
                raise InputError(
                    f"{text}; it is in the middle of epoch {self.epoch + 1}, which can't go on "
                    "with others: put back what it had, or begin again in another --output_dir"
                )
            if split == deciding and self.folder.history:
                text += f"; error_best compares errors on two {words[split]} sets"
            if self.strategy.is_first:
                note(text)

    def _check_steps(self, checkpoint: Checkpoint) -> None:
        where = f"the checkpoint is in the middle of epoch {self.epoch + 1}"
        if changed := self._changed(checkpoint, BATCH_OPTIONS):
            raise InputError(f"{where}, so {', '.join(changed)} must stay as it was")
        if not 0 < checkpoint.step <= len(self.train_batches):
            raise InputError(
                f"{where}, after step {checkpoint.step} of the {len(self.train_batches)} "
                "that the data make: are they the same?"
            )

    def _changed(self, checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
        return [n for n in names if checkpoint.options.get(n) != getattr(self.options, n)]

    def checkpoint(self) -> Checkpoint:
        """Return all that it takes to continue from here to the same bits, on rank 0."""
        return self.strategy.join_parts(
            Checkpoint(
                epoch=self.epoch,
                state_dict=self.network.state_dict(),
                momentum=momentum_by_name(self.optimizers, self.network),
                options=self.folder.options,
                classes=self.classes,
                scalers=[o.scaler.state_dict() for o in self.optimizers if o.scaler.is_enabled()],
                totals=self.totals.state() if self.totals.steps else {},
                history=self.folder.history,
                peak=self.peak.state(),
                data=self.data,
            )
        )

    def write(self, path: Path, checkpoint: Checkpoint) -> None:
        """Replace a checkpoint file, on rank 0; raise CannotSave."""
        if self.strategy.is_first:
            save_checkpoint(path, checkpoint)

    def save(self) -> None:
        """Replace checkpoint.pt; raise Diverged before that, and CannotSave."""
        self.check_state()
        self.write(self.folder.checkpoint, self.checkpoint())
        self.has_checkpoint = True

    # Divergence

    def check_losses(self, totals: Totals) -> None:
        """Raise Diverged unless the mean losses are finite."""
        if not all(loss is None or math.isfinite(loss) for loss in totals.losses()):
            module, step = totals.first_not_finite()
            raise Diverged(
                f"the loss of module {module} is not finite from step {step} of epoch "
                f"{self.epoch + 1} on"
            )

    def check_loss_scales(self, step: int) -> None:
        """Raise Diverged if float16 keeps a module from stepping."""
        for module, optimizer in zip(self.network.stage, self.optimizers, strict=True):
            scale = optimizer.scaler.get_scale()
            if scale < SMALLEST_SCALE:
                raise Diverged(
                    f"module {module.index} does not train: after step {step} of epoch "
                    f"{self.epoch + 1} its gradients overflow float16 even with a loss scale of "
                    f"{scale:.1g}; --amp bf16 needs no scale"
                )

    def check_state(self) -> None:
        """Raise Diverged unless the losses, and all that a checkpoint keeps, are finite."""
        if self.totals.steps:
            self.check_losses(self.totals)
        for module, optimizer in zip(self.network.stage, self.optimizers, strict=True):
            kept = state_of([module], [optimizer])
            if not torch.stack([tensor.isfinite().all() for tensor in kept]).all():
                steps = f"step {self.totals.steps} of " if self.totals.steps else ""
                epoch = self.epoch + bool(steps)
                raise Diverged(f"module {module.index} is not finite after {steps}epoch {epoch}")
