"""Cuts chosen by what modules take: the smallest largest peak, or the fewest modules that fit.

What a module takes adds up: what each unit keeps for the backward, what one unit's backward needs
for a moment on top, and the same for heads and context supply. `Costs` meters each part once, on
fake tensors (see planner.py); after that any cuts are a sum away. What the search finds is metered
as a whole before anyone relies on it.
"""

import contextlib
import copy
import math
from collections.abc import Hashable, Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs import Cut, InputError, choose_cuts, published_loss_scale
from engine.memory import LiveBytes, readable
from models import LocalModule, build_network
from models.context import ContextMode, Contexts, ContextSupply
from models.recompute import keep_input_only
from planning.plan import END_TO_END, fake_batch, step_peaks

Shape = tuple[int, int]
"""Channels and side length of features."""

IMAGE_CHANNELS = 3

# ---------------------------------------------------------------------------------------------
# What the parts take, in bytes


class UnitCost(NamedTuple):
    """A unit's output; all that its forward leaves (the output included) and all that is alive at
    the peak of its backward, inside a module and as its last unit; its parameters.

    As the last unit it is not recomputed, and its output stays: the next module waits for it.
    """

    output: int
    kept: int
    backward: int
    kept_last: int
    backward_last: int
    parameters: int


class HeadCost(NamedTuple):
    """A head's, with its decoder: peak of forward and backward; its output, which stays until the
    step is done; parameters; all that it owns.
    """

    peak: int
    output: int
    parameters: int
    fixed: int


class SupplyCost(NamedTuple):
    """A context supply's: peak of the forward; what that leaves (what enters the module included);
    peak of the backward on top of what is alive when it starts; all that it owns.
    """

    forward: int = 0
    kept: int = 0
    backward: int = 0
    fixed: int = 0


class Candidate(NamedTuple):
    """A module of the units up to, and without, `end`: its peak beyond what is alive all the time,
    which is the batch and every module's weights, momentum and statistics; of the latter, `fixed`
    are those of its head and context supply.
    """

    end: int
    peak: int
    fixed: int


