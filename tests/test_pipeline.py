"""Features that cross a cut, a stage's links to others, and the stages' ranges of modules."""

import itertools
import random
from argparse import Namespace
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from configs import InputError
from engine.step import Totals, make_optimizers, train_step
from models import build_network
from models.context import ContextMode, Contexts
from models.network import ForwardState, StageIO
from parallel import stages, transfer
from parallel.stages import balanced_ranges, check_ranges, module_times
from parallel.transfer import IN_FLIGHT, DeviceWaits, FeatureSpec, Link, crossing

CPU = torch.device("cpu")
NET = {"layers": 14, "local_module_num": 7, "dataset": "digits", "image_size": 16,
       "context_mode": "R0", "local_loss_mode": "cross_entropy"}  # fmt: skip
SPEC = FeatureSpec((4, 8, 8), torch.float32, torch.channels_last)
R0 = ContextMode.parse("R0")


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", ["E", "R3E", "R7"])
def test_specs_are_those_of_the_features_of_a_forward_pass(mode, last, amp):
    """Found on fake tensors, against the real ones of each cut."""
    arguments = {**NET, "context_mode": mode, "amp": amp}
    layout = torch.channels_last if last else torch.contiguous_format
    network = build_network(**arguments).to(memory_format=layout)
    images = torch.randn(3, 3, 16, 16).to(memory_format=layout)
    for cut, specs in enumerate(crossing(arguments, CPU, last)):
        seen = []
        io = StageIO()
        io.send = lambda state, seen=seen: seen.extend([state.h, *state.contexts.pushed()])
        network.set_stage(range(cut + 1), io)
        list(network.features(images))
        assert [FeatureSpec.of(tensor) for tensor in seen] == specs
        assert [spec.nbytes(3) for spec in specs] == [tensor.nbytes for tensor in seen]
        for spec, tensor in zip(specs, seen, strict=True):
            assert spec.empty(3, CPU).stride() == tensor.stride()
        # The window without the image: as many inputs as there are, n of Rn at most.
        assert len(specs) == 1 + min(ContextMode.parse(mode).recent, cut)


# ---------------------------------------------------------------------------------------------
# Links


class Wire:
    """Carries tensors within a process."""

    def __init__(self):
        self.sent, self.expected = deque(), deque()

    def send(self, tensor):
        self.sent.append(tensor.clone())
        return SimpleNamespace(wait=lambda: None)

    def receive(self, tensor):
        self.expected.append(tensor)
        return SimpleNamespace(wait=self._received)

    def _received(self):
        self.expected.popleft().copy_(self.sent.popleft())


def state_of(h):
    return ForwardState(h, Contexts(R0, h))


def test_features_leave_before_the_backward_of_what_made_them(monkeypatch):
    """So the next process computes with them meanwhile."""
    arguments, log, wire = {**NET, "context_mode": "R1E"}, [], Wire()
    part = build_network(**arguments)
    send = lambda piece: log.append("send") or wire.send(piece)  # noqa: E731
    specs = crossing(arguments, CPU, False)
    part.set_stage(range(2), Link(CPU, None, None, specs[1], send))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda t: log.append("backward") or backward(t))
    train_step(
        part, make_optimizers(part), torch.randn(4, 3, 16, 16), torch.arange(4), Totals(part, CPU),
        after_module=lambda module: log.append("done"),
    )  # fmt: skip
    assert log == ["backward", "done", "send", "send", "backward", "done"]


def test_features_that_do_not_fit_are_not_sent():
    """Bytes in another order would be other features, and nobody would know."""
    wire, contiguous = Wire(), torch.randn(2, 4, 8, 8)
    link = Link(CPU, None, None, [SPEC], wire.send)
    link.send(state_of(contiguous))
    assert torch.equal(wire.sent[0].permute(0, 3, 1, 2), contiguous)  # as the receiver reads it
    for bad in (contiguous.double(), contiguous[:, :2]):
        with pytest.raises(RuntimeError, match="crosses a cut where"):
            link.send(state_of(bad))


