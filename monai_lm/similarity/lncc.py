"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.fields.smoothing import box_sum, inverse_window_counts
from monai_lm.similarity.base import LocalSimilarity, row_sums

__all__ = ["LNCC"]


class LNCC(LocalSimilarity):
    """``1 - A² / (B C)`` per voxel, with ``A``, ``B``, ``C`` the covariance and variances in a cubic window.

    Invariant to ``a I + b`` of either image. Windows that reach over the edge use the voxels inside the image only.
    With window means ``M``, ``a = 2 A / (B C)`` and ``b = a A / B``, the derivative of ``Σ A² / (B C)`` is
    ``J Mᵀa - I Mᵀb - Mᵀ(a MJ - b MI)``: three box sums forward, three back, no autograd graph.

    Args:
        radius: half width of the window in voxels; a window is ``2 radius + 1`` voxels wide.
        epsilon: added to both variances, as a fraction of the variance of the whole image: windows with less contrast
            than that count little.

    Source:
        Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image Analysis 2008.
    """

    standardized = True

    def __init__(self, radius: int = 3, epsilon: float = 1e-3) -> None:
        if radius < 1:
            raise ValueError(f"radius must be at least 1 voxel, got {radius}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.radius = int(radius)
        self.halo = 2 * self.radius
        self.epsilon = float(epsilon)

    def reference(self, fixed: Tensor) -> tuple[Tensor, ...]:
        """The fixed image, its window means and its window variances."""
        weight = inverse_window_counts(fixed, self.radius)
        mean, square = (m * weight for m in self._sums(fixed, fixed * fixed))
        variance = (square - mean * mean).clamp(min=0) + self.epsilon
        return fixed, mean, variance

    def evaluate_rows(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss per row ``(B, rows)`` and derivative ``(B, C, *S)``; see :class:`LocalSimilarity`."""
        fixed, fixed_mean, fixed_variance = reference
        weight = inverse_window_counts(warped, self.radius)
        means = [m * weight for m in self._sums(warped, warped * warped, warped * fixed)]
        mean = means[0]
        variance = (means[1] - mean * mean).clamp(min=0) + self.epsilon
        covariance = means[2] - mean * fixed_mean
        ratio = covariance / (variance * fixed_variance)
        channels = warped.shape[1]
        loss = row_sums(1 - covariance * ratio) / channels
        a = 2 * ratio * weight
        b = a * covariance / variance
        of_a, of_b, of_both = self._sums(a, b, a * fixed_mean - b * mean)
        return loss, (warped * of_b - fixed * of_a + of_both) / channels

    def _sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Box sums of several images at once: a third of the kernels to compile and launch."""
        return box_sum(torch.cat(parts, 1), self.radius).chunk(len(parts), 1)
