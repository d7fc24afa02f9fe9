"""The finder of NaN and Inf against ones planted at known places."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from engine import anomaly
from engine.anomaly import Anomaly, FirstAnomaly
from engine.memory import LiveBytes
from engine.step import Totals, evaluate, make_optimizers, train_step
from models import build_network

BIG = 3e38  # float32 goes to 3.4e38


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """Each `empty` holds NaN, so that what is not written yet would give a false alarm."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """A small network in training, and a batch."""

    def __init__(self, lr=0.1, **options):
        torch.manual_seed(0)
        defaults = {"layers": 14, "local_module_num": 4, "image_size": 12, "context_mode": "R1E"}
        self.network = build_network(**(defaults | options))
        self.modules = self.network.local_modules
        self.optimizers = make_optimizers(self.network)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
        self.images, self.targets = torch.randn(6, 3, 12, 12), torch.randint(0, 10, (6,))
        self.device = self.images.device

    def step(self):
        self.network.train()
        totals = Totals(self.network, self.device)
        batch = self.images, self.targets
        list(train_step(self.network, self.optimizers, *batch, totals))
        return totals

    def evaluate(self):
        return evaluate(self.network, [(self.images, self.targets)], self.device)

    def found(self, what="step", **options):
        with pytest.raises(Anomaly) as caught, FirstAnomaly(self.network, **options):
            getattr(self, what)()
        assert "\n" not in str(caught.value)
        assert hooks_and_mode_are_off()
        return caught.value


def hooks_and_mode_are_off():
    hooks = module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks
    return not any(hooks) and _get_current_dispatch_mode() is None


def fill(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


class Op(nn.Module):
    """A unit that runs an operation on what enters it."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


# ---------------------------------------------------------------------------------------------
# No false alarm, and no change


@pytest.mark.parametrize(
    "options",
    [
        {"context_mode": "R0"},
        {"context_mode": "E"},
        {"context_mode": "R2", "context_group": 0},
        {},
        {"context_group": 5},
        {"local_loss_mode": "contrast", "recompute": True},
        {"h_reconstruct": True, "loss_scale": (1, 1, 1, 1), "droprate": 0.2},
        {"amp": "bf16"},
        {"amp": "bf16", "context_group": 0, "h_reconstruct": True, "loss_scale": (1, 1, 1, 1),
         "recompute": True},
    ],
    ids=str,
)  # fmt: skip
def test_healthy_training_is_not_disturbed(options):
    plain, watched = Run(**options), Run(**options)
    torch.manual_seed(1)
    for _ in range(2):
        plain.step()
    expected = plain.evaluate()
    torch.manual_seed(1)
    with FirstAnomaly(watched.network):
        for _ in range(2):
            watched.step()
        got = watched.evaluate()
    assert hooks_and_mode_are_off()
    assert got.losses() == expected.losses()
    same_state(plain, watched)


