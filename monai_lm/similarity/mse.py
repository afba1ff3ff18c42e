"""Mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.similarity.base import Similarity

__all__ = ["MSE"]


class MSE(Similarity):
    """``(I - J)²`` per voxel, for images of the same modality and intensity scale.

    ``prepare`` divides both images of a pair by their largest absolute intensity.
    """

    def prepare(self, fixed: Tensor, moving: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Bring the intensities of a pair into [-1, 1], both by the same factor."""
        axes = tuple(range(1, fixed.dim()))
        largest = torch.maximum(fixed.abs().amax(axes, keepdim=True), moving.abs().amax(axes, keepdim=True))
        largest = largest.clamp(min=torch.finfo(fixed.dtype).tiny)
        return (fixed / largest,), moving / largest

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        (fixed,) = reference
        difference = (warped - fixed) / warped.shape[1]
        return (difference * (warped - fixed)).flatten(1).sum(1), 2 * difference