class Costs:
    """What the parts of a net take with one batch size, and so what modules made of them take.

    Args:
        arguments: of `build_network`; number of modules and cuts do not matter.
        batch_size: samples a step.
    """

    def __init__(self, arguments: dict[str, Any], batch_size: int) -> None:
        self.arguments, self.batch_size = arguments, batch_size
        self.mode = ContextMode.parse(arguments["context_mode"])
        with FakeTensorMode():
            images, targets = fake_batch(arguments, batch_size)
            (all_units,) = build_network(**arguments | END_TO_END).local_modules
            self.units, self.shapes = unit_costs(all_units, images, arguments["recompute"])
            self.names = all_units.unit_names
            self.last_head = head_cost(all_units, self.shapes[-1], images, targets)
            self.heads = {}
            for module in self._one_of_each_stage():
                shape = self.shapes[self.names.index(module.unit_names[-1])]
                self.heads[shape] = head_cost(module, shape, images, targets)
        self.image: Shape = tuple(images.shape[1:3])
        self.batch = images.nbytes + targets.nbytes
        self.batch += images.nbytes if arguments["h_reconstruct"] else 0
        self.units_fixed = fixed_bytes(all_units.units)
        self.kept = [0, *accumulate(unit.kept for unit in self.units)]
        self.gradients = [0, *accumulate(unit.parameters for unit in self.units)]
        self._supplies: dict[tuple, SupplyCost] = {}

    def _one_of_each_stage(self) -> list[LocalModule]:
        """Modules with auxiliary heads, one ending in each stage."""
        cuts = [name for name in ((0, 0), (2, 0), (3, 0)) if name in self.names[:-1]]
        changed = {"cuts": cuts, "local_module_num": len(cuts) + 1, "context_mode": "R0"}
        if self.arguments["h_reconstruct"]:
            changed["loss_scale"] = (1, 1, 1, 1)
        return list(build_network(**self.arguments | changed).local_modules)[:-1]

    def features(self, shape: Shape) -> int:
        """Of float32 features (N, C, S, S)."""
        return _bytes(self.batch_size, shape)

    def supply(self, shape: Shape, sources: dict[str, Shape]) -> SupplyCost:
        """Of what supplies features with contexts; R0 and module 0 have no sources."""
        key = (shape, *sources.items())
        if key not in self._supplies:
            with FakeTensorMode():
                self._supplies[key] = supply_cost(self.arguments, self.batch_size, shape, sources)
        return self._supplies[key]

    def module_ends(self, start: int, window: Contexts[Shape]) -> Iterator[Candidate]:
        """Every module that may start with unit `start`, the shortest first."""
        supply = SupplyCost()
        held = at_start = at_end = stays = 0
        if start:
            sources, entry = window.named(), self.shapes[start - 1]
            supply = self.supply(entry, sources)
            # The image counts with the batch. What enters stays if it is a context later on.
            held = sum(self.features(s) for s in sources.values() if s != self.image)
            at_start = held + self.features(entry) + supply.forward
            stays = self.features(entry) if self.mode.recent else 0
            at_end = held + stays + supply.kept + supply.backward
        inside = -math.inf
        for end in range(start + 1, len(self.units) + 1):
            unit = self.units[end - 1]
            head = self.heads[self.shapes[end - 1]] if end < len(self.units) else self.last_head
            before = held + supply.kept + self.kept[end - 1] - self.kept[start]
            later = head.output + head.parameters + self.gradients[end]
            peak = max(
                at_start,
                before + unit.kept_last + head.peak,
                before + unit.backward_last + head.output + head.parameters,
                inside + unit.output + later,
                at_end + unit.output + later - self.gradients[start],
            )
            yield Candidate(end, peak, supply.fixed + head.fixed)
            inside = max(inside, before + unit.backward - self.gradients[end])

    def cuts(self, ends: Sequence[int]) -> list[Cut]:
        """The cuts behind modules that end before unit ends[0], ends[1], ..."""
        return [self.names[end - 1] for end in ends[:-1]]

    def ends(self, cuts: Sequence[Cut]) -> list[int]:
        """Where the modules between some cuts end."""
        return [*(self.names.index(tuple(cut)) + 1 for cut in cuts), len(self.units)]

    def peaks(self, ends: Sequence[int]) -> list[int]:
        """Of the modules that end before unit ends[0], ends[1], ..., everything counted."""
        window, start = Contexts(self.mode, self.image), 0
        peaks, fixed = [], self.batch + self.units_fixed
        for end in ends:
            (module,) = (m for m in self.module_ends(start, window) if m.end == end)
            peaks.append(module.peak)
            fixed += module.fixed
            if start:
                window.push(self.shapes[start - 1])
            start = end
        return [peak + fixed for peak in peaks]


def unit_costs(
    module: LocalModule, images: Tensor, recompute: bool
) -> tuple[list[UnitCost], list[Shape]]:
    """Of the units of a module that is a whole net, and the shapes that they give out."""
    kept, backward, shapes = _meter_units(module, images, recompute)
    kept_last, backward_last, _ = _meter_units(module, images, outputs_stay=True)
    outputs = [_bytes(len(images), shape) for shape in shapes]
    parameters = map(parameter_bytes, module.units)
    columns = outputs, kept, backward, kept_last, backward_last, parameters
    return list(map(UnitCost, *columns)), shapes


def _meter_units(
    module: LocalModule, images: Tensor, recompute: bool = False, outputs_stay: bool = False
) -> tuple[list[int], list[int], list[Shape]]:
    """Of each unit: bytes that its forward leaves, peak of its backward, shape of its output.

    The peak is beyond what was alive before the forward, what earlier units keep and the gradients
    of later ones' parameters; outputs of later ones do not count even if all outputs stay.
    """
    kept, shapes, stay = [], [], []
    peaks = [0] * len(module.units)
    with LiveBytes([*module.parameters(), *module.buffers(), images]) as meter:

        def is_through(index: int, gradient: Tensor | None = None) -> None:
            """The backward of a unit (or, with the index after the last one, of the head)."""
            if index < len(peaks):
                peaks[index] = meter.peak
            meter.peak = meter.live

        h, start = images, meter.live
        for index, unit in enumerate(module.units):
            before = meter.live
            h = keep_input_only(unit, h) if recompute else unit(h)
            kept.append(meter.live - before)
            shapes.append(tuple(h.shape[1:3]))
            h.register_hook(partial(is_through, index + 1))
            if outputs_stay:
                stay.append(h)
        loss = module.head(h).sum()
        del h
        loss.backward()
        is_through(0)
    later = sum(p.nbytes for p in module.head.parameters()) + start
    for index in reversed(range(len(peaks))):
        peaks[index] -= later + sum(kept[:index])
        later += sum(p.nbytes for p in module.units[index].parameters())
        later += stay[index].nbytes if outputs_stay else 0
    module.zero_grad(set_to_none=True)
    return kept, peaks, shapes


