"""`--parallel modules`: the features that travel from one process to the next."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import InputError
from engine.device import memory_format, wait_for
from models import build_network
from models.context import ContextMode
from models.network import ForwardState, StageIO
from models.torch_internals import FakeTensorMode, hidden_from_profiler

IN_FLIGHT = 2
"""Batches whose features may be in transit to the next process at once."""


class FeatureSpec(NamedTuple):
    """Shape of one sample, dtype and memory format of a tensor that crosses a cut.

    Features are (N, C, S, S); a prediction (`--consistency`) is (N, classes).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format

    @classmethod
    def of(cls, tensor: Tensor) -> "FeatureSpec":
        """Return the spec of a tensor whose first dimension is the samples."""
        is_map = tensor.dim() == 4
        is_channels_last = is_map and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        return cls(tuple(tensor.shape[1:]), tensor.dtype, layout)

    def empty(self, samples: int, device: torch.device) -> Tensor:
        """Return an uninitialised tensor for this many samples."""
        shape, layout = (samples, *self.shape), self.memory_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)

    def matched(self, tensor: Tensor) -> Tensor:
        """Return a tensor in this memory format; raise RuntimeError if shape or dtype differ."""
        if tuple(tensor.shape[1:]) != self.shape or tensor.dtype != self.dtype:
            raise RuntimeError(f"{FeatureSpec.of(tensor)} crosses a cut where {self} should")
        return tensor.contiguous(memory_format=self.memory_format)

    def contiguous_view(self, tensor: Tensor) -> Tensor:
        """Return a contiguous view of a tensor in this memory format, for torch.distributed."""
        is_channels_last = self.memory_format is torch.channels_last
        return tensor.permute(0, 2, 3, 1) if is_channels_last else tensor

    def nbytes(self, samples: int) -> int:
        """Return the bytes of this many samples."""
        return samples * torch.Size(self.shape).numel() * self.dtype.itemsize


def crossing(
    arguments: dict[str, Any], device: torch.device, channels_last: bool
) -> list[list[FeatureSpec]]:
    """Return, for each cut, the specs of the tensors that cross it.

    These are the features, then the module inputs in the window of `Rn`, oldest first. The images
    and labels do not cross: every process reads them. No tensor is allocated for this.

    Args:
        arguments: of `build_network`.
    Raises:
        InputError: a context of the user's own does not cross as it is.
    """
    with FakeTensorMode(), torch.no_grad(), device:
        network = build_network(**arguments)
        size = arguments["image_size"]
        images = torch.empty(2, 3, size, size, memory_format=memory_format(channels_last))
        recorder = _Recorder()
        for index in range(len(network.eval().local_modules)):
            network.set_stage(range(index, index + 1), recorder)
            for _ in network.features(images):
                pass
        return [[FeatureSpec.of(tensor) for tensor in tensors] for tensors in recorder.sent[:-1]]


class _Recorder(StageIO):
    """Runs the modules one stage at a time, and records what each sends to the next."""

    def __init__(self) -> None:
        self.sent: list[list[Tensor]] = []
        self.offered: dict[str, Tensor] = {}

    def receive(self, mode: ContextMode, images: Tensor) -> ForwardState:
        if not self.sent:
            return super().receive(mode, images)
        state = ForwardState.received(mode, images, self.sent[-1])
        received = state.contexts.named()
        for name in self.offered.keys() | received.keys():
            if received.get(name) is not self.offered.get(name):
                raise InputError(
                    f"the context {name} does not reach the next process as it is: have "
                    "Contexts.pushed and Contexts.received carry it"
                )
        return state

    def send(self, state: ForwardState) -> None:
        self.sent.append(state.tensors())
        self.offered = state.contexts.named()


