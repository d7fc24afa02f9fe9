"""Local heads and decoders. Training needs them, and inference drops all but the last head."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import InputError
from losses import CROSS_ENTROPY, TaskLoss, reconstruction_loss, similarity_matching
from models.checkpointing import checkpoint_unit
from models.layers import Pool, scaled_width, to_float32
from models.resnet import BasicBlock


class Head(nn.Sequential):
    """Layers from a module's features (N, C, S, S) to the head's output (N, D), and its loss.

    Attributes:
        task: the loss of the output.
        recompute: activation checkpointing of its residual blocks.
    """

    task: TaskLoss = CROSS_ENTROPY
    recompute = False

    @property
    def classifies(self) -> bool:
        """Whether the output is a logit per class."""
        return self.task.classifies

    def set_task(self, task: TaskLoss) -> None:
        """Take this loss; raise InputError from a head that has one of its own."""
        self.task = task

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            is_block = isinstance(layer, BasicBlock)
            features = (
                checkpoint_unit(layer, features) if self.recompute and is_block else layer(features)
            )
        return features

    def loss(self, features: Tensor, targets: Tensor, *before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the 0-d loss (equation 8) and the output (N, D), both float32 under autocast.

        Args:
            targets: (N,) class indices.
            before: for a task that `follows`, the prediction (N, D) of the module before.
        """
        output = to_float32(self(features))
        with torch.autocast(features.device.type, enabled=False):
            return self.task.function(output, targets, *before), output


class Place(NamedTuple):
    """Where a head stands, and what it has to give out.

    Attributes:
        channels, size: C and S of the features (N, C, S, S) that enter.
        outputs: number of classes, or width of the embedding.
        widen: w, factor of the widths of convs and hidden linear layers.
        feature_dim: f; hidden linear layers of `AcBf` are f*w wide.
        unit: index of the unit that the head follows, from 0.
        later_widths: channels of the units after that one.
        depth: residual blocks of an `auglocal` head.
    """

    channels: int
    size: int
    outputs: int
    widen: float = 1.0
    feature_dim: int = 128
    unit: int = 0
    later_widths: Sequence[int] = ()
    depth: int | None = None


def real_head(channels: int, num_classes: int) -> Head:
    """Return global average pool and linear layer: (N, C, S, S) -> logits (N, num_classes)."""
    return Head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


# ---------------------------------------------------------------------------------------------
# Auxiliary heads


