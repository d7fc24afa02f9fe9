"""Methods of siblings against numbers of their authors' releases (tests/golden/siblings).

The files ask for 1e-8, of small numbers absolute, of large ones relative.
"""

import json
import re
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden.siblings import golden_fill as fill
from torch import nn

import losses
import models
from configs import METHODS, loss_weights, unit_names
from engine.step import LocalSGD, Totals, evaluate, make_optimizers, train_step
from models import LocalModule
from models.auxiliary import PatchDecoder, PredSim, build_head, later_blocks_depth
from models.momentum import MomentumBlock
from models.resnet import BasicBlock

GOLDEN = Path(fill.__file__).parent
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
CPU = torch.device("cpu")
UNIFORM = torch.full((6, 10), 0.1, dtype=torch.float64)
INPUTS = {
    "case", "method", "config", "input", "labels", "parameters", "frozen", "sgd", "target",
    "bn_updates_in_one_step",  # which the running statistics show
}  # fmt: skip
"""Keys of a file that are no results."""


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def error(found, expected):
    """The largest error in a nest of numbers: of small ones absolute, of large ones relative."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(error(found[key], expected[key]) for key in expected)
    if isinstance(expected, list) and isinstance(expected[0], dict):
        return max(error(*pair) for pair in zip(found, expected, strict=True))
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


def values_of(case):
    return {role: torch.as_tensor(value) for role, value in fill.tensors(case).items()}


def load(module, values, *parts):
    """Fill a module in the order of its state, without running statistics, from parts of a case."""
    state = module.double().state_dict()
    names = [n for n in state if "running_" not in n and "num_batches" not in n]
    values = [v for part in parts or [""] for role, v in values.items() if role.startswith(part)]
    module.load_state_dict(state | dict(zip(names, values, strict=True)))
    return module


def features_of(case):
    return torch.as_tensor(fill.features(case)).requires_grad_()


def gradients(loss, features, roles, parameters):
    """Norms of d loss / d features, and of d loss / d parameter by role."""
    first, *norms = (x.norm() for x in torch.autograd.grad(loss, [features, *parameters]))
    return {"grad_input": first, "grad_norms": dict(zip(roles, norms, strict=True))}


# ---------------------------------------------------------------------------------------------
# Heads, decoders and losses: case -> what its file has


HEADS = {"dgl": "mlp-sr", "manppdgl": "mlp-sr-512", "predsim": "predsim", "auglocal": "auglocal"}


def widths_of(layers):
    return [(16, 16, 32, 64)[stage] for stage, _ in unit_names(layers)]


def head_case(case, targets):
    config, features = case["config"], features_of(case)
    later = config.get("widths") or widths_of(config.get("layers", 8))
    head = build_head(
        HEADS[case["case"].split("_")[0]], channels=config["C"], size=config["S"],
        outputs=config["classes"], later_widths=later[config.get("unit", 0) + 1 :],
        depth=config.get("depth"), widen=1.0, feature_dim=128,
    )  # fmt: skip
    load(head, values_of(case))
    loss, logits = head.loss(features, targets)
    found = {"logits": logits, "loss": loss}
    if isinstance(head, PredSim):
        pool, spread = head[0], head.similarity(features).flatten(2).std(2)
        assert [*pool.kernel_size, *pool.padding] == config["pool_kernel"] + config["pool_padding"]
        similarity = head.task.function(spread, targets)
        for name, part in (("pred", F.cross_entropy(logits, targets)), ("sim", similarity)):
            (grad,) = torch.autograd.grad(part, features, retain_graph=True)
            found |= {f"loss_{name}": part, f"grad_input_{name}_alone": grad.norm()}
    elif case["case"].startswith("auglocal"):
        assert blocks_of(head) == {key: config[key] for key in ("blocks", "bn1d")}
    return found | gradients(loss, features, values_of(case), head.parameters())


def blocks_of(head):
    """What the files say of the layers of an AugLocal head."""
    blocks = [layer for layer in head if isinstance(layer, BasicBlock)]
    shapes = [[b.conv1.in_channels, b.out_channels, b.conv1.stride[0]] for b in blocks]
    return {"blocks": shapes, "bn1d": any(isinstance(layer, nn.BatchNorm1d) for layer in head)}


def structure_case(case, targets):
    """Heads as `build_head` makes them, and `build_network` for the small nets; without data."""
    nets = []
    for net in case["nets"]:
        layers, depth = net["layers"], net["aux_net_depth"]
        names, widths = unit_names(layers), widths_of(layers)
        K, units, heads = len(names) - depth, [], []
        with torch.device("meta"):
            for unit in range(K - 1):
                d = later_blocks_depth(depth, 0.5, unit, K)
                later = widths[unit + 1 :]
                heads.append(build_head("auglocal", channels=widths[unit], size=32, outputs=10,
                                        later_widths=later, depth=d))  # fmt: skip
                units.append({"unit": unit, "depth": d} | blocks_of(heads[-1]))
            if layers == 32:
                network = models.build_network(
                    layers=layers, local_module_num=K, cuts=names[: K - 1], aux_net_depth=depth,
                    aux_net_config="auglocal",
                )  # fmt: skip
                *before, last = network.local_modules
                assert [blocks_of(m.head) for m in before] == [*map(blocks_of, heads)]
                assert len(last.units) == depth + 1
        nets.append({"layers": layers, "units": len(names), "aux_net_depth": depth, "modules": K,
                     "first_unit_of_last_module": K - 1, "units_with_aux": units})  # fmt: skip
    return {"nets": nets, "widths": {name: widths_of(int(name)) for name in case["widths"]}}


def momentum_case(case, targets):
    config, values, features = case["config"], values_of(case), features_of(case)
    width, stride = config["out_width"], config["stride"]
    local, average, following = (BasicBlock(config["C"], width, stride, 0.0) for _ in range(3))
    block = MomentumBlock(local, average, config["ema_momentum"], "scale" in values, False)
    head = build_head(config["head"], channels=width, size=config["S"] // stride, outputs=10)
    load(block, values, "scale", "lb.", "ema.")
    load(head, values, "head.")
    load(following, values, "next.")
    y = block(features)
    loss, logits = head.loss(y, targets)
    assert case["frozen"] == ["ema", "next"]
    assert not any(p.requires_grad for p in average.parameters())
    trained = [p for p in (*block.parameters(), *head.parameters()) if p.requires_grad]
    roles = [role for role in values if role.split(".")[0] not in case["frozen"]]
    found = gradients(loss, features, roles, trained)
    block.update(following.parameters())
    roles = [role for role in values if role.startswith("ema.")]
    after = [[p.norm(), p.sum()] for p in average.parameters()]
    return found | {
        "y_mean": y.mean(), "y_norm": y.norm(), "y_shape": y.shape, "logits": logits, "loss": loss,
        "ema_after": dict(zip(roles, after, strict=True)),
    }  # fmt: skip


def decoder_case(case, targets):
    features, size = features_of(case), case["config"]["image"]
    decoder = load(PatchDecoder(case["config"]["C"]), values_of(case))
    pixels = torch.as_tensor(fill._rng(case["case"] + ".target").random((6, 3, size, size)))
    loss = decoder.loss(decoder(features, (size, size)), pixels)
    return {"loss": loss} | gradients(loss, features, values_of(case), decoder.parameters())


def consistency_case(case, targets):
    logits, before, found = features_of(case), UNIFORM, {"loss_total": 0}
    for place, own in zip(("first", "second"), logits, strict=True):
        loss = partial(losses.consistency_loss, own, targets, before)
        found |= {f"loss_{place}_target": loss(1.0), f"loss_{place}_consistency": loss(0.0),
                  f"loss_{place}": loss(case["config"]["alpha"])}  # fmt: skip
        found["loss_total"] += found[f"loss_{place}"]
        before = own.detach().softmax(dim=1)
    (grad,) = torch.autograd.grad(found["loss_total"], logits)
    return found | {
        "grad_logits_first": grad[0].norm(), "grad_logits_second": grad[1].norm(),
        "grad_logits_second_rows": grad[1].norm(dim=1),
    }  # fmt: skip


def shared_extractor_case(case, targets):
    """A small net with the loss, since this project's modules share no extractor."""
    convs = [nn.Conv2d(*c, 3, padding=1) for c in ((3, 32), (32, 64), (64, 128), (128, 128))]
    extractor = nn.Sequential(
        convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.MaxPool2d(2), convs[2], nn.ReLU(), convs[3],
        nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128),
    )  # fmt: skip
    parts = [nn.Sequential(nn.Linear(138, 256), nn.ReLU(), nn.Linear(256, 10)) for _ in range(3)]
    net = load(nn.ModuleList([extractor, *parts]), values_of(case))
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in net]
    images, found = torch.as_tensor(fill.images(case)[1]), {"step_losses": []}
    for step in range(3):
        features, total, before = net[0](images), 0, UNIFORM
        for part in parts:
            logits = part(torch.cat([before, features], dim=1))
            total = total + losses.consistency_loss(logits, targets, before, 0.5)
            before = logits.detach().softmax(dim=1)
        if step == 2:
            return found | {"logits_after": logits}
        net.zero_grad()
        total.backward()
        norms = [p.grad.norm() for p in net.parameters()]
        found.setdefault("grad_norms", dict(zip(values_of(case), norms, strict=True)))
        found["step_losses"].append(total.item())
        for optimizer in optimizers:
            optimizer.step()


