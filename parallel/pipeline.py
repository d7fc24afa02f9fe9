"""`--parallel modules`: each process trains a range of the modules, and features travel on.

Module l needs for batch t what module l-1 makes of batch t, and no later update changes that. So
process r works on batch t-r while those before it work on later ones. None waits for a backward,
no weight is stale, and every module computes what it would in one process.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.checkpoint import Checkpoint
from models import ContSupNetwork
from parallel.process_group import ALIVE_TIMEOUT
from parallel.stages import (
    balanced_ranges,
    check_count,
    check_ranges,
    format_range,
    module_times,
)
from parallel.strategy import ParallelStrategy
from parallel.transfer import IN_FLIGHT, FeatureSpec, Link, crossing


class PipelineStrategy(ParallelStrategy):
    """Each process trains a contiguous range of the modules, and reads all images.

    Attributes:
        ranges: modules of each process, by rank.
        times: seconds of a step of each module, where they were measured.
    """

    warm_up = IN_FLIGHT + 1

    def divide(
        self, options: argparse.Namespace, arguments: dict[str, Any], device: torch.device
    ) -> None:
        """Choose the ranges, by measured times or `--module_ranges`, and connect the processes.

        Raises InputError if there are more processes than modules, or the ranges do not fit.
        """
        K, self.times = arguments["local_module_num"], None
        if options.module_ranges:
            check_ranges(options.module_ranges, K, self.size)
            self.ranges = options.module_ranges
        else:
            check_count(K, self.size)
            if self.size > 1 and not options.evaluate:
                self.times = self.on_first(lambda: module_times(arguments, options, device))
            self.ranges = balanced_ranges(self.times or [1.0] * K, self.size)
        cuts = crossing(arguments, device, options.channels_last)
        self.link = self._connect(cuts, device, arguments["momentum_aux"] is not None)
        self.waits = self.link.waits

    def _connect(
        self, cuts: Sequence[Sequence[FeatureSpec]], device: torch.device, sends_back: bool
    ) -> Link:
        # A group for each cut: its transfers wait for no other cut's, and for no stop signal.
        def groups() -> list[dist.ProcessGroup]:
            pairs = ([rank, rank + 1] for rank in range(self.size - 1))
            return [dist.new_group(pair, timeout=ALIVE_TIMEOUT) for pair in pairs]

        pairs, pairs_back = groups(), groups() if sends_back else []
        own, before, after = self.ranges[self.rank], self.rank - 1, self.rank + 1
        incoming = receive = outgoing = send = receive_back = send_back = None
        if self.rank > 0:
            incoming = cuts[own.start - 1]
            receive = partial(dist.irecv, src=before, group=pairs[before])
        if self.rank < self.size - 1:
            outgoing = cuts[own.stop - 1]
            send = partial(dist.isend, dst=after, group=pairs[self.rank])
        if self.rank > 0 and sends_back:
            send_back = partial(dist.isend, dst=before, group=pairs_back[before])
        if self.rank < self.size - 1 and sends_back:
            receive_back = partial(dist.irecv, src=after, group=pairs_back[self.rank])
        return Link(device, incoming, receive, outgoing, send, receive_back, send_back)

    def describe(self) -> dict[str, Any]:
        ranges = [format_range(modules) for modules in self.ranges]
        return {"processes": self.size, "strategy": "modules", "ranges": ranges}

    def __str__(self) -> str:
        parts = [f"{format_range(modules)} on rank {r}" for r, modules in enumerate(self.ranges)]
        text = "modules " + ", ".join(parts)
        if self.times:
            sums = [1000 * sum(self.times[i] for i in modules) for modules in self.ranges]
            text += f"; measured ms a step: {', '.join(f'{ms:.0f}' for ms in sums)}"
        return text

    def place(
        self, network: ContSupNetwork, options: argparse.Namespace, device: torch.device
    ) -> None:
        own = self.ranges[self.rank]
        network.set_stage(own, self.link)
        for index, module in enumerate(network.local_modules):
            if index not in own:
                module.to("meta")  # where it takes no memory
        super().place(network, options, device)

    def begin(self, sizes: Sequence[int]) -> None:
        self.link.begin(sizes)

    def begin_batch(self, size: int, is_last: bool) -> None:
        if is_last:
            self.link.expect_no_more()

    def end(self) -> None:
        self.link.flush()

    def merge_states(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Concatenate the modules' sums; the time is the longest."""
        sums = {
            name: torch.cat([part[name] for part in parts])
            for name, value in parts[0].items()
            if isinstance(value, Tensor)
        }
        return {**parts[0], **sums, "seconds": max(part["seconds"] for part in parts)}

    def split(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with the scalers and sums of this rank's modules."""
        modules = self.ranges[self.rank]
        own = slice(modules.start, modules.stop)
        totals = {
            name: value[own] if isinstance(value, Tensor) and value.dim() else value
            for name, value in checkpoint.totals.items()
        }
        return checkpoint._replace(totals=totals, scalers=checkpoint.scalers[own])
