"""Checkpoint files: this project's own and the authors' released format.

Both are read into the same `Checkpoint`; only this project's own is written. A file may be damaged,
or made to do harm: torch.load(weights_only=True) keeps it from running code, and each part is
checked before it is used.
"""

import errno
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import InputError, blocks_per_stage, one_line
from engine.errors import CannotSave
from engine.files import replacing
from models.build import build_network
from models.network import ContSupNetwork
from models.official import fits, from_official, is_official, matched, official_momentum

FORMAT = "contsup-1"

SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
"""Keys of a torch.amp.GradScaler's state."""


class Checkpoint(NamedTuple):
    """A training state between two steps.

    Attributes:
        epoch: epochs done.
        state_dict: weights and BatchNorm statistics, by the names of the file's format.
        momentum: SGD's momentum by parameter name, by the same names.
        options: the run's options. The authors' format lacks them, and all that follows.
        classes: names of the classes, in the order of the head's outputs.
        official: whether the file is of the authors' format.
        scalers: states of the modules' GradScalers with float16; else empty.
        totals: `Totals.state` of the epoch in progress; empty between two epochs.
        history: the metrics of the epochs done, a dict each, as in metrics.jsonl.
        peak: `PeakMemory.state`.
        data: `dataloaders.fingerprint` of the images.
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
    data: Mapping[str, Mapping] = {}

    @property
    def step(self) -> int:
        """Steps done of the epoch in progress, 0 between two epochs."""
        return self.totals.get("steps", 0)

    @property
    def done(self) -> tuple[int, int]:
        """Epochs done, and steps of the epoch in progress; a newer checkpoint has more."""
        return self.epoch, self.step


class Unreadable(InputError):
    """A checkpoint cannot be read here and now, but may be undamaged."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in this project's format; the earlier file stays until it is on the disk.

    Raises CannotSave.
    """
    contents = checkpoint._asdict() | {"format": FORMAT}
    del contents["official"]
    try:
        with replacing(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise CannotSave(f"cannot write {path}: {one_line(reason)}") from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of either format, to the CPU.

    Raises InputError for a file that is missing, damaged, or no checkpoint; Unreadable where that
    is not the file's fault.
    """
    path = Path(path)
    what = f"{path} is not a checkpoint that can be read"
    try:
        if not path.is_file():
            raise InputError(f"there is no checkpoint {path}")
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = _from_contents(contents)
        _check_parts(checkpoint)
        return checkpoint
    except InputError:
        raise
    except (OSError, MemoryError) as error:
        # A damaged zip file makes PyTorch seek to impossible places (EINVAL).
        kind = InputError if getattr(error, "errno", None) == errno.EINVAL else Unreadable
        raise kind(f"{what}: {one_line(error)[:300]}") from error
    except Exception as error:  # what torch.load raises on a damaged file is not documented
        if "can't allocate memory" in str(error):  # what the CPU allocator raises
            raise Unreadable(f"{what}: {one_line(error)[-300:]}") from error
        raise InputError(f"{what}: {_reason(error)}") from error


def _check_archive(path: Path) -> None:
    """Raise ValueError or BadZipFile unless this is an undamaged zip file, as torch.save writes it.

    torch.load ignores checksums, and unpacks compressed entries whatever their size.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # Python allows for bytes before an archive, PyTorch does not and may find other entries:
        # so the first one is where the archive's directory (at byte 42 of its record) says, at 0.
        file.seek(archive.start_dir + 42)
        if not entries or entries[0].header_offset or file.read(4) != bytes(4):
            raise ValueError("it has more in it than a zip file")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its entries have the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which PyTorch's files are not")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")


def _reason(error: Exception) -> str:
    """Return why a file could not be read, without PyTorch's advice to read it in an unsafe way."""
    text = one_line(error)
    if "eights only load failed" in text:
        return "it holds more than tensors and plain values, and might run code"
    kind = "" if type(error) in (ValueError, zipfile.BadZipFile) else f"{type(error).__name__}: "
    return kind + text[:300]


