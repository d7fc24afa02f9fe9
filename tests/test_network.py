"""Structure, context supply and gradient isolation of the networks."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cli import needs_compiled_checkpoints
from torch import nn

import losses
from configs import InputError, choose_cuts, published_loss_scale
from engine.memory import LiveBytes
from engine.step import Totals, make_optimizers, reconstructions, train_step
from models import LocalModule, build_network
from models.auxiliary import build_head
from models.context import IMAGE_ENCODERS, Contexts, ContextSupply, Encoder, ImageEncoder

MODES = ["R0", "R1", "R2", "R3", "E", "R1E", "R2E"]
DECODERS = {"h_reconstruct": True, "loss_scale": (1, 1, 1, 1)}
MEAN = torch.tensor([125.3, 123.0, 113.9], dtype=torch.float64)[:, None, None] / 255
DEVIATION = torch.tensor([63.0, 62.1, 66.7], dtype=torch.float64)[:, None, None] / 255


def tiny(**options):
    torch.manual_seed(0)
    defaults = {"layers": 14, "local_module_num": 4, "image_size": 12}
    return build_network(**(defaults | options)).double()


def tiny_batch(count=6, size=12):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def test_nothing_outlives_its_last_use():
    """Live bytes where a module's forward ends, by hand: weights and what autograd holds apart."""
    network = tiny(context_mode="R1", layers=8)
    images, _ = tiny_batch()
    held = []
    with torch.no_grad(), LiveBytes([*network.parameters(), *network.buffers(), images]) as meter:
        start = meter.live
        for _, h_out in network.features(images):
            held.append((meter.live - start) // h_out[0, 0].nbytes)
    # In maps of 6 images and the size of h_out: h_out itself and the one window entry, h_in (the
    # image, which is counted in `start`, for module 0).
    assert held == [16 * 6, (16 + 16) * 6, (32 + 16 * 4) * 6, (64 + 32 * 4) * 6]


# No gradient crosses a cut


def plain_forward(network, mode, x):
    """h_out of each module by the method's text: a window of n slots, nothing detached."""
    n = int(mode.strip("RE") or 0)
    window = [None] * n
    if n and "E" not in mode:
        window[0] = x
    h, outputs = x, []
    for index, module in enumerate(network.local_modules):
        if index:
            size = h.shape[-1]
            total = h
            if "E" in mode:
                conv1, bn1, _, conv2, bn2, _ = module.context["image"]
                context = F.relu(bn2(conv2(F.relu(bn1(conv1(x))))))
                total = total + F.adaptive_avg_pool2d(context, size)
            for s, source in enumerate(window):
                if source is not None:
                    conv, bn, _ = module.context[f"recent_{s}"]
                    total = total + F.adaptive_avg_pool2d(F.relu(bn(conv(source))), size)
            h = total
            window = [h, *window][:n]
        h = module.units(h)
        outputs.append(h)
    return outputs


def plain_losses(network, mode, loss, images, targets, scale):
    """Each module's loss by the method's text, on one graph that goes through all of them."""
    found, last = [], len(network.local_modules) - 1
    pixels = (images.mul(DEVIATION) + MEAN).clamp(0, 1)
    outputs = plain_forward(network, mode, images)
    for index, (module, h_out) in enumerate(zip(network.local_modules, outputs, strict=True)):
        contrast = loss == "contrast" and index < last
        task = losses.supervised_contrastive if contrast else F.cross_entropy
        value = task(module.head(h_out), targets)
        if scale and index < last:
            r = index / (last - 1) if last > 1 else 0
            lx, ly = ((1 - r) * scale[i] + r * scale[i + 2] for i in (0, 1))
            large = F.interpolate(h_out, images.shape[-2:], mode="bilinear", align_corners=True)
            decoded = nn.Sequential(*module.decoder)(large).sigmoid()
            value = lx * F.binary_cross_entropy(decoded, pixels) + ly * value
        found.append(value)
    return found


def check_isolation(mode, loss, K=4, scale=None, size=12):
    """Isolation changes no gradient of a module's own loss in its own parameters.

    So autograd through the plain, undetached forward is the truth; what it would send to
    earlier modules must not be in `.grad`.
    """
    decoders = {"h_reconstruct": True, "loss_scale": scale} if scale else {}
    network = tiny(
        layers=8, local_module_num=K, context_mode=mode, local_loss_mode=loss, **decoders
    )
    images, targets = tiny_batch(size=size)
    expected_losses = plain_losses(network, mode, loss, images, targets, scale)
    expected = {}
    for module, value in zip(network.local_modules, expected_losses, strict=True):
        own = list(module.parameters())
        expected |= dict(zip(own, torch.autograd.grad(value, own, retain_graph=True), strict=True))
    logits, local_losses = network.local_step(images, targets)
    torch.testing.assert_close(local_losses, [x.detach() for x in expected_losses])
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: n + m
        )
    assert len(expected) == len(list(network.parameters()))
    assert not logits.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
