"""Context encoders in groups of channels against the plain layers and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cli import needs_compiled_checkpoints
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from engine.memory import LiveBytes
from models import build_network, cpu_batch_norm
from models.context import Encoder, ImageEncoder, RecentEncoder

KINDS = {
    "image": lambda: ImageEncoder(16),
    "image_wide": lambda: ImageEncoder(16, widen=1.7),
    "recent": lambda: RecentEncoder(10, 16),
}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def make(kind, side=6, count=3, dtype=torch.float64):
    """An encoder with random norms, and a source (count, C_in, side, side)."""
    torch.manual_seed(0)
    encoder = KINDS[kind]()
    for bn in norms_of(encoder):
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    source = torch.randn(count, encoder[0].in_channels, side, side, dtype=dtype)
    return encoder.to(dtype), source


def norms_of(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def plain(encoder, source, size):
    """The layers one after the other, as torch.nn has them."""
    return F.adaptive_avg_pool2d(nn.Sequential(*encoder)(source), size)


def with_gradients(output, *inputs):
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def buffers(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def assert_same(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_as_plain(encoder, source, size=3, group=5, tolerance=1e-11):
    """Output, gradients and running statistics of two steps and of a pass without gradients."""
    twin = copy.deepcopy(encoder)
    inputs, expected_inputs = (
        [x for x in (source, *net.parameters()) if x.requires_grad] for net in (encoder, twin)
    )
    for factor in (1, 2):
        output = encoder(source * factor, (size, size), group)
        expected = plain(twin, source * factor, (size, size))
        assert_same(
            with_gradients(output, *inputs), with_gradients(expected, *expected_inputs), tolerance
        )
        with torch.no_grad():
            encoder(source, (size, size), group)
            plain(twin, source, (size, size))
        assert_same(buffers(encoder), buffers(twin), tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("side", "size", "layout"),
    [(6, 6, CONTIGUOUS), (6, 6, CHANNELS_LAST), (6, 3, CHANNELS_LAST), (9, 5, CONTIGUOUS)],
)
@pytest.mark.parametrize("group", [1, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_and_statistics_are_the_plain_layers(
    kind, group, side, size, layout, training
):
    encoder, source = make(kind, side)
    source = source.contiguous(memory_format=layout).requires_grad_()
    assert_as_plain(encoder.train(training), source, size, group)


def test_two_backwards():
    encoder, source = make("image")
    twin = copy.deepcopy(encoder)
    for output in (encoder(source, (3, 3), 5), plain(twin, source, (3, 3))):
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
    assert_same([p.grad for p in encoder.parameters()], [p.grad for p in twin.parameters()])


# Changed encoders


def exchange(layers, old, new):
    for name, layer in layers.named_children():
        if isinstance(layer, old):
            setattr(layers, name, new(layer))


def of_all_batches(encoder):
    for bn in norms_of(encoder):
        bn.momentum = None


def norm(new):
    return lambda encoder: exchange(encoder, nn.BatchNorm2d, lambda bn: new(bn.num_features))


def without_statistics(encoder):
    for bn in norms_of(encoder):
        bn.track_running_stats = False
        bn.running_mean = bn.running_var = bn.num_batches_tracked = None


def reflecting(conv):
    channels = conv.in_channels, conv.out_channels
    return nn.Conv2d(*channels, 3, padding=1, padding_mode="reflect")


CHANGES = {
    "reflected padding": lambda e: exchange(e, nn.Conv2d, reflecting),
    "affine=False": norm(lambda c: nn.BatchNorm2d(c, affine=False)),
    "no statistics": without_statistics,
    "LeakyReLU": lambda e: exchange(e, nn.ReLU, lambda _: nn.LeakyReLU(0.1)),
    "Softmax2d": lambda e: exchange(e, nn.ReLU, lambda _: nn.Softmax2d()),
    "plain norms": norm(lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False)),
    "momentum=None": of_all_batches,
    "GroupNorm": norm(lambda c: nn.GroupNorm(4, c)),
    "a third layer": lambda e: e.extend([nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Tanh()]),
    "parametrized": lambda e: nn.utils.parametrizations.weight_norm(e[-3]),
    "frozen first layer": lambda e: [layer.requires_grad_(False) for layer in (e[0], e[1])],
}


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_encoder_is_the_plain_one(change, layout):
    encoder, source = make("image")
    CHANGES[change](encoder)
    assert_as_plain(encoder.double(), source.contiguous(memory_format=layout))


def test_statistics_of_a_loader_are_those_of_plain_encoders():
    """By torch.optim.swa_utils.update_bn: the mean of all batches' statistics."""
    batches = [torch.randn(4, 3, 12, 12, dtype=torch.float64) for _ in range(3)]
    found = []
    for group in (0, 5):
        torch.manual_seed(0)
        network = build_network(
            layers=8, local_module_num=3, context_mode="R1E", context_group=group
        ).double()
        torch.optim.swa_utils.update_bn(batches, network)
        found.append(buffers(network))
    assert_same(*found)
    assert int(found[0]["local_modules.1.context.image.1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("place", range(6))
def test_hooks_see_and_change_what_they_would_in_plain_layers(place):
    encoder, source = make("image")
    source = source.contiguous(memory_format=CHANNELS_LAST)
    twin = copy.deepcopy(encoder)
    seen = []

    def halve(layer, inputs, output):
        seen.append(output)
        return output / 2

    for net in (encoder, twin):
        net[place].register_forward_hook(halve)
    found = with_gradients(encoder(source, (3, 3), 5), *encoder.parameters())
    assert_same(found, with_gradients(plain(twin, source, (3, 3)), *twin.parameters()))
    assert len({output.shape for output in seen}) == 1


def test_a_layer_without_weights_leaves_its_source_alone():
    network = build_network(layers=8, local_module_num=2, context_mode="E", context_group=5)
    supply = network.local_modules[1].context
    supply["image"] = Encoder(nn.Identity())
    image, h = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    before = image.clone()
    assert_same(supply(h, {"image": image}), h + image)
    assert_same(image, before, 0)


# Statistics and precision


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_moves_no_statistics_and_reads_none(kind):
    encoder, source = make(kind)
    twin = copy.deepcopy(encoder)
    output = encoder(source, (3, 3), 5)
    for bn in norms_of(encoder):
        bn.running_mean.add_(3)
        bn.running_var.mul_(7)
    moved = buffers(encoder)
    expected = with_gradients(plain(twin, source, (3, 3)), *twin.parameters())
    assert_same(with_gradients(output, *encoder.parameters()), expected)
    assert_same(buffers(encoder), moved, 0)
    assert {bn.momentum for bn in norms_of(encoder)} == {0.1}


@pytest.mark.parametrize("in_forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_of_the_forward_counts(kind, in_forward):
    encoder, source = make(kind, count=16, dtype=torch.float32)
    twin = copy.deepcopy(encoder)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_forward):
        output, expected = encoder(source, (3, 3), 5), plain(twin, source, (3, 3))
    assert output.dtype == (torch.bfloat16 if in_forward else torch.float32)
    wanted = with_gradients(expected, *twin.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=not in_forward):
        found = with_gradients(output, *encoder.parameters())
    rounding = 0.02 if in_forward else 1e-5
    biases = {i + 1 for i, (name, _) in enumerate(encoder.named_parameters()) if ".bias" in name}
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == theirs.dtype
        if index not in biases:  # those of convs before BatchNorm have no gradient but rounding
            assert (ours - theirs).norm() < rounding * theirs.norm()


@pytest.mark.parametrize("shape", [(3, 3, 4, 9), (2, 12, 8, 8), (4, 20, 3, 5), (1, 3, 6, 1)])
def test_batch_norm_by_lines_is_batchnorm(shape):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(shape[1], eps=1e-3, momentum=0.3).double()
    nn.init.normal_(bn.weight)
    twin = copy.deepcopy(bn)
    x = (torch.randn(shape).double() + 3).to(memory_format=CHANNELS_LAST).requires_grad_()
    assert cpu_batch_norm.is_faster_for(bn, x)
    assert_same(
        with_gradients(cpu_batch_norm.batch_norm(bn, x), x, *bn.parameters()),
        with_gradients(twin(x), x, *twin.parameters()),
    )
    assert_same(buffers(bn), buffers(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_by_lines_keeps_a_variance_at_a_far_mean(dtype):
    bn = nn.BatchNorm2d(12)
    x = torch.randn(8, 12, 16, 16, generator=torch.Generator().manual_seed(0)) * 4 + 400
    x = x.to(dtype, memory_format=CHANNELS_LAST)
    out = cpu_batch_norm.batch_norm(bn, x)
    exact = copy.deepcopy(bn).double()(x.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=1e-4)


# Memory


def peak_maps(encoder, source, size, group):
    """Peak of forward and backward above what was there before, in maps of the source's size."""
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), source]) as meter:
        start = meter.live
        context = encoder(source, (size, size), group)
        kept = meter.live - start
        context.sum().backward()
    assert kept >= context.nbytes
    if group:
        assert kept == context.nbytes
    return (meter.peak - start) / source[:, 0].nbytes


# Maps at the peak of 64 channels in groups of 16, where a group's ReLU runs backward: the group's
# conv, its output and two gradients; the first layer's conv and output, and its gradient so far.
@pytest.mark.parametrize(
    ("encoder", "by_hand"),
    [(ImageEncoder(64), 4 * 16 + 3 * 12), (RecentEncoder(32, 64), 4 * 16)],
    ids=["image", "recent"],
)
def test_forward_keeps_the_context_alone_and_peak_is_by_hand(encoder, by_hand):
    encoder = encoder.double()
    source = torch.randn(8, encoder[0].in_channels, 32, 32, dtype=torch.float64)
    small = sum(p.nbytes for p in encoder.parameters()) / source[:, 0].nbytes
    context = 64 / 16  # and its gradient, at half the size
    grouped, all_at_once = (peak_maps(encoder, source, 8, group) for group in (16, 0))
    assert by_hand <= grouped <= by_hand + 2 * context + 2 * small + 0.1
    assert grouped < 0.7 * all_at_once


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_runs_twice_in_a_step(kind, monkeypatch):
    """Channels times runs of each conv: also where groups share the layer before them."""
    encoder, source = make(kind)
    channels = []
    conv2d = F.conv2d

    def spied(x, weight, *args):
        channels.append(len(weight))
        return conv2d(x, weight, *args)

    monkeypatch.setattr(F, "conv2d", spied)
    encoder(source, (3, 3), 5).sum().backward()
    assert sum(channels) == 2 * sum(m.out_channels for m in encoder if hasattr(m, "out_channels"))


@needs_compiled_checkpoints
def test_compiled_code_recomputes_too():
    """The backward's code has the convs of the forward's, and is given no maps."""
    convs, given = [], []

    def count(graph, inputs):
        convs.append(sum(node.target is torch.ops.aten.convolution.default
                         for node in graph.graph.nodes))  # fmt: skip
        given.append([tuple(t.shape) for t in inputs if t.dim() == 4])
        return make_boxed_func(graph.forward)

    encoder, source = make("image", side=12)
    backend = aot_autograd(
        fw_compiler=count, partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )  # fmt: skip
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    compiled(source, (6, 6), 5).sum().backward()
    assert convs == [1 + 4, 1 + 4]  # 12 channels, and 16 in groups of 5
    maps = [shape for shape in given[1] if shape[0] == len(source)]
    assert set(maps) == {tuple(source.shape), (3, 16, 6, 6)}  # and the context's gradient
