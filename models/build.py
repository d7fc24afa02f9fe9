"""`build_network`: check every argument, then put the local modules together."""

import copy
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs import (
    AUGLOCAL,
    DATASETS,
    LOSS_SCALE_RULES,
    MOMENTUM_MIXES,
    OVERLAP_WEIGHT,
    Cut,
    InputError,
    Scale,
    check_cuts,
    choose_cuts,
    loss_weights,
    published_loss_scale,
)
from losses import CROSS_ENTROPY, LOCAL_LOSSES, TaskLoss, consistency_loss
from models.auxiliary import (
    Decoder,
    PatchDecoder,
    build_head,
    find_head,
    later_blocks_depth,
    later_blocks_head,
    real_head,
)
from models.context import ContextMode, Contexts, ContextSupply
from models.momentum import MomentumBlock
from models.network import ContSupNetwork, LocalModule
from models.resnet import BACKBONES, initialise
from models.torch_internals import FakeTensorMode, is_fake

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
    aux_net_depth: int | None = None,
    aux_net_taper: float | None = None,
    momentum_aux: float | None = None,
    momentum_aux_mix: str | None = None,
    overlap: int = 0,
    overlap_weight: float | None = None,
    consistency: float | None = None,
    patch_decoder: bool = False,
    loss_scale_rule: str = "module",
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
        image_size: side of the square images in pixels. The heads mlp-sr and predsim are built for
            it; all else takes any size.
        num_classes: outputs of the real head and of softmax auxiliary heads.
        balanced_memory: published memory-balanced cuts instead of equal layers.
        h_reconstruct: give each module but the last a decoder.
        aux_net_config, aux_net_widen, aux_net_feature_dim: see `build_head`.
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
        aux_net_depth, aux_net_taper: d and tau of `later_blocks_depth`, for the head `auglocal`; by
            default 6 and 0.5.
        momentum_aux: decay of the average in a `MomentumBlock` before each auxiliary head; None for
            no such blocks.
        momentum_aux_mix: `fixed` (the default) adds the two blocks, `learned` trains their
            proportion.
        overlap: 1 also trains each module on the next one's loss, in windows of two modules.
        overlap_weight: of a window's loss, in [0, 1]; by default 0.999.
        consistency: alpha of `losses.consistency_loss`, in [0, 1], for all heads; None for cross
            entropy alone.
        patch_decoder: a decoder for each quarter of the image.
        loss_scale_rule: see `configs.loss_weights`.
    Raises:
        InputError: an argument is out of range or does not fit the others; the message is a
            sentence that says what would be right.
    """
    _check_counts(
        layers=layers, local_module_num=local_module_num, image_size=image_size,
        num_classes=num_classes, aux_net_feature_dim=aux_net_feature_dim,
    )  # fmt: skip
    _check_switches(
        balanced_memory=balanced_memory, h_reconstruct=h_reconstruct, recompute=recompute,
        patch_decoder=patch_decoder,
    )  # fmt: skip
    _check_choice("dataset", dataset, DATASETS)
    _check_choice("local_loss_mode", local_loss_mode, LOCAL_LOSSES)
    _check_choice("amp", amp, AMP)
    _check_choice("model", model, BACKBONES)
    _check_range("droprate", droprate, _is_real(droprate) and 0 <= droprate < 1, "in [0, 1)")
    widen_fits = _is_real(aux_net_widen) and 0 < aux_net_widen <= WIDEST
    _check_range("aux_net_widen", aux_net_widen, widen_fits, f"above 0 and {WIDEST} at most")
    group_fits = _is_whole(context_group) and context_group >= 0
    _check_range("context_group", context_group, group_fits, "a whole number of at least 0")
    momentum_aux_mix = momentum_aux_mix or MOMENTUM_MIXES[0]
    _check_choice("momentum_aux_mix", momentum_aux_mix, MOMENTUM_MIXES)
    _check_choice("loss_scale_rule", loss_scale_rule, LOSS_SCALE_RULES)
    for name, value in {
        "aux_net_taper": aux_net_taper, "momentum_aux": momentum_aux,
        "overlap_weight": overlap_weight, "consistency": consistency,
    }.items():  # fmt: skip
        fits = value is None or (_is_real(value) and 0 <= value <= 1)
        _check_range(name, value, fits, "in [0, 1]")
    _check_range("overlap", overlap, _is_whole(overlap) and overlap in (0, 1), "0 or 1")
    depth_fits = aux_net_depth is None or (_is_whole(aux_net_depth) and aux_net_depth > 0)
    _check_range("aux_net_depth", aux_net_depth, depth_fits, "a whole number of at least 1")
    find_head(aux_net_config)  # raises InputError

    K = local_module_num
    task = LOCAL_LOSSES[local_loss_mode]
    of_cuts = {
        "aux_net_config": aux_net_config, "momentum_aux": momentum_aux, "overlap": overlap,
        "consistency": consistency,
    }  # fmt: skip
    for name in options_of_cuts(of_cuts):
        if K == 1:
            raise InputError(
                f"{name} is for the modules before a cut: give local_module_num 2 or more, not 1"
            )
    exclusive = {
        "consistency and overlap": consistency is not None and overlap > 0,
        "momentum_aux and overlap": momentum_aux is not None and overlap > 0,
        "momentum_aux and aux_net_config auglocal": momentum_aux is not None
        and find_head(aux_net_config)[1] is later_blocks_head,
        "train_modules and overlap": train_modules is not None and overlap > 0,
    }
    for names in (names for names, both in exclusive.items() if both):
        raise InputError(f"{names} exclude each other: leave one of them out")
    if consistency is not None and not task.classifies:
        raise InputError(
            "consistency is for heads that classify: give local_loss_mode cross_entropy"
        )
    for name, needs, given in (
        ("patch_decoder", h_reconstruct, patch_decoder),
        ("loss_scale_rule stage", h_reconstruct, loss_scale_rule != "module"),
    ):
        if given and not needs:
            raise InputError(f"{name} is for decoders: it needs h_reconstruct")
    smallest = 2 * SMALLEST_IMAGE if patch_decoder else SMALLEST_IMAGE
    _check_range("image_size", image_size, image_size >= smallest, f"{smallest} or more")

    if cuts is None:
        cuts = choose_cuts(layers, K, dataset, balanced_memory)
    else:
        check_cuts(cuts, layers, K)
    units = BACKBONES[model](layers, droprate)
    parts = _split(units, cuts)
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

    real_task = CROSS_ENTROPY
    if consistency is not None:
        function = partial(consistency_loss, alpha=consistency)
        task = real_task = TaskLoss(function, classifies=True, follows=True)
    outputs = num_classes if task.classifies else aux_net_feature_dim
    widths = [unit.out_channels for unit in units.values()]
    sizes = _sizes([*units.values()], image_size) if K > 1 else []

    def training_parts(index: int, end: int) -> dict[str, Any]:
        """Return what a module before the last trains with, as arguments of LocalModule.

        Its units end before unit `end` of the net.
        """
        if overlap and index == 0:
            return {"head": None}
        next_name, next_unit = next(iter(parts[index + 1].items()))
        given: dict[str, Any] = {}
        seen = end - 1  # the unit that the head sees the output of
        if momentum_aux is not None:
            seen = end
            given["momentum"] = MomentumBlock(
                _copy(next_unit), _copy(next_unit), momentum_aux, momentum_aux_mix == "learned",
                recompute,
            )  # fmt: skip
        depth = later_blocks_depth(
            AUGLOCAL["aux_net_depth"] if aux_net_depth is None else aux_net_depth,
            AUGLOCAL["aux_net_taper"] if aux_net_taper is None else aux_net_taper, index, K,
        )  # fmt: skip
        for name in ("head", "own_head") if overlap else ("head",):
            of_module = name == "head"  # the own head of windows has cross entropy in any case
            given[name] = build_head(
                aux_net_config, channels=widths[seen], size=sizes[seen],
                outputs=outputs if of_module else num_classes,
                later_widths=widths[seen + 1 :], depth=min(depth, len(widths) - seen - 1),
                widen=aux_net_widen, feature_dim=aux_net_feature_dim, unit=seen,
                task=task if of_module else CROSS_ENTROPY,
            )  # fmt: skip
            given[name].recompute = recompute
        if loss_scale is not None:
            given["decoder"] = (PatchDecoder if patch_decoder else Decoder)(
                widths[seen], aux_net_widen
            )
            stage = 0 if end == 1 else next_name[0]
            place = index if loss_scale_rule == "module" else stage
            given["loss_weights"] = loss_weights(loss_scale, place, K)
        return given

    modules: list[LocalModule] = []
    contexts, channels, end = Contexts(mode, image=3), 3, 0
    for index, part in enumerate(parts):
        sources = contexts.named() if index else {}
        supply = ContextSupply(sources, channels, aux_net_widen, context_group)
        if index:
            contexts.push(channels)
        end += len(part)
        channels = widths[end - 1]
        if index == K - 1:
            head = real_head(channels, num_classes)
            head.set_task(real_task)
            given = {"head": head}
        else:
            given = training_parts(index, end)
        modules.append(LocalModule(supply, part, recompute=recompute, **given))

    overlap_weight = OVERLAP_WEIGHT if overlap_weight is None else overlap_weight
    network = ContSupNetwork(
        modules, mode, dataset, AMP[amp], overlap_weight if overlap else None, num_classes
    )
    if overlap:
        _count_passes(modules)
    initialise(network)
    if train_modules is not None:
        for module in (m for i, m in enumerate(modules) if i not in train_modules):
            module.freeze()
    return network


def options_of_cuts(arguments: Mapping[str, Any]) -> list[str]:
    """Return which of some arguments of `build_network` are given, and need two modules."""
    head = arguments["aux_net_config"]
    is_given = {
        f"aux_net_config {head}": find_head(head)[1] is later_blocks_head,
        "momentum_aux": arguments["momentum_aux"] is not None,
        "overlap": arguments["overlap"] > 0,
        "consistency": arguments["consistency"] is not None,
    }
    return [name for name, given in is_given.items() if given]


def _split(units: dict[Cut, nn.Module], cuts: Sequence[Cut]) -> list[dict[Cut, nn.Module]]:
    """Return one dict of units for each module; a cut lies right after the unit it names."""
    parts: list[dict[Cut, nn.Module]] = [{}]
    after = {tuple(cut) for cut in cuts}
    for name, unit in units.items():
        parts[-1][name] = unit
        if name in after:
            parts.append({})
    return parts


def _copy(unit: nn.Module) -> nn.Module:
    """Return a copy, which copy.deepcopy alone does not make of tensors without data."""
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().clone()) for p in unit.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in unit.buffers()}
    return copy.deepcopy(unit, memo)


@torch.no_grad()
def _sizes(units: Iterable[nn.Module], image_size: int) -> list[int]:
    """Return the side of each unit's output, in pixels, without computing anything."""
    sizes, parameters = [], (p for unit in units for p in unit.parameters())
    has_data = all(not (is_fake(p) or p.is_meta) for p in parameters)
    with FakeTensorMode(allow_non_fake_inputs=True) if has_data else nullcontext():
        x = torch.zeros(1, 3, image_size, image_size)
        for unit in units:
            x = unit.eval()(x)  # where it keeps its statistics, and drops nothing out
            unit.train()
            sizes.append(x.shape[-1])
    return sizes


def _count_passes(modules: Sequence[LocalModule]) -> None:
    """Have BatchNorm move its running statistics as far as HPFF's passes over a batch do.

    HPFF runs the units of a module in its own pass and in each window: three times, twice at the
    ends, the stem once. models/windows.py runs them once.
    """
    for module in modules:
        passes = 2 if module in (modules[0], modules[-1]) else 3
        for name, unit in zip(module.unit_names, module.units, strict=True):
            for norm in (x for x in unit.modules() if isinstance(x, nn.BatchNorm2d)):
                times = 1 if name == (0, 0) else passes
                norm.momentum = 1 - (1 - norm.momentum) ** times


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