def test_gradients_are_those_of_each_modules_own_loss(mode, loss):
    check_isolation(mode, loss)


@pytest.mark.parametrize(
    ("K", "scale", "size"),
    [(1, None, 12), (2, (5, 1, 0, 0), 4), (4, (5, 0.05, 0.2, 0.5), 9)],  # 9: pools overlap
)
def test_gradients_end_to_end_with_decoders_and_at_odd_sizes(K, scale, size):
    check_isolation("R1E", "cross_entropy", K, scale, size)


def leak_features(monkeypatch):
    def forward_and_losses(module, *args, real=LocalModule.forward_and_losses):
        outputs = []
        with module.register_forward_hook(lambda *call: outputs.append(call[2])):
            _, *others = real(module, *args)
        return outputs[0], *others

    monkeypatch.setattr(LocalModule, "forward_and_losses", forward_and_losses)


def leak_context(monkeypatch):
    inputs, push = [], Contexts.push

    def supply(*args, real=ContextSupply.forward):
        inputs.append(real(*args))
        return inputs[-1]

    monkeypatch.setattr(ContextSupply, "forward", supply)
    monkeypatch.setattr(Contexts, "push", lambda self, h: push(self, inputs[-1] if inputs else h))


@pytest.mark.parametrize("leak", [leak_features, leak_context])
def test_a_gradient_that_crosses_a_cut_is_found(monkeypatch, leak):
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss, retain_graph=True))
    check_isolation("R1", "cross_entropy")  # with graphs retained all is well still
    leak(monkeypatch)
    with pytest.raises(AssertionError, match="local_modules"):
        check_isolation("R1", "cross_entropy")


def test_after_backward_comes_when_a_modules_gradients_are_there():
    network, seen = tiny(context_mode="R1E", **DECODERS), []

    def after_backward(module):
        seen.append(module)
        for m in network.local_modules:
            assert all((p.grad is not None) == (m in seen) for p in m.parameters())

    network.local_step(*tiny_batch(), after_backward)
    assert seen == list(network.local_modules)


# Exchanged and frozen modules


def sgd_steps(network, batch, steps=2):
    """Losses of some steps of plain SGD on what requires a gradient."""
    found = []
    for _ in range(steps):
        found.append(network.local_step(*batch)[1])
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    return found


def test_an_exchanged_module_is_run_trained_and_saved():
    options = {"layers": 8, "context_mode": "R1"}
    network, expected, batch = tiny(**options), tiny(**options), tiny_batch()
    torch.manual_seed(7)
    other = build_network(local_module_num=4, **options).double()
    weights = {k: v for k, v in other.state_dict().items() if k.startswith("local_modules.1.")}
    expected.load_state_dict(weights, strict=False)
    assert network.stage == [*network.local_modules]
    old, network.local_modules[1] = network.local_modules[1], other.local_modules[1]
    before = {name: value.clone() for name, value in old.state_dict().items()}
    seen = []
    for each in (network, expected):
        optimizers = make_optimizers(each)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1
        for _ in range(2):
            train_step(each, optimizers, *batch, Totals(each, batch[0].device))
        seen.append([*each.local_step(*batch)[1], each.eval()(batch[0])])
    assert all(map(torch.equal, *seen))
    saved = expected.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    assert all(parameter.grad is None for parameter in old.parameters())


