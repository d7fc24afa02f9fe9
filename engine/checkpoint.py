"""Checkpoint files: this project's own and the authors' released format.

Both are read into the same `Checkpoint`; only this project's own is written. A file that was handed
in is checked before anything is made of it: it may be damaged, or meant to do harm.
"""

import errno
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from configs import InputError, blocks_per_stage, one_line
from engine.files import replacing
from models.build import build_network
from models.network import ContSupNetwork
from models.official import (
    fits,
    from_official,
    is_official,
    matched,
    official_momentum,
)

FORMAT = "contsup-1"

GLOBALS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
)
"""All that the pickle of a checkpoint may name: `weights_only` lets more pass."""

UNSAFE = "it holds more than tensors and plain values, and might run code"

SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
"""What a torch.amp.GradScaler's state holds."""


class Checkpoint(NamedTuple):
    """A training state between two steps.

    Attributes:
        epoch: epochs done.
        state_dict: weights and BatchNorm statistics by the names that the format has for them.
        momentum: SGD's momentum by parameter name, likewise.
        options: the run's options; empty in the authors' format, which lacks them.
        classes: names of the classes, in the order of the head's outputs; empty likewise.
        official: whether the names are the authors'.
        scalers: state of the modules' loss scalers, with float16; else empty.
        totals: `Totals.state` of the epoch under way; empty between two epochs.
        history: the metrics of the epochs done, as metrics.jsonl has them; empty likewise.
        peak: `PeakMemory.state`; empty likewise.
    """

    epoch: int
    state_dict: dict[str, Tensor]
    momentum: dict[str, Tensor]
    options: dict[str, object]
    classes: list[str]
    official: bool = False
    scalers: Sequence[dict[str, float]] = ()
    totals: Mapping[str, Tensor | int] = {}
    history: Sequence[dict] = ()
    peak: Mapping[str, int | str] = {}

    @property
    def step(self) -> int:
        """Steps done of the epoch under way, 0 between two epochs."""
        return self.totals.get("steps", 0)


class Unreadable(InputError):
    """A checkpoint that may well be whole, but can't be read here and now."""


class CannotSave(Exception):
    """A checkpoint could not be written; the one that was there still is."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of this project; an earlier one stays until it is on the disk.

    Raises CannotSave.
    """
    contents = checkpoint._asdict() | {"format": FORMAT}
    del contents["official"]
    try:
        with replacing(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise CannotSave(f"cannot write {path}: {one_line(reason)}") from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of either format, to the CPU.

    Raises InputError for a file that is missing, damaged or no checkpoint, or that would run code
    or unpack to more than it is; Unreadable where that is not the file's fault.
    """
    path = Path(path)
    what = f"{path} is not a checkpoint that can be read"
    try:
        if not path.is_file():
            raise InputError(f"there is no checkpoint {path}")
        _check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (OSError, MemoryError) as error:
        kind = InputError if getattr(error, "errno", None) == errno.EINVAL else Unreadable
        raise kind(f"{what}: {_reason(error)}") from error
    except Exception as error:  # what torch.load raises on a damaged file is not documented
        raise InputError(f"{what}: {_reason(error)}") from error
    try:
        return _checked(_from_contents(contents))
    except InputError:
        raise
    except Exception as error:  # there is no end to what could be in the place of a part
        raise InputError(
            f"{path} is neither a checkpoint of this project nor of the authors' release "
            f"({type(error).__name__}: {one_line(error)[:200]})"
        ) from error


def _check_archive(path: Path) -> None:
    """ValueError or BadZipFile unless this is an undamaged zip file as torch.save writes them.

    torch.load does not look at checksums, and unpacks compressed entries whatever their size.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        _check_directory(file, path.stat().st_size)
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("entries of it have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which PyTorch's files are not")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(archive.read(entry))


def _check_directory(file: BinaryIO, size: int) -> None:
    """ValueError unless the zip file's directory is where its end says, right before that.

    Elsewhere Python and PyTorch would look for it in different places, and find different files.
    """
    file.seek(max(0, size - 98))
    end64, locator, end = struct.Struct("<4s36xQQ"), b"PK\6\7", struct.Struct("<4s8xLLH")
    tail = file.read(98)
    signature, length, offset, comment = end.unpack(tail[-end.size :])
    begins = size - end.size
    if tail[-42:-38] == locator and len(tail) == 98:
        begins = size - 98
        length, offset = end64.unpack(tail[: end64.size])[1:]
    if signature != b"PK\5\6" or comment or length + offset != begins:
        raise ValueError("its directory is not where it should be")


def _check_pickle(data: bytes) -> None:
    """ValueError if a pickle names anything but tensors, or is of a protocol that hides it."""
    for operation, named, _ in pickletools.genops(data):
        if operation.name == "GLOBAL" and not GLOBALS.fullmatch(named):
            raise ValueError(UNSAFE)
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(UNSAFE)


def _reason(error: Exception) -> str:
    """Why a file could not be loaded, without PyTorch's advice to load it in an unsafe way."""
    text = one_line(error)
    return UNSAFE if "eights only load failed" in text else text[:300]


def _from_contents(contents: dict) -> Checkpoint:
    version = contents.get("format")
    if isinstance(version, str) and version != FORMAT:
        raise Unreadable("the checkpoint is of a later version of this project")
    if version == FORMAT:
        return Checkpoint(**{k: v for k, v in contents.items() if k != "format"})
    state_dict = contents["state_dict"]
    if not is_official(state_dict):
        raise ValueError("unknown names in its state_dict")
    return Checkpoint(
        epoch=contents["epoch"],
        state_dict=dict(state_dict),
        momentum=official_momentum(state_dict, contents["optimizer"]),
        options={},
        classes=[],
        official=True,
    )


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if each of its parts is what it should be; TypeError or ValueError if not."""
    _check(_is_count(checkpoint.epoch), "its epoch is no number of epochs")
    for part in ("state_dict", "momentum", "options", "totals", "peak"):
        entries = getattr(checkpoint, part)
        _check(isinstance(entries, dict), f"its {part} are not what they should be")
        _check(all(isinstance(name, str) for name in entries), f"its {part} have names of no text")
    for part in ("state_dict", "momentum"):
        for name, value in getattr(checkpoint, part).items():
            _check(_is_plain_tensor(value), f"{name!r} in its {part} is no tensor")
    for value in checkpoint.peak.values():
        _check(isinstance(value, str) or _is_count(value), "its peak is not what it should be")
    classes = checkpoint.classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _check(named, "its classes are not a list of names")
    for state in checkpoint.scalers:
        _check(state.keys() == SCALER and all(map(_is_real, state.values())), "its scalers' state")
    if checkpoint.totals:
        _check_totals(checkpoint.totals)
    _check_history(checkpoint)
    return checkpoint


def _check_totals(totals: dict[str, Tensor | int | float]) -> None:
    counts = (totals["samples"], totals["steps"], totals["full"])
    _check(all(map(_is_count, counts)) and min(counts) > 0, "its totals count no steps")
    _check(_is_real(totals["seconds"]) and totals["seconds"] > 0, "its totals took no time")
    for name in totals.keys() - {"samples", "steps", "full", "seconds"}:
        sums = totals[name]
        _check(_is_plain_tensor(sums) and bool(sums.isfinite().all()), f"its totals' {name}")


def _check_history(checkpoint: Checkpoint) -> None:
    """Rows of figures and lists of figures, which metrics.jsonl is made of."""
    first = checkpoint.epoch - len(checkpoint.history) + 1
    for epoch, row in enumerate(checkpoint.history, start=first):
        numbers = (row["test_error"], row["samples_per_second"], row["peak_memory_bytes"])
        _check(row["epoch"] == epoch and all(map(_is_real, numbers)), f"its history of {epoch}")
        for name, value in row.items():
            figures = value if isinstance(value, list) else [value]
            finite = (x is None or (type(x) in (int, float) and math.isfinite(x)) for x in figures)
            _check(isinstance(name, str) and all(finite), f"its history of {epoch}")


def _check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_real(value: object) -> bool:
    return _is_count(value) or (type(value) is float and 0 <= value < math.inf)


def _is_plain_tensor(value: object) -> bool:
    """A tensor with values of its own on the CPU: not sparse, quantised, or without any."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
    )


