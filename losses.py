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
    """Return the supervised contrastive loss of a batch, with one view per sample.

    The loss of anchor i is the mean over the other samples p of its class of
        -log( exp(z_i.z_p / T) / sum over a != i of exp(z_i.z_a / T) ),
    with z the L2-normalised embeddings (README, equation 8). It is 0 if there is no such p.

    Args:
        embeddings: (N, D) outputs of an auxiliary head, not normalised.
        targets: (N,) class indices.
        temperature: T.
        among: (M, D) and (M,) of a larger batch to compare with, if these N are rows `first` to
            `first` + N - 1 of it.
    Returns:
        0-d mean over all N anchors.
    """
    z = F.normalize(embeddings, dim=1)
    all_z, all_targets = z, targets
    if among is not None:
        all_z, all_targets = F.normalize(among[0], dim=1), among[1]
    is_self = torch.eye(len(all_z), dtype=torch.bool, device=z.device)[first : first + len(z)]
    # The lowest finite number, not -inf: a batch of one would turn -inf - -inf into NaN.
    similarity = (z @ all_z.T / temperature).masked_fill(is_self, torch.finfo(z.dtype).min)
    log_p = similarity.log_softmax(dim=1)
    positive = (targets[:, None] == all_targets[None, :]) & ~is_self
    log_p_positive = log_p.masked_fill(~positive, 0).sum(dim=1)
    return -(log_p_positive / positive.sum(dim=1).clamp(min=1)).mean()


def reconstruction(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean binary cross entropy between a decoder's image and the input.

    Args:
        decoded: (N, 3, S, S) logits; their sigmoid is the image.
        pixels: (N, 3, S, S) un-normalised input in [0, 1].
    Returns:
        0-d mean over everything.
    """
    return F.binary_cross_entropy_with_logits(decoded, pixels)


class TaskLoss(NamedTuple):
    """A loss of auxiliary heads.

    Attributes:
        function: (head output (N, D), targets (N,)) -> 0-d loss.
        classifies: whether the head's output is a logit per class; else it is an embedding.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    classifies: bool


CROSS_ENTROPY = TaskLoss(F.cross_entropy, classifies=True)

LOCAL_LOSSES = {
    "cross_entropy": CROSS_ENTROPY,
    "contrast": TaskLoss(supervised_contrastive, classifies=False),
}
"""Losses by their `--local_loss_mode`."""
