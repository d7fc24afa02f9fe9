"""`build_network`: check every argument, then put the local modules together."""

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from configs import (
    DATASETS,
    Cut,
    InputError,
    Scale,
    check_cuts,
    choose_cuts,
    loss_weights,
    published_loss_scale,
)
from losses import CROSS_ENTROPY, LOCAL_LOSSES
from models.auxiliary import Decoder, auxiliary_head, find_head
from models.context import ContextMode, Contexts, ContextSupply
from models.network import ContSupNetwork, LocalModule
from models.resnet import BACKBONES, initialise, real_head

SMALLEST_IMAGE = 4
"""Two strides of 2 leave one pixel of this many."""


AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`--amp` -> dtype of autocast."""

WIDEST = 1000
"""An upper bound of `aux_net_widen`, so that a slip of the keyboard is an error of its own."""


def build_network(
    *,
    layers: int,
    local_module_num: int,
    context_mode: str = "R0",
    local_loss_mode: str = "cross_entropy",
    dataset: str = "cifar10",
    image_size: int = 32,
    num_classes: int = 10,
    balanced_memory: bool = False,
    h_reconstruct: bool = False,
    aux_net_config: str = "1c2f",
    aux_net_widen: float = 1.0,
    aux_net_feature_dim: int = 128,
    droprate: float = 0.0,
    loss_scale: Scale | None = None,
    context_group: int = 16,
    recompute: bool = False,
    cuts: Sequence[Cut] | None = None,
    amp: str = "off",
    model: str = "resnet",
    train_modules: Sequence[int] | None = None,
) -> ContSupNetwork:
    """Return a backbone cut into local modules, initialised from torch's global generator.

    Only what a run uses is built: no encoder without its context, no decoder without
    `h_reconstruct`. Initialisation and structure: README, "The method in equations".

    Args:
        layers: depth, 6n+2.
        local_module_num: K, number of modules; 1 is training end to end.
        context_mode: `Rn`, `E` or `RnE`, n <= K.
        local_loss_mode: `cross_entropy` or `contrast`, the auxiliary heads' loss.
        dataset: name in `configs.DATASETS`; chooses the published cuts and loss scales, and the
            mean and std that a decoder's target is un-normalised with.
        image_size: side of the square images in pixels. It is only checked: the network itself
            takes any size.
        num_classes: outputs of the real head and of softmax auxiliary heads.
        balanced_memory: published memory-balanced cuts instead of equal layers.
        h_reconstruct: give each module but the last a decoder.
        aux_net_config, aux_net_widen, aux_net_feature_dim: see `auxiliary_head`.
        droprate: dropout inside the blocks, in [0, 1).
        loss_scale: (ixx_1, ixy_1, ixx_2, ixy_2) for the decoders instead of the published row.
        context_group: output channels of a context encoder that run at a time; the backward
            recomputes their maps. 0 runs all channels at once and keeps their maps.
        recompute: activation checkpointing of every unit but a module's last, whose backward comes
            first.
        cuts: K-1 [stage, block] of your own, in order, instead of equal or balanced ones.
        model: name of a backbone in `models.resnet.BACKBONES`.
        train_modules: indices of the modules that train; the others are frozen. None for all.
        amp: `bf16` or `fp16` runs convs and matrix products in that, by autocast; `off` does not.
    Raises:
        InputError: an argument is out of range or does not fit the others; the message is a
            sentence that says what would be right.
    """
    _check_counts(
        layers=layers, local_module_num=local_module_num, image_size=image_size,
        num_classes=num_classes, aux_net_feature_dim=aux_net_feature_dim,
    )  # fmt: skip
    _check_switches(
        balanced_memory=balanced_memory, h_reconstruct=h_reconstruct, recompute=recompute
    )
    _check_choice("dataset", dataset, DATASETS)
    _check_choice("local_loss_mode", local_loss_mode, LOCAL_LOSSES)
    _check_choice("amp", amp, AMP)
    _check_choice("model", model, BACKBONES)
    _check_range(
        "image_size", image_size, image_size >= SMALLEST_IMAGE, f"{SMALLEST_IMAGE} or more"
    )
    _check_range("droprate", droprate, _is_real(droprate) and 0 <= droprate < 1, "in [0, 1)")
    widen_fits = _is_real(aux_net_widen) and 0 < aux_net_widen <= WIDEST
    _check_range("aux_net_widen", aux_net_widen, widen_fits, f"above 0 and {WIDEST} at most")
    group_fits = _is_whole(context_group) and context_group >= 0
    _check_range("context_group", context_group, group_fits, "a whole number of at least 0")
    find_head(aux_net_config)  # raises InputError

    K = local_module_num
    if cuts is None:
        cuts = choose_cuts(layers, K, dataset, balanced_memory)
    else:
        check_cuts(cuts, layers, K)
    parts = _split(BACKBONES[model](layers, droprate), cuts)
    mode = ContextMode.parse(context_mode)
    if mode.recent > K:
        raise InputError(
            f"context_mode {context_mode} asks for {mode.recent} module inputs, but there are "
            f"{K} modules: n of Rn may be at most local_module_num"
        )
    _check_train_modules(train_modules, K)
    if loss_scale is not None:
        _check_loss_scale(loss_scale, h_reconstruct)
    elif h_reconstruct and K > 1:
        loss_scale = published_loss_scale(layers, K, dataset, balanced_memory)

    task = LOCAL_LOSSES[local_loss_mode]
    modules: list[LocalModule] = []
    contexts, channels = Contexts(mode, image=3), 3
    for index, part in enumerate(parts):
        sources = contexts.named() if index else {}
        supply = ContextSupply(sources, channels, aux_net_widen, context_group)
        if index:
            contexts.push(channels)
        channels = list(part.values())[-1].out_channels
        decoder, weights = None, (0.0, 1.0)
        if index == K - 1:
            head, task = real_head(channels, num_classes), CROSS_ENTROPY
        else:
            outputs = num_classes if task.classifies else aux_net_feature_dim
            head = auxiliary_head(
                channels, outputs, aux_net_config, aux_net_widen, aux_net_feature_dim
            )
            if loss_scale is not None:
                decoder = Decoder(channels, aux_net_widen)
                weights = loss_weights(loss_scale, index, K)
        modules.append(LocalModule(supply, part, head, task, decoder, weights, recompute))

    network = ContSupNetwork(modules, mode, dataset, AMP[amp])
    initialise(network)
    if train_modules is not None:
        for module in (m for i, m in enumerate(modules) if i not in train_modules):
            module.freeze()
    return network


def _split(units: dict[Cut, nn.Module], cuts: Sequence[Cut]) -> list[dict[Cut, nn.Module]]:
    """Return one dict of units for each module; a cut lies right after the unit it names."""
    parts: list[dict[Cut, nn.Module]] = [{}]
    after = {tuple(cut) for cut in cuts}
    for name, unit in units.items():
        parts[-1][name] = unit
        if name in after:
            parts.append({})
    return parts


def _check_counts(**arguments: int) -> None:
    for name, value in arguments.items():
        if not _is_whole(value) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def _check_switches(**arguments: bool) -> None:
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, not {value!r}")


def _check_range(name: str, value: float, fits: bool, allowed: str) -> None:
    if not fits:
        raise InputError(f"{name} must be {allowed}, not {value!r}")


def _check_loss_scale(scale: Scale, h_reconstruct: bool) -> None:
    if not h_reconstruct:
        raise InputError("loss_scale weighs a decoder's loss: it needs h_reconstruct")
    four = isinstance(scale, Sequence) and len(scale) == 4
    if not four or not all(_is_real(x) and 0 <= x < math.inf for x in scale):
        raise InputError(f"loss_scale must be four numbers of at least 0, not {scale!r}")


def _check_train_modules(indices: Sequence[int] | None, K: int) -> None:
    if indices is None:
        return
    plain = isinstance(indices, Sequence) and bool(indices) and all(map(_is_whole, indices))
    if not plain or not set(indices) <= {*range(K)}:
        wrong = next(i for i in indices if i not in range(K)) if plain else indices
        raise InputError(f"train_modules must be among the modules 0 to {K - 1}, not {wrong!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
