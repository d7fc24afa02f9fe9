"""What crosses a cut, how a range of modules is linked to others, and who has which modules."""

import itertools
import random
from argparse import Namespace
from collections import deque

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from configs import InputError
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, train_step
from models import build_network
from models.context import ContextMode, Contexts
from models.network import Ends
from parallel.pipeline import (
    IN_FLIGHT,
    Kind,
    Link,
    Pipeline,
    Stalls,
    balanced_ranges,
    check_ranges,
    crossing,
    in_one_piece,
    module_times,
)

CPU = torch.device("cpu")
NET = {"layers": 14, "local_module_num": 7, "dataset": "digits", "image_size": 16}


# ---------------------------------------------------------------------------------------------
# What crosses


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", ["R0", "E", "R1", "R3", "R3E", "R7"])
def test_what_crosses_is_what_a_forward_pass_hands_on(mode, last, amp):
    """Found on fake tensors, against the real ones of each cut: shapes, dtypes, strides."""
    arguments = {**NET, "context_mode": mode, "amp": amp}
    network = build_network(**arguments)
    layout = torch.channels_last if last else torch.contiguous_format
    network.to(memory_format=layout)
    images = torch.randn(3, 3, 16, 16).to(memory_format=layout)
    for cut, kinds in enumerate(crossing(arguments, CPU, last)):
        seen = []

        class Seen(Ends):
            def leave(self, h, contexts, seen=seen):
                seen.extend([h, *contexts.pushed()])

        network.held, network.ends = list(network.local_modules)[: cut + 1], Seen()
        list(network.features(images))
        assert [Kind.of(tensor) for tensor in seen] == kinds
        assert [kind.nbytes(3) for kind in kinds] == [tensor.nbytes for tensor in seen]
        for kind, tensor in zip(kinds, seen, strict=True):
            assert kind.empty(3, CPU).stride() == tensor.stride()
        # The window without the image: as many inputs as there are, n of Rn at most.
        assert len(kinds) == 1 + min(ContextMode.parse(mode).recent, cut)


def test_the_window_is_made_again_as_it_was():
    image, inputs = torch.zeros(1), [torch.full((1,), float(n)) for n in range(1, 6)]
    for name, count in itertools.product(["R0", "E", "R1", "R3", "R3E"], range(6)):
        mode = ContextMode.parse(name)
        contexts, again = Contexts(mode, image), Contexts(mode, image)
        for h_in in inputs[:count]:
            contexts.push(h_in)
        for h_in in contexts.pushed():
            again.push(h_in)
        assert contexts.named().keys() == again.named().keys()
        for context, name in zip(contexts.named().values(), again.named(), strict=True):
            assert again.named()[name] is context
        assert all(h_in is not image for h_in in contexts.pushed())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 4), (3, 8, 1, 1)])
def test_a_piece_shares_its_tensors_memory(shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        tensor = torch.randn(shape).to(memory_format=layout)
        piece = in_one_piece(tensor)
        assert piece.is_contiguous() and piece.data_ptr() == tensor.data_ptr()
        assert sorted(piece.flatten().tolist()) == sorted(tensor.flatten().tolist())
    strided = torch.randn(4, 6)[:, ::2]
    assert torch.equal(in_one_piece(strided), strided)


# ---------------------------------------------------------------------------------------------
# Links


class Wire:
    """Carries tensors within a process, and counts what was sent and not yet waited for."""

    def __init__(self):
        self.sent, self.expected, self.unfinished, self.most = deque(), deque(), 0, 0

    def send(self, tensor):
        self.sent.append(tensor.clone())
        self.unfinished += 1
        self.most = max(self.most, self.unfinished)
        return self.Done(self)

    def receive(self, tensor):
        self.expected.append(tensor)
        return self.Arrives(self)

    class Done:
        def __init__(self, wire):
            self.wire = wire

        def wait(self):
            self.wire.unfinished -= 1

    class Arrives:
        def __init__(self, wire):
            self.wire = wire

        def wait(self):
            self.wire.expected.popleft().copy_(self.wire.sent.popleft())


def test_features_leave_before_the_backward_of_what_made_them(monkeypatch):
    """So the next process computes with them meanwhile; before that, the modules do in turn."""
    arguments, log = {**NET, "context_mode": "R1E"}, []
    kinds = crossing(arguments, CPU, False)
    part = build_network(**arguments)
    wire = Wire()
    send = lambda piece: log.append("send") or wire.send(piece)  # noqa: E731
    part.hold(range(0, 2), Link(CPU, None, None, kinds[1], send))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda t: log.append("backward") or backward(t))
    totals = Totals(part, CPU)
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    for _ in train_step(part, make_optimizers(part), images, targets, totals):
        log.append("done")
    assert log == ["backward", "done", "send", "send", "backward", "done"]


