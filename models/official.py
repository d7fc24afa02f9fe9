"""The authors' checkpoint format, and its names for the parts of a network:

    conv1, bn1, layer{stage}.{block}, fc             backbone
    aux_classifier_{stage}_{block}.head              auxiliary head of the module that ends there
    decoder_{stage}_{block}.decoder                  its decoder
    cont_sup_node.encoder_{cut}.encoder              context encoder of the image
    cont_sup_node.resencoder_{cut}_{s}.encoder       context encoder of window position s

A saved checkpoint puts `module.` before every name.
"""

from collections.abc import Iterator

from torch import Tensor

from configs import InputError
from models.network import ContSupNetwork, LocalModule

SAVED_PREFIX = "module."
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def official_names(network: ContSupNetwork) -> dict[str, str]:
    """Return {name in `network.state_dict()`: the authors' name, without `module.`}."""
    prefixes = {
        f"local_modules.{index}.{ours}": theirs
        for index, module in enumerate(network.local_modules)
        for ours, theirs in _prefixes(index, module, last=index == len(network.local_modules) - 1)
    }
    names = {}
    for name in network.state_dict():
        ours = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        names[name] = prefixes.get(ours, "") + name.removeprefix(ours)  # else the release lacks it
    return names


def _prefixes(index: int, module: LocalModule, last: bool) -> Iterator[tuple[str, str]]:
    for position, (stage, block) in enumerate(module.unit_names):
        yield f"units.{position}.", "" if stage == 0 else f"layer{stage}.{block}."
    for name in module.context:
        kind, _, which = name.partition("_")
        encoder = f"encoder_{index - 1}"
        if which:  # an encoder of the image other than E has a name that the release lacks
            encoder = f"{'res' if kind == 'recent' else kind}encoder_{index - 1}_{which}"
        yield f"context.{name}.", f"cont_sup_node.{encoder}.encoder."
    stage, block = module.unit_names[-1]
    yield ("head.2.", "fc.") if last else ("head.", f"aux_classifier_{stage}_{block}.head.")
    yield "decoder.", f"decoder_{stage}_{block}.decoder."


def is_official(state_dict: dict[str, Tensor]) -> bool:
    """Return whether the names are the authors' and not this project's."""
    return "conv1.weight" in state_dict or f"{SAVED_PREFIX}conv1.weight" in state_dict


def from_official(network: ContSupNetwork, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the official entries that `network` has, under its names; skip the rest.

    The release also saves encoders and decoders that its run never used.
    """
    bare = {name.removeprefix(SAVED_PREFIX): value for name, value in entries.items()}
    return {
        ours: bare[theirs] for ours, theirs in official_names(network).items() if theirs in bare
    }


def official_momentum(
    state_dict: dict[str, Tensor], optimizer: dict[str, dict]
) -> dict[str, Tensor]:
    """Return the momentum of the release's one SGD by official parameter name.

    The release numbers parameters in the order of the state dict, without buffers.
    """
    parameters = [name for name in state_dict if not name.endswith(BUFFERS)]
    return {
        parameters[number]: state["momentum_buffer"]
        for number, state in optimizer["state"].items()
        if state.get("momentum_buffer") is not None
    }


def load_official_state_dict(network: ContSupNetwork, state_dict: dict[str, Tensor]) -> None:
    """Load weights and BatchNorm statistics saved by the authors' release, in place.

    Names may have the `module.` of a saved checkpoint. Names that `network` lacks are skipped.

    Raises InputError if a tensor is missing or has another shape; the network is then as it was.
    """
    network.load_state_dict(matched(network, state_dict, official=True))


def matched(
    network: ContSupNetwork, state_dict: dict[str, Tensor], official: bool
) -> dict[str, Tensor]:
    """Return the state dict by this project's names; raise InputError if it does not fit."""
    if official:
        state_dict = from_official(network, state_dict)
    own = network.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state_dict]
    wrong += [f"{name} is not in the network" for name in state_dict if name not in own]
    wrong += [
        f"{name} is {_kind(state_dict[name])} and should be {_kind(tensor)}"
        for name, tensor in own.items()
        if name in state_dict and not fits(state_dict[name], tensor)
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"the checkpoint is of another architecture: {wrong[0]}{more}")
    return state_dict


def fits(tensor: Tensor, own: Tensor) -> bool:
    """Return whether `tensor` has the shape of `own`, and real numbers where `own` has them."""
    real = tensor.is_floating_point() or not (own.is_floating_point() or tensor.is_complex())
    return tensor.shape == own.shape and real


def _kind(tensor: Tensor) -> str:
    """Return type and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
