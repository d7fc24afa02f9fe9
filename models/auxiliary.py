"""What a local module is trained with and inference drops: auxiliary heads and decoders."""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from configs import InputError


def scaled_width(width: int, factor: float) -> int:
    """`width * factor`, truncated; InputError if that leaves nothing."""
    scaled = int(width * factor)
    if scaled < 1:
        raise InputError(f"a width of {width} times {factor} truncates to {scaled}: widen more")
    return scaled


def parse_head_config(config: str) -> tuple[int, int]:
    """`AcBf` -> (A convs, B linear layers), B >= 1; InputError for anything else."""
    match = isinstance(config, str) and re.fullmatch(r"([0-9])c([1-9])f", config)
    if not match:
        raise InputError(
            f"unknown aux_net_config {config!r}: AcBf means A convs and B linear layers, e.g. "
            "0c1f, 0c2f, 1c1f, 1c2f, 1c3f or 2c2f"
        )
    return int(match[1]), int(match[2])


def auxiliary_head(
    channels: int, outputs: int, config: str = "1c2f", widen: float = 1.0, feature_dim: int = 128
) -> nn.Sequential:
    """Local head on a module's output: (N, channels, S, S) -> (N, outputs).

    A times conv3x3-BN-ReLU, global average pool, B linear layers with ReLU between them.

    Args:
        channels: channels at the cut, 16, 32 or 64.
        outputs: number of classes, or the embedding's width for `contrast`.
        config: `AcBf`.
        widen: w; convs are 32w wide on 16 channels and 64w on more.
        feature_dim: f; hidden linear layers are f*w wide. Fractions of a width are truncated.
    Raises:
        InputError: config is not `AcBf`, or a width truncates to 0.
    """
    convs, linears = parse_head_config(config)
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


class Decoder(nn.Sequential):
    """Reconstructs the input from a module's output (`--h_reconstruct`; README, equation 9).

    (N, channels, S, S) is resized bilinearly to `size` = (H, W) of the image and convolved to the
    logits of an image (N, 3, H, W); their sigmoid is the reconstruction in [0, 1].
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