def _from_contents(contents: dict) -> Checkpoint:
    version = contents.get("format")
    if isinstance(version, str) and version != FORMAT:
        raise Unreadable("the checkpoint is of a later version of this project")
    if version == FORMAT:
        return Checkpoint(**{k: v for k, v in contents.items() if k != "format"})
    state_dict = contents["state_dict"]
    if not is_official(state_dict):
        raise ValueError("the names in its state_dict are neither this project's nor the authors'")
    return Checkpoint(
        epoch=contents["epoch"],
        state_dict=dict(state_dict),
        momentum=official_momentum(state_dict, contents["optimizer"]),
        options={},
        classes=[],
        official=True,
    )


def _check_parts(checkpoint: Checkpoint) -> None:
    """Raise some exception where a part is of the wrong type or has impossible numbers.

    Whether parts fit the network, the data and the options is checked where they are loaded.
    """
    _check(type(checkpoint.epoch) is int and _is_number(checkpoint.epoch), "epoch")
    for part in ("state_dict", "momentum", "options", "totals", "peak", "data"):
        entries = getattr(checkpoint, part)
        _check(isinstance(entries, dict) and all(isinstance(name, str) for name in entries), part)
        if part in ("state_dict", "momentum"):
            _check(all(map(_is_plain_tensor, entries.values())), part)
    for value in checkpoint.options.values():  # at most a list of lists, such as cuts
        items = [x for y in _as_list(value) for x in _as_list(y)]
        _check(all(x is None or type(x) in (bool, int, float, str) for x in items), "options")
    classes = checkpoint.classes
    _check(isinstance(classes, list) and all(isinstance(c, str) for c in classes), "classes")
    for state in checkpoint.scalers:
        _check(state.keys() == SCALER and all(map(_is_number, state.values())), "scalers")
    if totals := dict(checkpoint.totals):
        totals.pop("full", None)  # earlier versions have it
        numbers = [totals.pop(name) for name in ("samples", "steps", "seconds")]
        _check(all(_is_number(n) and n > 0 for n in numbers), "totals")
        sums = totals.values()
        _check(all(_is_plain_tensor(t) and t.isfinite().all() for t in sums), "totals")
    for split in checkpoint.data.values():
        _check(split.keys() == {"images", "crc32"} and isinstance(split["images"], list), "data")
        _check(all(map(_is_number, [*split["images"], split["crc32"]])), "data")
    for epoch, row in enumerate(checkpoint.history, checkpoint.epoch + 1 - len(checkpoint.history)):
        needed = [row[name] for name in ("test_error", "samples_per_second", "peak_memory_bytes")]
        needed.append(row.get("val_error", 0))
        figures = [x for v in row.values() for x in _as_list(v)]
        finite = (x is None or (type(x) in (int, float) and math.isfinite(x)) for x in figures)
        _check(row["epoch"] == epoch and all(map(_is_number, needed)) and all(finite), "history")


def _check(is_so: bool, part: str) -> None:
    if not is_so:
        raise ValueError(f"its {part} is not what it should be")


def _as_list(value: object) -> Sequence:
    return value if isinstance(value, list | tuple) else [value]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63


def _is_plain_tensor(value: object) -> bool:
    """Return whether it is a tensor with values of its own: not sparse, quantised, or on meta."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
    )


def check_weights(checkpoint: Checkpoint, arguments: dict[str, object]) -> None:
    """Raise InputError unless the weights are those of `build_network(**arguments)`.

    It allocates nothing: what a file asks for may be larger than the memory.
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
    """Load weights and BatchNorm statistics of either format into `network`, in place.

    Raises InputError if they are of another architecture; the network is then as it was.
    """
    network.load_state_dict(matched(network, checkpoint.state_dict, checkpoint.official))


def load_momentum(
    optimizers: list[torch.optim.SGD], network: ContSupNetwork, checkpoint: Checkpoint
) -> None:
    """Load the momentum of either format into the optimizers, which may be of some modules only.

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
    """Return SGD's momentum by parameter name, as a Checkpoint has it."""
    state = {p: s for o in optimizers for p, s in o.state.items()}
    return {
        name: state[parameter]["momentum_buffer"]
        for name, parameter in network.named_parameters()
        if parameter in state
    }
