"""`--recompute`: units that keep their inputs only, and what a module leaves for the next turn."""

import gc

import pytest
import torch
from test_network import tiny, tiny_batch
from torch import nn

from configs import InputError
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network


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
def test_steps_are_those_without(droprate, training):
    """To the last bit, dropout's draws included: the same operations on the same numbers."""
    results = []
    for recompute in (False, True):
        network = tiny(droprate=droprate, recompute=recompute).train(training)
        torch.manual_seed(3)
        steps = [network.local_step(*tiny_batch()) for _ in range(2)]
        results.append((steps, gradients(network), buffers(network), torch.rand(1)))
        assert {bn.momentum for bn in norms_of(network)} == {0.1}
    assert_equal(results[1], results[0])


def test_each_unit_but_a_modules_last_runs_twice_in_a_step_and_once_without_gradients():
    network = tiny(recompute=True)
    calls = []
    for unit in (unit for module in network.local_modules for unit in module.units):
        unit.conv1.register_forward_hook(lambda conv, *_: calls.append(conv))
    network.local_step(*tiny_batch())
    for module in network.local_modules:
        *times, last = (calls.count(unit.conv1) for unit in module.units)
        assert (times, last) == ([2] * len(times), 1)
    calls.clear()
    with torch.no_grad():
        network(tiny_batch()[0])
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("when", ["recomputation", "backward"])
def test_a_backward_that_raises_leaves_batchnorm_as_it_was(when):
    network = tiny(recompute=True)
    module = network.local_modules[1]
    h_out = module(torch.randn(3, 16, 6, 6, dtype=torch.float64))
    before, names = buffers(network), list(network.state_dict())

    def fail(*_):
        raise OSError("on purpose")

    if when == "recomputation":
        module.units[0].conv2.register_forward_hook(fail)
    else:
        module.units[0].conv2.weight.register_hook(fail)
    with pytest.raises(OSError, match="on purpose"):
        h_out.sum().backward()
    assert {bn.momentum for bn in norms_of(network)} == {0.1}
    assert list(network.state_dict()) == names
    assert_equal(buffers(network), before)


@pytest.mark.parametrize("in_forward", [True, False], ids=["forward", "backward"])
def test_the_recomputation_has_the_autocast_of_the_forward(in_forward):
    module = tiny(recompute=True).float().local_modules[1]
    dtypes = []
    module.units[0].conv1.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=in_forward):
        h_out = module(torch.randn(3, 16, 6, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=not in_forward):
        h_out.sum().backward()
    assert dtypes == [torch.bfloat16 if in_forward else torch.float32] * 2


def test_forward_keeps_the_units_outputs_alone():
    network = tiny(recompute=True, local_module_num=2)
    module = network.local_modules[0]
    images, _ = tiny_batch()
    kept = []
    with LiveBytes([*network.parameters(), *network.buffers(), images]) as meter:
        start = meter.live
        for unit in module.units:
            unit.register_forward_pre_hook(lambda *_: kept.append(meter.live - start))
        h_out = module(images)
        assert kept == [0, h_out.nbytes, 2 * h_out.nbytes]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("mode", "group", "window"), [("R0", 0, 0), ("R2", 5, 2), ("R1E", 0, 1), ("R1E", 5, 1)]
)
def test_a_module_leaves_its_output_alone(mode, group, window, recompute):
    """Bytes alive where the next module's turn begins and its units do, by hand.

    No garbage is collected meanwhile: what is in a cycle of references counts.
    """
    network = tiny(layers=8, image_size=8, context_mode=mode, context_group=group,
                   recompute=recompute)  # fmt: skip
    images, targets = tiny_batch(5, 8)
    optimizers, totals = make_optimizers(network), Totals(network, images.device)
    alive = tensors_alive(network, optimizers, images, targets, *totals.state().values())
    at_context, at_units = [], []
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(t for t in alive if isinstance(t, torch.Tensor)) as meter:
            start = meter.live
            for module in network.local_modules[1:]:
                for layer, to in ((module.context, at_context), (module, at_units)):
                    layer.register_forward_pre_hook(lambda *_, to=to: to.append(meter.live - start))
            train_step(network, optimizers, images, targets, totals)
            assert meter.live == start
    finally:
        gc.enable()
    h_out = [c * side**2 * 5 * 8 for c, side in [(16, 8), (16, 8), (32, 4), (64, 2)]]
    # What module i adds its context to, and the inputs of modules 1 to i-1 in the window.
    expected = [h_out[i - 1] + sum(h_out[max(1, i - window) - 1 : i - 1]) for i in (1, 2, 3)]
    assert at_context == expected
    if group:
        assert at_units == expected


@pytest.mark.parametrize("value", [1, 0, "True", None])
def test_recompute_is_a_switch(value):
    with pytest.raises(InputError, match="recompute must be True or False"):
        build_network(layers=8, local_module_num=2, recompute=value)