def head_cost(module: LocalModule, shape: Shape, images: Tensor, targets: Tensor) -> HeadCost:
    """Of the head and the decoder on features (N, C, S, S)."""
    h_out = torch.empty(len(images), shape[0], shape[1], shape[1], requires_grad=True)
    owned = nn.ModuleList(m for m in (module.head, module.decoder) if m is not None)
    with LiveBytes([*owned.parameters(), *owned.buffers(), h_out, images, targets]) as meter:
        before = meter.live
        loss, output = module.loss(h_out, targets, images)
        loss.backward()
    peak = meter.peak - before
    return HeadCost(peak, output.nbytes, parameter_bytes(owned), fixed_bytes(owned))


def supply_cost(
    arguments: dict[str, Any], batch_size: int, shape: Shape, sources: dict[str, Shape]
) -> SupplyCost:
    """Of the supply of features of one shape with contexts of others."""

    def features(shape: Shape) -> Tensor:
        return torch.empty(batch_size, shape[0], shape[1], shape[1])

    h = features(shape)
    if not sources:
        return SupplyCost(kept=h.nbytes)
    channels = {name: source[0] for name, source in sources.items()}
    supply = ContextSupply(
        channels, shape[0], arguments["aux_net_widen"], arguments["context_group"]
    )
    contexts = {name: features(source) for name, source in sources.items()}
    with LiveBytes([*supply.parameters(), *supply.buffers(), h, *contexts.values()]) as meter:
        before = meter.live
        h_in = supply(h, contexts)
        forward, kept = meter.peak - before, meter.live - before
        # The oldest falls out of the window, so only autograd holds it now; an image stays.
        oldest = f"recent_{ContextMode.parse(arguments['context_mode']).recent - 1}"
        if channels.get(oldest, IMAGE_CHANNELS) != IMAGE_CHANNELS:
            del contexts[oldest]
        begun = []

        def begins(gradient: Tensor) -> None:
            begun.append(meter.live)
            meter.peak = meter.live

        h_in.register_hook(begins)
        # Through an operation, so that nobody but autograd holds the gradient of h_in.
        (h_in * 1).backward(torch.empty_like(h_in))
    backward = meter.peak - begun[0]
    return SupplyCost(forward, kept, backward, fixed_bytes(supply))


def _bytes(batch_size: int, shape: Shape) -> int:
    channels, side = shape
    return 4 * batch_size * channels * side * side


