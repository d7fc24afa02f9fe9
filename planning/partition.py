"""Cuts chosen by predicted memory: the smallest peak of K modules, or the fewest modules that fit.

The memory of a module is a sum of parts: what each unit keeps for the backward, what one unit's
backward needs on top for a moment, and the same for heads and context supply. `Costs` meters each
part once, on tensors without data (planning/plan.py), so any cuts are a sum away. `Search` finds
the best ones, and they are metered as a network before a run relies on them.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from configs import Cut, InputError, choose_cuts, published_loss_scale
from engine.console import readable
from engine.memory import LiveBytes
from models import LocalModule, build_network
from models.build import options_of_cuts
from models.checkpointing import checkpoint_unit
from models.context import ContextMode, Contexts, ContextSupply
from models.torch_internals import FakeTensorMode
from planning.plan import END_TO_END, fake_batch, step_peaks

Shape = tuple[int, int]
"""Channels and side length of features."""

IMAGE_CHANNELS = 3

# ---------------------------------------------------------------------------------------------
# Memory of the parts, in bytes


class UnitCosts(NamedTuple):
    """Costs of each unit, [units] of bytes.

    The last unit of a module differs: it is not recomputed, and its output stays for the next one.

    Attributes:
        output: its output.
        parameters: its parameters.
        saved: what its forward leaves for the backward, the output included.
        backward: all that is alive at the peak of its backward, without what earlier units left.
        saved_last, backward_last: the same of a module's last unit.
    """

    output: np.ndarray
    parameters: np.ndarray
    saved: np.ndarray
    backward: np.ndarray
    saved_last: np.ndarray
    backward_last: np.ndarray


class HeadCosts(NamedTuple):
    """Costs of a head with its decoder, in bytes; or of one head after each unit, [units].

    Attributes:
        peak: of forward and backward.
        output: what the head returns.
        parameters: of both.
        state: weights, momentum and statistics.
    """

    peak: Any
    output: Any
    parameters: Any
    state: Any


class SupplyCost(NamedTuple):
    """Cost of a context supply, in bytes.

    Attributes:
        forward: peak of the forward.
        saved: what the forward leaves, the module's input included.
        backward: peak of the backward, beyond what is alive before.
        state: weights, momentum and statistics.
    """

    forward: int = 0
    saved: int = 0
    backward: int = 0
    state: int = 0


class Costs:
    """Memory of a network's parts for one batch size, and from it the memory of any modules.

    Args:
        arguments: of `build_network`; number of modules and cuts do not matter.
        batch_size: samples a step.
    Attributes:
        saved: [units + 1], bytes that the forward of all units before one leaves.
    """

    def __init__(self, arguments: dict[str, Any], batch_size: int) -> None:
        self.arguments, self.batch_size = arguments, batch_size
        self.mode = ContextMode.parse(arguments["context_mode"])
        with FakeTensorMode():
            images, targets = fake_batch(arguments, batch_size)
            network = build_network(**arguments | END_TO_END)
            (all_units,) = network.local_modules
            self.units, self.shapes = unit_costs(all_units, images, arguments["recompute"])
            self.names = all_units.unit_names
            by_kind, heads = {}, []
            for module, shape in zip(self._one_for_each_unit(), self.shapes[:-1], strict=True):
                kind = (
                    shape,
                    *(p.shape for part in owned_parts(module) for p in part.parameters()),
                )
                if kind not in by_kind:
                    by_kind[kind] = head_costs(module, shape, images, targets, network.num_classes)
                heads.append(by_kind[kind])
            last = head_costs(all_units, self.shapes[-1], images, targets, network.num_classes)
            heads.append(last)
        self.heads = HeadCosts(*np.array(heads, dtype=float).T)
        self.image: Shape = tuple(images.shape[1:3])
        self.fixed = images.nbytes * (1 + arguments["h_reconstruct"]) + targets.nbytes
        self.fixed += state_bytes(all_units.units)
        self.saved = np.concatenate([[0], np.cumsum(self.units.saved)])
        self._supplies: dict[tuple, SupplyCost] = {}

    def _one_for_each_unit(self) -> list[LocalModule]:
        """Return a module with an auxiliary head for each unit but the last."""
        cuts = self.names[:-1]
        changed = {
            "cuts": cuts, "local_module_num": len(cuts) + 1, "context_mode": "R0",
            "train_modules": None, "overlap": 0,
        }  # fmt: skip
        if self.arguments["h_reconstruct"]:
            changed["loss_scale"] = (1, 1, 1, 1)
        return list(build_network(**self.arguments | changed).local_modules)[:-1]

    @cached_property
    def search(self) -> "Search":
        """The search for cuts."""
        return Search(self)

    def supply(self, shape: Shape, sources: dict[str, Shape]) -> SupplyCost:
        """Return the cost of supplying features with contexts; R0 has no sources."""
        key = (shape, *sources.items())
        if key not in self._supplies:
            with FakeTensorMode():
                self._supplies[key] = supply_cost(self.arguments, self.batch_size, shape, sources)
        return self._supplies[key]

    def modules_from(self, start: int, window: Contexts[Shape]) -> tuple[np.ndarray, np.ndarray]:
        """Return peaks of the modules that may begin with unit `start`, the shortest first.

        The batch and all modules' weights, momentum and statistics are alive all the time, and not
        in these peaks. Of the latter, the part of head and context supply is returned second.
        """
        supply = SupplyCost()
        contexts = at_start = at_end = 0
        if start:
            sources, h_out = window.named(), self.shapes[start - 1]
            h_out_bytes = feature_bytes(self.batch_size, h_out)
            supply = self.supply(h_out, sources)
            # The image counts with the batch.
            contexts = sum(
                feature_bytes(self.batch_size, s) for s in sources.values() if s != self.image
            )
            at_start = contexts + h_out_bytes + supply.forward
            at_end = contexts + supply.saved + supply.backward
            at_end += h_out_bytes if self.mode.recent else 0  # it is a context of later modules
        units = UnitCosts(*(column[start:] for column in self.units))
        heads = HeadCosts(*(column[start:] for column in self.heads))
        before = contexts + supply.saved + np.cumsum(units.saved) - units.saved
        gradients = np.cumsum(units.parameters)
        head = heads.output + heads.parameters
        inside = np.maximum.accumulate(before + units.backward - gradients)
        inside = np.concatenate([[-np.inf], inside[:-1]])
        # In the head, in the backward of the last unit, and of an earlier one or the supply.
        peaks = [
            before + units.saved_last + heads.peak,
            before + units.backward_last + head,
            np.maximum(inside, at_end) + gradients + units.output + head,
        ]
        return np.maximum(reduce(np.maximum, peaks), at_start), heads.state + supply.state

    def cuts(self, ends: Sequence[int]) -> list[Cut]:
        """Return the cuts between modules that end before unit ends[0], ends[1], ..."""
        return [self.names[end - 1] for end in ends[:-1]]

    def ends(self, cuts: Sequence[Cut]) -> list[int]:
        """Return where the modules between some cuts end."""
        return [*(self.names.index(tuple(cut)) + 1 for cut in cuts), len(self.names)]

    def peaks(self, ends: Sequence[int]) -> list[int]:
        """Return the peaks of modules that end before unit ends[0], ..., everything counted."""
        window, start = Contexts(self.mode, self.image), 0
        peaks, fixed = [], self.fixed
        for end in ends:
            peaks_from, fixed_from = self.modules_from(start, window)
            peaks.append(int(peaks_from[end - start - 1]))
            fixed += int(fixed_from[end - start - 1])
            if start:
                window.push(self.shapes[start - 1])
            start = end
        return [peak + fixed for peak in peaks]


def unit_costs(
    module: LocalModule, images: Tensor, recompute: bool
) -> tuple[UnitCosts, list[Shape]]:
    """Return the costs of the units of a module that is the full net, and their outputs' shapes."""
    saved, backward, shapes = _meter_units(module, images, recompute)
    saved_last, backward_last, _ = _meter_units(module, images, outputs_stay=True)
    outputs = [feature_bytes(len(images), shape) for shape in shapes]
    parameters = [parameter_bytes(unit) for unit in module.units]
    columns = outputs, parameters, saved, backward, saved_last, backward_last
    return UnitCosts(*np.array(columns, dtype=float)), shapes


