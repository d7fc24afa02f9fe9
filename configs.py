"""Constants of data sets, cuts and loss scales, as published in ContSup (arXiv 2312.07636).

The error for bad input is here too, since nothing here depends on torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Cut = tuple[int, int]
"""[stage, block] of the unit that a cut lies right after; the stem is (0, 0)."""


class InputError(ValueError):
    """A wrong option, file or data set of the user's. The message says what would be right."""


def one_line(error: Exception | str) -> str:
    """Return an exception's message on one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def printable(text: str) -> str:
    """Return text on one line, with unprintable characters (of file names, say) escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True)
class DatasetConfig:
    """A data set's constants.

    Attributes:
        classes: number of classes; None where the images on disk decide it.
        image_size: side in pixels.
        mean, std: per channel, in pixels of 0..255.
        pad: pixels added on each side before the random crop back to `image_size`.
        reflect: pad by reflection, else with black.
        flip: whether training images are mirrored at random.
        batch_size, lr: the defaults; published ones for the paper's data sets.
        per_class: number of training images of each class, for plans; None if it is not known.
        read: folder -> `dataloaders.ImageData`; None where `dataloaders.READERS` has it.
    """

    classes: int | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: int
    reflect: bool
    flip: bool
    batch_size: int
    lr: float
    per_class: tuple[int, ...] | None = None
    read: Callable[[Path], Any] | None = None


HALF = (127.5, 127.5, 127.5)

CIFAR10 = DatasetConfig(
    classes=10, image_size=32, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), pad=4,
    reflect=True, flip=True, batch_size=1024, lr=0.8, per_class=(5000,) * 10,
)  # fmt: skip
SVHN = DatasetConfig(
    classes=10, image_size=32, mean=HALF, std=HALF, pad=2, reflect=False, flip=False,
    batch_size=1024, lr=0.8,
    per_class=(4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
)  # fmt: skip
STL10 = DatasetConfig(
    classes=10, image_size=96, mean=HALF, std=HALF, pad=4, reflect=False, flip=True,
    batch_size=128, lr=0.1, per_class=(500,) * 10,
)  # fmt: skip

# Of the training split that dataloaders.py draws.
DIGITS_TRAIN = (142, 146, 142, 146, 145, 145, 145, 143, 139, 144)

DATASETS = {
    "cifar10": CIFAR10,
    "cifar100": replace(CIFAR10, classes=100, per_class=(500,) * 100),
    "svhn": SVHN,
    "stl10": STL10,
    # Not in the paper. A mirrored digit is another sign, so digits are not flipped.
    "digits": replace(SVHN, batch_size=128, lr=0.1, per_class=DIGITS_TRAIN),
    "folder": replace(CIFAR10, classes=None, per_class=None),
}

SAME_TABLES = {"cifar100": "cifar10"}
"""Data sets that use the cuts and loss scales published for another one."""


# ---------------------------------------------------------------------------------------------
# Cuts: (layers, K) -> the K-1 cuts

EQUAL_CUTS: dict[tuple[int, int], list[Cut]] = {
    (32, 2): [(2, 1)],
    (32, 3): [(1, 4), (2, 4)],
    (32, 4): [(1, 2), (2, 1), (3, 0)],
    (32, 8): [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)],
    (32, 16): [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (2, 2), (2, 3),
               (2, 4), (3, 0), (3, 1), (3, 2), (3, 3)],
    (110, 2): [(2, 8)],
    (110, 3): [(1, 17), (2, 17)],
    (110, 4): [(1, 11), (2, 7), (3, 3)],
    (110, 8): [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)],
    (110, 16): [(1, 1), (1, 4), (1, 7), (1, 10), (1, 13), (1, 16), (2, 1), (2, 4), (2, 7),
                (2, 11), (2, 15), (3, 1), (3, 5), (3, 9), (3, 13)],
}  # fmt: skip

BALANCED_CUTS: dict[tuple[int, str, int], list[Cut]] = {
    (110, "cifar10", 2): [(1, 14)],
    (110, "cifar10", 3): [(1, 9), (2, 2)],
    (110, "cifar10", 4): [(1, 6), (1, 14), (2, 8)],
    (110, "stl10", 2): [(1, 14)],
    (110, "stl10", 3): [(1, 8), (2, 1)],
    (110, "stl10", 4): [(1, 6), (1, 14), (2, 8)],
    (32, "cifar10", 2): [(1, 3)],
    (32, "cifar10", 4): [(1, 2), (1, 4), (2, 2)],
    (32, "cifar10", 8): [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)],
    (32, "cifar10", 16): EQUAL_CUTS[32, 16],
}


