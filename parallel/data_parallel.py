"""`--parallel data`: every rank trains all modules on a part of each batch.

torch's DistributedDataParallel averages a module's gradients over the ranks in that module's
backward, so all ranks take the same steps. With `--sync_bn` BatchNorm takes the statistics of the
batch, and the training is that of one process but for the order of sums.
"""

import argparse
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs import InputError
from dataloaders import share_sizes
from engine.checkpoint import Checkpoint
from losses import TaskLoss
from models import ContSupNetwork, LocalModule
from models.torch_internals import keep_graphs_whole
from parallel.strategy import ParallelStrategy
from parallel.sync_batchnorm import gather_rows, synchronise


class SharedBatch:
    """The batch of the current step, of which each rank has a part.

    Attributes:
        rank, number: this rank and how many there are.
        sizes: samples of each rank's part; known on the host, so that nobody waits for a device.
    """

    def __init__(self) -> None:
        self.rank, self.number = dist.get_rank(), dist.get_world_size()
        self.sizes = [0] * self.number

    def check(self, own: int) -> None:
        """Raise ValueError unless the part of this rank has `own` samples."""
        if own != self.sizes[self.rank]:
            raise ValueError(
                f"a part of {own} samples, not {self.sizes[self.rank]}: call begin_batch first"
            )

    def weight(self) -> float:
        """Return world size * own samples / all samples.

        DistributedDataParallel divides by the world size, so every sample weighs the same.
        """
        return self.sizes[self.rank] * self.number / sum(self.sizes)

    def weigh(self, *losses: Tensor | None) -> None:
        """Have the gradients of 0-d losses multiplied by the weight."""
        weight = self.weight()
        for loss in losses:
            if loss is not None and weight != 1:
                loss.register_hook(lambda grad: grad * weight)

    def compare_with_all(self, task: TaskLoss) -> TaskLoss:
        """Return a loss that compares this rank's samples with those of all ranks."""

        def function(embeddings: Tensor, targets: Tensor) -> Tensor:
            first, total = sum(self.sizes[: self.rank]), sum(self.sizes)
            candidates = gather_rows(embeddings, first, total), gather_rows(targets, first, total)
            return task.function(embeddings, targets, candidates=candidates, first_row=first)

        return task._replace(function=function)


