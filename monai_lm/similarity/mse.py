"""Mean squared error."""

from __future__ import annotations

from torch import Tensor

from monai_lm.similarity.base import Similarity

__all__ = ["MSE"]


class MSE(Similarity):
    """``(I - J)²`` per voxel, for images of the same modality and intensity scale."""

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        (fixed,) = reference
        difference = (warped - fixed) / warped.shape[1]
        return (difference * (warped - fixed)).flatten(1).sum(1), 2 * difference