def same_state(a, b):
    for x, y in zip(a.network.state_dict().values(), b.network.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(momentum(a), momentum(b), strict=True):
        assert torch.equal(x, y)


def momentum(run):
    return [s["momentum_buffer"] for o in run.optimizers for s in o.state.values()]


def overflowing():
    """A run whose scaled gradients overflow in float16."""
    run = Run(amp="fp16")
    for optimizer in run.optimizers:
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    return run


def test_scaled_gradients_that_overflow_in_float16_can_be_passed_over():
    plain, watched = overflowing(), overflowing()
    plain.step()
    with FirstAnomaly(watched.network, backward=False):
        watched.step()
    assert {o.scaler.get_scale() for o in watched.optimizers} == {2.0**99}  # they did overflow
    same_state(plain, watched)
    error = overflowing().found()
    assert (error.phase, error.tensor.dtype) == ("backward", torch.float16)


def test_the_forward_is_watched_though_the_backward_is_not():
    run = Run(amp="fp16")
    fill(run.modules[1].units[0].conv1.weight, 60000)
    error = run.found(backward=False)
    assert (error.operation, error.phase) == ("aten.convolution", "forward")
    assert error.tensor.dtype == torch.float16


def test_memory_is_counted_the_same_in_either_order():
    def peak(outside, inside):
        run = Run(recompute=True)
        meter = LiveBytes([*run.network.parameters(), *run.network.buffers(), *momentum(run)])
        finder = FirstAnomaly(run.network)
        with finder if outside else nullcontext(), meter, finder if inside else nullcontext():
            run.step()
        return meter.peak, meter.live

    assert peak(False, False) == peak(True, False) == peak(False, True)


# ---------------------------------------------------------------------------------------------
# Planted in the forward


def test_conv_that_overflows():
    run = Run()
    fill(run.modules[1].units[0].conv1.weight[3], BIG)
    error = run.found()
    assert (error.operation, error.made) == ("aten.convolution", True)
    assert (error.phase, error.node) == ("forward", "")
    assert error.module == "local_modules.1.units.0.conv1"
    assert error.place.startswith("models/resnet.py:")
    assert error.place.endswith(" (forward)")
    assert error.tensor.shape == (6, 16, 12, 12)
    assert 0 < error.tensor.nans + error.tensor.infs <= 6 * 12 * 12  # of one channel
    assert str(error) == (
        f"aten.convolution makes (6, 16, 12, 12) float32 with {error.tensor.nans} NaN and "
        f"{error.tensor.infs} Inf of 13824 values of finite inputs, "
        f"in the forward of local_modules.1.units.0.conv1, at {error.place}"
    )


def test_numbers_of_nan_and_inf_are_counted():
    def plant(x):
        factors = torch.ones(x.shape)
        factors.view(-1)[:5] = -1
        return ((x * 0 + 1) * factors).view(-1).log().view_as(x)

    run = Run()
    run.modules[2].units.append(Op(plant))
    error = run.found()
    assert error.operation == "aten.log"
    assert (error.tensor.nans, error.tensor.infs) == (5, 0)
    assert error.module == f"local_modules.2.units.{len(run.modules[2].units) - 1}"
    assert error.place.startswith("tests/test_anomaly.py:")
    assert error.place.endswith("(plant)")


def test_head_that_overflows_in_training_and_in_evaluation():
    for what in ("step", "evaluate"):
        run = Run()
        fill(run.modules[0].head[-1].weight, BIG)
        error = run.found(what)
        assert (error.operation, error.phase) == ("aten.addmm", "forward")
        assert error.module == f"local_modules.0.head.{len(run.modules[0].head) - 1}"


def test_encoder_in_groups_is_looked_into():
    run = Run()
    fill(run.modules[2].context["image"][4].weight, BIG)
    error = run.found()
    assert error.module == "local_modules.2.context.image"
    assert error.operation == "aten.mul"
    assert error.place.startswith("models/norm_relu.py:")


def test_encoder_in_one_piece():
    run = Run(context_group=0)
    fill(run.modules[2].context["image"][3].weight, BIG)
    error = run.found()
    assert (error.module, error.operation) == (
        "local_modules.2.context.image.3",
        "aten.convolution",
    )


def test_batch_norm_whose_running_variance_overflows():
    """Its output is finite; schema and result say nothing of the statistics."""
    run = Run()
    with torch.no_grad():
        run.modules[2].units[0].conv1.weight.mul_(1e20)
    error = run.found()
    assert (error.operation, error.made) == ("aten.native_batch_norm", True)
    assert error.tensor.name == "local_modules.2.units.0.bn1.running_var"
    assert error.module == "local_modules.2.units.0.bn1"


def test_loss_is_outside_of_any_module():
    run = Run(local_loss_mode="contrast")
    plain = run.modules[1].task.function
    run.modules[1].task = run.modules[1].task._replace(
        function=lambda output, targets: plain(output, targets) / torch.zeros(())
    )
    error = run.found()
    assert (error.operation, error.phase) == ("aten.div", "forward")
    assert error.module == "after local_modules.1.head"
    assert "in the forward, after local_modules.1.head, at tests/" in str(error)


# ---------------------------------------------------------------------------------------------
# Planted in the backward and in the optimizer


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_alone(recompute):
    run = Run(recompute=recompute)
    zero_at_sqrt = Op(lambda x: x + (x * 0).sqrt())
    units = list(run.modules[2].units)
    run.modules[2].units = nn.Sequential(units[0], zero_at_sqrt, *units[1:])
    error = run.found()
    assert (error.phase, error.node) == ("backward", "SqrtBackward0")
    assert (error.operation, error.made) == ("aten.div", True)
    assert error.module == "local_modules.2.units.1"
    assert error.place.startswith("models/network.py:")
    assert error.place.endswith("(local_steps)")


def test_backward_after_units_that_ran_again():
    """Recomputing leaves a module by an exception as soon as it has what it needs."""
    run = Run(recompute=True, local_module_num=2, context_group=0)
    assert len(run.modules[1].units) > 2
    run.modules[1].context["image"].append(Op(lambda x: x + (x * 0).sqrt()))
    assert run.found().module == "local_modules.1.context.image.6"


def test_backward_is_of_the_module_that_made_the_node():
    """Not of one that ran next, and made none."""
    run = Run()
    ops = Op(lambda x: (x * 0).sqrt()), Op(lambda x: (x.detach().exp(), x)[1])
    run.modules[2].units = nn.Sequential(*ops, *run.modules[2].units)
    assert run.found().module == "local_modules.2.units.0"


def test_gradient_that_overflows_as_it_is_added_up():
    network = nn.Linear(1, 1, bias=False)
    fill(network.weight, 1)
    with pytest.raises(Anomaly, match="of finite inputs") as caught, FirstAnomaly(network):
        for _ in range(2):
            network(torch.full((1, 1), BIG)).sum().backward()
    error = caught.value
    assert (error.node, error.operation) == ("AccumulateGrad", "aten.add_")
    assert error.tensor.name == "gradient of weight"


def test_backward_of_the_loss():
    run = Run()
    plain = run.modules[1].task.function
    run.modules[1].task = run.modules[1].task._replace(
        function=lambda output, targets: plain(output, targets) + (output * 0).sqrt().sum()
    )
    error = run.found()
    assert (error.node, error.module) == ("SqrtBackward0", "after local_modules.1.head")


def test_forward_that_runs_again_in_the_backward():
    """It goes wrong the second time only."""
    run = Run(recompute=True)
    times = []

    def plant(x):
        times.append(None)
        return x.exp() / (0.0 if len(times) == 2 else 1.0)

    units = list(run.modules[2].units)
    run.modules[2].units = nn.Sequential(nn.Sequential(Op(plant), units[0]), *units[1:])
    error = run.found()
    assert (error.phase, error.operation) == ("backward", "aten.div")
    assert error.module == "local_modules.2.units.0.0"
    assert error.place.endswith("(plant)")


def test_backward_of_an_encoder_in_groups():
    run = Run()
    gradient = Op(lambda x: x * 1)
    gradient.register_full_backward_hook(lambda m, of_x, of_out: (of_out[0] * 0 + 1e38,))
    run.modules[2].units = nn.Sequential(gradient, *run.modules[2].units)
    error = run.found()
    assert (error.phase, error.node) == ("backward", "_EncodeBackward")
    assert error.module == "local_modules.2.context.recent_0"  # added last, so first in turn
    assert error.place.startswith(("models/norm_relu.py:", "models/grouped.py:"))


@pytest.mark.parametrize("options", [{}, {"amp": "fp16", "backward": False}], ids=str)
def test_optimizer_that_overflows(options):
    run = Run(lr=1e39, amp=options.get("amp", "off"))
    error = run.found(backward=options.get("backward", True))
    assert (error.operation, error.phase) == ("aten._fused_sgd_", "optimizer step")
    assert error.tensor.name == "local_modules.0.units.0.conv1.weight"
    assert error.tensor.shape == (16, 3, 3, 3)
    assert error.module == "after local_modules.0.head"
    assert error.place.endswith("(step_and_free)")


def test_gradients_passed_over_in_the_backward_reach_the_optimizer():
    run = Run()
    run.modules[1].units.insert(0, Op(lambda x: x + (x * 0).sqrt()))
    error = run.found(backward=False)
    assert (error.phase, error.made) == ("optimizer step", False)
    assert error.tensor.name.startswith("gradient of local_modules.1.context.")


# ---------------------------------------------------------------------------------------------
# What is not finite from the start


@pytest.mark.parametrize("backward", [True, False])
def test_image_with_nan(backward):
    run = Run(context_mode="R0")
    run.images[0, 0, 0, 0], run.images[0, 0, 0, 1] = torch.nan, torch.inf
    error = run.found(backward=backward)
    assert (error.operation, error.made) == ("aten.convolution", False)
    assert error.module == "local_modules.0.units.0.conv1"
    assert error.tensor == ("input", (6, 3, 12, 12), torch.float32, 1, 1)
    assert "its input is not finite already, input (6, 3, 12, 12) float32 with 1 NaN" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "local_modules.1.units.0.conv1.weight",
        "local_modules.1.units.0.bn1.running_mean",
        "local_modules.1.head.7.bias",
    ],
)
def test_weights_with_nan_are_named(name):
    run = Run()
    run.network.state_dict()[name].view(-1)[0] = torch.nan
    error = run.found()
    assert not error.made
    assert (error.tensor.name, error.tensor.nans) == (name, 1)
    assert error.module == name.rpartition(".")[0]


