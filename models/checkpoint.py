"""Checkpoint files: this project's own and the authors' released format.

Both are read into the same `Checkpoint`; only this project's own is written.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import InputError
from models.network import ContSupNetwork
from models.official import from_official, is_official, official_momentum

FORMAT = "contsup-1"


class Checkpoint(NamedTuple):
    """A training state between two epochs.

    Attributes:
        epoch: epochs done.
        state_dict: weights and BatchNorm statistics by the names that the format has for them.
        momentum: SGD's momentum by parameter name, likewise.
        options: the run's options; empty in the authors' format, which lacks them.
        classes: names of the classes, in the order of the head's outputs; empty likewise.
        official: whether the names are the authors'.
        scalers: state of the modules' loss scalers, with float16; else empty.
    """

    epoch: int
    state_dict: dict[str, Tensor]
    momentum: dict[str, Tensor]
    options: dict[str, object]
    classes: list[str]
    official: bool = False
    scalers: Sequence[dict[str, float]] = ()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name to write `path` under: the file that was there stays until that is done."""
    unfinished = path.with_name(path.name + ".tmp")
    yield unfinished
    os.replace(unfinished, path)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of this project."""
    contents = checkpoint._asdict() | {"format": FORMAT}
    del contents["official"]
    with replacing(path) as unfinished:
        torch.save(contents, unfinished)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of either format, to the CPU.

    Raises InputError for a file that is missing, is no checkpoint or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises on a damaged file is not documented
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a checkpoint that can be read: {reason}") from error
    try:
        return _checked(_from_contents(contents))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is neither a checkpoint of this project nor of the authors' release "
            f"({type(error).__name__}: {error})"
        ) from error


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
    if not isinstance(checkpoint.epoch, int) or checkpoint.epoch < 0:
        raise ValueError(f"its epoch is {checkpoint.epoch!r}")
    for part in ("state_dict", "momentum"):
        for name, tensor in getattr(checkpoint, part).items():
            if not (isinstance(name, str) and isinstance(tensor, Tensor)):
                raise TypeError(f"{name!r} in its {part} is no tensor")
    if not all(isinstance(state, dict) for state in checkpoint.scalers):
        raise TypeError("its scalers are not what they should be")
    if not isinstance(checkpoint.options, dict) or not isinstance(checkpoint.classes, list):
        raise TypeError("its options or classes are not what they should be")
    return checkpoint


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
        if parameter is None or parameter.shape != buffer.shape:
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
        f"{name} is {list(state_dict[name].shape)} and should be {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"the checkpoint is of another architecture: {wrong[0]}{more}")
    network.load_state_dict(state_dict)
