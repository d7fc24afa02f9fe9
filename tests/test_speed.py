"""Channels-last, compiled and autocast steps against plain ones, and steps without a GPU's answer.

Nets are in float64 where numbers must be the same; then only the order of sums may differ.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cli import few_test_images, main
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import models.grouped
from configs import InputError
from dataloaders import load_dataset
from engine import device as speed
from engine import training
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.device import memory_format, ready
from engine.memory import PeakMemory
from engine.step import LocalSGD, Totals, evaluate, make_optimizers, train_one_epoch, train_step
from models import ContSupNetwork, build_network

CPU = torch.device("cpu")
DECODERS = {"h_reconstruct": True, "loss_scale": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def no_code_of_other_tests():
    torch._dynamo.reset()
    counters.clear()


def make(dtype=torch.float64, channels_last=True, **options):
    """A network on the CPU with random BatchNorm weights."""
    torch.manual_seed(0)
    defaults = {"layers": 8, "local_module_num": 3, "image_size": 12}
    network = build_network(**(defaults | options))
    for bn in norms_of(network):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.5)
    return ready(network.to(dtype), CPU, channels_last=channels_last, compiled=False)


def norms_of(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def make_batch(dtype=torch.float64, count=6, size=12, channels_last=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 10, (count,), generator=generator)
    return images.to(dtype, memory_format=memory_format(channels_last)), targets


def optimizers_of(network, lr=0.05):
    optimizers = make_optimizers(network)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
    return optimizers


def take_steps(network, images, targets, steps=3):
    """Losses of each step, module by module, and what the network holds afterwards."""
    torch.manual_seed(2)  # of the dropout
    optimizers, curves = optimizers_of(network), []
    for _ in range(steps):
        totals = Totals(network, images.device)
        for _ in train_step(network, optimizers, images, targets, totals):
            pass
        curves.append(totals.losses())
    return curves, network.state_dict()


def assert_same(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def graphs():
    return counters["stats"]["unique_graphs"]


# Channels-last


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize("decoding", [{}, DECODERS], ids=["", "decoders"])
@pytest.mark.parametrize("mode", ["R0", "R1", "E", "R1E"])
def test_channels_last_trains_as_contiguous(mode, decoding, loss):
    options = {"layers": 14, "local_module_num": 4, "context_mode": mode, **decoding}
    ran = []
    for last in (True, False):
        network = make(local_loss_mode=loss, channels_last=last, **options)
        images, targets = make_batch(channels_last=last)
        ran.append(take_steps(network, images, targets))
    assert_same(*ran, 1e-10)


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("mode", ["R0", "R1", "E", "R1E"])
@pytest.mark.parametrize("last", [True, False])
def test_features_are_in_the_format_of_the_images(last, mode, group):
    network = make(channels_last=last, context_mode=mode, context_group=group)
    weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[2] > 1]
    for tensor in weights + [h for _, h in network.features(make_batch(channels_last=last)[0])]:
        assert tensor.is_contiguous(memory_format=memory_format(last))


# --compile

COMPILED = [
    {"context_mode": "R0"},
    {"context_mode": "R1", "recompute": True, "local_module_num": 2, "droprate": 0.3},
    {"context_mode": "R3", "local_loss_mode": "contrast"},
    {"context_mode": "E", "context_group": 5},
    {"context_mode": "E", "context_group": 0},
    {"context_mode": "R1E", "recompute": True, "layers": 14, **DECODERS},
    {"context_mode": "R1E", "local_loss_mode": "contrast", "dataset": "stl10", **DECODERS},
]


def both_ways(options, batch, backend, dtype=torch.float64):
    """What an eager network and a compiled one come to."""
    eager, compiled = make(dtype, **options), make(dtype, **options)
    compiled.compile_steps(backend)
    return take_steps(compiled, *batch), take_steps(eager, *batch)


@pytest.mark.parametrize("options", COMPILED, ids=lambda o: "-".join(map(str, o.values())))
def test_compiled_steps_train_as_eager_ones(options):
    """Losses, weights and BatchNorm's statistics, which move once a step."""
    compiled, eager = both_ways(options, make_batch(), "aot_eager")
    assert_same(compiled, eager, 1e-9)
    assert all(v == 3 for k, v in compiled[1].items() if k.endswith("num_batches_tracked"))