def _meter_units(
    module: LocalModule, images: Tensor, recompute: bool = False, outputs_stay: bool = False
) -> tuple[list[int], list[int], list[Shape]]:
    """Return for each unit the bytes that its forward leaves, its backward's peak, output's shape.

    The peak is beyond what was alive before the forward, what earlier units keep and the gradients
    of later units' parameters. Outputs of later units do not count, even if all outputs stay.
    """
    saved, shapes, stay = [], [], []
    peaks = [0] * len(module.units)
    with LiveBytes([*module.parameters(), *module.buffers(), images]) as meter:

        def backward_ends(index: int, gradient: Tensor | None = None) -> None:
            """Take the peak of a unit's backward; the index after the last one is the head's."""
            if index < len(peaks):
                peaks[index] = meter.peak
            meter.peak = meter.live

        h, start = images, meter.live
        for index, unit in enumerate(module.units):
            before = meter.live
            h = checkpoint_unit(unit, h) if recompute else unit(h)
            saved.append(meter.live - before)
            shapes.append(tuple(h.shape[1:3]))
            h.register_hook(partial(backward_ends, index + 1))
            if outputs_stay:
                stay.append(h)
        loss = module.head(h).sum()
        del h
        loss.backward()
        backward_ends(0)
    later = sum(p.nbytes for p in module.head.parameters()) + start
    for index in reversed(range(len(peaks))):
        peaks[index] -= later + sum(saved[:index])
        later += sum(p.nbytes for p in module.units[index].parameters())
        later += stay[index].nbytes if outputs_stay else 0
    module.zero_grad(set_to_none=True)
    return saved, peaks, shapes