# ---------------------------------------------------------------------------------------------
# Whole nets


LOOPS = {
    "dgl": METHODS["dgl"], "predsim": METHODS["predsim"], "hpff": METHODS["hpff"],
    "auglocal": METHODS["auglocal"] | {"aux_net_depth": 2},
    "man": METHODS["man"], "manpp_infopro": METHODS["manpp"],
    "manpp_dgl": METHODS["dgl"] | {
        "aux_net_config": "mlp-sr-512", "momentum_aux": 0.995, "momentum_aux_mix": "learned",
    },
}  # fmt: skip
PARTS = {"aux": "head", "pred": "head", "sim": "head", "window_head": "head", "scale":
         "momentum.scale", "lb": "momentum.local", "ema": "momentum.average"}  # fmt: skip
"""Names of a module's parts in the files -> here, where they differ."""


def build_loop(case):
    config, options = case["config"], dict(LOOPS[case["case"].split("_loop")[0]])
    names, stem_alone = unit_names(14), "cutstem.scale" in values_of(case)
    ends = [0 if units[-1] == "stem" else units[-1] for units in config["modules"][:-1]]
    cuts = [names[0]] * stem_alone + [names[end] for end in ends]
    if "ixx_1" in config:
        scale = [config[name] for name in ("ixx_1", "ixy_1", "ixx_2", "ixy_2")]
        options |= {"loss_scale": scale, "aux_net_config": config["head"]}
    K = len(cuts) + 1
    network = models.build_network(layers=14, local_module_num=K, cuts=cuts, **options)
    *before, last = network.local_modules
    if options.get("loss_scale_rule") == "stage" and config["K_of_lambda"] != K:
        for module, following in zip(before, network.local_modules[1:], strict=True):
            stage = following.unit_names[0][0]
            module.loss_weights = loss_weights(scale, stage, config["K_of_lambda"])
    if "stem_head" in config:  # a slip of the release
        contrast = losses.LOCAL_LOSSES["contrast"]
        before[0].head = build_head("1c2f", channels=16, size=32, outputs=128, task=contrast)
    if config["blocks_per_stage"] == [2, 1, 1]:  # the last stages' second blocks are not there
        last.units, last.unit_names = last.units[1:2], [(3, 0)]
    return network.double()


