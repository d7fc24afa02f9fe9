"""Channels-last, compiled and autocast steps against plain ones, and steps that wait for nothing.

Nets are in float64 where numbers must be the same; then only the order of sums may differ.
"""

import re

import pytest
import torch
import torch._dynamo
from cli import TINY, metrics_of, needs_compiled_checkpoints, needs_fake_cuda, summary_of
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs import METHODS, InputError
from engine.device import memory_format, move_to_device
from engine.step import Totals, evaluate, make_optimizers, train_step
from models import ContSupNetwork, build_network
from models import network as network_module

CPU = torch.device("cpu")
DECODERS = {"h_reconstruct": True, "loss_scale": (1, 1, 1, 1)}
CONTRAST = {"local_loss_mode": "contrast"}


@pytest.fixture(autouse=True)
def no_code_of_other_tests():
    torch._dynamo.reset()
    counters.clear()


def make(dtype=torch.float64, channels_last=True, **options):
    """A network on the CPU with random BatchNorm weights."""
    torch.manual_seed(0)
    network = build_network(**({"layers": 8, "local_module_num": 3, "image_size": 12} | options))
    for bn in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.5)
    return move_to_device(network.to(dtype), CPU, channels_last=channels_last, compiled=False)


def make_batch(dtype=torch.float64, count=6, channels_last=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 12, 12, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 10, (count,), generator=generator)
    return images.to(dtype, memory_format=memory_format(channels_last)), targets


def optimizers_of(network, lr=0.05, **scaler):
    optimizers = make_optimizers(network)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        if scaler:
            optimizer.scaler = torch.amp.GradScaler("cpu", **scaler)
    return optimizers


def take_steps(network, images, targets, steps=3, optimizers=None):
    """Losses of each step, module by module, and what the network holds afterwards."""
    torch.manual_seed(2)  # of the dropout
    optimizers, curves = optimizers or optimizers_of(network), []
    for _ in range(steps):
        totals = Totals(network, CPU)
        train_step(network, optimizers, images, targets, totals)
        curves.append(totals.losses())
    return curves, {name: value.clone() for name, value in network.state_dict().items()}


def assert_same(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Channels-last


@pytest.mark.parametrize("options", [
    {"context_mode": "R0", **CONTRAST}, {"context_mode": "R1", **DECODERS},
    {"context_mode": "E"}, {"context_mode": "R1E", "context_group": 0, **DECODERS, **CONTRAST},
], ids=str)  # fmt: skip
def test_channels_last_trains_as_contiguous(options):
    ran = []
    for last in (True, False):
        network = make(channels_last=last, **options)
        batch = make_batch(channels_last=last)
        weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[2] > 1]
        for tensor in weights + [h_out for _, h_out in network.features(batch[0])]:
            assert tensor.is_contiguous(memory_format=memory_format(last))
        ran.append(take_steps(network, *batch))
    assert_same(*ran, 1e-10)


# --compile


def graphs():
    return counters["stats"]["unique_graphs"]


COMPILED = [
    ({"context_mode": "R0"}, 1e-9),
    ({"context_mode": "R1", "recompute": True, "local_module_num": 2, "droprate": 0.3}, 1e-9),
    ({"context_mode": "R3", **CONTRAST}, 1e-9),
    ({"context_mode": "E", "context_group": 5}, 1e-9),
    ({"context_mode": "E", "context_group": 0}, 1e-9),
    ({"context_mode": "R1E", "recompute": True, "layers": 14, **DECODERS}, 1e-9),
    ({"context_mode": "R1E", "dataset": "stl10", **CONTRAST, **DECODERS}, 1e-9),
    ({"context_mode": "E", "dtype": torch.float32, "amp": "bf16"}, 0.02),
    ({"context_mode": "E", "dtype": torch.float32, "backend": "inductor", **DECODERS}, 1e-4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "tolerance"), COMPILED, ids=str)