def head_costs(
    module: LocalModule, shape: Shape, images: Tensor, targets: Tensor, num_classes: int
) -> HeadCosts:
    """Return the costs of the module's head and decoder on features (N, C, S, S)."""
    h_out = features(len(images), shape).requires_grad_()
    owned = nn.ModuleList(owned_parts(module))
    follows = module.head.task.follows
    predicted = [torch.empty(len(images), num_classes)] if follows else []
    with LiveBytes([*owned.parameters(), *owned.buffers(), h_out, images, targets]) as meter:
        before = meter.live
        output, *losses = module.losses(h_out, targets, images, *predicted)
        module.local_loss(*losses).backward()
    peak = meter.peak - before
    return HeadCosts(peak, output.nbytes, parameter_bytes(owned), state_bytes(owned))


def owned_parts(module: LocalModule) -> list[nn.Module]:
    """Return what follows a module's units: blocks before the head, head, and decoder."""
    parts = (module.momentum, module.head, module.decoder)
    return [part for part in parts if part is not None]


def supply_cost(
    arguments: dict[str, Any], batch_size: int, shape: Shape, sources: dict[str, Shape]
) -> SupplyCost:
    """Return the cost of supplying features of one shape with contexts of others."""
    h = features(batch_size, shape)
    if not sources:
        return SupplyCost(saved=h.nbytes)
    channels = {name: source[0] for name, source in sources.items()}
    supply = ContextSupply(
        channels, shape[0], arguments["aux_net_widen"], arguments["context_group"]
    )
    contexts = {name: features(batch_size, source) for name, source in sources.items()}
    with LiveBytes([*supply.parameters(), *supply.buffers(), h, *contexts.values()]) as meter:
        before = meter.live
        h_in = supply(h, contexts)
        forward, saved = meter.peak - before, meter.live - before
        # The oldest falls out of the window, so only autograd keeps it now; an image stays.
        oldest = f"recent_{ContextMode.parse(arguments['context_mode']).recent - 1}"
        if channels.get(oldest, IMAGE_CHANNELS) != IMAGE_CHANNELS:
            del contexts[oldest]
        at_start = []

        def backward_starts(gradient: Tensor) -> None:
            at_start.append(meter.live)
            meter.peak = meter.live

        h_in.register_hook(backward_starts)
        # Through an operation, so that only autograd keeps the gradient of h_in.
        (h_in * 1).backward(torch.empty_like(h_in))
    backward = meter.peak - at_start[0]
    return SupplyCost(forward, saved, backward, state_bytes(supply))