def test_what_is_of_another_kind_does_not_cross():
    """Bytes in another order would be other features, and nobody would know."""
    kind = Kind((4, 8, 8), torch.float32, torch.channels_last)
    wire, other = Wire(), torch.randn(2, 4, 8, 8)
    link = Link(CPU, None, None, [kind], wire.send)
    link.leave(other, Contexts(ContextMode.parse("R0"), other))
    assert torch.equal(wire.sent[0].permute(0, 3, 1, 2), other)  # as the receiver reads it
    for bad in (other.double(), other[:, :2]):
        with pytest.raises(RuntimeError, match="crosses a cut where"):
            link.leave(bad, Contexts(ContextMode.parse("R0"), bad))


def test_waiting_for_another_process_is_a_stall(monkeypatch):
    kind = Kind((4, 8, 8), torch.float32, torch.contiguous_format)
    wire = Wire()
    link = Link(CPU, [kind], wire.receive, [kind], wire.send)
    clock = itertools.count()
    monkeypatch.setattr("parallel.pipeline.time.perf_counter", lambda: float(next(clock)))
    link.begin([2, 2])
    wire.sent.append(torch.ones(2, 4, 8, 8))
    h, contexts = link.enter(ContextMode.parse("R0"), torch.randn(2, 3, 8, 8))
    assert link.stalls.taken() == 1
    for _ in range(IN_FLIGHT):
        link.leave(h, contexts)
    assert link.stalls.taken() == 0  # there is room
    link.leave(h, contexts)
    assert link.stalls.taken() == 1


@pytest.mark.parametrize("mode", ["R0", "E", "R2", "R1E"])
def test_linked_ranges_compute_what_a_whole_network_does(mode):
    """Three ranges, batches of two sizes: outputs and gradients by their bits."""
    arguments = {**NET, "context_mode": mode}
    kinds = crossing(arguments, CPU, False)
    ranges = [range(0, 2), range(2, 5), range(5, 7)]
    wires = [Wire(), Wire()]
    parts = []
    for r, held in enumerate(ranges):
        torch.manual_seed(0)
        part = build_network(**arguments)
        before = (kinds[held.start - 1], wires[r - 1].receive) if r else (None, None)
        after = (kinds[held.stop - 1], wires[r].send) if r < 2 else (None, None)
        link = Link(CPU, *before, *after)
        part.hold(held, link)
        assert [m.index for m in part.held] == list(held)
        assert {p.is_meta for m in part.local_modules if m.index not in held
                for p in m.parameters()} == {True}  # fmt: skip
        parts.append(part)
    torch.manual_seed(0)
    whole = build_network(**arguments)
    sizes = [4, 4, 3]
    for part in parts:
        part.ends.begin(sizes)
    optimizers = [make_optimizers(part) for part in parts]
    own = make_optimizers(whole)
    for optimizer in (*itertools.chain(*optimizers), *own):
        optimizer.param_groups[0]["lr"] = 0.1
    sums = [Totals(part, CPU) for part in parts]
    all_sums = Totals(whole, CPU)
    for size in sizes:
        images, targets = torch.randn(size, 3, 16, 16), torch.arange(size)
        for part, optimizer, totals in zip(parts, optimizers, sums, strict=True):
            list(train_step(part, optimizer, images, targets, totals))
        list(train_step(whole, own, images, targets, all_sums))
    for part in parts:
        part.ends.flush()
        for module in part.held:
            theirs = whole.local_modules[module.index].state_dict()
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor, theirs[name]), name
    assert [loss for totals in sums for loss in totals.losses()] == all_sums.losses()
    assert [wire.unfinished for wire in wires] == [0, 0]
    assert not wires[0].expected and not wires[1].expected
    tensors = len(kinds[1])
    assert wires[0].most <= IN_FLIGHT * tensors


def test_the_next_batch_is_expected_before_this_one_is_computed_with():
    arguments = {**NET, "context_mode": "R0"}
    kinds, wire = crossing(arguments, CPU, False)[1], Wire()
    link = Link(CPU, kinds, wire.receive, None, None)
    images = torch.randn(4, 3, 16, 16)
    link.begin([4, 4, 2])
    for left in (2, 1, 0):
        wire.sent.append(torch.ones(4 if left else 2, 16, 16, 16))
        h, _ = link.enter(ContextMode.parse("R0"), images)
        assert torch.equal(h, torch.ones_like(h))
        assert len(wire.expected) == len(link.in_flight()) == (left > 0)
    link.begin([4, 4])
    link.end()  # the first of them is the last
    wire.sent.append(torch.ones(4, 16, 16, 16))
    link.enter(ContextMode.parse("R0"), images)
    assert not wire.expected


def test_what_is_in_flight_is_metered():
    """Received ahead of time, and sent: both are alive when a step begins."""
    kind = Kind((4, 8, 8), torch.float32, torch.channels_last)
    link = Link(CPU, [kind], Wire().receive, [kind], Wire().send)
    link.begin([2, 2])
    h = torch.randn(2, 4, 8, 8)
    for _ in range(IN_FLIGHT + 1):
        link.leave(h.clone(), Contexts(ContextMode.parse("R0"), h))
    with LiveBytes(link.in_flight()) as meter:
        pass
    assert meter.live == (1 + IN_FLIGHT) * 2 * 4 * 8 * 8 * 4