def test_momentum_with_inf_reaches_the_optimizer():
    run = Run()
    momentum(run)[0][0] = torch.inf
    error = run.found()
    assert (error.phase, error.made) == ("optimizer step", False)
    assert error.tensor.name == "momentum_buffer_list"
    assert error.module == "after local_modules.0.head"


# ---------------------------------------------------------------------------------------------
# Single operations


def raised(run):
    """What is raised where `run` is called alone."""
    with FirstAnomaly(nn.Identity()):
        try:
            run()
        except Anomaly as error:
            return error
    return None


def test_in_place_operations_are_judged_by_what_they_were_given():
    x = torch.tensor([1e30, 1.0])
    error = raised(lambda: x.mul_(x))
    assert (error.operation, error.made) == ("aten.mul_", True)
    assert not raised(lambda: x.mul_(2)).made


def test_what_is_written_all_over_is_no_input():
    error = raised(lambda: torch.empty(2, dtype=torch.float16).copy_(torch.tensor([1e5, 1.0])))
    assert (error.operation, error.made) == ("aten.copy_", True)
    assert error.tensor == ("self", (2,), torch.float16, 0, 1)
    assert not raised(lambda: torch.empty(2).copy_(torch.tensor([torch.nan, 1.0]))).made
    error = raised(lambda: torch.exp(torch.tensor([1e3]), out=torch.empty(1)))
    assert (error.operation, error.made) == ("aten.exp", True)