def blocks_per_stage(layers: int) -> int:
    """Return n of a ResNet of depth `layers` = 6n+2.

    Raises InputError if no whole n >= 1 gives this depth.
    """
    n, rest = divmod(layers - 2, 6)
    if rest or n < 1:
        below = max(8, layers - rest)
        raise InputError(f"a ResNet has 6n+2 layers; {layers} is not such a depth, {below} is")
    return n


def unit_names(layers: int) -> list[Cut]:
    """Return [stage, block] of the 3n+1 units of a ResNet, the stem (0, 0) first."""
    n = blocks_per_stage(layers)
    return [(0, 0)] + [(stage, block) for stage in (1, 2, 3) for block in range(n)]


def choose_cuts(layers: int, K: int, dataset: str, balanced_memory: bool = False) -> list[Cut]:
    """Return the K-1 cuts of a ResNet, each named by the unit that it lies right after.

    Balanced cuts are the published ones. Equal ones that are not published are computed: of U
    units, cut i = 1 .. K-1 lies after unit floor(U*i/K), counted from 1.

    Raises InputError for a K that does not fit the depth or has no published balanced cuts.
    """
    units = unit_names(layers)
    _check_module_num(K, layers)
    if K == 1:
        return []
    if balanced_memory:
        dataset = _dataset_with_tables(dataset)
        if (layers, dataset, K) not in BALANCED_CUTS:
            known = ", ".join(f"ResNet-{n} {d} K={k}" for n, d, k in BALANCED_CUTS)
            raise InputError(
                f"no balanced cuts are published for ResNet-{layers} on {dataset} with K={K}; "
                f"there are {known}"
            )
        return list(BALANCED_CUTS[layers, dataset, K])
    if (layers, K) in EQUAL_CUTS:
        return list(EQUAL_CUTS[layers, K])
    return [units[len(units) * i // K - 1] for i in range(1, K)]


def balanced_cuts_are_equal(layers: int, K: int | None, dataset: str) -> bool:
    """Return whether this net's published balanced cuts are the same as its equal ones."""
    balanced = BALANCED_CUTS.get((layers, _dataset_with_tables(dataset), K))
    return balanced is not None and balanced == EQUAL_CUTS.get((layers, K))


def check_cuts(cuts: Sequence[Cut], layers: int, K: int) -> None:
    """Raise InputError unless cuts are K-1 units in order, none of them the last unit."""
    units = unit_names(layers)
    _check_module_num(K, layers)
    if not isinstance(cuts, Sequence) or len(cuts) != K - 1:
        count = len(cuts) if isinstance(cuts, Sequence) else repr(cuts)
        raise InputError(f"{K} modules have {K - 1} cuts between them, but {count} are given")
    places = []
    for cut in cuts:
        if not isinstance(cut, Sequence) or tuple(cut) not in units[:-1]:
            raise InputError(
                f"a cut of ResNet-{layers} lies after [stage, block] [0, 0] or [1, 0] to "
                f"{list(units[-2])}, not after {list(cut) if isinstance(cut, tuple) else cut!r}"
            )
        places.append(units.index(tuple(cut)))
    if places != sorted(set(places)):
        raise InputError("cuts go from front to back, each but once")


def _check_module_num(K: int, layers: int) -> None:
    count = len(unit_names(layers))
    if not 1 <= K <= count:
        raise InputError(
            f"ResNet-{layers} has {count} units, so local_module_num must be 1 to {count}, not {K}"
        )


# ---------------------------------------------------------------------------------------------
# Loss scales with a decoder: K -> (ixx_1, ixy_1, ixx_2, ixy_2)

Scale = tuple[float, float, float, float]

LOSS_SCALES: dict[tuple[int, str], dict[int, Scale]] = {
    (32, "cifar10"): {2: (5, 1, 0, 0), 4: (6, 0, 1, 2), 8: (5, 0, 0, 2), 16: (5, 0.05, 0.2, 0.5)},
    (110, "cifar10"): {2: (5, 0.5, 0, 0), 4: (1, 0, 0, 1), 8: (5, 0, 0, 1), 16: (5, 0, 0.5, 1)},
    (110, "stl10"): {
        2: (10, 1, 0, 0), 4: (20, 0.2, 5, 2), 8: (20, 0.2, 5, 1), 16: (20, 0.5, 10, 0.1)
    },
    (110, "svhn"): {
        2: (1, 0.1, 0, 0), 4: (5, 0, 0.5, 0), 8: (5, 0, 0.5, 2), 16: (5, 0.2, 0.5, 1)
    },
}  # fmt: skip

BALANCED_LOSS_SCALES: dict[tuple[int, str], dict[int, Scale]] = {
    (32, "cifar10"): {2: (5, 0.1, 0, 0), 3: (5, 0, 5, 0.1), 4: (5, 0, 0, 0.1), 8: (5, 0, 0, 2)},
    (110, "cifar10"): {2: (5, 0.1, 0, 0), 3: (5, 0, 5, 0.1), 4: (5, 0, 0, 0.1)},
}


def published_loss_scale(layers: int, K: int, dataset: str, balanced_memory: bool = False) -> Scale:
    """Return the published (ixx_1, ixy_1, ixx_2, ixy_2) of a net that trains with decoders.

    Raises InputError if the paper has no row for it.
    """
    balanced_memory = balanced_memory and not balanced_cuts_are_equal(layers, K, dataset)
    table = BALANCED_LOSS_SCALES if balanced_memory else LOSS_SCALES
    rows = table.get((layers, _dataset_with_tables(dataset)), {})
    if K not in rows:
        known = "; ".join(
            f"ResNet-{n} {d} K={'/'.join(map(str, r))}" for (n, d), r in table.items()
        )
        balance = "with" if balanced_memory else "without"
        raise InputError(
            f"h_reconstruct needs loss scales, and none are published for ResNet-{layers} on "
            f"{dataset} with K={K} ({balance} memory balance: {known}); "
            "give your own with loss_scale, or leave h_reconstruct out"
        )
    return rows[K]


MOMENTUM_MIXES = ("fixed", "learned")
"""`--momentum_aux_mix`: two blocks added, or in a trained proportion."""

LOSS_SCALE_RULES = ("module", "stage")
"""`--loss_scale_rule`: what a module's loss weights go by; `stage` is the rule of MAN's release."""


def loss_weights(scale: Scale, place: int, K: int) -> tuple[float, float]:
    """Return (lx, ly), weights of reconstruction and task loss of a module before the last.

    They go linearly from (ixx_1, ixy_1) at the first module to (ixx_2, ixy_2) at the last that
    has a decoder (README, equation 7); with K = 2 there is only the first.

    Args:
        place: the module's index 0 .. K-2. By the rule `stage`, the stage 1 .. 3 of the unit after
            the module instead, and 0 for a module that is the stem alone.
    """
    ixx_1, ixy_1, ixx_2, ixy_2 = scale
    r = min(place / (K - 2), 1.0) if K > 2 else 0.0
    return (1 - r) * ixx_1 + r * ixx_2, (1 - r) * ixy_1 + r * ixy_2


def _dataset_with_tables(dataset: str) -> str:
    return SAME_TABLES.get(dataset, dataset)


# ---------------------------------------------------------------------------------------------
# Methods: name -> options of train.py; sources and what differs from them: docs/methods.md

AUGLOCAL = {"aux_net_depth": 6, "aux_net_taper": 0.5}
OVERLAP_WEIGHT = 0.999
INFOPRO = {"context_mode": "R0", "local_loss_mode": "cross_entropy", "h_reconstruct": True}
MAN = INFOPRO | {
    "aux_net_config": "2c2f", "loss_scale": [5.0, 0.5, 0.0, 0.0], "loss_scale_rule": "stage",
    "momentum_aux": 0.995,
}  # fmt: skip
SOFTMAX = {"context_mode": "R0", "local_loss_mode": "cross_entropy"}

METHODS: dict[str, dict[str, Any]] = {
    "contsup": {"context_mode": "E"},
    "greedy": SOFTMAX | {"aux_net_config": "0c1f"},
    "dgl": SOFTMAX | {"aux_net_config": "mlp-sr"},
    "infopro": INFOPRO,
    "predsim": SOFTMAX | {"aux_net_config": "predsim"},
    "auglocal": SOFTMAX | {"aux_net_config": "auglocal"} | AUGLOCAL,
    "man": MAN,
    "manpp": MAN | {"momentum_aux_mix": "learned"},
    "hpff": INFOPRO | {
        "aux_net_config": "2c2f", "loss_scale": [5.0, 0.5, 0.0, 0.0], "patch_decoder": True,
        "overlap": 1, "overlap_weight": OVERLAP_WEIGHT,
    },
    "sid": SOFTMAX | {"consistency": 0.5},
}  # fmt: skip
"""Options by `--method`. The command line has them as if typed, but for those that are typed."""