def test_a_batch_is_expected_while_the_one_before_is_computed_with():
    """What was received ahead of time, and what is being sent, counts as in flight."""
    wire = Wire()
    link = Link(CPU, [SPEC], wire.receive, [SPEC], wire.send)
    images = torch.randn(2, 3, 8, 8)
    link.begin([2, 2, 1])
    for size, expected in ((2, 1), (2, 1), (1, 0)):
        wire.sent.append(torch.ones(size, 8, 8, 4))
        assert torch.equal(link.receive(R0, images).h, torch.ones(size, 4, 8, 8))
        assert len(wire.expected) == len(link.in_flight()) == expected
    link.begin([2, 2])
    link.expect_no_more()  # no batch after the first of these
    for _ in range(IN_FLIGHT + 1):
        link.send(state_of(torch.randn(2, 4, 8, 8)))
    assert [tensor.numel() for tensor in link.in_flight()] == [2 * 4 * 8 * 8] * (1 + IN_FLIGHT)
    wire.sent.appendleft(torch.ones(2, 8, 8, 4))
    link.receive(R0, images)
    assert not wire.expected


def test_waiting_for_another_process_is_timed(monkeypatch):
    clock, wire = itertools.count(), Wire()
    monkeypatch.setattr(transfer.time, "perf_counter", lambda: float(next(clock)))
    link = Link(CPU, [SPEC], wire.receive, [SPEC], wire.send)
    link.begin([2, 2])
    wire.sent.append(torch.ones(2, 8, 8, 4))
    state = link.receive(R0, torch.randn(2, 3, 8, 8))
    assert link.waits.seconds() == 1
    for _ in range(IN_FLIGHT):
        link.send(state)
    assert link.waits.seconds() == 0  # there is room
    link.send(state)
    assert link.waits.seconds() == 1


def test_on_cuda_waits_are_the_streams(monkeypatch):
    """Events are recorded around a wait, and read when the device has come to them."""
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(
        record=lambda: log.append("record"),
        elapsed_time=lambda other: log.append("read") or 250.0,
    ))  # fmt: skip
    waits = DeviceWaits(torch.device("cuda"))
    for _ in range(2):
        with waits:
            log.append("wait")
    assert waits.seconds() == 0.5
    assert log == ["record", "wait", "record"] * 2 + ["synchronize", "read", "read"]


def test_a_profiler_sees_no_transfer():
    """torch would write its end into a record that is gone by then."""
    link = Link(CPU, [SPEC], torch.erf, [SPEC], torch.erf)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        link.begin([2])
        link.send(state_of(torch.randn(2, 4, 8, 8)))
        torch.sin(torch.ones(1))
    names = {event.name for event in profiler.events()}
    assert "aten::sin" in names and "aten::erf" not in names


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
        assert max(sum(times[i] for i in modules) for modules in ranges) == pytest.approx(best)
    with pytest.raises(InputError, match="3 processes for 2 modules: take 2 at most"):
        balanced_ranges([1.0, 1.0], 3)


@pytest.mark.parametrize(("ends", "says"), [
    ([(0, 3)], "--module_ranges has 1 ranges for 2 processes"),
    ([(0, 0), (2, 3)], "--module_ranges: 2-3 should begin with module 1"),
    ([(0, 2), (2, 3)], "--module_ranges: 2-3 should begin with module 3"),
    ([(0, 1), (2, 2)], "--module_ranges ends with module 2, and the last of 4 is 3"),
])  # fmt: skip
def test_ranges_that_do_not_fit_are_refused(ends, says):
    with pytest.raises(InputError) as error:
        check_ranges([range(first, last + 1) for first, last in ends], 4, 2)
    assert str(error.value) == says


def test_a_module_that_is_slow_once_is_not_slow(monkeypatch):
    """Its time is the least of the timed steps."""
    options = Namespace(channels_last=True, compile=False, batch_size=4)
    arguments = {**NET, "layers": 8, "local_module_num": 2, "num_classes": 10}
    readings = [0.0]  # of each step: its start, and the ends of the two modules
    for step in range(10):
        took = [100.0, 100.0] if step < 2 else [2.0, 3.0] if step != 4 else [2.0, 50.0]
        start = readings[-1]
        readings += [start + took[0], start + sum(took), start + sum(took)]
    clock = iter([r / 1000 for r in readings])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    assert module_times(arguments, options, CPU) == pytest.approx([0.002, 0.003])
