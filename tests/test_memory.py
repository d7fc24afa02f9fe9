"""The memory meter against counts by hand."""

import torch
import torch.nn.functional as F

from engine.memory import LiveBytes, PeakMemory, readable
from engine.step import tensors_alive
from models import build_network

KIB = 1024


def zeros(kib):
    return torch.zeros(kib * KIB, dtype=torch.uint8)


def test_counts_what_is_alive_at_once():
    with LiveBytes() as meter:
        a = zeros(4)
        b = zeros(3)
        assert meter.live == meter.peak == 7 * KIB
        del a
        assert meter.live == 3 * KIB
        c = zeros(2)
        assert (meter.live, meter.peak) == (5 * KIB, 7 * KIB)
        del b, c
    assert (meter.live, meter.peak) == (0, 7 * KIB)


def test_views_and_known_tensors_count_once():
    weight = zeros(8)
    with LiveBytes([weight, weight[:KIB]]) as meter:
        assert meter.live == 8 * KIB
        view = weight.view(2, -1)[1]
        view += 1
        assert meter.peak == 8 * KIB
        copy = view.clone()
        assert meter.peak == (8 + 4) * KIB
        del copy, view
    assert meter.live == 8 * KIB


def test_counts_what_autograd_saves_until_backward_frees_it():
    x = torch.zeros(256, requires_grad=True)  # 1 KiB
    with LiveBytes([x]) as meter:
        y = x.exp()  # saved for the backward
        z = y.sin()  # saves y
        del y
        assert meter.live == 3 * KIB
        loss = z.sum()
        del z
        assert meter.live == 2 * KIB + 4
        loss.backward()
        assert meter.live == 2 * KIB + 4  # x, its gradient, the loss; y is gone
    assert meter.peak >= 3 * KIB + 4


def test_counts_temporary_tensors_inside_the_backward():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    features, weights = x.untyped_storage().nbytes(), weight.untyped_storage().nbytes()
    with LiveBytes([x, weight]) as meter:
        out = F.conv2d(x, weight, padding=1).relu()  # the conv's output dies: relu saves its own
        assert meter.live == 2 * features + weights
        out.sum().backward()
    # Before, with the loss and its gradient; then the gradients of the relu, of x and of weight.
    assert meter.peak == (2 * features + weights) + 2 * 4 + (2 * features + weights)


def test_peak_of_a_run_is_of_the_first_two_full_steps():
    peak = PeakMemory(torch.device("cpu"))
    for samples, kib in [(4, 1), (8, 5), (8, 7), (8, 100), (4, 100)]:
        with peak.step(samples, list):
            zeros(kib)
    assert peak.bytes == 7 * KIB
    assert "live tensor" in peak.how


def test_peak_of_a_run_is_the_higher_of_its_steps():
    peak = PeakMemory(torch.device("cpu"))
    for kib in (7, 5):
        with peak.step(8, list):
            zeros(kib)
    assert peak.bytes == 7 * KIB


def test_weights_statistics_momentum_and_batch_are_alive_before_a_step():
    network = build_network(layers=8, local_module_num=2, context_mode="E")
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in network.local_modules
    ]
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for optimizer, _ in zip(optimizers, network.local_steps(images, targets), strict=True):
        optimizer.step()
    alive = tensors_alive(network, optimizers, images, targets)
    weights = sum(network.parameter_counts().values())
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    statistics = sum(2 * 4 * m.num_features + 8 for m in norms)
    assert sum(t.nbytes for t in alive) == 2 * 4 * weights + statistics + 4 * 2 * 3 * 1024 + 2 * 8


def test_peak_counts_what_is_alive_before_the_step():
    peak = PeakMemory(torch.device("cpu"))
    with peak.step(2, lambda: [zeros(3)]):
        pass
    assert peak.bytes == 3 * KIB


def test_readable():
    assert readable(467 * 2**20) == "467 MiB"
    assert readable(2464 * 2**20) == "2.41 GiB"


def test_a_meter_goes_on_from_its_state():
    """Of steps of the same kind; compiled ones are watched anew until all three have been."""
    cpu = torch.device("cpu")
    state = {"bytes": 123, "largest": 4, "steps": 2, "how": PeakMemory(cpu).how}
    meter = PeakMemory(cpu)
    meter.load(state)
    assert meter.state() == state
    meter.load(state | {"bytes": 9, "how": "another"})
    assert meter.bytes == 123
    for steps, peak in ((2, 0), (3, 123)):
        compiled = PeakMemory(cpu, compiled=True)
        compiled.load(state | {"how": compiled.how, "steps": steps})
        assert compiled.bytes == peak
