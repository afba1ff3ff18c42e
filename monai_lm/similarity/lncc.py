"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity.base import KernelSimilarity

__all__ = ["LNCC"]


class LNCC(KernelSimilarity):
    """``1 - A² / (B C)`` per voxel, with ``A``, ``B``, ``C`` the covariance and variances in a cubic window.

    Invariant to ``a I + b`` of either image. Windows that reach over the edge use the voxels inside the image only.
    With window means ``M``, ``a = 2 A / (B C)`` and ``b = a A / B``, the derivative of ``Σ A² / (B C)`` is
    ``J Mᵀa - I Mᵀb - Mᵀ(a MJ - b MI)``: three box sums forward, three back, no autograd graph.

    With a weight per voxel, window means are weighted means, and the loss at a voxel counts as much as the voxel.

    Args:
        radius: half width of the window in voxels; a window is ``2 radius + 1`` voxels wide, across thick slices, too:
            windows as wide in millimetres, but at least three slices, lose Dice on hearts (validation).
        epsilon: added to both variances, as a fraction of the squared :func:`~monai_lm.similarity.base.contrast` of the
            image: windows with less contrast than that count little.

    Source:
        Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image Analysis 2008.
    """

    standardized = True

    def __init__(self, radius: int = 2, epsilon: float = 2e-3) -> None:
        if radius < 1:
            raise ValueError(f"radius must be at least 1 voxel, got {radius}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.radius = int(radius)
        self.epsilon = float(epsilon)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :func:`monai_lm.kernels.reference.lncc`."""
        fixed, shift, factor, weight = reference
        return kernels.lncc(warped, fixed, shift, factor, weight, self.radius, self.epsilon, out)
