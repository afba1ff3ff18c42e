"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

from torch import Tensor

from monai_lm.fields.smoothing import box_sum, inverse_window_counts
from monai_lm.similarity.base import Similarity

__all__ = ["LNCC"]


class LNCC(Similarity):
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
        self.epsilon = float(epsilon)

    def reference(self, fixed: Tensor) -> tuple[Tensor, ...]:
        """The fixed image, its window means and its window variances."""
        weight = inverse_window_counts(fixed, self.radius)
        mean = self._sum(fixed) * weight
        variance = (self._sum(fixed * fixed) * weight - mean * mean).clamp(min=0) + self.epsilon
        return fixed, mean, variance

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        fixed, fixed_mean, fixed_variance = reference
        weight = inverse_window_counts(warped, self.radius)
        mean = self._sum(warped) * weight
        variance = (self._sum(warped * warped) * weight - mean * mean).clamp(min=0) + self.epsilon
        covariance = self._sum(warped * fixed) * weight - mean * fixed_mean
        ratio = covariance / (variance * fixed_variance)
        channels = warped.shape[1]
        loss = (1 - covariance * ratio).flatten(1).sum(1) / channels
        a = 2 * ratio * weight
        b = a * covariance / variance
        derivative = warped * self._sum(b) - fixed * self._sum(a) + self._sum(a * fixed_mean - b * mean)
        return loss, derivative / channels

    def _sum(self, x: Tensor) -> Tensor:
        return box_sum(x, self.radius)