def parameters_by_role(network, roles):
    """Each parameter by its name in the files, which have those of a part in the same order."""
    modules = network.local_modules
    units = [unit for module in modules for unit in module.units]
    parts = {f"unit{i}": unit for i, unit in enumerate(units)}
    parts |= {"stem": units[0], "final": modules[-1].head}
    first_cut = any(role.startswith("cutstem.") for role in roles)
    left, found = {}, {}
    for role in roles:
        owner, part, *_ = role.split(".")
        key = owner
        if owner not in parts:
            number = int(re.sub("[a-z]", "", owner.replace("stem", "-1")))
            index = number + (first_cut and owner.startswith("cut"))
            key = index, PARTS.get(part, re.sub("[0-9]", "", part))
        if key not in left:
            of = parts[key] if key in parts else attrgetter(key[1])(modules[key[0]])
            left[key] = iter([of] if isinstance(of, nn.Parameter) else of.parameters())
        found[role] = next(left[key])
    assert len({*found.values()}) == len(found) == len([*network.parameters()])
    return found


def loop_case(case, targets):
    network, values = build_loop(case), values_of(case)
    by_role = parameters_by_role(network, values)
    for role, parameter in by_role.items():
        parameter.data.copy_(values[role])
    images = torch.as_tensor(fill.images(case)[1])
    optimizers, gradient, logits, averages = make_optimizers(network), {}, [], []

    def keep_norms(optimizer, *_):
        for parameter in optimizer.param_groups[0]["params"]:
            gradient.setdefault(parameter, parameter.grad.norm())

    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = case["sgd"]["lr"]
        optimizer.register_step_pre_hook(keep_norms)
    averaged = {role: p for role, p in by_role.items() if ".ema." in role}
    found = {"step_losses": []}
    with network.local_modules[-1].head.register_forward_hook(
        lambda *call: logits.append(call[2].detach())
    ):
        for step in range(2):
            totals = Totals(network, CPU)
            train_step(network, optimizers, images, targets, totals)
            found["step_losses"].append([x for x in totals.losses() if x is not None])
            averages.append({role: p.norm().item() for role, p in averaged.items()})
            if step == 0 and "bn_updates_in_one_step" in case:
                found |= running_norms(network, case["bn_updates_in_one_step"])
    assert all(p.grad is None and not p.requires_grad for p in averaged.values())
    found["step_logits"] = torch.stack(logits).reshape(torch.tensor(case["step_logits"]).shape)
    found["grad_norms"] = {role: gradient[p] for role, p in by_role.items() if p in gradient}
    if averaged:
        found["ema_norms_after_each_forward"] = averages
    network.eval()
    return found | {
        "eval_logits_after": network(images).detach(),
        "eval_loss_after": evaluate(network, [(images, targets)], CPU).losses()[-1],
    }


