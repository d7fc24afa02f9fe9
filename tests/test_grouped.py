"""Context encoders in groups of channels against the plain layers and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs import InputError
from engine.memory import LiveBytes
from models import build_network
from models.context import ImageEncoder, RecentEncoder

KINDS = {
    "image": lambda: ImageEncoder(16),
    "image_wide": lambda: ImageEncoder(16, widen=1.7),
    "recent": lambda: RecentEncoder(10, 16),
}
GROUPS = [1, 5, 100]
STRAIGHT, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def randomise_norms(encoder):
    for bn in norms_of(encoder):
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(bn.running_var, 0.5, 2)


def norms_of(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def make(kind, side=6, count=3, dtype=torch.float64):
    """An encoder, and a source (count, C_in, side, side)."""
    torch.manual_seed(0)
    encoder = KINDS[kind]()
    randomise_norms(encoder)
    source = torch.randn(count, encoder[0].in_channels, side, side, dtype=dtype)
    return encoder.to(dtype), source


def plain(encoder, source, size):
    """The layers one after the other, as torch.nn has them."""
    return F.adaptive_avg_pool2d(nn.Sequential(*encoder)(source), size)


def upstream_of(output):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(output.shape, dtype=output.dtype, generator=generator)


def with_gradients(output, *inputs):
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream_of(output))]


def buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def assert_same(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("side", "size", "layout"),
    [(6, 6, STRAIGHT), (6, 6, CHANNELS_LAST), (6, 3, CHANNELS_LAST), (9, 5, STRAIGHT)],
)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_plain_layers(kind, group, side, size, layout, training):
    encoder, source = make(kind, side)
    encoder.train(training)
    twin = copy.deepcopy(encoder)
    source = source.contiguous(memory_format=layout).requires_grad_()

    expected = plain(twin, source, (size, size))
    output = encoder(source, (size, size), group)

    assert_same(
        with_gradients(output, source, *encoder.parameters()),
        with_gradients(expected, source, *twin.parameters()),
    )
    assert_same(buffers(encoder), buffers(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_group_0_is_the_plain_layers(kind):
    encoder, source = make(kind)
    assert_same(encoder(source, (3, 3)), plain(encoder, source, (3, 3)), 0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [4, 3])
@pytest.mark.parametrize("kind", ["image", "recent"])
def test_gradcheck(kind, size, training):
    torch.manual_seed(0)
    encoder = ImageEncoder(5, widen=0.2) if kind == "image" else RecentEncoder(3, 5)
    randomise_norms(encoder)
    encoder.double().train(training)
    names = [name for name, _ in encoder.named_parameters()]

    def run(source, *parameters):
        own = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(encoder, own, (source, (size, size), 2))

    source = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (source, *encoder.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_of_a_source_that_wants_none(kind):
    encoder, source = make(kind)
    twin = copy.deepcopy(encoder)
    assert_same(
        with_gradients(encoder(source, (3, 3), 5), *encoder.parameters()),
        with_gradients(plain(twin, source, (3, 3)), *twin.parameters()),
    )
    assert source.grad is None


def test_upstream_gradient_without_strides():
    """A sum's gradient is one number, expanded; nothing may write to it."""
    encoder, source = make("image")
    twin = copy.deepcopy(encoder)
    encoder(source, (6, 6), 5).sum().backward()
    plain(twin, source, (6, 6)).sum().backward()
    assert_same([p.grad for p in encoder.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(kind, training):
    encoder, source = make(kind)
    encoder.train(training)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        output = encoder(source, (3, 3), 5)
        assert_same(output, plain(twin, source, (3, 3)))
    assert not output.requires_grad
    assert_same(buffers(encoder), buffers(twin))


@pytest.mark.parametrize("layout", [STRAIGHT, CHANNELS_LAST], ids=str)
def test_context_has_the_layout_of_its_source(layout):
    encoder, source = make("image")
    output = encoder(source.contiguous(memory_format=layout), (3, 3), 5)
    assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_move_once_a_step(kind):
    encoder, source = make(kind)
    twin = copy.deepcopy(encoder)
    for step in (1, 2, 3):
        batch = source * step + step
        output = encoder(batch, (3, 3), 5)
        plain(twin, batch, (3, 3))
        moved = buffers(encoder)
        assert_same(moved, buffers(twin))
        output.sum().backward()
        assert_same(buffers(encoder), moved, 0)
        assert {int(bn.num_batches_tracked) for bn in norms_of(encoder)} == {step}
    assert {bn.momentum for bn in norms_of(encoder)} == {0.1}


def test_evaluation_moves_no_statistics():
    encoder, source = make("image")
    before = buffers(encoder.eval())
    encoder(source, (3, 3), 5).sum().backward()
    assert_same(buffers(encoder), before, 0)


class NoConvBackward(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            raise OSError("on purpose")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_raises_moves_nothing(kind):
    encoder, source = make(kind)
    output = encoder(source, (3, 3), 5)
    before = buffers(encoder)
    with NoConvBackward(), pytest.raises(OSError, match="on purpose"):
        output.sum().backward()
    assert_same(buffers(encoder), before, 0)
    assert {bn.momentum for bn in norms_of(encoder)} == {0.1}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_normalises_by_the_statistics_of_the_forward(kind, training):
    encoder, source = make(kind)
    encoder.train(training)
    twin = copy.deepcopy(encoder)
    output = encoder(source, (3, 3), 5)
    for bn in norms_of(encoder):
        bn.running_mean.add_(3)
        bn.running_var.mul_(7)
    encoder.train(not training)
    assert_same(
        with_gradients(output, *encoder.parameters()),
        with_gradients(plain(twin, source, (3, 3)), *twin.parameters()),
    )


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [6, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_under_autocast_backward_outside(kind, size):
    """As near to the plain layers under autocast as bf16 lets it be, which fp32 is not."""
    encoder, source = make(kind, count=16, dtype=torch.float32)
    twin = copy.deepcopy(encoder)
    source.requires_grad_()
    with bfloat16():
        output = encoder(source, (size, size), 5)
        expected = plain(twin, source, (size, size))
    assert output.dtype == expected.dtype == torch.bfloat16
    found = with_gradients(output, source, *encoder.parameters())
    wanted = with_gradients(expected, source, *twin.parameters())
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    rounding = 0.003 * upstream_of(output).norm()
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm() + rounding
    assert_same(buffers(encoder), buffers(twin), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_under_autocast_of_a_forward_outside(kind):
    encoder, source = make(kind, dtype=torch.float32)
    twin = copy.deepcopy(encoder)
    source.requires_grad_()
    output, expected = encoder(source, (3, 3), 5), plain(twin, source, (3, 3))
    wanted = with_gradients(expected, source, *twin.parameters())
    with bfloat16():
        found = with_gradients(output, source, *encoder.parameters())
    assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_float64_alone(kind):
    encoder, source = make(kind)
    twin = copy.deepcopy(encoder)
    with bfloat16():
        output, expected = encoder(source, (3, 3), 5), plain(twin, source, (3, 3))
    assert_same(output, expected)


def test_one_value_a_channel_is_refused_as_batchnorm_does():
    encoder, source = make("recent", side=1, count=1)
    with pytest.raises(ValueError, match="value"):
        plain(encoder, source, (1, 1))
    with pytest.raises(ValueError, match="value"):
        encoder(source, (1, 1), 5)


def saved_for_backward(run):
    """What `run()` returns, and the tensors that autograd saved meanwhile."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), saved


def maps_among(tensors, network):
    """Storages of those that are neither per channel nor learned."""
    learned = {p.data_ptr() for p in network.parameters()}
    return [t.data_ptr() for t in tensors if t.dim() > 1 and t.data_ptr() not in learned]


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_saves_the_source_alone(kind):
    encoder, source = make(kind)
    _, saved = saved_for_backward(lambda: encoder(source, (3, 3), 5))
    assert maps_among(saved, encoder) == [source.data_ptr()]
    widest = max(bn.num_features for bn in norms_of(encoder))
    assert max(t.numel() for t in saved if t.dim() == 1) <= widest
    _, saved = saved_for_backward(lambda: plain(encoder, source, (3, 3)))
    assert len(maps_among(saved, encoder)) > 1


def test_a_module_saves_its_contexts_alone():
    torch.manual_seed(0)
    network = build_network(
        layers=14, local_module_num=4, context_mode="R2E", image_size=8, context_group=5
    )
    supply = network.local_modules[3].context
    h = torch.randn(2, 32, 4, 4)
    contexts = {
        "image": torch.randn(2, 3, 8, 8),
        "recent_0": torch.randn(2, 16, 8, 8),
        "recent_1": torch.randn(2, 16, 8, 8),
    }
    before = h.clone(), {name: c.clone() for name, c in contexts.items()}
    _, saved = saved_for_backward(lambda: supply(h, contexts))
    assert sorted(maps_among(saved, supply)) == sorted(c.data_ptr() for c in contexts.values())
    assert_same((h, contexts), before, 0)


def bytes_of_statistics(encoder):
    """Mean and variance in float64, kept from the forward."""
    return sum(2 * 8 * bn.num_features for bn in norms_of(encoder))


@pytest.mark.parametrize("make_encoder", [lambda: ImageEncoder(64), lambda: RecentEncoder(32, 64)])
def test_forward_leaves_the_context_alone(make_encoder):
    encoder = make_encoder().double()
    source = torch.randn(4, encoder[0].in_channels, 16, 16, dtype=torch.float64)
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), source]) as meter:
        start = meter.live
        context = encoder(source, (8, 8), 16)
        assert meter.live - start == context.nbytes + bytes_of_statistics(encoder)
        context.sum().backward()
        del context
        assert meter.live - start == sum(p.nbytes for p in encoder.parameters())
    assert all(p.grad is not None for p in encoder.parameters())


def peak_maps(encoder, source, size, group):
    """Peak of forward and backward above what was there before, in maps of the source's size."""
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), source]) as meter:
        start = meter.live
        encoder(source, (size, size), group).sum().backward()
    return (meter.peak - start) / source[:, 0].nbytes


# Maps at the peak of 64 channels in groups of 16. In the forward: context, what the last layer
# sees, a group's conv and its squares. In the backward: source, first layer and its gradient so
# far, a group's conv and two gradients.
@pytest.mark.parametrize(
    ("make_encoder", "size", "by_hand"),
    [
        (lambda: ImageEncoder(64), 32, 64 + 12 + 2 * 16),
        (lambda: ImageEncoder(64), 16, 3 + 2 * 12 + 12 + 3 * 16),
        (lambda: RecentEncoder(32, 64), 32, 64 + 32 + 2 * 16),
        (lambda: RecentEncoder(32, 64), 16, 32 + 3 * 16),
    ],
    ids=["image", "image_pooled", "recent", "recent_pooled"],
)
def test_peak_by_hand_and_below_that_of_the_plain_layers(make_encoder, size, by_hand):
    encoder = make_encoder().double()
    source = torch.randn(8, encoder[0].in_channels, 32, 32, dtype=torch.float64)
    grouped, whole = (peak_maps(encoder, source, size, group) for group in (16, 0))
    small = sum(p.nbytes for p in encoder.parameters()) / source[:, 0].nbytes
    assert by_hand <= grouped < by_hand + 2 * small + 0.1
    assert grouped < 0.7 * whole


@pytest.mark.parametrize("value", [-1, 1.5, True, "16", None])
def test_context_group_is_a_whole_number(value):
    with pytest.raises(InputError, match="context_group must be a whole number"):
        build_network(layers=8, local_module_num=2, context_group=value)


@pytest.mark.parametrize("group", [0, 5, 16])
def test_context_group_reaches_the_encoders(group):
    network = build_network(layers=8, local_module_num=3, context_mode="E", context_group=group)
    calls = []
    for module in network.local_modules:
        for encoder in module.context.values():
            encoder.register_forward_pre_hook(lambda _, args: calls.append(args[2]))
    network(torch.randn(2, 3, 32, 32))
    assert calls == [group, group]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("group", [1, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_stays_on_the_device(kind, group, training):
    """On fake CUDA tensors, which raise where an operation mixes devices."""
    with FakeTensorMode(), torch.device("cuda"):
        encoder = KINDS[kind]().train(training)
        source = torch.randn(2, encoder[0].in_channels, 9, 9)
        output = encoder(source, (5, 5), group)
        assert (output.device.type, output.shape) == ("cuda", (2, 16, 5, 5))


@pytest.mark.parametrize("mode", ["R0", "R1", "R3", "E", "R1E", "R2E"])
def test_network_with_groups_stays_on_the_device(mode):
    with FakeTensorMode(), torch.device("cuda"):
        network = build_network(
            layers=8, local_module_num=4, context_mode=mode, image_size=8, context_group=24
        )
        for _, h_out in network.features(torch.randn(4, 3, 8, 8)):
            assert h_out.device.type == "cuda"