def test_compiled_autocast_is_near_the_eager_one():
    compiled, eager = both_ways(
        {"context_mode": "E", "amp": "bf16"}, make_batch(torch.float32), "aot_eager", torch.float32
    )
    torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02)


def test_inductor_trains_as_eager():
    options = {"local_module_num": 2, "context_mode": "E", **DECODERS}
    compiled, eager = both_ways(options, make_batch(torch.float32), "inductor", torch.float32)
    assert graphs() > 0
    assert_same(compiled, eager, 1e-4)


def test_a_graph_break_is_an_error():
    network = make(context_mode="E")
    network.compile_steps("eager")
    unit = network.local_modules[1].units[0]
    forward = unit.forward

    def broken(x):
        torch._dynamo.graph_break()
        return forward(x)

    take_steps(network, *make_batch(), steps=1)
    unit.forward = broken
    with pytest.raises(torch._dynamo.exc.Unsupported):
        take_steps(network, *make_batch(), steps=1)


@pytest.mark.parametrize(
    ("mode", "kinds"),
    # Stem, a block of each stage, the first ones of stages 2 and 3, which widen, and the last
    # block, with the real head. Encoders give 16, 32 or 64 channels at a size each, and there
    # are two where a stage's first block is the receiver; forward and backward are apart.
    [("R0", 7), ("E", 7 + 2 * 3)],
)
def test_identical_modules_share_their_code(mode, kinds):
    network = make(torch.float32, layers=32, local_module_num=16, context_mode=mode)
    network.compile_steps("eager")
    batch = make_batch(torch.float32, count=4)
    take_steps(network, *batch, steps=1)
    assert graphs() == kinds
    take_steps(network, *batch, steps=1)
    assert graphs() == kinds


def test_more_kinds_of_module_than_dynamos_limit():
    """Decoders weigh each module's losses otherwise: with 9 modules or more none is another's."""
    scale = {"h_reconstruct": True, "loss_scale": (5, 0, 0, 0.1)}
    network = make(torch.float32, layers=20, local_module_num=10, **scale)
    network.compile_steps("eager")
    take_steps(network, *make_batch(torch.float32), steps=1)


def test_evaluation_and_a_smaller_last_batch_compile_nothing():
    network = make(torch.float32, context_mode="R1E", **DECODERS)
    eager = make(torch.float32, context_mode="R1E", **DECODERS)
    network.compile_steps("eager")
    batches = [make_batch(torch.float32, count) for count in (8, 8, 5)]
    counts, found = [], []

    def report(step, _):
        counts.append(graphs())

    for net in (network, eager):
        optimizers, peak = optimizers_of(net), PeakMemory(CPU, compiled=True)
        for _ in range(2):
            trained = train_one_epoch(net, optimizers, batches, peak, report)
        found.append([trained.losses(), evaluate(net, batches, CPU).losses()])
        counts.append(graphs())
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
    assert_same(*found, 1e-4)


def test_compiled_encoders_make_their_maps_again():
    """Convs in the code of the forward and again in that of the backward, and none are saved."""
    convs, saved = [], []

    def counting(code, _):
        names = [str(node.target) for node in code.graph.nodes]
        convs.append(sum("conv2d" in name for name in names))
        return code.forward

    network = make(local_module_num=2, context_mode="E", context_group=5)
    network.compile_steps(counting)
    supply = network.local_modules[1].context
    images, _ = make_batch()
    h = torch.randn(6, 16, 12, 12, dtype=torch.float64)

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h_in = supply(h, {"image": images})
    h_in.sum().backward()
    assert convs == [1 + 4, 1 + 4]  # 12 channels, and 16 in groups of 5
    weights = supply["image"][3].weight.numel()
    assert sorted(saved)[-2:] == [weights, images.numel()]


