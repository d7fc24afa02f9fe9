"""Context supply: what a module sees besides the output of the one before (README, equation 1)."""

import re
from collections import deque
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import InputError
from models.auxiliary import scaled_width
from models.checkpointing import encode_in_groups

T = TypeVar("T")


class ContextMode(NamedTuple):
    """`Rn` or `RnE` supply the `recent` = n latest module inputs, `E` and `RnE` the `image`."""

    recent: int
    image: bool

    @classmethod
    def parse(cls, name: str) -> "ContextMode":
        """`R0`, `E`, `R2`, `R1E`, ... -> ContextMode; InputError for any other name."""
        match = isinstance(name, str) and re.fullmatch(r"(?:R(0|[1-9][0-9]{0,5}))?(E?)", name)
        if not match or not name:
            raise InputError(
                f"unknown context_mode {name!r}: it is Rn for the n latest module inputs "
                "(R0 for no context), E for the image, or RnE for both"
            )
        return cls(recent=int(match[1] or 0), image=bool(match[2]))


class Contexts(Generic[T]):
    """The contexts on offer at a cut, by name; moves on from cut to cut.

    The image counts as the input of module 0. So it opens the window of `Rn` and falls out of it
    after n cuts; in `RnE`, where it comes as a context of its own, the window starts empty.

    T is a tensor during a forward pass and a number of channels when encoders are built: what
    is supplied where is said here once.
    """

    def __init__(self, mode: ContextMode, image: T) -> None:
        self._opening = image
        self._image = {"image": image} if mode.image else {}
        self._window = deque([] if mode.image else [image], maxlen=mode.recent)

    def named(self) -> dict[str, T]:
        """`image`, and `recent_s` for the s-th latest module input, s = 0 being the newest."""
        return self._image | {f"recent_{s}": h_in for s, h_in in enumerate(self._window)}

    def push(self, h_in: T) -> None:
        """Add a module's input, at the next cut the newest, and drop the oldest."""
        self._window.appendleft(h_in)

    def pushed(self) -> list[T]:
        """What of the window was pushed, oldest first: all of it but the image."""
        return [h_in for h_in in reversed(self._window) if h_in is not self._opening]


class Encoder(nn.Sequential):
    """Layers at a context's own size, then an average pool to the cut's size."""

    def forward(self, source: Tensor, size: tuple[int, int], group: int = 0) -> Tensor:
        """Context (N, from_channels, H, W) -> (N, channels, *size).

        With `group` > 0 the last layer runs that many channels at a time, and the backward computes
        the maps again; with 0 it is the plain layers, which keep theirs.
        """
        if group:
            return encode_in_groups(list(self), partial(pool, size=size), source, group)
        return pool(super().forward(source), size)


class ImageEncoder(Encoder):
    """M_E: image (N, 3, H, W) -> (N, channels, *size); two 3x3 convs."""

    def __init__(self, channels: int, widen: float = 1.0) -> None:
        width = scaled_width(12, widen)
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class RecentEncoder(Encoder):
    """M_R: earlier module input (N, from_channels, H, W) -> (N, channels, *size); a 1x1 conv."""

    def __init__(self, from_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(from_channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class ContextSupply(nn.ModuleDict):
    """Adds each named context, encoded, to the features that enter a module (README, equation 1).

    The encoders belong to the module they supply and train on its loss. Module 0 has none.
    """

    def __init__(
        self, sources: dict[str, int], channels: int, widen: float = 1.0, group: int = 16
    ) -> None:
        super().__init__(
            {
                name: ImageEncoder(channels, widen)
                if name == "image"
                else RecentEncoder(from_channels, channels)
                for name, from_channels in sources.items()
            }
        )
        self.group = group

    def forward(self, h: Tensor, contexts: dict[str, Tensor]) -> Tensor:
        """h (N, C, S, S) and the contexts, all detached -> h_in (N, C, S, S)."""
        for name, encoder in self.items():
            context = encoder(contexts[name], h.shape[-2:], self.group)
            # In groups the context is nobody else's; a plain encoder's ReLU has saved it.
            in_place = self.group and context.dtype == h.dtype
            h = context.add_(h) if in_place else h + context
        return h


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average pool to `size`; x itself where it has that already."""
    if x.shape[-2:] == size:
        return x
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = _averages(x, size)
        return rows @ x @ columns.T
    return F.adaptive_avg_pool2d(x, size)


def _averages(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Matrices (S, H) and (S, W) that pool x (N, C, H, W) as adaptive pooling does.

    Its backward on CUDA adds in any order; that of a matrix product does not.
    """
    matrices = []
    for count, total in zip(size, x.shape[-2:], strict=True):
        row = torch.arange(count, device=x.device)[:, None]
        column = torch.arange(total, device=x.device)
        averaged = (column >= row * total // count) & (column * count < (row + 1) * total)
        weights = averaged.to(x.dtype)
        matrices.append(weights / weights.sum(1, keepdim=True))
    return matrices