def check_weights(checkpoint: Checkpoint, arguments: dict[str, object]) -> None:
    """InputError unless the weights are those of `build_network(**arguments)`.

    Nothing is allocated for that: what a file asks for may be larger than the memory.
    """
    count, blocks = len(checkpoint.state_dict), 3 * blocks_per_stage(arguments["layers"])
    if blocks > count:
        raise InputError(
            f"the checkpoint is of another architecture: it has {count} tensors, and the network "
            f"{blocks} blocks"
        )
    with torch.device("meta"):
        matched(build_network(**arguments), checkpoint.state_dict, checkpoint.official)


def load_weights(network: ContSupNetwork, checkpoint: Checkpoint) -> None:
    """Weights and BatchNorm statistics of either format into `network`, in place.

    Raises InputError if they are of another architecture; nothing is changed then.
    """
    network.load_state_dict(matched(network, checkpoint.state_dict, checkpoint.official))


def load_momentum(
    optimizers: list[torch.optim.SGD], network: ContSupNetwork, checkpoint: Checkpoint
) -> None:
    """The momentum of either format into the optimizers of the modules held, in place.

    Raises InputError if a buffer does not have its parameter's shape.
    """
    momentum = checkpoint.momentum
    if checkpoint.official:
        momentum = from_official(network, momentum)
    parameters = dict(network.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, buffer in momentum.items():
        parameter = parameters.get(name)
        if parameter is None or not fits(buffer, parameter):
            raise InputError(f"the checkpoint's momentum of {name} is of another architecture")
        if parameter in owner:
            # In the parameter's memory format, which a fused step takes for granted.
            own = torch.empty_like(parameter, requires_grad=False).copy_(buffer)
            owner[parameter].state[parameter]["momentum_buffer"] = own


def momentum_by_name(
    optimizers: list[torch.optim.SGD], network: ContSupNetwork
) -> dict[str, Tensor]:
    """SGD's momentum by parameter name, as a Checkpoint holds it."""
    state = {p: s for o in optimizers for p, s in o.state.items()}
    return {
        name: state[parameter]["momentum_buffer"]
        for name, parameter in network.named_parameters()
        if parameter in state
    }