def features(batch_size: int, shape: Shape) -> Tensor:
    """Return float32 features (N, C, S, S)."""
    return torch.empty(batch_size, shape[0], shape[1], shape[1])


def feature_bytes(batch_size: int, shape: Shape) -> int:
    """Return the bytes of float32 features (N, C, S, S)."""
    return 4 * batch_size * shape[0] * shape[1] ** 2


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters that train, and so of their gradients."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def state_bytes(module: nn.Module) -> int:
    """Return the bytes of weights, momentum and statistics."""
    weights = sum(parameter.nbytes for parameter in module.parameters())
    return weights + parameter_bytes(module) + sum(b.nbytes for b in module.buffers())


# ---------------------------------------------------------------------------------------------
# The search, on the sums


class Search:
    """The smallest peak of modules that make up the net, for each number of modules.

    A dynamic programme over the units before a boundary, the number of modules made of them, and
    the window of contexts after them. Weights, momentum, statistics and the batch are left out, so
    cuts whose heads have fewer weights may be better by some of their bytes.

    Attributes:
        peaks: [modules], bytes; infinite where there are more modules than units.
    """

    def __init__(self, costs: Costs) -> None:
        self.saved = costs.saved
        count = len(costs.names)
        window = Contexts(costs.mode, costs.image)
        windows = {_key(window): window}
        # By window: smallest largest peak [units before, modules]; and the modules before it.
        self._smallest = defaultdict(lambda: np.full((count + 1, count + 1), np.inf))
        self._modules: dict[Hashable, list[tuple[int, Hashable, np.ndarray]]] = defaultdict(list)
        self._smallest[_key(window)][0, 0] = 0
        for start in range(count):
            for key in [key for key, s in self._smallest.items() if np.isfinite(s[start]).any()]:
                peaks, _ = costs.modules_from(start, windows[key])
                after = copy.deepcopy(windows[key])
                if start:
                    after.push(costs.shapes[start - 1])
                windows.setdefault(_key(after), after)
                self._modules[_key(after)].append((start, key, peaks))
                largest = np.maximum(self._smallest[key][start, :-1], peaks[:, None])
                smallest = self._smallest[_key(after)][start + 1 :, 1:]
                np.minimum(smallest, largest, out=smallest)
        self.peaks = np.min([smallest[-1] for smallest in self._smallest.values()], axis=0)

    def ends(self, count: int) -> list[int]:
        """Return where `count` modules with the smallest peak end; as even as it lets them be."""
        limit, end, ends = self.peaks[count], len(self.saved) - 1, []
        key = next(key for key, s in self._smallest.items() if s[-1, count] <= limit)
        while end:
            ends.append(end)
            count -= 1
            even = self.saved[end] * count / (count + 1)
            starts = [
                (start, before)
                for start, before, peaks in self._modules[key]
                if start < end
                and peaks[end - start - 1] <= limit
                and self._smallest[before][start, count] <= limit
            ]
            end, key = min(starts, key=lambda found: abs(self.saved[found[0]] - even))
        return ends[::-1]


def _key(window: Contexts[Shape]) -> Hashable:
    return tuple(window.named().items())


# ---------------------------------------------------------------------------------------------
# The choice, checked by metering the network


class Partition(NamedTuple):
    """Cuts, and the metered peak of a training step with them, in bytes."""

    cuts: list[Cut]
    peak: int


def smallest_peak(arguments: dict[str, Any], batch_size: int) -> Partition:
    """Return the K-1 cuts with the smallest peak, K = `local_module_num` of the arguments.

    Equal layers and the published balanced cuts are tried too, and win where they are as good.
    All is in float32, whatever `amp` says.
    """
    arguments = arguments | {"amp": "off"}
    K = arguments["local_module_num"]
    candidates = [choose_cuts(arguments["layers"], K, arguments["dataset"])]
    with contextlib.suppress(InputError):  # where none are published
        candidates.append(choose_cuts(arguments["layers"], K, arguments["dataset"], True))
    costs = Costs(arguments, batch_size)
    candidates.append(costs.cuts(costs.search.ends(K)))
    tried = [Partition(cuts, metered_peak(arguments, batch_size, cuts)) for cuts in candidates]
    return min(tried, key=lambda partition: partition.peak)


