"""Context supply: the image, or earlier features, added to a module's input (equation 1)."""

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from configs import InputError
from models.checkpointing import encode_in_groups
from models.layers import pool, scaled_width

T = TypeVar("T")


class ContextMode(NamedTuple):
    """The contexts that each cut is supplied with (paper, section 3.2): `Rn`, `E`, `RnE`, ...

    Attributes:
        recent: n, number of the latest module inputs.
        images: letters of IMAGE_ENCODERS, each an encoder of the image.
    """

    recent: int
    images: str

    @classmethod
    def parse(cls, name: str, known: Collection[str] | None = None) -> "ContextMode":
        """Return the mode of a name; raise InputError for an unknown one.

        Args:
            known: letters of encoders; those of IMAGE_ENCODERS if None.
        """
        match = isinstance(name, str) and re.fullmatch(r"R0|(?:R([1-9][0-9]{0,5}))?([A-Z]*)", name)
        letters = (match and match[2]) or ""
        twice = len(set(letters)) < len(letters)
        known = set(IMAGE_ENCODERS if known is None else known)
        if not match or not name or not known.issuperset(letters) or twice:
            raise InputError(
                f"unknown context_mode {name!r}: it is Rn for the n latest module inputs "
                "(R0 for no context), E for the image, or RnE for both"
            )
        return cls(recent=int(match[1] or 0), images=letters)


class Contexts(Generic[T]):
    """The contexts that a cut is supplied with, from cut to cut (README, equation 2).

    The image counts as the input of module 0. So it opens the window of `Rn` and falls out of it
    after n cuts. In `RnE` it is a context of its own, and the window starts empty.

    T is a tensor in a forward pass, a number of channels when encoders are built, and a shape in
    plans. `pushed` and `received` carry all contexts but the image to another process.
    """

    def __init__(self, mode: ContextMode, image: T) -> None:
        self._opening = image
        self._images = {"image" if x == "E" else f"image_{x}": image for x in mode.images}
        self._window = deque([] if mode.images else [image], maxlen=mode.recent)

    def named(self) -> dict[str, T]:
        """Return what is supplied at this cut, by name.

        `image` is for the encoder E, `image_X` for another letter X, and `recent_s` for the s-th
        latest module input, s = 0 being the newest.
        """
        return self._images | {f"recent_{s}": h_in for s, h_in in enumerate(self._window)}

    def push(self, h_in: T) -> None:
        """Put a module's input in front of the window, and drop the oldest."""
        self._window.appendleft(h_in)

    @classmethod
    def received(cls, mode: ContextMode, image: T, pushed: Iterable[T]) -> "Contexts[T]":
        """Return the contexts of which these are the image and what `pushed` gave."""
        contexts = cls(mode, image)
        for h_in in pushed:
            contexts.push(h_in)
        return contexts

    def pushed(self) -> list[T]:
        """Return the module inputs in the window, oldest first, without the image."""
        return [h_in for h_in in reversed(self._window) if h_in is not self._opening]


class Encoder(nn.Sequential):
    """Layers at a context's own size, then an average pool to the cut's size."""

    def forward(self, source: Tensor, size: tuple[int, int], group: int = 0) -> Tensor:
        """Return (N, channels, *size) for a context (N, from_channels, H, W).

        With `group` > 0 the last layer runs that many channels at a time, and the backward
        recomputes the activations. With 0 the plain layers run and keep their activations.
        """
        if group:
            return encode_in_groups(list(self), partial(pool, size=size), source, group)
        return pool(super().forward(source), size)


class ImageEncoder(Encoder):
    """M_E: two 3x3 convs, image (N, 3, H, W) -> (N, channels, *size) (README, equation 3)."""

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
    """M_R: a 1x1 conv, (N, from_channels, H, W) -> (N, channels, *size) (README, equation 4)."""

    def __init__(self, from_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(from_channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


IMAGE_ENCODERS: dict[str, Callable[[int, float], Encoder]] = {"E": ImageEncoder}
"""Letter in `--context_mode` -> (channels, widen) -> encoder of the image (N, 3, H, W)."""


def make_encoder(name: str, from_channels: int, channels: int, widen: float) -> Encoder:
    """Return the encoder of a context that `Contexts.named` offers, for a cut of some channels."""
    kind, _, which = name.partition("_")
    if kind == "recent":
        return RecentEncoder(from_channels, channels)
    return IMAGE_ENCODERS[which or "E"](channels, widen)


class ContextSupply(nn.ModuleDict):
    """Encoders that add each context to the features that enter a module (README, equation 1).

    The encoders belong to the module they supply and train on its loss. Module 0 has none.
    """

    def __init__(
        self, sources: dict[str, int], channels: int, widen: float = 1.0, group: int = 16
    ) -> None:
        super().__init__(
            {
                name: make_encoder(name, from_channels, channels, widen)
                for name, from_channels in sources.items()
            }
        )
        self.group = group

    def forward(self, h: Tensor, contexts: dict[str, Tensor]) -> Tensor:
        """Return h_in (N, C, S, S) for h (N, C, S, S) and the contexts by name, all detached."""
        for name, encoder in self.items():
            context = encoder(contexts[name], h.shape[-2:], self.group)
            # Autograd has saved a plain encoder's output for its ReLU, but not a grouped one's.
            is_fresh = self.group > 0 and context is not contexts[name]
            in_place = is_fresh and context.dtype == h.dtype
            h = context.add_(h) if in_place else h + context
        return h
