"""Each entry of `configs.METHODS`, without and with the image as context; new entries too."""

import copy
import json
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli import end_of, interrupt_after
from torch import nn

import losses
from configs import METHODS, InputError
from engine.memory import LiveBytes
from engine.options import INVOCATION_OPTIONS, NETWORK_OPTIONS, complete_options
from engine.step import Totals, make_optimizers, tensors_alive, train_step
from models import build_network
from models.auxiliary import PredSim
from planning.partition import fewest_modules
from planning.plan import planned_peak
from report.results import KIND_OPTIONS

CPU = torch.device("cpu")
SIZE, CUTS = 16, [(1, 0), (1, 1), (2, 1)]
MEAN = torch.tensor([125.3, 123.0, 113.9], dtype=torch.float64)[:, None, None] / 255
DEVIATION = torch.tensor([63.0, 62.1, 66.7], dtype=torch.float64)[:, None, None] / 255
each = pytest.mark.parametrize(("method", "mode"), [*product(METHODS, ("R0", "E"))])
with_E = pytest.mark.parametrize(("method", "mode"), [
    pytest.param(method, mode, marks=[pytest.mark.slow] if mode == "R0" else [])
    for method, mode in product(METHODS, ("R0", "E"))
])  # fmt: skip
"""Those with E are fast."""


def arguments(method, mode, **more):
    """Those of a tiny net: the method's, and what it leaves to tables of large nets."""
    chosen = {"local_loss_mode": "contrast"} | METHODS[method] | {"context_mode": mode}
    if chosen.get("h_reconstruct"):
        chosen.setdefault("loss_scale", (5, 0.5, 0.5, 1))
    if chosen.get("aux_net_config") == "auglocal":
        chosen["aux_net_depth"] = 2
    tiny = {"layers": 14, "local_module_num": 4, "cuts": CUTS, "image_size": SIZE}
    return tiny | chosen | more


def build(method, mode, **more):
    torch.manual_seed(0)
    return build_network(**arguments(method, mode, **more))