def test_a_profiler_sees_no_transfer():
    """torch would write its end into a record that is gone by then."""
    kind = Kind((4, 8, 8), torch.float32, torch.contiguous_format)
    link = Link(CPU, [kind], torch.erf, [kind], torch.erf)
    h = torch.randn(2, 4, 8, 8)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        link.begin([2])
        link.leave(h, Contexts(ContextMode.parse("R0"), h))
        torch.sin(h)
    names = {event.name for event in profiler.events()}
    assert "aten::sin" in names and "aten::erf" not in names


def test_a_stall_is_timed(monkeypatch):
    clock = iter([1.0, 3.5, 10.0, 10.5])
    monkeypatch.setattr("parallel.pipeline.time.perf_counter", lambda: next(clock))
    stalls = Stalls(CPU)
    for _ in range(2):
        with stalls:
            pass
    assert stalls.taken() == 3.0
    assert stalls.taken() == 0.0


@pytest.mark.parametrize("done", [False, True])
def test_on_cuda_a_stall_is_the_streams(monkeypatch, done):
    """Events are recorded around the wait, and read when they are over, or asked for."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def query(self):
            return done

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stalls = Stalls(torch.device("cuda"))
    for _ in range(3):
        with stalls:
            log.append("wait")
    assert log == ["record", "wait", "record"] * 3
    assert len(stalls._events) == (0 if done else 3)  # else they would pile up in an epoch
    assert stalls.taken() == 0.75
    assert log[9:] == ["synchronize"] * (0 if done else 3)


def test_what_stalls_a_pipeline_is_what_its_process_waits_for(monkeypatch):
    clock = iter([1.0, 3.5])
    monkeypatch.setattr("parallel.pipeline.time.perf_counter", lambda: next(clock))
    team = Namespace(rank=0, size=1, is_first=True, device=CPU)
    options = Namespace(module_ranges=None, evaluate=None, channels_last=False)
    way = Pipeline(team, options, {**NET, "context_mode": "E"})
    with way.waiting:
        pass
    assert way.stalled() == 2.5 and way.stalled() == 0


# ---------------------------------------------------------------------------------------------
# Ranges


def test_balanced_ranges_are_the_best_there_are():
    chance = random.Random(0)
    for _ in range(200):
        times = [chance.choice([1.0, 2.0, 3.0, 5.5]) for _ in range(chance.randrange(1, 9))]
        processes = chance.randrange(1, len(times) + 1)
        ranges = balanced_ranges(times, processes)
        check_ranges(ranges, len(times), processes)
        best = min(
            max(sum(times[a:b]) for a, b in itertools.pairwise([0, *cuts, len(times)]))
            for cuts in itertools.combinations(range(1, len(times)), processes - 1)
        )
        assert max(sum(times[i] for i in held) for held in ranges) == pytest.approx(best)


def test_more_processes_than_modules():
    with pytest.raises(InputError, match="3 processes for 2 modules: take 2 at most"):
        balanced_ranges([1.0, 1.0], 3)


def test_a_module_that_is_slow_once_is_not_slow(monkeypatch):
    """Seconds are the least of the timed steps, module by module."""
    options = Namespace(channels_last=True, compile=False, batch_size=4)
    arguments = {**NET, "layers": 8, "local_module_num": 2, "num_classes": 10}
    readings = [0.0]  # when it began; then of each step whether it is late, its start, both ends
    for step in range(10):
        took = [100.0, 100.0] if step < 2 else [2.0, 3.0] if step != 4 else [2.0, 50.0]
        start = readings[-1]
        readings += [start] * (step >= 5) + [start, start + took[0], start + sum(took)]
        readings[0] = 0.0
    clock = iter([r / 1000 for r in readings])
    monkeypatch.setattr("parallel.pipeline.time.perf_counter", lambda: next(clock))
    assert module_times(arguments, options, CPU) == pytest.approx([0.002, 0.003])


def test_sums_of_all_processes():
    parts = [
        {"losses": torch.tensor([1.0, 2.0]), "samples": 8, "steps": 2, "full": 4, "seconds": 2.0},
        {"losses": torch.tensor([3.0]), "samples": 8, "steps": 2, "full": 4, "seconds": 3.0},
    ]
    merged = Pipeline.merged(None, parts)
    assert merged.pop("losses").tolist() == [1, 2, 3]
    assert merged == {"samples": 8, "steps": 2, "full": 4, "seconds": 3.0}
    assert Pipeline.losses(None, [([0.5, 1.0], 8), ([2.0], 8)]) == [0.5, 1.0, 2.0]


def test_a_loss_that_is_not_finite_is_of_the_module_by_its_index():
    network = build_network(**NET, context_mode="R0")
    network.held = list(network.local_modules)[4:6]
    totals, output = Totals(network, CPU), torch.zeros(2, 10)
    targets = torch.zeros(2, dtype=torch.int64)
    for loss in (1.0, float("nan"), 1.0):
        totals.add(network.held[0], torch.tensor(1.0), output, targets)
        totals.add(network.held[1], torch.tensor(loss), output, targets)
        totals.count(2)
    assert totals.first_not_finite() == (5, 2)