def parameter_bytes(module: nn.Module) -> int:
    """Of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def fixed_bytes(module: nn.Module) -> int:
    """Weights, momentum and statistics."""
    return 2 * parameter_bytes(module) + sum(b.nbytes for b in module.buffers())


# ---------------------------------------------------------------------------------------------
# The search, on the sums


class Reached:
    """That the units before some one can be modules within a limit, with some window after them.

    Attributes:
        window: the contexts on offer to what follows.
        counts: bit k is set if k modules can do it.
        before: (start of the last of these modules, key of what was reached before it).
    """

    def __init__(self, window: Contexts[Shape], counts: int = 0) -> None:
        self.window, self.counts = window, counts
        self.before: list[tuple[int, Hashable]] = []


def reach(costs: Costs, limit: int) -> list[dict[Hashable, Reached]]:
    """What can be reached before each unit, and at the end, by modules within `limit` bytes.

    Weights, momentum, statistics and the batch do not count.
    """
    reached: list[dict[Hashable, Reached]] = [{} for _ in range(len(costs.units) + 1)]
    reached[0][()] = Reached(Contexts(costs.mode, costs.image), counts=1)
    for start in range(len(costs.units)):
        for key, here in reached[start].items():
            window = copy.deepcopy(here.window)
            if start:
                window.push(costs.shapes[start - 1])
            new_key = tuple(window.named().items())
            for module in costs.module_ends(start, here.window):
                if module.peak <= limit:
                    there = reached[module.end].setdefault(new_key, Reached(window))
                    there.counts |= here.counts << 1
                    there.before.append((start, key))
                elif costs.kept[module.end] - costs.kept[start] > limit:
                    break
    return reached


def counts_within(reached: list[dict[Hashable, Reached]]) -> int:
    """Bit k is set if k modules make up the whole net."""
    return reduce(or_, (r.counts for r in reached[-1].values()), 0)


def tightest(costs: Costs, wanted: int) -> list[int]:
    """Ends of modules whose largest peak is as small as it can be.

    Their number is one whose bit is set in `wanted`, the smallest of these that is possible; some
    bit from 1 to the number of units has to be.
    Weights do not count, so that cuts with smaller heads may be some of their bytes better.
    """
    low, high = 0, max(costs.peaks([len(costs.units)]))
    # With plain encoders or many contexts, modules can take more than the net as one.
    while not counts_within(reach(costs, high)) & wanted:
        low, high = high, 2 * high
    while high - low > 1024:
        middle = (low + high) // 2
        fits = counts_within(reach(costs, middle)) & wanted
        low, high = (low, middle) if fits else (middle, high)
    reached = reach(costs, high)
    possible = counts_within(reached) & wanted
    return _way_back(costs, reached, (possible & -possible).bit_length() - 1)


def _way_back(costs: Costs, reached: list[dict[Hashable, Reached]], count: int) -> list[int]:
    """Ends of `count` modules from what was reached; as even as the limit lets them be."""
    end = len(costs.units)
    here = next(r for r in reached[end].values() if r.counts >> count & 1)
    ends = []
    while end:
        ends.append(end)
        count -= 1
        fair = costs.kept[end] * count / (count + 1)
        start, key = min(
            (b for b in here.before if reached[b[0]][b[1]].counts >> count & 1),
            key=lambda before: abs(costs.kept[before[0]] - fair),
        )
        end, here = start, reached[start][key]
    return ends[::-1]


# ---------------------------------------------------------------------------------------------
# The choice, checked by metering the whole


class Partition(NamedTuple):
    """Cuts, and the metered peak of a training step with them in bytes."""

    cuts: list[Cut]
    peak: int


def smallest_peak(arguments: dict[str, Any], batch_size: int) -> Partition:
    """The K-1 cuts with the smallest peak, K = `local_module_num` of the arguments.

    Equal layers and the published balanced cuts are tried too, and win where they are as good.
    All is in float32, whatever `amp` says.
    """
    arguments = arguments | {"amp": "off"}
    K = arguments["local_module_num"]
    candidates = [choose_cuts(arguments["layers"], K, arguments["dataset"])]
    with contextlib.suppress(InputError):  # where none are published
        candidates.append(choose_cuts(arguments["layers"], K, arguments["dataset"], True))
    costs = Costs(arguments, batch_size)
    candidates.append(costs.cuts(tightest(costs, wanted=1 << K)))
    tried = [Partition(cuts, metered_peak(arguments, batch_size, cuts)) for cuts in candidates]
    return min(tried, key=lambda partition: partition.peak)


def fewest_modules(arguments: dict[str, Any], batch_size: int, kind: str, budget: int) -> Partition:
    """The cuts of the fewest modules whose peak is at most `budget` bytes.

    Args:
        arguments: of `build_network`; `local_module_num` does not matter, and `amp` is off.
        batch_size: samples a step.
        kind: of cuts, `equal`, `balanced` or `auto`.
        budget: in bytes.
    Raises:
        InputError: nothing fits; the message says what would.
    """
    note = "" if arguments.get("amp", "off") == "off" else " (cuts are planned in float32)"
    arguments = arguments | {"amp": "off"}
    costs = Costs(arguments, batch_size)
    for cuts in _cuts_that_may_fit(costs, kind, budget):
        peak = metered_peak(arguments, batch_size, cuts)
        if peak <= budget:
            return Partition(cuts, peak)
    raise InputError(_what_would_fit(costs, kind, budget) + note)


def _cuts_that_may_fit(costs: Costs, kind: str, budget: int) -> Iterator[list[Cut]]:
    """Cuts that fit the budget by the sum of the parts, of the fewest modules first."""
    if kind == "auto":
        possible = counts_within(reach(costs, budget - costs.batch - costs.units_fixed))
    for K in _allowed(costs, kind):
        if kind == "auto":
            if not possible >> K & 1:
                continue
            ends = tightest(costs, wanted=1 << K)
        else:
            ends = costs.ends(_listed_cuts(costs, kind, K))
        if max(costs.peaks(ends)) <= budget:
            yield costs.cuts(ends)


def _allowed(costs: Costs, kind: str) -> list[int]:
    """Numbers of modules that there are with this context mode, decoder and kind of cuts.

    InputError if there is none.
    """
    a, count, allowed = costs.arguments, len(costs.units), []
    why_not = InputError(
        f"context_mode {a['context_mode']} asks for {costs.mode.recent} module inputs, but "
        f"ResNet-{a['layers']} has {count} units"
    )
    for K in range(max(1, costs.mode.recent), count + 1):
        try:
            if a["h_reconstruct"] and a["loss_scale"] is None and K > 1:
                published_loss_scale(a["layers"], K, a["dataset"], kind == "balanced")
            if kind != "auto":
                _listed_cuts(costs, kind, K)
            allowed.append(K)
        except InputError as error:
            why_not = error
    if not allowed:
        raise why_not
    return allowed


def _listed_cuts(costs: Costs, kind: str, K: int) -> list[Cut]:
    a = costs.arguments
    return choose_cuts(a["layers"], K, a["dataset"], kind == "balanced")


def _what_would_fit(costs: Costs, kind: str, budget: int) -> str:
    """One sentence: that nothing fits, the smallest peak there is, and what would fit."""
    a, batch_size = costs.arguments, costs.batch_size
    peak, K = _least(costs, kind)
    message = (
        f"no {kind} cuts of ResNet-{a['layers']} fit {readable(budget)} at batch size "
        f"{batch_size}: the smallest peak is {readable(peak)}, with {K} modules; "
    )
    if not a["recompute"]:
        recomputed, K = _least(Costs(a | {"recompute": True}, batch_size), kind)
        fits = "fits" if recomputed <= budget else "is too much as well"
        message += f"with --recompute it is {readable(recomputed)}, which {fits}; "
    smallest, _ = _least(Costs(a, 2), kind)
    if smallest > budget or batch_size == 2:
        return message + "no batch size fits"
    # Bytes grow with the batch along a straight line, or (contrast) a little faster.
    line = 2 + (batch_size - 2) * (budget - smallest) // max(1, peak - smallest)
    batch_size = min(line, batch_size - 1)
    while _least(Costs(a, batch_size), kind)[0] > budget:
        batch_size -= 1 + batch_size // 100
    return message + f"--batch_size {batch_size} fits"


def _least(costs: Costs, kind: str) -> tuple[int, int]:
    """The smallest peak of all numbers of modules, and that number."""
    if kind == "auto":
        allowed = _allowed(costs, kind)
        ends = tightest(costs, wanted=sum(1 << K for K in allowed))
        peak = max(costs.peaks(ends))
        # Modules own weights, which tightest leaves out: fewer modules may take less in all.
        while fewer := [K for K in allowed if len(ends) >= 2 * K]:
            other = tightest(costs, wanted=1 << fewer[-1])
            if max(costs.peaks(other)) >= peak:
                break
            ends, peak = other, max(costs.peaks(other))
        return peak, len(ends)
    return min(
        (max(costs.peaks(costs.ends(_listed_cuts(costs, kind, K)))), K)
        for K in _allowed(costs, kind)
    )


def metered_peak(arguments: dict[str, Any], batch_size: int, cuts: list[Cut]) -> int:
    """Peak of a training step with these cuts, in bytes."""
    with FakeTensorMode():
        network = build_network(**arguments | {"cuts": cuts, "local_module_num": len(cuts) + 1})
        return max(step_peaks(network, *fake_batch(arguments, batch_size)))