# --amp


def amp_net(amp, **options):
    return make(torch.float32, amp=amp, **options)


class Products(TorchDispatchMode):
    """The dtypes that matrix products come out in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_convs_are_narrow_and_losses_are_not(monkeypatch, amp, loss, group):
    network = amp_net(
        amp, local_loss_mode=loss, context_mode="R1E", context_group=group, **DECODERS
    )
    narrow, layers, convs, tasks, decoded = set(), 0, [], [], []
    convolve, reconstruction = models.grouped._convolve, losses.reconstruction
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda *call: narrow.add(call[2].dtype))

    def spied_convolve(*args):
        convs.append(convolve(*args))
        return convs[-1]

    def spied_reconstruction(*args):
        decoded.append([*args, reconstruction(*args)])
        return decoded[-1][-1]

    def spied(function):
        def task(output, targets):
            with Products() as products:
                tasks.append((output.dtype, products.dtypes, function(output, targets)))
            return tasks[-1][-1]

        return task

    monkeypatch.setattr(models.grouped, "_convolve", spied_convolve)
    monkeypatch.setattr(losses, "reconstruction", spied_reconstruction)
    for module in network.local_modules:
        module.task = module.task._replace(function=spied(module.task.function))
    logits, values = network.local_step(*make_batch(torch.float32))

    assert narrow == {network.narrow}
    assert {conv.dtype for conv in convs} == ({network.narrow} if group else set())
    wide = [logits, *values, *network.parameters(), *(p.grad for p in network.parameters())]
    wide += [t for call in decoded for t in call] + [value for *_, value in tasks]
    assert {t.dtype for t in [*wide, *network.buffers()] if t.is_floating_point()} == {
        torch.float32
    }
    assert (len(tasks), len(decoded)) == (3, 2)
    products = {torch.float32} if loss == "contrast" else set()
    assert tasks[0][:2] == (torch.float32, products)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_logits_are_float32_and_near_the_plain_ones(amp):
    images, targets = make_batch(torch.float32)
    found = []
    for precision in ("off", amp):
        network = amp_net(precision, context_mode="R1E")
        logits = network(images).detach()
        assert logits.dtype == torch.float32
        tested = evaluate(network, [(images, targets)], CPU).losses()
        found.append([logits, torch.tensor(tested)])
    assert not torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_evaluate_takes_the_loss_of_float32_logits(monkeypatch):
    seen = []
    cross_entropy = F.cross_entropy

    def spied(output, targets):
        seen.append(output.dtype)
        return cross_entropy(output, targets)

    monkeypatch.setattr(F, "cross_entropy", spied)
    evaluate(amp_net("bf16"), [make_batch(torch.float32)], CPU)
    assert seen == [torch.float32] * 3


def test_unknown_amp_is_refused():
    for value in ("float16", "", None, True):
        with pytest.raises(InputError, match="amp"):
            build_network(layers=8, local_module_num=2, amp=value)


def test_bf16_trains_as_float32_does():
    """Loss curves of digits, in means of 16 steps: nowhere are bf16 and float32 of one seed as far
    apart as float32 of three seeds (other weights, another order) where these are the farthest."""
    data = load_dataset("digits", ".", 32).train

    def curve(amp, seed, steps=64, window=16, size=16):
        torch.manual_seed(seed)
        network = build_network(layers=8, local_module_num=2, context_mode="E", amp=amp,
                                dataset="digits")  # fmt: skip
        network = ready(network, CPU, channels_last=True, compiled=False)
        optimizers, values = optimizers_of(network, 0.1), []
        for part in torch.randperm(len(data.targets))[: steps * size].split(size):
            images = data.images[part][:, :, ::2, ::2] / 128.0 - 1
            totals = Totals(network, CPU)
            for _ in train_step(network, optimizers, images, data.targets[part], totals):
                pass
            values.append(totals.losses())
        return torch.tensor(values).view(-1, window, 2).mean(1)

    curves = torch.stack([curve("off", seed) for seed in range(3)])
    narrow = curve("bf16", 0)
    noise = (curves.amax(0) - curves.amin(0)).max()
    gap = (narrow - curves[0]).abs().max()
    assert 0 < gap < noise
    assert (narrow[-1] < 0.8 * narrow[0]).all()


# Scaled losses of --amp fp16, and the optimizer


def sgd_by_hand(weight, gradients, lr):
    """Nesterov's SGD with momentum 0.9 and weight decay 1e-4."""
    momentum = None
    for gradient in gradients:
        gradient = gradient + 1e-4 * weight
        momentum = gradient if momentum is None else 0.9 * momentum + gradient
        weight = weight - lr * (gradient + 0.9 * momentum)
    return weight


