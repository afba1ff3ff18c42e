"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.compilation import piece
from monai_lm.fields.smoothing import box_sum, inverse_window_counts
from monai_lm.similarity.base import LocalSimilarity, line_sums

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
    in_pieces = True

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
        sums = box_sum(piece(_moments, fixed), self.radius)
        return fixed, *piece(_mean_and_variance, sums, self.radius, self.epsilon)

    def evaluate_lines(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss per line ``(B, rows, columns)`` and derivative ``(B, C, *S)``; see :class:`LocalSimilarity`."""
        fixed, mean, variance = reference
        sums = [box_sum(piece(_moments, warped, fixed), self.radius)]  # lists give up what nobody needs any more
        loss, *parts = piece(_correlation, sums.pop(), mean, variance, self.radius, self.epsilon)
        del reference, mean, variance
        return loss, piece(_derivative, warped, fixed, box_sum(parts.pop(), self.radius))


# --- pieces: pure functions that are compiled one by one; images that are filtered together are stacked as channels


def _moments(image: Tensor, other: Tensor | None = None) -> Tensor:
    """An image, its square, and its product with another one."""
    return torch.cat([image, image * image] + ([] if other is None else [image * other]), 1)


def _mean_and_variance(sums: Tensor, radius: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Window means and variances from the box sums of an image and of its square."""
    mean, square = (sums * inverse_window_counts(sums, radius)).chunk(2, 1)
    return mean, (square - mean * mean).clamp(min=0) + epsilon


def _correlation(
    sums: Tensor, fixed_mean: Tensor, fixed_variance: Tensor, radius: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Loss per row, and ``a``, ``b`` and ``a MJ - b MI`` weighted for :func:`box_sum`, from those of ``I, I², I J``."""
    weight = inverse_window_counts(sums, radius)
    mean, square, both = (sums * weight).chunk(3, 1)
    variance = (square - mean * mean).clamp(min=0) + epsilon
    covariance = both - mean * fixed_mean
    ratio = covariance / (variance * fixed_variance)
    a = 2 * ratio * weight
    b = a * covariance / variance
    return line_sums(1 - covariance * ratio) / mean.shape[1], torch.cat([a, b, a * fixed_mean - b * mean], 1)


def _derivative(warped: Tensor, fixed: Tensor, sums: Tensor) -> Tensor:
    """Derivative of the loss from the box sums of what :func:`_correlation` returns."""
    of_a, of_b, of_both = sums.chunk(3, 1)
    return (warped * of_b - fixed * of_a + of_both) / warped.shape[1]
