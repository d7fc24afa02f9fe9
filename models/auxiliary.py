"""Auxiliary nets, which training needs and inference drops: local heads and decoders."""

import re
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from configs import InputError


def scaled_width(width: int, factor: float) -> int:
    """Return `width * factor`, truncated; raise InputError if that is 0."""
    scaled = int(width * factor)
    if scaled < 1:
        raise InputError(f"a width of {width} times {factor} truncates to {scaled}: widen more")
    return scaled


def conv_linear_head(
    match: re.Match, channels: int, outputs: int, widen: float, feature_dim: int
) -> nn.Sequential:
    """Return an `AcBf` head: A times conv3x3-BN-ReLU, global average pool, B linear layers.

    There is a ReLU between linear layers. Convs are 32w wide on 16 channels, else 64w; the
    first one has stride 2 on fewer than 64 channels. Hidden linear layers are f*w wide. Fractions
    of a width are truncated.
    """
    convs, linears = int(match[1]), int(match[2])
    base_width = 32 if channels == 16 else 64
    layers: list[nn.Module] = []
    for i in range(convs):
        conv_width = scaled_width(base_width, widen)
        stride = 2 if i == 0 and channels < 64 else 1
        layers += [
            nn.Conv2d(channels, conv_width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(conv_width),
            nn.ReLU(inplace=True),
        ]
        channels = conv_width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(linears - 1):
        hidden = scaled_width(feature_dim, widen)
        layers += [nn.Linear(channels, hidden), nn.ReLU(inplace=True)]
        channels = hidden
    layers.append(nn.Linear(channels, outputs))
    return nn.Sequential(*layers)


HEADS: dict[str, Callable[[re.Match, int, int, float, int], nn.Module]] = {
    r"([0-9])c([1-9])f": conv_linear_head,
}
"""`--aux_net_config`: pattern of a name -> (match, channels, outputs, w, f) -> head."""


def find_head(config: str) -> tuple[re.Match, Callable[..., nn.Module]]:
    """Return the match and the builder of a head's name; raise InputError for an unknown name."""
    for pattern, build in HEADS.items():
        if isinstance(config, str) and (match := re.fullmatch(pattern, config)):
            return match, build
    raise InputError(
        f"unknown aux_net_config {config!r}: AcBf means A convs and B linear layers, e.g. "
        "0c1f, 0c2f, 1c1f, 1c2f, 1c3f or 2c2f"
    )


def auxiliary_head(
    channels: int, outputs: int, config: str = "1c2f", widen: float = 1.0, feature_dim: int = 128
) -> nn.Module:
    """Return a local head on a module's output: (N, channels, S, S) -> (N, outputs).

    Args:
        channels: channels at the cut.
        outputs: number of classes, or the embedding's width for `contrast`.
        config: name of an entry in HEADS.
        widen: w, factor of the widths of convs and hidden linear layers.
        feature_dim: f; hidden linear layers are f*w wide.
    Raises:
        InputError: the name is unknown, or a width truncates to 0.
    """
    match, build = find_head(config)
    return build(match, channels, outputs, widen, feature_dim)


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
