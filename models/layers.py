"""Small layers and functions that heads, decoders and context encoders share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import InputError


def scaled_width(width: int, factor: float) -> int:
    """Return `width * factor`, truncated; raise InputError if that is 0."""
    scaled = int(width * factor)
    if scaled < 1:
        raise InputError(f"a width of {width} times {factor} truncates to {scaled}: widen more")
    return scaled


def to_float32(x: Tensor) -> Tensor:
    """Return x, or a float32 copy of float16 or bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Pool(nn.Module):
    """An average pool to side x side; unlike PyTorch's, deterministic on CUDA where that is asked.

    (N, C, S, S) -> (N, C, side, side).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return pool(x, (self.side, self.side))


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return x average-pooled to `size`; x itself where it has that already."""
    if x.shape[-2:] == size:
        return x
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = _averages(x, size)
        return rows @ x @ columns.T
    return F.adaptive_avg_pool2d(x, size)


def _averages(x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Return matrices (S, H) and (S, W) that pool x (N, C, H, W) as adaptive pooling does.

    The backward of adaptive pooling on CUDA adds in any order; that of a matrix product does not.
    """
    matrices = []
    for count, total in zip(size, x.shape[-2:], strict=True):
        row = torch.arange(count, device=x.device)[:, None]
        column = torch.arange(total, device=x.device)
        averaged = (column >= row * total // count) & (column * count < (row + 1) * total)
        weights = averaged.to(x.dtype)
        matrices.append(weights / weights.sum(1, keepdim=True))
    return matrices