def test_half_written_memory_is_no_anomaly():
    def halves():
        whole = torch.empty(4, 2)
        whole[:2] = 1
        whole.t()[:, :2].detach().add_(1)
        torch.empty_like(whole).bernoulli_(0.5)
        torch.empty(2).normal_()
        return torch.zeros_like(whole)

    assert raised(halves) is None
    error = raised(lambda: torch.empty(2) + 1)
    assert not error.made


def test_lists_of_tensors():
    xs = [torch.tensor([1.0]), torch.tensor([1e30])]
    error = raised(lambda: torch._foreach_mul_(xs, 1e30))
    assert (error.operation, error.made) == ("aten._foreach_mul_", True)
    xs = [torch.tensor([1.0]), torch.tensor([1e30])]
    assert raised(lambda: torch._foreach_mul(xs, 1e30)).made


def test_infinite_constants_are_meant():
    mask = torch.tensor([True, False])
    assert raised(lambda: torch.ones(2).masked_fill(mask, -torch.inf)) is None
    assert raised(lambda: torch.full((2,), torch.inf)) is None
    assert raised(lambda: torch.ones(2).isfinite().all().item()) is None
    assert not raised(lambda: torch.full((2,), torch.nan).masked_fill(mask, -torch.inf)).made
    error = raised(lambda: torch.ones(2).masked_fill(mask, -torch.inf).exp().log())
    assert (error.operation, error.made) == ("aten.log", True)  # exp took it, and is finite


