"""Global normalised cross-correlation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity.base import KernelSimilarity

__all__ = ["NCC"]


class NCC(KernelSimilarity):
    """``1 - ρ²`` with ``ρ`` the correlation of the two images, times the number of voxels.

    Invariant to ``a I + b`` of either image, so also to inverted contrast.

    Args:
        epsilon: added to both variances, as a fraction of the squared contrast of the image.
    """

    standardized = invariant = True

    def __init__(self, epsilon: float = 1e-6) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = float(epsilon)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :func:`monai_lm.kernels.reference.ncc`."""
        fixed, shift, factor, weight = reference
        return kernels.ncc(warped, fixed, shift, factor, weight, self.epsilon, out)
