"""Losses against plain loops in float64."""

import math

import pytest
import torch

import losses
from configs import loss_weights, published_loss_scale


def plain_contrastive(embeddings, targets, temperature):
    z = [e / math.sqrt(sum(float(x) ** 2 for x in e)) for e in embeddings]
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if targets[p] == targets[i]]
        if positives:
            denominator = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
            terms = [
                -math.log(math.exp(float(z[i] @ z[p]) / temperature) / denominator)
                for p in positives
            ]
            total += sum(terms) / len(terms)
    return total / len(z)


@pytest.mark.parametrize("targets", [[0, 1, 0, 2, 0, 1], [0, 1, 2, 3, 4, 5], [1] * 6, [0, 0]])
def test_contrastive_is_the_double_loop(targets):
    torch.manual_seed(0)
    embeddings = torch.randn(len(targets), 5, dtype=torch.float64)
    targets = torch.tensor(targets)
    for temperature in (0.07, 1.0):
        loss = losses.supervised_contrastive(embeddings, targets, temperature)
        assert float(loss) == pytest.approx(
            plain_contrastive(embeddings, targets, temperature), 1e-12
        )


def test_contrastive_temperature_is_the_published_one():
    embeddings, targets = torch.eye(3, dtype=torch.float64)[[0, 0, 1]], torch.tensor([0, 0, 1])
    by_hand = math.log(1 + math.exp(-1 / 0.07)) * 2 / 3  # the third anchor has no positive
    assert float(losses.supervised_contrastive(embeddings, targets)) == pytest.approx(
        by_hand, 1e-12
    )


@pytest.mark.parametrize("targets", [[3], [0, 1]])
def test_contrastive_without_positives_is_zero_with_zero_gradient(targets):
    embeddings = torch.randn(len(targets), 4, requires_grad=True)
    loss = losses.supervised_contrastive(embeddings, torch.tensor(targets))
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_contrastive_gradient():
    embeddings = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 0, 1, 2, 0])
    torch.autograd.gradcheck(lambda e: losses.supervised_contrastive(e, targets, 0.5), embeddings)


def test_reconstruction_is_the_mean_binary_cross_entropy():
    logits = torch.tensor([[[[0.0, 2.0]]]], dtype=torch.float64)
    pixels = torch.tensor([[[[0.25, 1.0]]]], dtype=torch.float64)
    by_hand = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert float(losses.reconstruction_loss(logits, pixels)) == pytest.approx(by_hand, 1e-12)


PUBLISHED_SCALES = """
32 cifar10 | 5 1 0 0 | 6 0 1 2 | 5 0 0 2 | 5 0.05 0.2 0.5
110 cifar10 | 5 0.5 0 0 | 1 0 0 1 | 5 0 0 1 | 5 0 0.5 1
110 stl10 | 10 1 0 0 | 20 0.2 5 2 | 20 0.2 5 1 | 20 0.5 10 0.1
110 svhn | 1 0.1 0 0 | 5 0 0.5 0 | 5 0 0.5 2 | 5 0.2 0.5 1
"""
BALANCED_SCALES = {
    (32, 2): (5, 0.1, 0, 0), (32, 3): (5, 0, 5, 0.1), (32, 4): (5, 0, 0, 0.1),
    (32, 8): (5, 0, 0, 2),
    (110, 2): (5, 0.1, 0, 0), (110, 3): (5, 0, 5, 0.1), (110, 4): (5, 0, 0, 0.1),
}  # fmt: skip


def test_loss_scales_are_the_published_ones():
    for line in PUBLISHED_SCALES.strip().splitlines():
        net, *cells = line.split(" | ")
        layers, dataset = net.split()
        for K, cell in zip((2, 4, 8, 16), cells, strict=True):
            expected = tuple(float(x) for x in cell.split())
            assert published_loss_scale(int(layers), K, dataset) == expected
    for (layers, K), expected in BALANCED_SCALES.items():
        assert published_loss_scale(layers, K, "cifar10", balanced_memory=True) == expected


@pytest.mark.parametrize(
    ("K", "index", "expected"),
    [(4, 0, (6, 0)), (4, 1, (3.5, 1)), (4, 2, (1, 2)), (2, 0, (6, 0)), (3, 1, (1, 2))],
)
def test_loss_weights_by_hand(K, index, expected):
    assert loss_weights((6, 0, 1, 2), index, K) == pytest.approx(expected)
