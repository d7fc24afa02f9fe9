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
    among: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> Tensor:
    """Supervised contrastive loss of a batch, one view a sample (`--local_loss_mode contrast`).

    Anchor i has a loss for each other sample p of its class, and its mean over them counts:
        -log( exp(z_i.z_p / T) / sum over a != i of exp(z_i.z_a / T) ),
    with z the L2-normalised embeddings. An anchor without a positive counts 0.

    Args:
        embeddings: (N, D) outputs of an auxiliary head, not normalised.
        targets: (N,) class indices.
        temperature: T.
        among: (M, D) and (M,) of a larger batch to compare with; these N come in it, one after the
            other, from place `first` on. Without it they are the batch.
    Returns:
        0-d mean over all N anchors.
    """
    z = F.normalize(embeddings, dim=1)
    of_all, targets_of_all = (
        (z, targets) if among is None else (F.normalize(among[0], dim=1), among[1])
    )
    itself = torch.eye(len(of_all), dtype=torch.bool, device=z.device)[first : first + len(z)]
    # The lowest finite number, not -inf: a batch of one would turn -inf - -inf into NaN.
    similarity = (z @ of_all.T / temperature).masked_fill(itself, torch.finfo(z.dtype).min)
    log_p = similarity.log_softmax(dim=1)
    positive = (targets[:, None] == targets_of_all[None, :]) & ~itself
    log_p_positive = log_p.masked_fill(~positive, 0).sum(dim=1)
    return -(log_p_positive / positive.sum(dim=1).clamp(min=1)).mean()


def reconstruction(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean binary cross entropy between a decoder's image and the input (`--h_reconstruct`).

    Args:
        decoded: (N, 3, S, S) logits; their sigmoid is the image.
        pixels: (N, 3, S, S) un-normalised input in [0, 1].
    Returns:
        0-d mean over everything.
    """
    return F.binary_cross_entropy_with_logits(decoded, pixels)


class TaskLoss(NamedTuple):
    """What a head trains on.

    Attributes:
        function: (head output (N, D), targets (N,)) -> 0-d loss.
        classifies: whether the output is a logit a class; else it is an embedding.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    classifies: bool


CROSS_ENTROPY = TaskLoss(F.cross_entropy, classifies=True)

LOCAL_LOSSES = {
    "cross_entropy": CROSS_ENTROPY,
    "contrast": TaskLoss(supervised_contrastive, classifies=False),
}
"""`--local_loss_mode`: what an auxiliary head trains on."""
