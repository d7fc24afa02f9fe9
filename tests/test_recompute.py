"""Units that keep their inputs only, and what a module leaves alive for the next one's turn."""

import gc
from contextlib import contextmanager

import pytest
import torch
from test_network import tiny, tiny_batch
from torch import nn

from configs import InputError
from engine import step as engine
from engine.memory import LiveBytes
from models import build_network

DECODERS = {"h_reconstruct": True, "loss_scale": (1, 1, 1, 1)}
VARIANTS = {"cross_entropy": {}, "contrast": {"local_loss_mode": "contrast"} | DECODERS}


def norms_of(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters()}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("droprate", [0.0, 0.5])
def test_gradients_and_statistics_are_those_without(droprate, training):
    """To the last bit, dropout's draws included: the same operations on the same numbers."""
    images, targets = tiny_batch()
    results = []
    for recompute in (False, True):
        network = tiny(droprate=droprate, recompute=recompute).train(training)
        torch.manual_seed(3)
        logits, local_losses = network.local_step(images, targets)
        after = torch.rand(1)
        results.append((logits, local_losses, gradients(network), buffers(network), after))
    assert_equal(results[1], results[0])


def test_without_gradients_nothing_is_run_again():
    plain, network = tiny(local_module_num=2), tiny(local_module_num=2, recompute=True)
    images, _ = tiny_batch()
    calls = []
    network.local_modules[0].units[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert_equal(network(images), plain(images))
    assert len(calls) == 1


def test_each_unit_but_a_modules_last_runs_twice_in_a_step():
    network = tiny(recompute=True)
    calls = []
    for unit in (unit for module in network.local_modules for unit in module.units):
        unit.conv1.register_forward_hook(lambda conv, *_: calls.append(conv))
    network.local_step(*tiny_batch())
    for module in network.local_modules:
        *times, last = (calls.count(unit.conv1) for unit in module.units)
        assert (times, last) == ([2] * len(times), 1)


def test_statistics_move_once_a_step():
    plain, network = tiny(local_module_num=2), tiny(local_module_num=2, recompute=True)
    images, _ = tiny_batch()
    for step in (1, 2, 3):
        batch = images * step + step
        plain.local_modules[0](batch)
        h_out = network.local_modules[0](batch)
        moved = buffers(network)
        assert_equal(moved, buffers(plain))
        h_out.sum().backward()
        assert_equal(buffers(network), moved)
        norms = norms_of(network.local_modules[0].units)
        assert {int(bn.num_batches_tracked) for bn in norms} == {step}
    assert {bn.momentum for bn in norms_of(network)} == {0.1}


@pytest.mark.parametrize("when", ["the second forward", "the backward"])
def test_a_backward_that_raises_leaves_batchnorm_as_it_was(when):
    network = tiny(recompute=True)
    module = network.local_modules[1]
    h_out = module(torch.randn(3, 16, 6, 6, dtype=torch.float64))
    before, names = buffers(network), list(network.state_dict())
    momenta = []

    def fail(*_):
        momenta.extend(bn.momentum for bn in norms_of(module.units[0]))
        raise OSError("on purpose")

    if when == "the second forward":
        module.units[0].conv2.register_forward_hook(fail)
    else:
        module.units[0].conv2.weight.register_hook(fail)
    with pytest.raises(OSError, match="on purpose"):
        h_out.sum().backward()
    assert set(momenta) == ({0.0} if when == "the second forward" else {0.1})
    assert {bn.momentum for bn in norms_of(network)} == {0.1}
    assert list(network.state_dict()) == names
    assert_equal(buffers(network), before)


def test_backward_normalises_by_the_batch():
    """Running statistics that changed since the forward change nothing."""
    found = []
    for recompute in (False, True):
        network = tiny(recompute=recompute, local_module_num=2)
        module = network.local_modules[0]
        h_out = module(tiny_batch()[0])
        if recompute:
            for bn in norms_of(module.units[:-1]):
                bn.running_mean.add_(3)
                bn.running_var.mul_(7)
        h_out.square().sum().backward()
        found.append(gradients(module.units))
    assert_equal(found[1], found[0])


def test_two_backwards_through_a_unit():
    found = []
    for recompute in (False, True):
        network = tiny(recompute=recompute, local_module_num=2)
        h_out = network.local_modules[0](tiny_batch()[0])
        h_out.sum().backward(retain_graph=True)
        h_out.square().sum().backward()
        found.append(gradients(network))
    assert_equal(found[1], found[0])


def bfloat16(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("in_forward", [True, False], ids=["forward", "backward"])
def test_autocast_of_the_second_forward_is_the_firsts(in_forward):
    images = torch.randn(4, 3, 8, 8)
    results = []
    for recompute in (False, True):
        network = tiny(recompute=recompute).float()
        module, dtypes = network.local_modules[1], []
        module.units[0].conv1.register_forward_hook(lambda *a, to=dtypes: to.append(a[2].dtype))
        with bfloat16(in_forward):
            *_, h_out = (h for m, h in network.features(images) if m.index <= 1)
        with bfloat16(not in_forward):
            h_out.backward(torch.cos(h_out.detach()))
        results.append((h_out.detach(), gradients(module.units), buffers(network)))
    assert dtypes == [torch.bfloat16 if in_forward else torch.float32] * 2
    assert_equal(results[1], results[0])


def test_autograd_saves_the_units_inputs_alone():
    """But for the last unit's maps, which its backward needs at once."""
    module = tiny(recompute=True, local_module_num=2).local_modules[0]
    inputs, saved, before_last = [], [], []
    for unit in module.units:
        unit.register_forward_pre_hook(lambda _, args: inputs.append(args[0].data_ptr()))
    module.units[-1].register_forward_pre_hook(lambda *_: before_last.extend(saved))

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(tiny_batch()[0])
    assert sorted(p for p in before_last if p) == sorted(inputs[:-1])  # null: of an empty tensor
    assert len(inputs) == 3


def test_forward_leaves_the_units_outputs_alone():
    network = tiny(recompute=True, local_module_num=2)
    module = network.local_modules[0]
    images, _ = tiny_batch()
    held = []
    with LiveBytes([*network.parameters(), *network.buffers(), images]) as meter:
        start = meter.live
        for unit in module.units:
            unit.register_forward_pre_hook(lambda *_: held.append(meter.live - start))
        h_out = module(images)
        assert held == [0, h_out.nbytes, 2 * h_out.nbytes]
        h_out.sum().backward()
        del h_out
        assert meter.live - start == sum(p.nbytes for p in module.units.parameters())


class Watch:
    """The meter of engine.train_one_epoch, read where a module's turn begins and ends."""

    def __init__(self, network):
        self.device = torch.device("cpu")
        self.at_context, self.at_units, self.at_end = [], [], []
        for module in network.local_modules:
            module.context.register_forward_pre_hook(lambda *_: self.note(self.at_context))
            module.register_forward_pre_hook(lambda *_: self.note(self.at_units))

    def note(self, readings):
        readings.append(self.meter.live - self.start)

    @contextmanager
    def step(self, samples, alive):
        with LiveBytes(alive()) as self.meter:
            self.start = self.meter.live
            for readings in (self.at_context, self.at_units, self.at_end):
                readings.clear()
            yield
            self.note(self.at_end)


def window_by_hand(mode, index, h_in):
    """Module inputs, apart from the image, that are supplied at the cut before module `index`."""
    n = int(mode.strip("RE") or 0)
    return sum(h_in[max(1, index - n) : index])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("mode", "group"), [("R0", 0), ("R2", 0), ("R2", 5), ("R1E", 0), ("R1E", 5)]
)
def test_a_module_leaves_its_output_alone(mode, group, recompute, variant):
    """Bytes alive in the next module's turn, by hand, in a step after momentum has been made.

    No garbage is collected meanwhile: what hangs in a cycle of references counts.
    """
    network = tiny(
        layers=8, image_size=8, context_mode=mode, context_group=group, recompute=recompute,
        **VARIANTS[variant],
    )  # fmt: skip
    images, targets = tiny_batch(5, 8)
    optimizers, watch = engine.make_optimizers(network), Watch(network)
    gc.collect()
    gc.disable()
    try:
        engine.train_one_epoch(network, optimizers, [(images, targets)] * 2, watch, lambda *_: None)
    finally:
        gc.enable()

    pixels = images.nbytes if variant == "contrast" else 0
    losses = wrong = finite_steps = 4 * 8  # of engine.Totals
    always = pixels + losses + (wrong if variant == "cross_entropy" else 0)
    h_out = [channels * side**2 * 5 * 8 for channels, side in [(16, 8), (16, 8), (32, 4), (64, 2)]]
    h_in = [0, *h_out[:-1]]
    supplied = [h_in[i] + window_by_hand(mode, i, h_in) for i in (1, 2, 3)]
    assert watch.at_context == [always + held for held in supplied]
    assert watch.at_end == [losses + wrong + finite_steps]
    if group:  # the encoders keep what they were supplied with, and mean and variance
        statistics = [16 * sum(bn.num_features for bn in norms_of(module.context))
                      for module in network.local_modules[1:]]  # fmt: skip
        kept = [always + sum(both) for both in zip(supplied, statistics, strict=True)]
        assert watch.at_units[1:4] == kept


@pytest.mark.parametrize("value", [1, 0, "True", None])
def test_recompute_is_a_switch(value):
    with pytest.raises(InputError, match="recompute must be True or False"):
        build_network(layers=8, local_module_num=2, recompute=value)


def test_own_cuts_are_the_ends_of_the_modules():
    network = build_network(layers=14, local_module_num=3, cuts=[[0, 0], [2, 1]])
    assert [m.unit_names for m in network.local_modules] == [
        [(0, 0)], [(1, 0), (1, 1), (2, 0), (2, 1)], [(3, 0), (3, 1)],
    ]  # fmt: skip
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    alone = build_network(layers=8, local_module_num=1, cuts=[])
    assert [len(m.unit_names) for m in alone.local_modules] == [4]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([[1, 0]], "3 modules have 2 cuts between them, but 1 are given"),
        ([[0, 0], [1, 0], [2, 0]], "but 3 are given"),
        ([], "but 0 are given"),
        ([[2, 0], [1, 0]], "front to back"),
        ([[1, 0], [1, 0]], "front to back, each but once"),
        ([[1, 0], [3, 1]], r"not after \[3, 1\]"),
        ([[1, 0], [1, 2]], r"not after \[1, 2\]"),
        ([[0, 1], [1, 0]], r"not after \[0, 1\]"),
        ([[1, 0], [4, 0]], r"not after \[4, 0\]"),
        ([[1, 0], [2]], r"not after \[2\]"),
    ],
)
def test_cuts_that_are_none_are_refused(cuts, message):
    with pytest.raises(InputError, match=message):
        build_network(layers=14, local_module_num=3, cuts=cuts)