def batch(count=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return images.to(dtype), torch.randint(0, 10, (count,), generator=generator)


# ---------------------------------------------------------------------------------------------
# The slow plain version of a step


class Plain:
    """Losses by the methods' text, one after the other; gradients add to `.grad`."""

    def __init__(self, network, options, images, targets):
        self.modules, self.options = network.local_modules, options
        self.images, self.targets = images, targets
        self.pixels = (images * DEVIATION + MEAN).clamp(0, 1)
        self.q = torch.full((len(images), 10), 0.1, dtype=torch.float64)

    def forward(self, i, h):
        """Module i with its context, nothing detached."""
        module = self.modules[i]
        if i and self.options["context_mode"] == "E":
            context = nn.Sequential(*module.context["image"])(self.images)
            h = h + F.adaptive_avg_pool2d(context, h.shape[-1])
        runs_stem_apart = i == 0 and self.options.get("overlap")
        return module.units[1:](h) if runs_stem_apart else module.units(h)

    def looked_ahead(self, i, h):
        """What head and decoder of module i see."""
        momentum = self.modules[i].momentum
        if momentum is None:
            return h
        s = 1 if momentum.scale is None else momentum.scale
        return s * momentum.local(h) + (2 - s) * momentum.average(h)

    def task_loss(self, i, head, y):
        if isinstance(head, PredSim):
            pool, flatten, linear, conv = head
            prediction = F.cross_entropy(linear(flatten(pool(y))), self.targets)
            spread, labels = conv(y).flatten(2).std(2), F.one_hot(self.targets, 10).double()
            rows = [x - x.mean(1, keepdim=True) for x in (spread, labels)]
            rows = [x / (1e-8 + x.norm(dim=1, keepdim=True)) for x in rows]
            similarity = (rows[0] @ rows[0].T - rows[1] @ rows[1].T).square().mean()
            return 0.01 * prediction + 0.99 * similarity
        output, alpha = nn.Sequential(*head)(y), self.options.get("consistency")
        if alpha is not None:
            q, self.q = self.q, output.detach().softmax(1)
            mixed = alpha * F.one_hot(self.targets, 10) + (1 - alpha) * q
            entropy = -(q * q.log()).sum(1).mean()
            return -(mixed * output.log_softmax(1)).sum(1).mean() - (1 - alpha) * entropy
        contrast = self.options["local_loss_mode"] == "contrast" and i + 1 < len(self.modules)
        loss = losses.supervised_contrastive if contrast else F.cross_entropy
        return loss(output, self.targets)

    def decoded_loss(self, decoder, y, pixels):
        large = F.interpolate(y, pixels.shape[-2:], mode="bilinear", align_corners=True)
        return F.binary_cross_entropy(nn.Sequential(*decoder)(large).sigmoid(), pixels)

    def local_loss(self, i, h):
        module, y = self.modules[i], self.looked_ahead(i, h)
        task, decoder = self.task_loss(i, module.head, y), module.decoder
        if decoder is None:
            return task
        if self.options.get("patch_decoder"):
            parts = zip(decoder, self.quarters(y), self.quarters(self.pixels), strict=True)
            reconstruction = sum(self.decoded_loss(*part) for part in parts)
        else:
            reconstruction = self.decoded_loss(decoder, y, self.pixels)
        by_stage = self.options.get("loss_scale_rule") == "stage"
        place = self.modules[i + 1].unit_names[0][0] if by_stage else i
        r, scale = min(1, place / (len(self.modules) - 2)), self.options["loss_scale"]
        lx, ly = ((1 - r) * scale[k] + r * scale[k + 2] for k in (0, 1))
        return lx * reconstruction + ly * task

    @staticmethod
    def quarters(x):
        half = x.shape[-1] // 2
        return [x[:, :, a : a + half, b : b + half] for a in (0, half) for b in (0, half)]

    def step(self):
        """Each module on its own loss, from detached features."""
        found, h = [], self.images
        for i in range(len(self.modules)):
            h = self.forward(i, h.detach())
            found.append(self.local_loss(i, h))
            found[-1].backward()
        return found

    def update_averages(self):
        """As the text says, with the weights before the optimizer's step."""
        m = self.options.get("momentum_aux")
        for i, module in enumerate(self.modules):
            if module.momentum is not None:
                following = self.modules[i + 1].units[0].state_dict()
                for name, own in module.momentum.average.named_parameters():
                    own.copy_(m * own + (1 - m) * following[name])

    def step_of_windows(self):
        """Each module in three passes: its own, and one in each window of two."""
        weight, found = self.options.get("overlap_weight", 0.999), []
        v = self.modules[0].units[0](self.images)  # the stem runs once
        x = self.forward(0, v).detach()
        for i, module in enumerate(self.modules[1:], 1):
            x = self.forward(i, x)
            u = self.forward(i - 1, v)
            z = self.forward(i, u)
            own_head = module.head if i + 1 == len(self.modules) else module.own_head
            own = self.task_loss(i, own_head, x)
            found.append((1 - weight) * own + weight * self.local_loss(i, z))
            found[-1].backward()
            x, v = x.detach(), u.detach()
        return found


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / (1 + value.abs().max())
        assert error < tolerance, (name, error)


def gradients(network):
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@each
def test_gradients_are_those_of_plain_autograd(method, mode):
    network, (images, targets) = build(method, mode).double(), batch()
    plain_network, options = copy.deepcopy(network), arguments(method, mode)
    for norm in (x for x in plain_network.modules() if isinstance(x, nn.BatchNorm2d)):
        norm.momentum = 0.1
    plain = Plain(plain_network, options, images, targets)
    expected = plain.step_of_windows() if options.get("overlap") else plain.step()
    _, found = network.local_step(images, targets)
    torch.testing.assert_close(found, [x.detach() for x in expected], rtol=1e-10, atol=1e-10)
    close(gradients(network), gradients(plain_network), 1e-10)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert gradients(network).keys() == trained
    assert all(("momentum.average" in n) != (n in trained) for n, _ in network.named_parameters())
    with torch.no_grad():
        plain.update_averages()
    close(dict(network.named_parameters()), dict(plain_network.named_parameters()), 1e-12)
    close(statistics(network), statistics(plain_network), 1e-10)


def statistics(network):
    """Running means and variances; encoders of contexts see a batch once, in windows too."""
    buffers = network.named_buffers()
    return {n: b for n, b in buffers if "running" in n and "context" not in n}


@with_E
def test_recomputed_units_give_the_same_gradients(method, mode):
    results = []
    for recompute in (False, True):
        network = build(method, mode, recompute=recompute).double()
        network.local_step(*batch())
        results.append(gradients(network) | dict(network.named_buffers()))
    close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_loss_scales_change_no_gradient(method):
    """Each module has one of its own, as in float16."""
    network, plain = (build(method, "E").double() for _ in range(2))
    images, targets = batch()
    plain.local_step(images, targets)
    state, pixels = network.begin(images)
    for module in network.stage:
        network.module_step(module, state, targets, pixels, lambda x, m=module: x * 2**m.index)
        for finished in state.pop_finished():
            for parameter in (p for p in finished.parameters() if p.grad is not None):
                parameter.grad /= 2**finished.index
    close(gradients(network), gradients(plain), 1e-12)


@with_E
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_real_step_takes_what_was_planned(method, mode, recompute):
    chosen, count = arguments(method, mode, recompute=recompute), 32
    network, (images, targets) = build_network(**chosen), batch(count, torch.float32)
    optimizers, totals = make_optimizers(network), Totals(network, CPU)
    with LiveBytes(tensors_alive(network, optimizers, images, targets)) as meter:
        train_step(network, optimizers, images, targets, totals)
    assert planned_peak(chosen, count) == pytest.approx(meter.peak, rel=0.01)


@with_E
def test_steps_in_bfloat16_are_finite(method, mode):
    network, (images, targets) = build(method, mode, amp="bf16"), batch(dtype=torch.float32)
    optimizers, totals = make_optimizers(network), Totals(network, CPU)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        train_step(network, optimizers, images, targets, totals)
    assert totals.first_not_finite() is None
    assert all(p.isfinite().all() for p in network.parameters())


# ---------------------------------------------------------------------------------------------
# The command line


BASE = [
    "--dataset", "digits", "--limit_per_class", "2", "--layers", "8", "--local_module_num", "3",
    "--batch_size", "8", "--epochs", "2", "--seed", "5", "--device", "cpu",
]  # fmt: skip


def words(method):
    """--method, and loss scales where it has decoders without them."""
    preset = METHODS[method]
    more = ["--loss_scale", "5", "0.5", "0.5", "1"]
    own = preset.get("h_reconstruct") and "loss_scale" not in preset
    return [*BASE, "--method", method, *(more if own else [])]


@pytest.mark.parametrize(
    "method",
    [m if m in ("man", "hpff") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(train_py, method):
    assert train_py(*words(method), "--output_dir", "whole")[0] == 0
    with interrupt_after(1):
        assert train_py(*words(method), "--output_dir", "parts")[0] == 130
    assert train_py("--resume", "parts/checkpoint.pt")[0] == 0
    assert end_of("parts") == end_of("whole")


def config_of(train_py, *typed):
    assert train_py(*BASE, "--epochs", "1", *typed, "--output_dir", "run")[0] == 0
    return json.loads(Path("run/config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_config_json_has_the_options_of_a_method(train_py, method):
    config = config_of(train_py, *words(method))
    assert {name: config[name] for name in METHODS[method]} == METHODS[method]
    assert "method" not in config


TYPED = [
    ("man --h_reconstruct False",
     {"h_reconstruct": False, "loss_scale": None, "loss_scale_rule": "module",
      "momentum_aux": 0.995, "aux_net_config": "2c2f"}),
    ("dgl --aux_net_config 1c2f", {"aux_net_config": "1c2f", "local_loss_mode": "cross_entropy"}),
    ("auglocal --aux_net_config 1c2f", {"aux_net_depth": None, "aux_net_taper": None}),
    ("auglocal --aux_net_depth 2", {"aux_net_depth": 2, "aux_net_config": "auglocal"}),
    ("hpff --overlap 0", {"overlap": 0, "overlap_weight": None, "patch_decoder": True}),
    ("hpff --overlap_weight 0.5", {"overlap": 1, "overlap_weight": 0.5}),
    ("man --ixx_1 1 --ixy_1 2 --ixx_2 3 --ixy_2 4", {"loss_scale": [1, 2, 3, 4]}),
    ("manpp --momentum_aux 0.9", {"momentum_aux": 0.9, "momentum_aux_mix": "learned"}),
    ("sid --consistency 0.8 --context_mode E", {"consistency": 0.8, "context_mode": "E"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), TYPED)
@pytest.mark.parametrize("last", [False, True], ids=["method first", "method last"])
def test_typed_options_win(train_py, line, expected, last):
    method, *typed = line.split()
    typed = [*typed, "--method", method] if last else ["--method", method, *typed]
    config = config_of(train_py, *typed)
    assert {name: config[name] for name in expected} == expected


REFUSED = {
    "--method other": "invalid choice: 'other'",
    "--method auglocal --local_module_num 1": "local_module_num 2 or more",
    "--momentum_aux 0.9 --local_module_num 1": "momentum_aux",
    "--overlap 1 --local_module_num 1": "overlap",
    "--method sid --local_module_num 1": "consistency",
    "--method sid --local_loss_mode contrast": "consistency is for heads that classify",
    "--method predsim --local_loss_mode contrast": "predsim",
    "--method predsim --consistency 0.5": "predsim",
    "--method hpff --parallel modules --dry_run": "--overlap needs",
    "--method hpff --train_modules 1": "train_modules and overlap",
    "--method hpff --consistency 0.5": "consistency and overlap",
    "--method hpff --momentum_aux 0.5": "momentum_aux and overlap",
    "--method auglocal --momentum_aux 0.5": "momentum_aux and aux_net_config auglocal",
    "--aux_net_depth 2": "--aux_net_depth is for --aux_net_config auglocal",
    "--aux_net_taper 0": "--aux_net_taper is for --aux_net_config auglocal",
    "--overlap_weight 0": "--overlap_weight is for --overlap 1",
    "--patch_decoder": "needs h_reconstruct",
    "--loss_scale_rule stage": "needs h_reconstruct",
    "--momentum_aux 1.5": "'1.5' is not a number from 0 to 1",
    "--momentum_aux_mix fixed": "--momentum_aux_mix is for --momentum_aux",
    "--aux_net_config 3d4f": "unknown aux_net_config '3d4f'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_combinations_are_refused(refused, line):
    assert REFUSED[line] in refused(*BASE, *line.split())


def test_a_method_replaces_that_of_a_checkpoint():
    """Options of the other method that it does not set are dropped, and typed ones stay."""
    of_sid = vars(complete_options([*BASE, "--method", "sid"]))
    kept = {k: v for k, v in of_sid.items() if k not in INVOCATION_OPTIONS}
    for more, expected in (([], None), (["--consistency", "0.9"], 0.9)):
        options = complete_options(["--resume", "x", "--method", "dgl", *more], kept)
        assert (options.aux_net_config, options.consistency) == ("mlp-sr", expected)
        assert (options.layers, options.seed, options.context_mode) == (8, 5, "R0")
    assert complete_options(["--resume", "x"], kept).consistency == 0.5


def test_a_run_without_the_options_of_methods_is_known_as_it_was(train_py):
    """Of an earlier version."""
    run = [*BASE, "--output_dir", "run", "--resume", "auto"]
    assert train_py(*run)[0] == 0
    config = json.loads(Path("run/config.json").read_text())
    for option in set(KIND_OPTIONS) - {"aux_net_config", "loss_scale"}:
        del config[option]
    Path("run/config.json").write_text(json.dumps(config))
    status, out, err = train_py(*run)
    assert (status, out, err) == (0, ["run is finished after 2 epochs"], [])


def test_a_module_that_trains_on_nothing_is_named(train_py):
    base = [*BASE, "--epochs", "1", "--output_dir"]
    for method, idle in (("man", 1), ("hpff", 0)):
        note = f"train.py: note: module {idle} trains on nothing"
        status, _, err = train_py(*base, method, "--method", method)
        assert (status, len(err), err[0].startswith(note)) == (0, 1, True)
    assert train_py(*base, "more", *words("man"), "--loss_scale", "5", "1", "1", "1")[2] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auglocal", "hpff"])
def test_a_budget_is_kept_by_the_fewest_modules_that_keep_it(method):
    """The depth of AugLocal's heads depends on the number of modules, windows have two modules."""
    options = complete_options(["--method", method, "--layers", "14"])
    given = {name: getattr(options, name) for name in NETWORK_OPTIONS} | {"num_classes": 10}
    peaks = {K: planned_peak(given | {"local_module_num": K}, 64) for K in range(2, 8)}
    for budget in (max(peaks.values()), peaks[4], min(peaks.values())):
        found = fewest_modules(given, 64, "equal", budget)
        K = next(K for K, peak in peaks.items() if peak <= budget)
        assert (len(found.cuts) + 1, found.peak) == (K, peaks[K])
    with pytest.raises(InputError, match="the smallest peak found is"):
        fewest_modules(given, 64, "equal", min(peaks.values()) - 1)