class Link(StageIO):
    """Receives features from the process before, and sends them to the next.

    The next batch's features are being received while this batch trains, and this batch's are sent
    during the backward. In one group traffic goes one way: a message back could wait for such a
    receive forever. So what `--momentum_aux` sends back, once a step, has groups of its own.

    Args:
        device: of the features.
        incoming: specs of what the process before sends; None for the first process.
        receive: `dist.irecv` from the process before: contiguous tensor -> Work.
        outgoing: specs of what the next process expects; None for the last process.
        send: `dist.isend` to the next process: contiguous tensor -> Work.
        receive_back, send_back: the same from the next process, and to the one before.
    """

    def __init__(
        self,
        device: torch.device,
        incoming: Sequence[FeatureSpec] | None,
        receive: Callable[[Tensor], dist.Work] | None,
        outgoing: Sequence[FeatureSpec] | None,
        send: Callable[[Tensor], dist.Work] | None,
        receive_back: Callable[[Tensor], dist.Work] | None = None,
        send_back: Callable[[Tensor], dist.Work] | None = None,
    ) -> None:
        self.device, self.incoming, self.outgoing = device, incoming, outgoing
        self._receive, self._send = receive, send
        self._receive_back, self._send_back = receive_back, send_back
        self.waits = DeviceWaits(device)
        self._sizes: deque[int] = deque()
        self._coming: deque[tuple[list[Tensor], list[dist.Work]]] = deque()
        self._going: deque[tuple[list[Tensor], list[dist.Work]]] = deque()
        self._going_back: deque[tuple[Tensor, dist.Work]] = deque()

    def begin(self, sizes: Sequence[int]) -> None:
        """Expect batches of these sizes, one after the other."""
        self._sizes = deque(sizes)
        self._expect()

    def expect_no_more(self) -> None:
        """Expect no batch after the one that is being received or trained on."""
        self._sizes.clear()

    def receive(self, mode: ContextMode, images: Tensor) -> ForwardState:
        if self.incoming is None:
            return super().receive(mode, images)
        tensors, works = self._coming.popleft()
        self._wait(works)
        self._expect()
        return ForwardState.received(mode, images, tensors)

    def send(self, state: ForwardState) -> None:
        if self.outgoing is None:
            return
        if len(self._going) == IN_FLIGHT:
            self._wait(self._going.popleft()[1])
        specs_and_tensors = zip(self.outgoing, state.tensors(), strict=True)
        pieces = [spec.contiguous_view(spec.matched(tensor)) for spec, tensor in specs_and_tensors]
        with hidden_from_profiler():
            self._going.append((pieces, [self._send(piece) for piece in pieces]))

    def send_back(self, block: nn.Module) -> None:
        self._finish_back()
        weights = torch.cat([p.detach().flatten() for p in block.parameters()])
        with hidden_from_profiler():
            self._going_back.append((weights, self._send_back(weights)))

    def receive_back(self, like: Sequence[Tensor]) -> list[Tensor]:
        sizes = [tensor.numel() for tensor in like]
        weights = torch.empty(sum(sizes), dtype=like[0].dtype, device=self.device)
        with hidden_from_profiler():
            work = self._receive_back(weights)
        self._wait([work])
        parts = zip(weights.split(sizes), like, strict=True)
        return [part.view(tensor.shape) for part, tensor in parts]

    def in_flight(self) -> list[Tensor]:
        """Return what was received ahead of time, and what has not been sent."""
        features = [t for tensors, _ in (*self._coming, *self._going) for t in tensors]
        return [*features, *(weights for weights, _ in self._going_back)]

    def flush(self) -> None:
        """Wait until everything has been sent."""
        while self._going:
            self._wait(self._going.popleft()[1])
        self._finish_back()

    def _finish_back(self) -> None:
        while self._going_back:
            self._wait([self._going_back.popleft()[1]])

    def _expect(self) -> None:
        if self.incoming is None or not self._sizes:
            return
        samples = self._sizes.popleft()
        tensors = [spec.empty(samples, self.device) for spec in self.incoming]
        with hidden_from_profiler():
            works = [
                self._receive(spec.contiguous_view(tensor))
                for spec, tensor in zip(self.incoming, tensors, strict=True)
            ]
        self._coming.append((tensors, works))

    def _wait(self, works: Sequence[dist.Work]) -> None:
        with self.waits:
            for work in works:
                work.wait()


class DeviceWaits:
    """Measures how long the device waits inside the `with`: on CUDA its stream, not the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waits: list[tuple[Any, Any]] = []  # start and end: seconds, or CUDA events

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception: object) -> None:
        self._waits.append((self._start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the seconds since the last call; wait for the device."""
        waits, self._waits = self._waits, []
        if self.device.type != "cuda":
            return sum(end - start for start, end in waits)
        wait_for(self.device)
        return sum(start.elapsed_time(end) for start, end in waits) / 1000
