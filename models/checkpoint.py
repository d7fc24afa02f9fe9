"""Checkpoint files: this project's own and the authors' released format.

Both are read into the same `Checkpoint`; only this project's own is written. A file that was handed
in is checked before anything is made of it: it may be damaged, or meant to do harm.
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import InputError, one_line
from files import replacing
from models.network import ContSupNetwork
from models.official import from_official, is_official, official_momentum

FORMAT = "contsup-1"

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
    or unpack to more than it is.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"there is no checkpoint {path}")
        _check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # what torch.load raises on a damaged file is not documented
        raise InputError(
            f"{path} is not a checkpoint that can be read: {_reason(error)}"
        ) from error
    try:
        return _checked(_from_contents(contents))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is neither a checkpoint of this project nor of the authors' release "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def _check_archive(path: Path) -> None:
    """ValueError or BadZipFile unless this is an undamaged zip file as torch.save writes them.

    torch.load does not look at checksums, and unpacks compressed entries whatever their size.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which PyTorch's files are not")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")


def _reason(error: Exception) -> str:
    """Why a file could not be loaded, without PyTorch's advice to load it in an unsafe way."""
    text = one_line(error)
    if "eights only load failed" in text:
        return "it holds more than tensors and plain values, and might run code"
    return text[:300]


def _from_contents(contents: dict) -> Checkpoint:
    if contents.get("format") == FORMAT:
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
    _check(_is_count(checkpoint.epoch), f"its epoch is {checkpoint.epoch!r}")
    for part in ("state_dict", "momentum", "options", "totals", "peak"):
        entries = getattr(checkpoint, part)
        _check(isinstance(entries, dict), f"its {part} are not what they should be")
        _check(all(isinstance(name, str) for name in entries), f"its {part} have names of no text")
    for part in ("state_dict", "momentum"):
        for name, value in getattr(checkpoint, part).items():
            _check(_is_plain_tensor(value), f"{name!r} in its {part} is no tensor")
    for part in ("totals", "peak"):
        for name, value in getattr(checkpoint, part).items():
            known = isinstance(value, str) or _is_real(value) or _is_plain_tensor(value)
            _check(known, f"{name!r} in its {part} is not what it should be")
    classes = checkpoint.classes
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _check(named, "its classes are not a list of names")
    for state in checkpoint.scalers:
        _check(state.keys() == SCALER and all(map(_is_real, state.values())), "its scalers' state")
    _check_history(checkpoint)
    return checkpoint


def _check_history(checkpoint: Checkpoint) -> None:
    first = checkpoint.epoch - len(checkpoint.history) + 1
    for epoch, row in enumerate(checkpoint.history, start=first):
        numbers = (row["test_error"], row["samples_per_second"], row["peak_memory_bytes"])
        _check(row["epoch"] == epoch and all(map(_is_real, numbers)), f"its history of {epoch}")


def _check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_real(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_plain_tensor(value: object) -> bool:
    """A tensor with values of its own on the CPU: not sparse, quantised, or without any."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
    )


def load_weights(network: ContSupNetwork, checkpoint: Checkpoint) -> None:
    """Weights and BatchNorm statistics of either format into `network`, in place.

    Raises InputError if they are of another architecture; nothing is changed then.
    """
    if checkpoint.official:
        load_official_state_dict(network, checkpoint.state_dict)
    else:
        _load_checked(network, checkpoint.state_dict)


def load_official_state_dict(network: ContSupNetwork, state_dict: dict[str, Tensor]) -> None:
    """Weights and BatchNorm statistics saved by the authors' release into `network`, in place.

    Names that `network` has no use for are skipped: the release also saves encoders and decoders
    that its run never used. Names may carry the `module.` of a saved checkpoint.

    Raises InputError if a tensor is missing or has another shape; nothing is changed then.
    """
    _load_checked(network, from_official(network, state_dict))


def load_momentum(
    optimizers: list[torch.optim.SGD], network: ContSupNetwork, checkpoint: Checkpoint
) -> None:
    """The momentum of either format into the optimizers of the modules, in place.

    Raises InputError if a buffer does not have its parameter's shape.
    """
    momentum = checkpoint.momentum
    if checkpoint.official:
        momentum = from_official(network, momentum)
    parameters = dict(network.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, buffer in momentum.items():
        parameter = parameters.get(name)
        if parameter is None or not _fits(buffer, parameter):
            raise InputError(f"the checkpoint's momentum of {name} is of another architecture")
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


def _load_checked(network: ContSupNetwork, state_dict: dict[str, Tensor]) -> None:
    own = network.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state_dict]
    wrong += [f"{name} is not in the network" for name in state_dict if name not in own]
    wrong += [
        f"{name} is {_kind(state_dict[name])} and should be {_kind(tensor)}"
        for name, tensor in own.items()
        if name in state_dict and not _fits(state_dict[name], tensor)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"the checkpoint is of another architecture: {wrong[0]}{more}")
    network.load_state_dict(state_dict)


def _fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor has the shape of one's own, and real numbers where that has them."""
    real = tensor.is_floating_point() or not (own.is_floating_point() or tensor.is_complex())
    return tensor.shape == own.shape and real


def _kind(tensor: Tensor) -> str:
    """Type and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