def vector(*values):
    """A module of one weight."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values))
    return module


@pytest.mark.parametrize("scale", [False, True])
def test_optimizer_is_nesterov_by_hand(scale):
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    starts = [p.detach().clone() for p in module.parameters()]
    gradients = [[torch.randn_like(p) for _ in range(3)] for p in module.parameters()]
    optimizer = LocalSGD(module, scale)
    optimizer.param_groups[0]["lr"] = 0.1
    for of_step in zip(*gradients, strict=True):
        factor = optimizer.scaler.scale(torch.ones(()))
        assert (factor.item() > 1) == scale
        for parameter, gradient in zip(module.parameters(), of_step, strict=True):
            parameter.grad = gradient * factor
        optimizer.step_and_free()
        assert all(p.grad is None for p in module.parameters())
    for parameter, start, of_all in zip(module.parameters(), starts, gradients, strict=True):
        assert_same(parameter.detach(), sgd_by_hand(start, of_all, 0.1), 1e-14)


def test_losses_are_scaled_with_fp16_alone():
    for amp in ("off", "bf16", "fp16"):
        scalers = [o.scaler for o in make_optimizers(amp_net(amp))]
        assert len({id(scaler) for scaler in scalers}) == 3
        assert {scaler.is_enabled() for scaler in scalers} == {amp == "fp16"}


def test_a_module_whose_gradients_overflow_skips_its_step():
    network = amp_net("fp16")
    images, targets = make_batch(torch.float32)
    optimizers = optimizers_of(network)
    take = lambda: list(train_step(network, optimizers, images, targets, Totals(network, CPU)))  # noqa: E731
    for optimizer in optimizers:
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    take()
    before = [[p.detach().clone() for p in m.parameters()] for m in network.local_modules]
    weight = network.local_modules[1].head[-1].weight
    planted = weight.register_hook(lambda gradient: gradient + torch.inf)
    take()
    moved = [
        {bool((p != b).any()) for p, b in zip(m.parameters(), old, strict=True)}
        for m, old in zip(network.local_modules, before, strict=True)
    ]
    assert moved == [{True}, {False}, {True}]
    assert [o.scaler.get_scale() for o in optimizers] == [256, 128, 256]
    planted.remove()
    take()
    assert all((p != b).any() for p, b in zip(network.local_modules[1].parameters(), before[1],
                                              strict=True))  # fmt: skip


def test_momentum_is_whole_after_a_first_step_that_overflowed():
    """The second step is then the first one, whatever was in the memory of the momentum."""
    module = vector(1.0, 2.0)
    optimizer = LocalSGD(module, scale=True)
    optimizer.param_groups[0]["lr"] = 0.1
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        optimizer.scaler.scale((module.weight * torch.inf).sum()).backward()
        optimizer.step_and_free()
        assert module.weight.tolist() == [1, 2]
        optimizer.scaler.scale(module.weight.sum()).backward()
        optimizer.step_and_free()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = sgd_by_hand(torch.tensor([1.0, 2.0]), [torch.ones(2)], 0.1)
    assert_same(module.weight.detach(), expected, 1e-6)


def test_scaling_changes_a_step_by_rounding_alone():
    ran = []
    for scaled in (True, False):
        network = amp_net("fp16", context_mode="R1E", **DECODERS)
        optimizers = optimizers_of(network)
        for optimizer in optimizers:
            optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        batch = make_batch(torch.float32)
        list(train_step(network, optimizers, *batch, Totals(network, CPU)))
        ran.append([p.detach() for p in network.parameters()])
    torch.testing.assert_close(*ran, rtol=1e-3, atol=1e-4)


# What would wait for the device, or mix devices: on fake tensors both raise

AMPS = ["off", "bf16", "fp16"]
CONTEXTS = ["R0", "R1", "R3", "E", "R1E"]
CONTRAST = {"local_loss_mode": "contrast", "recompute": True}
WAYS = [
    {"context_group": 16, "channels_last": True, **DECODERS},
    {"context_group": 16, "channels_last": False, **CONTRAST},
    {"context_group": 0, "channels_last": True, **CONTRAST},
    {"context_group": 0, "channels_last": False, **DECODERS},
]


def fake_net(device, amp, channels_last, **options):
    """A fake network and batch; call in FakeTensorMode."""
    with torch.device(device):
        network = build_network(layers=8, local_module_num=4, image_size=8, amp=amp, **options)
        for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            weight = conv.weight.detach().to(memory_format=memory_format(channels_last))
            conv.weight = nn.Parameter(weight)  # .to() of a module swaps, which fakes refuse
        images = torch.empty(4, 3, 8, 8).to(memory_format=memory_format(channels_last))
        return network, images, torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("mode", CONTEXTS)
def test_a_step_waits_for_nothing(mode, amp):
    for options in WAYS[:2]:
        with FakeTensorMode():
            network, images, targets = fake_net("cpu", amp, context_mode=mode, **options)
            totals, optimizers = Totals(network, images.device), make_optimizers(network)
            assert len(list(train_step(network, optimizers, images, targets, totals))) == 4


def test_reading_a_number_in_a_step_is_found():
    with FakeTensorMode():
        network, images, targets = fake_net("cpu", "off", True)
        head = network.local_modules[1].head
        head.register_forward_hook(lambda *call: call[2] * call[2].max().item())
        totals, optimizers = Totals(network, images.device), make_optimizers(network)
        with pytest.raises(Exception, match=r"item|_local_scalar_dense|[Dd]ata-?\s?dependent"):
            list(train_step(network, optimizers, images, targets, totals))


def pretend_cuda(monkeypatch, network):
    """Stand-ins for what fake CUDA tensors cannot do without a GPU.

    Backward: gives gradients of 0 where they belong. Fused SGD: only looks at the devices.
    Autocast and scaler would switch themselves off.
    """
    turns = iter(network.local_modules)

    def backward(loss):
        assert (loss.dim(), loss.dtype) == (0, torch.float32)
        for parameter in next(turns).parameters():
            parameter.grad = torch.zeros_like(parameter)

    def fused_sgd(*lists, grad_scale, found_inf, **_):
        tensors = [*(t for tensors in lists for t in tensors), grad_scale, found_inf]
        assert len({t.device for t in tensors if t is not None}) == 1

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)


@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("mode", CONTEXTS)
def test_a_step_stays_on_the_device(monkeypatch, mode, amp):
    """On cuda:1: what goes to the CPU or to the current CUDA device is found."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    for options in WAYS:
        with FakeTensorMode(), monkeypatch.context() as patch:
            network, images, targets = fake_net("cuda:1", amp, context_mode=mode, **options)
            optimizers, totals = make_optimizers(network), Totals(network, images.device)
            pretend_cuda(patch, network)
            list(train_step(network, optimizers, images, targets, totals))
            features = [h_out for _, h_out in network.features(images)]
            logits = network(images)
            state = [v for o in optimizers for s in o.state.values() for v in s.values()]
            tensors = [logits, totals._losses, totals._wrong, *network.state_dict().values()]
            assert {str(t.device) for t in tensors + state + features} == {"cuda:1"}
            assert logits.dtype == torch.float32
            assert {h.dtype for h in features} == {network.narrow or torch.float32}
            assert len(state) == len(list(network.parameters()))
            assert [o.scaler.is_enabled() for o in optimizers] == [amp == "fp16"] * 4