def test_a_process_with_some_modules_runs_an_exchanged_one():
    network, other = tiny(), tiny()
    network.set_stage(range(1, 3), network.io)
    assert network.stage == [*network.local_modules[1:3]]
    network.local_modules[1] = other.local_modules[2]  # whose place was another
    assert other.stage[2].index == 2
    assert network.stage == [other.local_modules[2], network.local_modules[2]]
    assert [module.index for module in network.stage] == [1, 2]


def test_a_frozen_module_runs_forward_only():
    """The others get the same bits as if it trained. BatchNorm follows eval() and train()."""
    options, batch = {"layers": 8, "context_mode": "R1E", "droprate": 0.0}, tiny_batch()
    plain, frozen = tiny(**options), tiny(**options)
    frozen.local_modules[0].requires_grad_(False)
    frozen.local_modules[2].requires_grad_(False)
    frozen.local_modules[1].units.requires_grad_(False)  # partly
    seen = []
    expected, losses = plain.local_step(*batch)[1], frozen.local_step(*batch, seen.append)[1]
    assert all(map(torch.equal, expected, losses))
    assert seen == list(frozen.local_modules)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in frozen.named_parameters():
        index, part = name.split(".")[1:3]
        if index in "02" or (index, part) == ("1", "units"):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])
    statistics = dict(plain.named_buffers())
    assert all(torch.equal(value, statistics[name]) for name, value in frozen.named_buffers())


def test_a_frozen_module_keeps_no_graph():
    network, saved = tiny(layers=8, context_mode="R1E", recompute=True), []
    keep = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None)
    network.requires_grad_(False)
    with keep:
        _, values = network.local_step(*tiny_batch())
    assert saved == [] and not any(value.requires_grad for value in values)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_frozen_module_needs_no_optimizer(amp):
    torch.manual_seed(0)
    network = build_network(layers=8, local_module_num=3, context_mode="R1E", amp=amp)
    images, targets = torch.randn(8, 3, 12, 12), torch.arange(8)
    network.local_modules[0].requires_grad_(False)
    network.local_modules[1].units.requires_grad_(False)
    optimizers = make_optimizers(network)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.1
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(3):
        train_step(network, optimizers, images, targets, Totals(network, images.device))
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in network.named_parameters() if p.requires_grad}
    network.requires_grad_(False)  # afterwards, too
    train_step(network, optimizers, images, targets, Totals(network, images.device))


def test_modules_that_do_not_train_stay_as_they_are():
    network = build_network(layers=8, local_module_num=4, context_mode="E", train_modules=[1, 3])
    network.train()
    assert [module.training for module in network.local_modules] == [False, True, False, True]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sgd_steps(network, (torch.randn(8, 3, 12, 12), torch.arange(8)))
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, before[n])}
    assert {name.split(".")[1] for name in changed} == {"1", "3"}