def conv_linear_head(match: re.Match, place: Place) -> Head:
    """Return an `AcBf` head: A times conv3x3-BN-ReLU, global average pool, B linear layers.

    There is a ReLU between linear layers. Convs are 32w wide on 16 channels, else 64w; the
    first one has stride 2 on fewer than 64 channels. Hidden linear layers are f*w wide. Fractions
    of a width are truncated.
    """
    convs, linears, channels = int(match[1]), int(match[2]), place.channels
    base_width = 32 if channels == 16 else 64
    layers: list[nn.Module] = []
    for i in range(convs):
        conv_width = scaled_width(base_width, place.widen)
        stride = 2 if i == 0 and channels < 64 else 1
        layers += [
            nn.Conv2d(channels, conv_width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(conv_width),
            nn.ReLU(inplace=True),
        ]
        channels = conv_width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(linears - 1):
        hidden = scaled_width(place.feature_dim, place.widen)
        layers += [nn.Linear(channels, hidden), nn.ReLU(inplace=True)]
        channels = hidden
    layers.append(nn.Linear(channels, place.outputs))
    return Head(*layers)


def mlp_sr_head(match: re.Match, place: Place) -> Head:
    """Return DGL's head `mlp-sr` as AugLocal's release has it (docs/methods.md).

    Pool to ceil(S/4); 3 times conv1x1-BN-ReLU of Cw channels; pool to 2; 2 times linear-BN-ReLU
    4Cw wide, without bias; linear.
    """
    width = scaled_width(place.channels, place.widen)
    hidden, from_channels = 4 * width, place.channels
    layers: list[nn.Module] = [Pool(math.ceil(place.size / 4))]
    for _ in range(3):
        layers += _conv1x1(from_channels, width)
        from_channels = width
    layers += [Pool(2), nn.Flatten()]
    for _ in range(2):
        linear = nn.Linear(hidden, hidden, bias=False)
        layers += [linear, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return Head(*layers, nn.Linear(hidden, place.outputs))


def mlp_sr_512_head(match: re.Match, place: Place) -> Head:
    """Return `mlp-sr-512`, the head that the MAN++ release calls DGL (docs/methods.md).

    Pool to 8; 3 times conv1x1-BN-ReLU of 128w channels; global average pool; 3 times
    linear-BN-ReLU 512w wide; linear.
    """
    width, hidden = scaled_width(128, place.widen), scaled_width(512, place.widen)
    layers: list[nn.Module] = [Pool(8)]
    for from_channels in (place.channels, width, width):
        layers += _conv1x1(from_channels, width)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for inputs in (width, hidden, hidden):
        layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return Head(*layers, nn.Linear(hidden, place.outputs))


def _conv1x1(from_channels: int, channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(from_channels, channels, 1, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class PredSim(Head):
    """A linear classifier on pooled features, beside similarity matching of a conv (PredSim).

    The loss is 0.01 cross entropy + 0.99 similarity matching.
    """

    INPUTS = 512
    """Of the linear layer, at most."""

    def __init__(self, place: Place) -> None:
        channels, size = place.channels, place.size
        if size < 2:
            raise InputError("the head predsim compares positions, and these features have one")
        kernel, pooled = [1, 1], [size, size]
        for axis in (0, 1) * size.bit_length():
            if channels * pooled[0] * pooled[1] > self.INPUTS and kernel[axis] < size:
                kernel[axis] *= 2
                pooled[axis] = math.ceil(size / kernel[axis])
        padding = [k * (math.ceil(size / k) - size // k) // 2 for k in kernel]
        super().__init__(
            nn.AvgPool2d(tuple(kernel), padding=tuple(padding)),
            nn.Flatten(),
            nn.Linear(channels * pooled[0] * pooled[1], place.outputs),
        )
        self.similarity = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.task = TaskLoss(
            partial(similarity_matching, classes=place.outputs),
            classifies=False, compares_samples=True,
        )  # fmt: skip

    @property
    def classifies(self) -> bool:
        """The output is the classifier's, although `task` compares embeddings."""
        return True

    def set_task(self, task: TaskLoss) -> None:
        """Raise InputError for another loss than cross entropy, which is the classifier's."""
        if task is not CROSS_ENTROPY:
            raise InputError(
                "the head predsim has losses of its own: give local_loss_mode cross_entropy, and "
                "no consistency"
            )

    def forward(self, features: Tensor) -> Tensor:
        for layer in list(self)[:3]:
            features = layer(features)
        return features

    def loss(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted 0-d loss and the logits (N, classes)."""
        logits = to_float32(self(features))
        maps = to_float32(self.similarity(features))
        with torch.autocast(features.device.type, enabled=False):
            spread = maps.flatten(2).std(dim=2)
            parts = F.cross_entropy(logits, targets), self.task.function(spread, targets)
            return 0.01 * parts[0] + 0.99 * parts[1], logits


def later_blocks_head(match: re.Match, place: Place) -> Head:
    """Return AugLocal's head: blocks as wide as some of the net's later units, pool, linear.

    Of the M later units, counted from unit u, it copies units round(u + M i/d), i = 1 .. d, half
    to even. A block has stride 2 where the widths since the last stride have doubled.
    """
    later, d, unit = place.later_widths, place.depth, place.unit
    if not later:
        raise InputError("the head auglocal copies later units, and behind the last there is none")
    if d is None or not 1 <= d <= len(later):
        raise InputError(
            f"the head auglocal copies later units of the net: its depth is 1 to {len(later)} "
            f"after this unit, not {d}"
        )
    layers: list[nn.Module] = []
    channels, doublings = place.channels, 0.0
    for i in range(1, d + 1):
        width = later[_round(unit * d + len(later) * i, d) - unit - 1]
        doublings += math.log2(width / channels)
        stride = 2 if doublings >= 1 else 1
        doublings -= stride - 1
        layers.append(BasicBlock(channels, width, stride, droprate=0.0))
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.BatchNorm1d(channels)] if d == 1 else []
    return Head(*layers, nn.Linear(channels, place.outputs))


def later_blocks_depth(depth: int, taper: float, index: int, K: int) -> int:
    """Return d_l of module l = `index` of K: max(1, round(d (1-t) + t)), t = l taper / (K-2)."""
    t = index * taper / (K - 2) if K > 2 else 0.0
    return max(1, round(depth * (1 - t) + t))


def _round(numerator: int, denominator: int) -> int:
    """Return the nearest whole number of a fraction, a half to the even one."""
    down, rest = divmod(numerator, denominator)
    return down + (2 * rest > denominator or (2 * rest == denominator and down % 2))


HEADS: dict[str, Callable[[re.Match, Place], Head]] = {
    r"([0-9])c([1-9])f": conv_linear_head,
    "mlp-sr": mlp_sr_head,
    "mlp-sr-512": mlp_sr_512_head,
    "predsim": lambda match, place: PredSim(place),
    "auglocal": later_blocks_head,
}
"""`--aux_net_config`: pattern of a name -> (match, place) -> head."""


def find_head(config: str) -> tuple[re.Match, Callable[[re.Match, Place], Head]]:
    """Return the match and the builder of a head's name; raise InputError for an unknown name."""
    for pattern, build in HEADS.items():
        if isinstance(config, str) and (match := re.fullmatch(pattern, config)):
            return match, build
    named = ", ".join(name for name in HEADS if re.fullmatch(r"[\w-]+", name))
    raise InputError(
        f"unknown aux_net_config {config!r}: it is AcBf for A convs and B linear layers, e.g. "
        f"0c1f, 1c2f or 2c2f, or one of {named}"
    )


def build_head(
    config: str,
    *,
    channels: int,
    size: int,
    outputs: int,
    later_widths: Sequence[int] = (),
    depth: int | None = None,
    widen: float = 1.0,
    feature_dim: int = 128,
    unit: int | None = None,
    task: TaskLoss = CROSS_ENTROPY,
) -> Head:
    """Return an auxiliary head on a module's output: (N, channels, size, size) -> (N, outputs).

    Args:
        config: name of an entry in HEADS.
        channels, size, outputs, later_widths, depth, widen, feature_dim, unit: see `Place`. By
            default `unit` is that of a ResNet of depth 6n+2 whose last n units are as wide as the
            last one.
        task: loss of the head's output.
    Raises:
        InputError: the name is unknown, a width truncates to 0, or the head does not fit the place
            or the task.
    """
    match, build = find_head(config)
    later = list(later_widths)
    if unit is None:
        unit = 3 * later.count(later[-1]) - len(later) if later else 0
    head = build(match, Place(channels, size, outputs, widen, feature_dim, unit, later, depth))
    if type(head) is nn.Sequential:
        head = Head(*head)
    if not isinstance(head, Head):
        raise InputError(f"the head {config} is a {type(head).__name__}, no models.auxiliary.Head")
    head.set_task(task)
    return head


# ---------------------------------------------------------------------------------------------
# Decoders


class Decoder(nn.Sequential):
    """Two convs that reconstruct the image (`--h_reconstruct`; README, equation 9).

    Features (N, channels, S, S) are resized bilinearly to the image's `size` = (H, W). The output
    is the logits of an image (N, 3, H, W); their sigmoid is the reconstruction in [0, 1].
    """

    def __init__(self, channels: int, widen: float = 1.0) -> None:
        width = scaled_width(12, widen)
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        resized = F.interpolate(features, size, mode="bilinear", align_corners=True)
        return super().forward(resized)

    def loss(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the 0-d loss of decoded logits (N, 3, H, W) against pixels in [0, 1]."""
        return reconstruction_loss(decoded, pixels)


class PatchDecoder(nn.ModuleList):
    """Four decoders, one for each quarter of the image (`--patch_decoder`; HPFF).

    Each sees its quarter of the features. Shapes are those of `Decoder`. The losses of the quarters
    are added.
    """

    def __init__(self, channels: int, widen: float = 1.0) -> None:
        super().__init__(Decoder(channels, widen) for _ in range(4))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        heights, widths = ([x // 2, x - x // 2] for x in size)
        sizes = [(height, width) for height in heights for width in widths]
        parts = [
            decoder(part, part_size)
            for decoder, part, part_size in zip(self, quarters(features), sizes, strict=True)
        ]
        return torch.cat([torch.cat(parts[:2], dim=3), torch.cat(parts[2:], dim=3)], dim=2)

    def loss(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the 0-d sum of the quarters' losses."""
        pairs = zip(quarters(decoded), quarters(pixels), strict=True)
        return sum(reconstruction_loss(*pair) for pair in pairs)


def quarters(x: Tensor) -> list[Tensor]:
    """Return the upper left, upper right, lower left and lower right part of (N, C, H, W)."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    halves = x[:, :, :height], x[:, :, height:]
    return [part for half in halves for part in (half[..., :width], half[..., width:])]