# train.py

TINY = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--local_module_num", "2",
    "--local_loss_mode", "cross_entropy", "--context_mode", "E",
    "--batch_size", "16", "--epochs", "3", "--seed", "5",
]  # fmt: skip
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def train_py(tmp_path, monkeypatch, capsys):
    """train.py in an empty folder, with 40 test images, a quick compiler and no lasting switches.

    Gives status, output and errors.
    """
    monkeypatch.chdir(tmp_path)
    few_test_images(monkeypatch)
    monkeypatch.setattr(ContSupNetwork.compile_steps, "__defaults__", ("aot_eager",))
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = backends[0].benchmark, backends[0].allow_tf32, backends[1].allow_tf32
    yield lambda *arguments: main(monkeypatch, capsys, *arguments)
    backends[0].benchmark, backends[0].allow_tf32, backends[1].allow_tf32 = kept


def summary_of(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def losses_of(folder):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["local_losses"] for line in lines])


def test_every_speed_option_trains_the_same(train_py, monkeypatch):
    kept = []
    monkeypatch.setattr(speed, "keep_heap", lambda: kept.append(True))
    cpu = [*TINY, "--device", "cpu"]
    assert train_py(*cpu, "--output_dir", "plain")[0] == 0
    assert kept == [True]
    assert summary_of("plain")["data_on_device_bytes"] == 0
    plain = losses_of("plain")
    for options in (
        ["--no-channels_last"], ["--compile"], ["--data_on_device"], ["--keep_heap", "False"],
        ["--cudnn_benchmark"], ["--tf32"],
    ):  # fmt: skip
        folder = options[0].strip("-")
        status, out, err = train_py(*cpu, *options, "--output_dir", folder)
        assert (status, err) == (0, [])
        torch.testing.assert_close(losses_of(folder), plain, rtol=2e-3, atol=2e-3)
        said = [line for line in out if line.startswith("compiled ")]
        assert len(said) == (options == ["--compile"])
        assert all(re.fullmatch(r"compiled [1-9]\d* graphs in [\d.]+ s so far", s) for s in said)
        assert torch.backends.cudnn.benchmark == (options == ["--cudnn_benchmark"])
        assert torch.backends.cudnn.allow_tf32 == (options == ["--tf32"])
        assert torch.backends.cuda.matmul.allow_tf32 == (options == ["--tf32"])
    assert len(kept) == 6
    images, targets = 20 + 40, 8  # of 3x32x32 bytes; an int64 each
    assert summary_of("data_on_device")["data_on_device_bytes"] == images * (3072 + targets)
    assert "allocator" in summary_of("compile")["peak_memory_how"]