def test_no_numbers_and_other_numbers():
    assert raised(lambda: torch.zeros(0).exp().sum() + torch.arange(3).sum()) is None
    assert raised(lambda: torch.ones(2, dtype=torch.complex64) * 2) is None


def test_memory_that_a_tensor_is_given():
    assert raised(lambda: torch.zeros(1).resize_(9)) is None
    assert raised(lambda: torch.zeros(1).set_(torch.empty(9))) is None


def test_module_outside_of_the_network_counts_as_the_one_that_calls_it():
    run = Run()
    run.modules[2].units.append(Op(lambda x: Op(torch.log)(x * 0 - 1)))
    assert run.found().module == f"local_modules.2.units.{len(run.modules[2].units) - 1}"


def test_may_be_entered_inside_of_a_module():
    finder = FirstAnomaly(nn.Identity())
    other = register_module_forward_pre_hook(lambda module, args: None)
    Op(lambda x: (finder.__enter__(), x)[1])(torch.ones(1))
    finder.__exit__(None, None, None)
    other.remove()
    assert hooks_and_mode_are_off()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_finds_one_value_in_any_layout(dtype, value):
    for make in (torch.Tensor.contiguous, lambda x: x.permute(3, 0, 2, 1)[:, 1:]):
        x = make(torch.ones(3, 4, 5, 6, dtype=dtype))
        x[-1, -1, -1, -1] = value
        error = raised(lambda x=x: x * 1)
        assert (error.tensor.nans, error.tensor.infs) == ((1, 0) if value != value else (0, 1))
        assert error.tensor.dtype == dtype


def test_place_is_where_the_backward_of_another_thread_was_called():
    """On CUDA a backward has a thread of its own, whose stack does not begin in this repository."""
    finder = FirstAnomaly(nn.Identity())
    with finder, ThreadPoolExecutor(1) as pool:
        place = pool.submit(anomaly._place, finder._frames()).result()
    assert place.startswith("tests/test_anomaly.py:")
    assert place.endswith("(test_place_is_where_the_backward_of_another_thread_was_called)")


def test_may_be_entered_again_after_an_exception():
    run = Run()
    finder = FirstAnomaly(run.network)
    with pytest.raises(KeyboardInterrupt), finder:
        handle = run.modules[1].units[0].register_forward_hook(interrupt)
        run.step()
    handle.remove()
    assert hooks_and_mode_are_off()
    run.modules[0].task = run.modules[0].task._replace(function=lambda x, _: x.sum() / 0)
    with pytest.raises(Anomaly, match=r"forward, after local_modules\.0\.head, at "), finder:
        run.step()
    assert hooks_and_mode_are_off()


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_is_remembered_of_nodes_does_not_grow_with_the_steps(monkeypatch):
    monkeypatch.setattr(anomaly, "NODES", 50)
    x = torch.ones(2, requires_grad=True)
    with anomaly.FirstAnomaly(torch.nn.Identity()) as watch:
        for _ in range(500):
            x = x * 1
        assert 50 <= len(watch._module_of_node) <= 101