def running_norms(network, names):
    units = [unit for module in network.local_modules for unit in module.units]
    found = {f"running_{kind}_norm_after_one_step": {} for kind in ("mean", "var")}
    for name in names:
        index, norm = re.match(r"unit(\d+).(bn\d)", name.replace("stem.bn", "unit0.bn1")).groups()
        for key, norms in found.items():
            norms[name] = getattr(getattr(units[int(index)], norm), key[:12].strip("_")).norm()
    return found


# ---------------------------------------------------------------------------------------------


RUNS = {
    ".*_loop": loop_case, "auglocal_structure": structure_case, "hpff_decoder": decoder_case,
    "manppdgl|dgl|predsim|auglocal": head_case, "man": momentum_case,
    "sid_loss": consistency_case, "sid_net": shared_extractor_case,
}  # fmt: skip
"""Beginning of a case's name -> what runs it; the first that fits."""


def worst_error(name):
    """The largest error in all numbers of a case's file."""
    case = read(name)
    targets = torch.as_tensor(fill.labels(len(case.get("labels", []))))
    assert targets.tolist() == case.get("labels", [])
    run = next(run for start, run in RUNS.items() if re.match(start, name))
    return error(run(case, targets), {key: case[key] for key in case.keys() - INPUTS})


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_the_releases(name):
    assert worst_error(name) < 1e-8


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "padding", "inputs"),
    [
        (16, 32, (8, 4), (0, 0), 512), (32, 16, (4, 4), (0, 0), 512), (64, 8, (4, 2), (0, 0), 512),
        (16, 96, (32, 16), (0, 0), 288), (32, 48, (16, 16), (0, 0), 288),
        (64, 24, (16, 8), (8, 0), 384),
    ],
)  # fmt: skip
def test_pools_of_predsim(channels, size, kernel, padding, inputs):
    pool, _, linear, _ = build_head("predsim", channels=channels, size=size, outputs=10)
    assert (pool.kernel_size, pool.padding, linear.in_features) == (kernel, padding, inputs)
    assert pool(torch.zeros(1, channels, size, size)).numel() == inputs


def average_after_the_step(monkeypatch):
    late, update, count = [], MomentumBlock.update, Totals.count
    monkeypatch.setattr(MomentumBlock, "update", lambda *args: late.append(args))

    def count_and_update(totals, samples):
        count(totals, samples)
        for args in late:
            update(*args)
        late.clear()

    monkeypatch.setattr(Totals, "count", count_and_update)


def round_half_up(monkeypatch):
    monkeypatch.setattr(models.auxiliary, "_round", lambda x, y: (2 * x + y) // (2 * y))


def reverse_divergence(monkeypatch):
    real = F.kl_div
    monkeypatch.setattr(F, "kl_div", lambda p, q, **how: real(q.log(), p.exp(), **how))


def own_loss_reaches_the_module_before(monkeypatch):
    """As the paper's figure of two paths might be read; the values stay the same."""
    of_window, of_own, owns = LocalModule.losses, LocalModule.own_loss, []

    def both(module, h_out, targets, pixels):
        output, task_loss, other = of_window(module, h_out, targets, pixels)
        own = of_own(module, h_out, targets)
        owns.append(own.detach())
        share = 0.001 / 0.999 / (1 if other is None else module.loss_weights[1])
        return output, task_loss + share * (own - owns[-1]), other

    monkeypatch.setattr(LocalModule, "losses", both)
    monkeypatch.setattr(LocalModule, "own_loss", lambda _, h_out, __: owns[-1] + 0 * h_out.sum())


def norms_see_a_batch_once(monkeypatch):
    monkeypatch.setattr(models.build, "_count_passes", lambda modules: None)


def plain_momentum(monkeypatch):
    step = LocalSGD.step_and_free
    monkeypatch.setattr(LocalSGD, "step_and_free", lambda optimizer: (
        optimizer.param_groups[0].update(nesterov=False), step(optimizer)))  # fmt: skip


MISTAKES = {
    average_after_the_step: "man_loop", round_half_up: "auglocal_structure",
    reverse_divergence: "sid_loss_a05", own_loss_reaches_the_module_before: "hpff_loop_0c2f",
    norms_see_a_batch_once: "hpff_loop_0c2f", plain_momentum: "predsim_loop",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(monkeypatch, mistake):
    mistake(monkeypatch)
    assert worst_error(MISTAKES[mistake]) > 1e-6
