"""The network against numbers of an independent float64 implementation (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import fill
from test_network import tiny, tiny_batch

import models
from engine.step import make_optimizers
from models.official import official_names

GOLDEN = Path(__file__).parent / "golden"


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-6, atol=1e-6)


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


def check_evaluation(network, images, targets, expected):
    network.eval()
    logits = network(images)
    close(logits, expected["logits"])
    close(F.cross_entropy(logits, targets), expected["loss"])
    network.train()


@pytest.mark.parametrize(
    ("name", "context_group", "recompute"),
    [
        ("r32_k4_E_softmax", 0, False),
        ("r32_k4_E_softmax", 5, True),
        ("r32_k8_R2_softmax", 0, True),
        ("r32_k8_R2_softmax", 5, False),
        ("r32_k8_R0_softmax_decoder", 16, False),
        ("r32_k16_R1E_contrast", 16, True),
    ],
)
def test_golden(name, context_group, recompute):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    network = build(case, context_group=context_group, recompute=recompute)
    images, targets = map(torch.as_tensor, fill.batch(case))
    settings = {k: v for k, v in case["sgd"].items() if k != "steps"}
    optimizers = {m: torch.optim.SGD(m.parameters(), **settings) for m in network.local_modules}

    check_evaluation(network, images, targets, case["eval_before"])
    grad_norms = {}
    official = official_names(network)

    def step(module):
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:  # of this module alone, since the others' are freed
                grad_norms.setdefault(official[name], parameter.grad.norm())
        optimizers[module].step()
        optimizers[module].zero_grad()

    for i, expected in enumerate(case["step_losses"]):
        logits, losses = network.local_step(images, targets, after_backward=step)
        close(torch.stack(losses), expected)
        if i == 0:
            close(logits, case["train_logits"])
    check_evaluation(network, images, targets, case["eval_after"])

    assert grad_norms.keys() == case["grad_norms"].keys()
    for name, norm in case["grad_norms"].items():
        close(grad_norms[name], norm)
    trained = [p for name, p in network.named_parameters() if official[name] in grad_norms]
    assert sum(p.numel() for p in trained) == case["trained_parameters"]
    assert sum(network.parameter_counts().values()) == case["trained_parameters"]


def test_all_golden_cases_are_there():
    assert len(list(GOLDEN.glob("*.json"))) == 4


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize("mode", ["R0", "R1", "R2", "R3", "E", "R1E", "R2E"])
def test_groups_and_recomputation_train_the_same_network(mode, loss):
    images, targets = tiny_batch()
    results = []
    for context_group, recompute in [(0, False), (5, True)]:
        network = tiny(
            context_mode=mode, local_loss_mode=loss, h_reconstruct=True, loss_scale=(1, 1, 1, 1),
            context_group=context_group, recompute=recompute,
        )  # fmt: skip
        optimizers = make_optimizers(network)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05

        def update(module, optimizers=optimizers):
            optimizers[module.index].step()
            optimizers[module.index].zero_grad()

        steps = [network.local_step(images, targets, update) for _ in range(3)]
        results.append((steps, network.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert results[1][0][0][1] != results[1][0][2][1]