def test_compiled_steps_train_as_eager_ones(options, tolerance):
    """Losses, weights and BatchNorm's statistics, which move once a step."""
    options = options.copy()
    backend = options.pop("backend", "aot_eager")
    batch = make_batch(options.get("dtype", torch.float64))
    compiled, eager = make(**options), make(**options)
    compiled.compile_steps(backend)
    found = take_steps(compiled, *batch)
    assert graphs() > 0
    assert_same(found, take_steps(eager, *batch), tolerance)
    assert all(v == 3 for k, v in found[1].items() if k.endswith("num_batches_tracked"))


def test_a_graph_break_is_an_error():
    network = make(context_mode="R0")
    network.compile_steps("eager")
    network.local_modules[1].units[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        take_steps(network, *make_batch(), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kinds"),
    # Stem, a block of each stage, the first ones of stages 2 and 3, which widen, and the last
    # block, with the real head. Encoders give 16, 32 or 64 channels, at a size each. Decoders
    # weigh each module's losses otherwise, which is left out of what is compiled.
    [({"context_mode": "R0"}, 7), ({"context_mode": "E"}, 7 + 3),
     ({"h_reconstruct": True, "loss_scale": (5, 0, 0, 0.1)}, 7)],
    ids=str,
)  # fmt: skip
def test_identical_modules_share_their_code(options, kinds):
    network = make(torch.float32, layers=32, local_module_num=16, **options)
    network.compile_steps("aot_eager")
    for _ in range(2):
        take_steps(network, *make_batch(torch.float32, count=4), steps=1)
        assert graphs() == kinds


@needs_compiled_checkpoints
def test_evaluation_compiles_nothing():
    compiled, eager = (make(torch.float32, context_mode="R1E") for _ in range(2))
    compiled.compile_steps("eager")
    batches = [make_batch(torch.float32, count) for count in (6, 5)]
    found = [evaluate(network, batches, CPU).losses() for network in (compiled, eager)]
    assert graphs() == 0
    assert_same(*found, 1e-4)


@pytest.mark.parametrize("options", [{"context_mode": "E"}, {"recompute": True}], ids=str)
def test_a_version_that_compiles_no_checkpoints_refuses_them(monkeypatch, options):
    """Its compiled code would move BatchNorm's statistics twice a step."""
    monkeypatch.setattr(network_module, "COMPILES_CHECKPOINTS", False)
    with pytest.raises(InputError, match=r"--compile needs PyTorch .* where layers are recomputed"):
        make(**{"context_mode": "R0"} | options).compile_steps()
    for allowed in ({"context_mode": "E", "context_group": 0}, {"context_mode": "R0"}):
        make(**allowed).compile_steps("eager")


# --amp


class Dtypes(TorchDispatchMode):
    """The dtypes that each operation's result comes out in."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        self.of.setdefault(func.overloadpacket.__name__, set()).add(getattr(first, "dtype", None))
        return result


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize(("amp", "narrow"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_convs_are_narrow_and_losses_are_not(amp, narrow, loss, group):
    network = make(torch.float32, amp=amp, local_loss_mode=loss, context_mode="R1E",
                   context_group=group, **DECODERS)  # fmt: skip
    with Dtypes() as dtypes:
        logits, values = network.local_step(*make_batch(torch.float32))
        evaluate(network, [make_batch(torch.float32)], CPU)
    wide = {torch.float32}
    assert dtypes.of["convolution"] == dtypes.of["addmm"] == {narrow}  # addmm: a linear layer
    for part in ("_log_softmax", "nll_loss_forward", "binary_cross_entropy_with_logits"):
        assert dtypes.of[part] == wide, part
    assert (torch.float32 in dtypes.of["mm"]) == (loss == "contrast")  # similarities
    kept = [logits, *values, *network.parameters(), *(p.grad for p in network.parameters())]
    assert {t.dtype for t in kept} == wide


# The optimizer, and the scaled losses of --amp fp16


def test_a_module_whose_gradients_overflow_skips_its_step():
    """In the module alone: each has a scaler of its own."""
    network = make(torch.float32, amp="fp16")
    optimizers = optimizers_of(network, init_scale=256.0)
    weight = network.local_modules[1].head[-1].weight
    weight.register_hook(lambda gradient: gradient + torch.inf)
    before = [p.detach().clone() for p in network.parameters()]
    take_steps(network, *make_batch(torch.float32), 1, optimizers)
    moved = {(name.split(".")[1], bool((p != b).any()))
             for (name, p), b in zip(network.named_parameters(), before, strict=True)}  # fmt: skip
    assert moved == {("0", True), ("1", False), ("2", True)}
    assert [o.scaler.get_scale() for o in optimizers] == [256, 128, 256]


def test_neither_scaling_nor_a_first_step_that_overflows_changes_a_step():
    """Whatever was in the memory of the momentum. A scale of 2^n rounds nothing in float64."""
    ran = []
    for scaled in (True, False):
        network, batch = make(**DECODERS), make_batch()
        optimizers = optimizers_of(network, init_scale=64.0, enabled=scaled)
        planted = [p.register_hook(lambda gradient: gradient + torch.inf)
                   for p in network.parameters()]  # fmt: skip
        if scaled:
            take_steps(network, *batch, 1, optimizers)
        for hook in planted:
            hook.remove()
        take_steps(network, *batch, 2, optimizers)
        ran.append([p.detach() for p in network.parameters()])
    torch.testing.assert_close(*ran, rtol=0, atol=0)


# What would wait for the device, or mix devices: on fake tensors both raise

FAKES = [
    {"context_mode": "R0", "amp": "off", "context_group": 16, **DECODERS},
    {"context_mode": "R1", "amp": "bf16", "context_group": 16, "recompute": True, **CONTRAST},
    {"context_mode": "R3", "amp": "fp16", "context_group": 0, **CONTRAST, **DECODERS},
    {"context_mode": "E", "amp": "fp16", "context_group": 16, "recompute": True},
    {"context_mode": "R1E", "amp": "off", "context_group": 0, **CONTRAST},
    {"context_mode": "R1E", "amp": "bf16", "context_group": 16, **DECODERS},
]
METHOD_FAKES = [
    {"amp": "off", "local_loss_mode": "cross_entropy"}
    | (DECODERS if "h_reconstruct" in METHODS[name] else {}) | METHODS[name]
    | {"context_mode": "E"} for name in METHODS
]  # fmt: skip


def fake_net(device, **options):
    """A fake network and batch, channels-last; call in FakeTensorMode."""
    with torch.device(device):
        network = build_network(layers=8, local_module_num=4, image_size=8, **options)
        for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            weight = conv.weight.detach().to(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(weight)  # .to() of a module swaps, which fakes refuse
        images = torch.empty(4, 3, 8, 8).to(memory_format=torch.channels_last)
        return network, images, torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("options", FAKES + METHOD_FAKES, ids=str)
def test_a_step_waits_for_nothing(options):
    with FakeTensorMode():
        network, *batch = fake_net("cpu", **options)
        train_step(network, make_optimizers(network), *batch, Totals(network, CPU))


def pretend_cuda(monkeypatch, network):
    """Stand-ins for what fake CUDA tensors cannot do without a GPU.

    Backward: gives gradients of 0 where they belong. Fused SGD: only looks at the devices.
    Autocast and scaler would switch themselves off.
    """
    turns = iter(network.local_modules)

    def backward(loss):
        assert (loss.dim(), loss.dtype) == (0, torch.float32)
        for parameter in (p for p in next(turns).parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)

    def fused_sgd(*lists, grad_scale, found_inf, **_):
        tensors = [*(t for tensors in lists for t in tensors), grad_scale, found_inf]
        assert len({t.device for t in tensors if t is not None}) == 1

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)


@pytest.mark.parametrize(
    "options", [o for o in FAKES + METHOD_FAKES if not o.get("overlap")], ids=str
)  # a window's backward needs more than `pretend_cuda`
def test_a_step_stays_on_the_device(monkeypatch, options):
    """On cuda:1: what goes to the CPU or to the current CUDA device is found."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    with FakeTensorMode(), monkeypatch.context() as patch:
        needs_fake_cuda()
        network, images, targets = fake_net("cuda:1", **options)
        optimizers, totals = make_optimizers(network), Totals(network, images.device)
        pretend_cuda(patch, network)
        train_step(network, optimizers, images, targets, totals)
        features = [h_out for _, h_out in network.features(images)]
        logits = network(images)
        state = [v for o in optimizers for s in o.state.values() for v in s.values()]
        tensors = [logits, *network.state_dict().values(), *state, *features]
        tensors += [t for t in totals.state().values() if isinstance(t, torch.Tensor)]
        assert {str(t.device) for t in tensors} == {"cuda:1"}
        assert logits.dtype == torch.float32
        assert {h.dtype for h in features} == {network.autocast_dtype or torch.float32}
        assert len(state) == sum(p.requires_grad for p in network.parameters())
        scaled = [o.scaler.is_enabled() for o in optimizers]
        assert scaled == [options["amp"] == "fp16"] * 4


# train.py

ON_CPU = [*TINY, "--context_mode", "E"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def train(train_py, monkeypatch):
    """As train_py, with a quick compiler; its switches do not outlast the test."""
    monkeypatch.setattr(ContSupNetwork.compile_steps, "__defaults__", ("aot_eager",))
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield train_py
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def losses_of(folder):
    return torch.tensor([m["local_losses"] for m in metrics_of(folder)])


SWITCHES = ["--data_on_device", "--cudnn_benchmark", "--tf32"]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([*SWITCHES, "--no-channels_last", "--keep_heap=False"], 2e-3), (["--amp", "bf16"], 0.05),
        pytest.param(["--compile"], 2e-3, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_options_for_speed_train_the_same(train, options, tolerance):
    images = (20 + 40) * (3 * 32 * 32 + 8)  # bytes, and an int64 of the class
    for folder, given in (("plain", []), ("run", options)):
        status, _, err = train(*ON_CPU, *given, "--output_dir", folder)
        assert (status, err) == (0, [])
        assert torch.backends.cudnn.benchmark == ("--cudnn_benchmark" in given)
        assert torch.backends.cudnn.allow_tf32 == ("--tf32" in given)
        assert torch.backends.cuda.matmul.allow_tf32 == ("--tf32" in given)
        summary = summary_of(folder)
        assert summary["data_on_device_bytes"] == images * ("--data_on_device" in given)
        assert ("allocator" in summary["peak_memory_how"]) == ("--compile" in given)
    assert_same(losses_of("run"), losses_of("plain"), tolerance)
    assert "bf16" not in options or not torch.equal(losses_of("run"), losses_of("plain"))


@NEEDS_CUDA
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([], 0.02), (["--amp", "fp16"], 0.2),
        pytest.param(["--compile"], 0.02, marks=needs_compiled_checkpoints),
        pytest.param(["--amp", "bf16", "--compile", "--data_on_device"], 0.2,
                     marks=needs_compiled_checkpoints),
    ],
    ids=str,
)  # fmt: skip
def test_run_on_cuda(train, monkeypatch, options, tolerance):
    monkeypatch.setattr(ContSupNetwork.compile_steps, "__defaults__", ("inductor",))
    assert train(*ON_CPU, "--output_dir", "cpu")[0] == 0
    device = f"cuda:{torch.cuda.device_count() - 1}"
    status, out, err = train(*ON_CPU, "--device", device, *options, "--output_dir", "run")
    assert (status, err) == (0, [])
    assert re.fullmatch(r"planned peak .* accuracy \d\.\d+ \(planned / measured\)", out[-1])
    assert_same(losses_of("run"), losses_of("cpu"), tolerance)
    summary = summary_of("run")
    assert "max_memory_allocated" in summary["peak_memory_how"]
    assert 2**20 < summary["peak_memory_bytes"] < 2**30
    assert summary["device"].startswith("cuda")


@NEEDS_CUDA
def test_images_on_the_gpu_are_not_in_the_peak(train):
    """All digits are 5 MB of images: with them or without, a step peaks at the same."""
    peaks = []
    for on_device in ("True", "False"):
        method = [*ON_CPU, "--device", "cuda", "--limit_per_class", "1000", "--epochs", "1"]
        assert train(*method, "--data_on_device", on_device, "--output_dir", on_device)[0] == 0
        peaks.append(summary_of(on_device)["peak_memory_bytes"])
    assert summary_of("True")["data_on_device_bytes"] > 4e6
    assert abs(peaks[0] - peaks[1]) < 2e6