class DataParallelStrategy(ParallelStrategy):
    """Each process trains all modules on its part of each batch.

    Gradients are averaged before a GradScaler looks at them. So with float16 all ranks skip the
    same steps, and their scales stay the same.
    """

    def divide(
        self, options: argparse.Namespace, arguments: dict[str, Any], device: torch.device
    ) -> None:
        """Set this rank's part of a batch.

        Raises InputError if --sync_bn is to be compiled.
        """
        if options.sync_bn and options.compile:
            raise InputError("--sync_bn and --compile exclude each other: leave one of them out")
        self.sync_bn, self.batch = options.sync_bn, SharedBatch()
        self.share = self.rank, self.size

    def describe(self) -> dict[str, Any]:
        return {"processes": self.size, "strategy": "data", "sync_bn": self.sync_bn}

    def __str__(self) -> str:
        statistics = "all of the batch" if self.sync_bn else "its own part"
        return (f"each batch in {self.size} parts, one a process; BatchNorm takes statistics of "
                f"{statistics}")  # fmt: skip

    def place(
        self, network: ContSupNetwork, options: argparse.Namespace, device: torch.device
    ) -> None:
        """Move the network to the device, and wrap each module's step in DistributedDataParallel.

        Weights and statistics become those of rank 0. Names in the network's state_dict stay.
        """
        super().place(network, options, device)
        self._broadcast_buffers(network)
        # The weight of a 1x1 convolution and its gradient may differ in the strides of sizes 1.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        for module in network.stage:
            if self.sync_bn:
                synchronise(module)
            for head in filter(None, (module.head, module.own_head)):
                if head.task.compares_samples:
                    head.task = self.batch.compare_with_all(head.task)
            if network.overlap_weight is not None:
                _weigh_losses(module, self.batch)
            elif not module.frozen:
                _wrap_step(module, self.batch)
        if network.overlap_weight is not None:
            for parameter in network.parameters():
                dist.broadcast(parameter.detach(), src=0)
            network.average_gradients = _average_gradients
        if network.compiled:
            keep_graphs_whole()

    def begin_batch(self, size: int, is_last: bool) -> None:
        self.batch.sizes = share_sizes(size, self.size)

    def end(self) -> None:
        """Give all ranks the running statistics of rank 0; without sync_bn they differ."""
        self._broadcast_buffers(self.network)

    def _broadcast_buffers(self, network: ContSupNetwork) -> None:
        for module in network.stage:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def merge_states(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Add the sums of all samples; a loss is finite where all parts of it are."""
        finite = torch.stack([part["finite_steps"] for part in parts]).amin(0)
        sums = {name: sum(part[name] for part in parts) for name in ("losses", "wrong", "samples")}
        seconds = max(part["seconds"] for part in parts)
        return {**parts[0], **sums, "finite_steps": finite, "seconds": seconds}

    def state_to_send(self, own: Checkpoint) -> Checkpoint:
        """Return the sums alone on all but rank 0: the rest is the same on all ranks."""
        return own if self.is_first else own._replace(state_dict={}, momentum={}, scalers=())

    def split(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return totals whose sum over the ranks is the saved one.

        Rank 0 keeps losses and errors and others get zeros. The samples are divided.
        """
        totals = dict(checkpoint.totals)
        if totals:
            rank, number = self.share
            totals["samples"] = share_sizes(totals["samples"], number)[rank]
            if rank:
                totals |= {name: totals[name] * 0 for name in ("losses", "wrong")}
        return checkpoint._replace(totals=totals)


class _Step(nn.Module):
    """The training step of a local module, as a module that has its parameters.

    Those of its context encoders are among them. They run before the step, but get their gradients
    in the same backward.
    """

    def __init__(self, module: LocalModule, batch: SharedBatch) -> None:
        super().__init__()
        self.local_module, self.batch = module, batch
        self.run = module.forward_and_losses

    def forward(
        self, h_in: Tensor, targets: Tensor, pixels: Tensor | None, *before: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Run `LocalModule.forward_and_losses`, and weight the gradients of the losses.

        With a weight of (own samples) * ranks / (all samples), DistributedDataParallel's mean over
        the ranks is the mean over the batch. It is applied to the losses' gradients, since later
        parts of the backward (sync_bn, the contrastive loss) sum over the ranks already.
        """
        self.batch.check(len(targets))
        h_out, output, *parts = self.run(h_in, targets, pixels, *before)
        self.batch.weigh(*parts)
        return h_out, output, *parts


def _wrap_step(module: LocalModule, batch: SharedBatch) -> None:
    """Have a module's training step average its gradients over the ranks.

    The gradients are views into the buffer that DistributedDataParallel keeps, so that they take
    no memory of their own.
    """
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    step = DistributedDataParallel(_Step(module, batch), gradient_as_bucket_view=True, **buffers)
    # A bound method is not registered as a submodule, so the names in the state_dict stay.
    module.forward_and_losses = step.__call__


def _weigh_losses(module: LocalModule, batch: SharedBatch) -> None:
    """Weigh the gradients of a module's losses in windows, as `_Step` does."""
    losses, own_loss = module.losses, module.own_loss

    def weighed_losses(h_out: Tensor, targets: Tensor, pixels: Tensor | None) -> tuple:
        batch.check(len(targets))
        output, *parts = losses(h_out, targets, pixels)
        batch.weigh(*parts)
        return output, *parts

    def weighed_own_loss(h_out: Tensor, targets: Tensor) -> Tensor:
        loss = own_loss(h_out, targets)
        batch.weigh(loss)
        return loss

    module.losses, module.own_loss = weighed_losses, weighed_own_loss


def _average_gradients(module: LocalModule) -> None:
    """Average a module's gradients over the ranks.

    A window's backward runs twice through a module, which DistributedDataParallel does not expect.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    mean = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    for grad, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        grad.copy_(part.view(grad.shape))