def test_resume_may_change_what_changes_no_learning(train_py):
    cpu = [*TINY, "--device", "cpu"]
    assert train_py(*cpu, "--output_dir", "whole")[0] == 0
    assert train_py(*cpu, "--output_dir", "run")[0] == 0
    cut_off("run", epoch=1)
    kept = ["--resume", "run/checkpoint.pt"]
    for refused in (["--amp", "bf16"], ["--tf32"]):
        status, _, err = train_py(*kept, *refused)
        assert (status, len(err)) == (2, 1)
        assert refused[0].strip("-") in err[0]
    assert train_py(*kept, "--compile", "--no-channels_last", "--data_on_device")[0] == 0
    torch.testing.assert_close(losses_of("run"), losses_of("whole"), rtol=5e-3, atol=5e-3)


def cut_off(folder, epoch):
    """Leaves a run as if it had been stopped after an epoch; needs its model_best of that epoch."""
    folder = Path(folder)
    state = read_checkpoint(folder / f"epoch_{epoch}.pt")
    save_checkpoint(folder / "checkpoint.pt", state)
    (folder / "summary.json").unlink()


@pytest.fixture(autouse=True)
def every_epoch_is_kept(monkeypatch):
    """train.py leaves epoch_<number>.pt beside checkpoint.pt."""

    def save(path, state):
        save_checkpoint(path, state)
        save_checkpoint(path.with_name(f"epoch_{state.epoch}.pt"), state)

    monkeypatch.setattr(training, "save_checkpoint", save)


