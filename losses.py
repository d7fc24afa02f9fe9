"""Loss functions of the local modules."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07


def supervised_contrastive(
    embeddings: Tensor,
    targets: Tensor,
    temperature: float = TEMPERATURE,
    candidates: tuple[Tensor, Tensor] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return the supervised contrastive loss of a batch, with one view per sample.

    The loss of anchor i is the mean over the other samples p of its class of
        -log( exp(z_i.z_p / T) / sum over a != i of exp(z_i.z_a / T) ),
    with z the L2-normalised embeddings (README, equation 8). It is 0 if there is no such p.

    Args:
        embeddings: (N, D) outputs of an auxiliary head, not normalised.
        targets: (N,) class indices.
        temperature: T.
        candidates: embeddings (M, D) and targets (M,) of the whole batch, of which these N are a
            part (`--parallel data`); None where these N are the batch.
        first_row: index of anchor 0 in the candidates.
    Returns:
        0-d mean over all N anchors.
    """
    z = F.normalize(embeddings, dim=1)
    all_z, all_targets = z, targets
    if candidates is not None:
        all_z, all_targets = F.normalize(candidates[0], dim=1), candidates[1]
    is_self = torch.eye(len(all_z), dtype=torch.bool, device=z.device)
    is_self = is_self[first_row : first_row + len(z)]
    # The lowest finite number, not -inf: a batch of one would turn -inf - -inf into NaN.
    similarity = (z @ all_z.T / temperature).masked_fill(is_self, torch.finfo(z.dtype).min)
    log_p = similarity.log_softmax(dim=1)
    positive = (targets[:, None] == all_targets[None, :]) & ~is_self
    log_p_positive = log_p.masked_fill(~positive, 0).sum(dim=1)
    return -(log_p_positive / positive.sum(dim=1).clamp(min=1)).mean()


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean binary cross entropy between a decoder's image and the input.

    Args:
        decoded: (N, 3, S, S) logits; their sigmoid is the image.
        pixels: (N, 3, S, S) un-normalised input in [0, 1].
    Returns:
        0-d mean over everything.
    """
    return F.binary_cross_entropy_with_logits(decoded, pixels)


def similarity_matching(
    embeddings: Tensor,
    targets: Tensor,
    classes: int,
    candidates: tuple[Tensor, Tensor] | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return PredSim's similarity matching: the 0-d mean of (R_embeddings - R_labels)^2.

    R has the cosine similarity of each pair of samples, the sample itself included. An embedding is
    centred by its mean over D, a one-hot label by 1/classes.

    Args:
        embeddings: (N, D).
        targets: (N,) class indices.
        candidates, first_row: as in `supervised_contrastive`; `first_row` does not matter here.
    """
    all_embeddings, all_targets = (embeddings, targets) if candidates is None else candidates
    own, other = _directions(embeddings), _directions(all_embeddings)
    of_class = _directions(torch.eye(classes, dtype=own.dtype, device=own.device))
    labels = of_class[targets] @ of_class[all_targets].T
    difference = (own @ other.T).clamp(-1, 1) - labels.clamp(-1, 1)
    return difference.square().mean()


def _directions(rows: Tensor) -> Tensor:
    """Return rows (N, D) minus their mean over D, divided by their norm."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    return centred / (1e-8 + centred.norm(dim=1, keepdim=True))


def consistency_loss(logits: Tensor, targets: Tensor, before: Tensor, alpha: float) -> Tensor:
    """Return alpha CE(logits, targets) + (1 - alpha) KL(before || softmax(logits)), 0-d (SID).

    Args:
        logits: (N, classes).
        targets: (N,) class indices.
        before: (N, classes) probabilities that the module before predicts, without a gradient.
    """
    divergence = F.kl_div(logits.log_softmax(dim=1), before, reduction="batchmean")
    return alpha * F.cross_entropy(logits, targets) + (1 - alpha) * divergence


class TaskLoss(NamedTuple):
    """A loss of auxiliary heads.

    Attributes:
        function: (head output (N, D), targets (N,)) -> 0-d loss.
        classifies: whether the head's output is a logit per class; else it is an embedding.
        compares_samples: whether the loss of a sample depends on the other samples. If so, the
            function also takes `candidates` and `first_row`, as `supervised_contrastive` does.
        follows: whether the function also takes the prediction of the module before.
    """

    function: Callable[..., Tensor]
    classifies: bool
    compares_samples: bool = False
    follows: bool = False


CROSS_ENTROPY = TaskLoss(F.cross_entropy, classifies=True)

LOCAL_LOSSES = {
    "cross_entropy": CROSS_ENTROPY,
    "contrast": TaskLoss(supervised_contrastive, classifies=False, compares_samples=True),
}
"""Losses by their `--local_loss_mode`."""