# The caller's own autocast


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize(("amp", "enabled"), [("bf16", False), ("bf16", True), ("off", True)])
def test_an_autocast_around_the_loop_changes_no_step(amp, enabled, loss):
    """As with amp="bf16" alone. Its cache would keep the weights of the first step."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(6, 3, 12, 12, generator=generator), torch.arange(6) // 2
    options = {"context_mode": "R1E", "layers": 8, "local_loss_mode": loss, **DECODERS}
    found = []
    for around, own in ((nullcontext(), "bf16"), (torch.autocast("cpu", enabled=enabled), amp)):
        network = tiny(amp=own, **options).float()
        with around:
            losses = sgd_steps(network, batch, 3)
            found.append((losses, network.eval()(batch[0])))
        found[-1] += (network.state_dict(),)
    (losses, logits, state), (own_losses, own_logits, own_state) = found
    assert losses == own_losses and losses[0] != losses[1]
    assert torch.equal(logits, own_logits)
    assert all(torch.equal(value, own_state[name]) for name, value in state.items())


# What is built


def test_widths_follow_the_options():
    network = build_network(
        layers=8, local_module_num=2, context_mode="E", local_loss_mode="contrast",
        h_reconstruct=True, loss_scale=(1, 1, 1, 1), aux_net_widen=0.55, aux_net_feature_dim=65,
    )  # fmt: skip
    first, second = network.local_modules  # 12w = 6.6, 32w = 17.6, f*w = 35.75
    assert (second.context["image"][0].out_channels, first.decoder[0].out_channels) == (6, 6)
    assert first.head[0].out_channels == 17
    assert [x.out_features for x in first.head if isinstance(x, nn.Linear)] == [35, 65]


def test_balanced_modules_end_at_their_cuts_and_have_the_weights_of_their_row():
    network = build_network(
        layers=32, local_module_num=4, balanced_memory=True, h_reconstruct=True, dataset="cifar10"
    )
    assert [m.unit_names[-1] for m in network.local_modules] == [(1, 2), (1, 4), (2, 2), (3, 4)]
    weights = [m.loss_weights for m in network.local_modules[:-1]]
    assert weights == [pytest.approx(w) for w in [(5, 0), (2.5, 0.05), (0, 0.1)]]


@pytest.mark.parametrize(
    ("config", "widen", "convs", "linears"),
    [
        ("0c1f", 1, [], [(16, 7)]),
        ("0c2f", 1, [], [(16, 128), (128, 7)]),
        ("1c1f", 1, [(16, 32, 2)], [(32, 7)]),
        ("1c2f", 1, [(16, 32, 2)], [(32, 128), (128, 7)]),
        ("1c3f", 1, [(16, 32, 2)], [(32, 128), (128, 128), (128, 7)]),
        ("2c2f", 1, [(16, 32, 2), (32, 32, 1)], [(32, 128), (128, 7)]),
        ("2c2f", 0.3, [(16, 9, 2), (9, 9, 1)], [(9, 38), (38, 7)]),
    ],
)
def test_auxiliary_head_layers_by_hand(config, widen, convs, linears):
    head = build_head(config, channels=16, size=32, outputs=7, widen=widen)
    found = [(c.in_channels, c.out_channels, c.stride[0]) for c in head if isinstance(c, nn.Conv2d)]
    assert found == convs
    assert [(x.in_features, x.out_features) for x in head if isinstance(x, nn.Linear)] == linears


EQUAL = """
8 4: 0,0 1,0 2,0
20 4: 1,0 2,0 2,2
32 1:
32 3: 1,4 2,4
32 5: 1,1 1,4 2,2 3,0
32 8: 1,0 1,2 1,4 2,1 2,3 3,0 3,2
110 3: 1,17 2,17
110 16: 1,1 1,4 1,7 1,10 1,13 1,16 2,1 2,4 2,7 2,11 2,15 3,1 3,5 3,9 3,13
"""
BALANCED = """\
110 2 cifar10: 1,14
110 3 cifar10: 1,9 2,2
110 4 cifar10: 1,6 1,14 2,8
110 2 stl10: 1,14
110 3 stl10: 1,8 2,1
110 4 stl10: 1,6 1,14 2,8
32 2 cifar10: 1,3
32 4 cifar10: 1,2 1,4 2,2
32 8 cifar10: 1,1 1,2 1,3 2,1 2,2 3,1 3,2
32 16 cifar10: 0,0 1,0 1,1 1,2 1,3 1,4 2,0 2,1 2,2 2,3 2,4 3,0 3,1 3,2 3,3
"""


@pytest.mark.parametrize("line", (EQUAL + BALANCED).split("\n")[1:-1])
def test_cuts_are_the_published_ones_or_at_equal_numbers_of_units(line):
    net, cuts = line.split(":")
    layers, K, *dataset = net.split()
    expected = [tuple(int(x) for x in cut.split(",")) for cut in cuts.split()]
    assert choose_cuts(int(layers), int(K), *(dataset or ["svhn"]), bool(dataset)) == expected


def test_published_loss_scales_of_balanced_cuts_that_are_the_equal_ones():
    scales = [published_loss_scale(32, 16, "cifar10", balanced) for balanced in (True, False)]
    assert scales == [(5, 0.05, 0.2, 0.5)] * 2


@needs_compiled_checkpoints
def test_an_encoder_with_a_forward_of_its_own_is_compiled_with_it(monkeypatch):
    class Doubled(ImageEncoder):
        def forward(self, *arguments):
            return 2 * Encoder.forward(self, *arguments)

    monkeypatch.setitem(IMAGE_ENCODERS, "D", Doubled)
    losses = []
    for compiled in (False, True):
        network = tiny(context_mode="D", layers=8, local_module_num=2)
        if compiled:
            network.compile_steps("aot_eager")
        losses.append(network.local_step(*tiny_batch())[1])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("context_mode", ["R1X", "RE", "R0E", "", "R01", "E1", None, "R" + "9" * 5000],
         "unknown context_mode"),
        ("context_mode", ["R5"], "n of Rn may be at most"),
        ("local_module_num", [8], "has 7 units"),
        ("local_module_num", [0, 2.0], "local_module_num must be a whole number"),
        ("layers", [2, 15], r"6n\+2"),
        ("layers", ["32"], "layers must be a whole number"),
        ("h_reconstruct", [True], "needs loss scales"),
        ("h_reconstruct", ["False"], "h_reconstruct must be True or False"),
        ("loss_scale", [(1, 1, 1, 1)], "needs h_reconstruct"),
        ("decoders", [(1, 1, 1), (1, 1, 1, math.nan), 5], "four numbers"),
        ("balanced_memory", [True], "no balanced cuts are published"),
        ("balanced_memory", [None], "balanced_memory must be True or False"),
        ("dataset", ["cifar", []], "unknown dataset"),
        ("local_loss_mode", ["softmax", {}], "unknown local_loss_mode"),
        ("aux_net_config", ["1c0f", "3f", 12], "unknown aux_net_config"),
        ("aux_net_widen", [0.01], "truncates to 0"),
        ("aux_net_widen", [-1, 1e30, "1"], "aux_net_widen must be"),
        ("aux_net_feature_dim", [0], "aux_net_feature_dim"),
        ("droprate", [1.0, math.nan], "droprate"),
        ("image_size", [3], "image_size"),
        ("num_classes", [0], "num_classes"),
        ("amp", ["float16", "", None, True], "unknown amp"),
        ("train_modules", [[4], [-1, 0], [], [0.5], 3, "01", [True]],
         "train_modules must be among the modules 0 to 3"),
        ("context_group", [-1, 1.5, True, "16", None], "context_group must be a whole number"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_with_a_sentence(name, values, message):
    for value in values:
        bad = {"h_reconstruct": True, "loss_scale": value} if name == "decoders" else {name: value}
        with pytest.raises(InputError, match=message):
            build_network(**({"layers": 14, "local_module_num": 4} | bad))


def test_decoder_scales_are_needed_only_where_a_decoder_is():
    for K in (1, 3):
        build_network(layers=32, local_module_num=K, dataset="svhn")
    build_network(layers=32, local_module_num=1, dataset="svhn", h_reconstruct=True)
    with pytest.raises(InputError, match="svhn with K=2"):
        build_network(layers=32, local_module_num=2, dataset="svhn", h_reconstruct=True)


@pytest.mark.parametrize("dataset", ["cifar10", "stl10"])
def test_reconstructions_are_what_the_decoders_make(dataset):
    """Beside the un-normalised image; drawing them moves no statistics."""
    network, (images, _) = tiny(layers=8, dataset=dataset, **DECODERS), tiny_batch()
    before = {name: value.clone() for name, value in network.named_buffers()}
    rows = reconstructions(network, images)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    plain = images.mul(DEVIATION) + MEAN if dataset == "cifar10" else (images + 1) / 2
    torch.testing.assert_close(rows["image"], plain.clamp(0, 1))
    assert list(rows) == ["image", "cut [0, 0]", "cut [1, 0]", "cut [2, 0]"]
    decoded = [m.decoder(h, images.shape[-2:]) for m, h in [*network.features(images)][:-1]]
    torch.testing.assert_close([*rows.values()][1:], [logits.sigmoid() for logits in decoded])


def test_initialisation():
    torch.manual_seed(0)
    network = build_network(layers=32, local_module_num=4, context_mode="E")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5000:
            std = math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels))
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
            assert abs(float(layer.weight.detach().mean())) < std / 20
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))


def test_dropout_acts_in_training_only():
    network = tiny(droprate=0.5)
    images, _ = tiny_batch()
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))
