"""Global normalised cross-correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.similarity.base import Similarity

__all__ = ["NCC"]


class NCC(Similarity):
    """``1 - ρ²`` with ``ρ`` the correlation of the two images, times the number of voxels.

    Invariant to ``a I + b`` of either image, so also to inverted contrast.

    Args:
        epsilon: added to both variances, as a fraction of the squared contrast of the image.
    """

    standardized = True
    weighable = True

    def __init__(self, epsilon: float = 1e-6) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = float(epsilon)

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        fixed, *weights = reference
        axes = tuple(range(2, warped.dim()))
        weight = weights[0] if weights else torch.ones_like(fixed[:, :1])
        total = weight.sum(axes, keepdim=True)

        def mean(values: Tensor) -> Tensor:
            return (values * weight).sum(axes, keepdim=True) / total

        i, j = warped - mean(warped), fixed - mean(fixed)
        covariance, variance = mean(i * j), mean(i * i) + self.epsilon
        ratio = covariance / (variance * (mean(j * j) + self.epsilon))
        loss = (total * (1 - covariance * ratio)).flatten(1).mean(1)
        return loss, 2 * ratio * (covariance / variance * i - j) * weight / warped.shape[1]
