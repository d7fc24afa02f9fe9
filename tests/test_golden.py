"""The training step against numbers of an independent float64 implementation (tests/golden).

The files ask for 1e-6. The largest error on the CPU was 5e-14, so the tests ask for 1e-12.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from golden import fill

import models
from engine.step import LocalSGD, Totals, evaluate, make_optimizers, train_step
from models.context import Contexts
from models.official import official_names

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
CASES = [
    ("r32_k4_E_softmax", 0, False),
    ("r32_k4_E_softmax", 5, True),
    ("r32_k8_R2_softmax", 0, True),
    ("r32_k8_R2_softmax", 5, False),
    ("r32_k8_R0_softmax_decoder", 16, False),
    ("r32_k16_R1E_contrast", 16, True),
]


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def build(case, **how):
    network = models.build_network(
        layers=case["layers"],
        local_module_num=case["K"],
        context_mode=case["context_mode"],
        local_loss_mode=case["loss"],
        dataset=case["dataset"],
        image_size=case["image_size"],
        balanced_memory=case["balanced"],
        h_reconstruct=case["h_reconstruct"],
        aux_net_config=case["aux"]["config"],
        aux_net_widen=case["aux"]["widen"],
        aux_net_feature_dim=case["aux"]["feature_dim"],
        **how,
    ).double()
    weights = {name: torch.as_tensor(value) for name, value in fill.state_dict(case).items()}
    models.load_official_state_dict(network, weights)
    return network


def evaluated(network, images, targets):
    loss = evaluate(network, [(images, targets)], CPU).losses()[-1]
    return {"logits": network(images).detach(), "loss": loss}


def errors_of(case, network):
    """The error of each kind of number in a case's file."""
    images, targets = map(torch.as_tensor, fill.batch(case))
    optimizers = make_optimizers(network)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = case["sgd"]["lr"]
    norms, logits, step_losses, official = {}, [], [], official_names(network)

    def keep_norm(name, parameter):
        norms.setdefault(official[name], parameter.grad.norm())

    for name, parameter in network.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(keep_norm, name))
    eval_before = evaluated(network, images, targets)
    network.train()
    with network.local_modules[-1].head.register_forward_hook(lambda *call: logits.append(call[2])):
        for _ in range(case["sgd"]["steps"]):
            totals = Totals(network, CPU)
            train_step(network, optimizers, images, targets, totals)
            step_losses.append(totals.losses())
    found = {
        "eval_before": eval_before,
        "step_losses": step_losses,
        "train_logits": logits[0].detach(),
        "grad_norms": norms,
        "eval_after": evaluated(network, images, targets),
    }
    return {part: error(found[part], case[part]) for part in found}


def error(found, expected):
    """The largest error in a nest of numbers: of small ones absolute, of large ones relative."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(error(found[key], expected[key]) for key in expected)
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    return float(((found - expected).abs() / (1 + expected.abs())).max())


@pytest.mark.parametrize(("name", "context_group", "recompute"), CASES)
def test_golden(name, context_group, recompute):
    case = read(name)
    network = build(case, context_group=context_group, recompute=recompute)
    counts = {"backbone": 0, "context": 0, "auxiliary": 0}
    for weight in case["grad_norms"]:
        kind = {"cont": "context", "aux": "auxiliary", "decoder": "auxiliary"}
        part = kind.get(weight.split("_")[0], "backbone")
        counts[part] += math.prod(case["state_dict_shapes"][weight])
    assert network.parameter_counts() == counts
    assert sum(counts.values()) == case["trained_parameters"]
    assert max(errors_of(case, network).values()) < 1e-12


def test_all_golden_cases_are_there():
    assert sorted({name for name, *_ in CASES}) == sorted(p.stem for p in GOLDEN.glob("*.json"))


SLIGHTLY_OTHER = {
    "r32_k4_E_softmax": (LocalSGD, "step_and_free", lambda step: lambda optimizer: (
        optimizer.param_groups[0].update(nesterov=False), step(optimizer))),
    "r32_k8_R2_softmax": (Contexts, "push", lambda push: lambda contexts, h: (
        push(contexts, h * 1.0001))),
    "r32_k8_R0_softmax_decoder": (models.auxiliary, "reconstruction_loss", lambda loss: (
        lambda decoded, pixels: loss(decoded, pixels * 0.9999))),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIGHTLY_OTHER)
def test_a_slightly_other_step_is_found(monkeypatch, name):
    case, (owner, function, change) = read(name), SLIGHTLY_OTHER[name]
    network = build(case)
    monkeypatch.setattr(owner, function, change(getattr(owner, function)))
    assert max(errors_of(case, network).values()) > 1e-6
