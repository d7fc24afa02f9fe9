"""Backbones as flat lists of units: a CIFAR-style ResNet of depth 6n+2 (paper, section 4.1)."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from configs import Cut, unit_names

STAGE_CHANNELS = (16, 16, 32, 64)
"""Channels that the stem (stage 0) and the stages 1 to 3 give out."""


class Stem(nn.Module):
    """A 3x3 conv, BN, ReLU: image (N, 3, S, S) -> (N, 16, S, S)."""

    out_channels = STAGE_CHANNELS[0]

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STAGE_CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_CHANNELS[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class BasicBlock(nn.Module):
    """A residual block: (N, in_channels, S, S) -> (N, channels, S/stride, S/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, droprate: float) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(droprate)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.bn1(self.conv1(x)), inplace=True))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return F.relu(out, inplace=True)


def resnet_units(layers: int, droprate: float = 0.0) -> dict[Cut, nn.Module]:
    """Return the units of a ResNet by [stage, block], in the order of the forward pass.

    Args:
        layers: depth, 6n+2; InputError is raised for another.
        droprate: dropout inside the blocks, in [0, 1).
    """
    units: dict[Cut, nn.Module] = {}
    for stage, block in unit_names(layers):
        if stage == 0:
            units[stage, block] = Stem()
            continue
        first = block == 0
        in_channels = STAGE_CHANNELS[stage - 1 if first else stage]
        stride = 2 if first and stage > 1 else 1
        units[stage, block] = BasicBlock(in_channels, STAGE_CHANNELS[stage], stride, droprate)
    return units


BACKBONES: dict[str, Callable[[int, float], dict[Cut, nn.Module]]] = {"resnet": resnet_units}
"""`--model`: (layers, droprate) -> units by the names that `configs.unit_names(layers)` gives.

Each unit maps features to features, (N, C, S, S) -> (N, C', S', S'), and has `out_channels` = C'.
"""


def initialise(network: nn.Module) -> None:
    """Initialise conv weights as published, in place: normal with std sqrt(2 / (kh*kw*out)).

    BatchNorm (weight 1, bias 0), linear layers and conv biases keep PyTorch's default
    (README, equation 5).
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            kh, kw = layer.kernel_size
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (kh * kw * layer.out_channels)))