def test_fp16_resumed_ends_like_the_uninterrupted_run(train_py, monkeypatch):
    """With scales that grow at every second step, so that they say where a run went on from."""
    scaler = partial(torch.amp.GradScaler, init_scale=8.0, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    arguments = [*TINY, "--device", "cpu", "--amp", "fp16"]
    for folder in ("whole", "run"):
        assert train_py(*arguments, "--output_dir", folder)[0] == 0
    cut_off("run", epoch=1)
    assert train_py("--resume", "run/checkpoint.pt")[0] == 0
    whole, resumed = (read_checkpoint(f"{folder}/checkpoint.pt") for folder in ("whole", "run"))
    # 20 images in batches of 16: 2 steps an epoch, 6 in all, so the scale doubles three times.
    assert [s["scale"] for s in whole.scalers] == [64.0, 64.0]
    assert list(resumed.scalers) == list(whole.scalers)
    assert_same(resumed.state_dict, whole.state_dict, 0)
    assert_same(resumed.momentum, whole.momentum, 0)


def test_only_fp16_has_scalers_in_its_checkpoints(train_py):
    arguments = [*TINY, "--device", "cpu", "--epochs", "1"]
    assert train_py(*arguments, "--amp", "bf16", "--output_dir", "run")[0] == 0
    assert read_checkpoint("run/checkpoint.pt").scalers == []


@NEEDS_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([], 0.02), (["--amp", "bf16"], 0.2), (["--amp", "fp16"], 0.2), (["--compile"], 0.02),
        (["--data_on_device"], 0.02), (["--amp", "bf16", "--compile", "--data_on_device"], 0.2),
    ],
    ids=str,
)  # fmt: skip
def test_run_on_cuda(train_py, monkeypatch, device, options, tolerance):
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    monkeypatch.setattr(ContSupNetwork.compile_steps, "__defaults__", ("inductor",))
    assert train_py(*TINY, "--device", "cpu", "--output_dir", "cpu")[0] == 0
    status, _, err = train_py(*TINY, "--device", device, *options, "--output_dir", "run")
    assert (status, err) == (0, [])
    torch.testing.assert_close(losses_of("run"), losses_of("cpu"), rtol=tolerance, atol=tolerance)
    summary = summary_of("run")
    assert "max_memory_allocated" in summary["peak_memory_how"]
    assert 2**20 < summary["peak_memory_bytes"] < 2**30
    assert summary["device"].startswith("cuda")
    assert (summary["data_on_device_bytes"] > 0) == ("--data_on_device" in options)


@NEEDS_CUDA
def test_images_on_the_gpu_are_not_in_the_peak(train_py):
    """All digits are 5 MB of images: with them or without, a step peaks at the same."""
    arguments = [*TINY, "--device", "cuda", "--limit_per_class", "1000", "--epochs", "1"]
    assert train_py(*arguments, "--output_dir", "off")[0] == 0
    assert train_py(*arguments, "--data_on_device", "--output_dir", "on")[0] == 0
    off, on = summary_of("off"), summary_of("on")
    assert on["data_on_device_bytes"] > 4e6
    assert abs(on["peak_memory_bytes"] - off["peak_memory_bytes"]) < 2e6