def fewest_modules(arguments: dict[str, Any], batch_size: int, kind: str, budget: int) -> Partition:
    """Return the cuts of the fewest modules whose peak is at most `budget` bytes.

    Args:
        arguments: of `build_network`; `local_module_num` and `amp` do not matter, since cuts are
            planned in float32.
        batch_size: samples a step.
        kind: of cuts, `equal`, `balanced` or `auto`.
        budget: in bytes.
    Raises:
        InputError: nothing fits, or no number of modules is allowed.
    """
    note = "" if arguments.get("amp", "off") == "off" else " (cuts are planned in float32)"
    arguments = arguments | {"amp": "off"}
    costs = Costs(arguments, batch_size)
    allowed = _allowed(costs, kind)
    # The sum of the parts is exact, but for heads whose depth depends on the number of modules
    # (auglocal), and for windows, of which it has one module.
    limit = budget * (1.25 if arguments["aux_net_config"] == "auglocal" else 1)
    too_large = []
    for K in allowed:
        if kind == "auto" and costs.search.peaks[K] > limit - costs.fixed:
            continue
        ends = _ends(costs, kind, K)
        if max(costs.peaks(ends)) <= limit:
            cuts = costs.cuts(ends)
            peak = metered_peak(arguments, batch_size, cuts)
            if peak <= budget:
                return Partition(cuts, peak)
            too_large.append((peak, K))
    if not too_large:
        if kind == "auto":
            allowed = [min(allowed, key=lambda K: costs.search.peaks[K])]
        _, K = min((max(costs.peaks(_ends(costs, kind, K))), K) for K in allowed)
        cuts = costs.cuts(_ends(costs, kind, K))
        too_large = [(metered_peak(arguments, batch_size, cuts), K)]
    peak, K = min(too_large)
    raise InputError(
        f"no {kind} cuts of ResNet-{arguments['layers']} fit {readable(budget)} at batch size "
        f"{batch_size}: the smallest peak found is {readable(peak)}, with {K} modules; take a "
        f"smaller --batch_size{'' if arguments['recompute'] else ' or --recompute'}{note}"
    )


def _allowed(costs: Costs, kind: str) -> list[int]:
    """Return the numbers of modules that context mode, decoder and kind of cuts allow.

    Raises InputError if there is none.
    """
    a, count, allowed = costs.arguments, len(costs.names), []
    why_not = InputError(
        f"context_mode {a['context_mode']} asks for {costs.mode.recent} module inputs, but "
        f"ResNet-{a['layers']} has {count} units"
    )
    trained = max(a.get("train_modules") or [0])
    least = 2 if options_of_cuts(a) else 1
    for K in range(max(least, costs.mode.recent, trained + 1), count + 1):
        try:
            if a["h_reconstruct"] and a["loss_scale"] is None and K > 1:
                published_loss_scale(a["layers"], K, a["dataset"], kind == "balanced")
            if kind != "auto":
                _ends(costs, kind, K)
            allowed.append(K)
        except InputError as error:
            why_not = error
    if not allowed:
        raise why_not
    return allowed


def _ends(costs: Costs, kind: str, K: int) -> list[int]:
    if kind == "auto":
        return costs.search.ends(K)
    a = costs.arguments
    return costs.ends(choose_cuts(a["layers"], K, a["dataset"], kind == "balanced"))


def metered_peak(arguments: dict[str, Any], batch_size: int, cuts: list[Cut]) -> int:
    """Return the peak of a training step with these cuts, in bytes."""
    with FakeTensorMode():
        network = build_network(**arguments | {"cuts": cuts, "local_module_num": len(cuts) + 1})
        return max(step_peaks(network, *fake_batch(arguments, batch_size)))
