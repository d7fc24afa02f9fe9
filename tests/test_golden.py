"""The network against numbers of an independent float64 implementation (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import fill

import models
from models.official import official_names

CASES = sorted((Path(__file__).parent / "golden").glob("*.json"))


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-6, atol=1e-6)


def build(case):
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


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path):
    case = json.loads(path.read_text())
    network = build(case)
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
    assert len(CASES) == 4
