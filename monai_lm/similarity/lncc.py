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

    With a weight per voxel, window means are weighted means, and the loss at a voxel counts as much as the voxel.

    Args:
        radius: half width of the window in voxels; a window is ``2 radius + 1`` voxels wide.
        epsilon: added to both variances, as a fraction of the squared :func:`~monai_lm.similarity.base.contrast` of the
            image: windows with less contrast than that count little.

    Source:
        Avants et al., "Symmetric diffeomorphic image registration with cross-correlation", Medical Image Analysis 2008.
    """

    standardized = True
    in_pieces = True
    weighable = True

    def __init__(self, radius: int = 2, epsilon: float = 2e-3) -> None:
        if radius < 1:
            raise ValueError(f"radius must be at least 1 voxel, got {radius}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.radius = int(radius)
        self.halo = 2 * self.radius
        self.epsilon = float(epsilon)

    @property
    def signature(self) -> str:
        """The radius is a constant in the kernels."""
        return f"LNCC({self.radius})"

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        """The fixed image, its window means and variances; with a weight, that and the inverse of its window sums."""
        inverse = () if weight is None else (_inverse(box_sum(weight, self.radius)),)
        sums = box_sum(piece(_moments, fixed, None, weight), self.radius)
        moments = piece(_mean_and_variance, sums, self.radius, self.epsilon, *inverse)
        return (fixed, *moments) if weight is None else (fixed, *moments, weight, *inverse)

    def evaluate_lines(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss per line ``(B, rows, columns)`` and derivative ``(B, C, *S)``; see :class:`LocalSimilarity`."""
        fixed, mean, variance, *weights = reference
        weight = weights[0] if weights else None
        sums = [
            box_sum(piece(_moments, warped, fixed, weight), self.radius)
        ]  # lists give up what is not needed any more
        loss, *parts = piece(_correlation, sums.pop(), mean, variance, self.radius, self.epsilon, *weights)
        del reference, mean, variance, weights
        return loss, piece(_derivative, warped, fixed, box_sum(parts.pop(), self.radius), weight)


# --- pieces: pure functions that are compiled one by one; images that are filtered together are stacked as channels


def _moments(image: Tensor, other: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """An image, its square, and its product with another one, each times the weight."""
    weighted = image if weight is None else image * weight
    return torch.cat([weighted, weighted * image] + ([] if other is None else [weighted * other]), 1)


def _inverse(window_sums: Tensor) -> Tensor:
    """Inverse of a weight's window sums, zero where nothing in the window counts."""
    return torch.where(window_sums > 1e-6, 1 / window_sums.clamp(min=1e-6), torch.zeros_like(window_sums))


def _mean_and_variance(
    sums: Tensor, radius: int, epsilon: float, inverse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Window means and variances from the box sums of an image and of its square."""
    inverse = inverse_window_counts(sums, radius) if inverse is None else inverse
    mean, square = (sums * inverse).chunk(2, 1)
    return mean, (square - mean * mean).clamp(min=0) + epsilon


def _correlation(
    sums: Tensor,
    fixed_mean: Tensor,
    fixed_variance: Tensor,
    radius: int,
    epsilon: float,
    weight: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss per line; ``a``, ``b`` and ``a MJ - b MI`` weighted for :func:`box_sum`, from those of ``I, I², I J``."""
    inverse = inverse_window_counts(sums, radius) if inverse is None else inverse
    mean, square, both = (sums * inverse).chunk(3, 1)
    variance = (square - mean * mean).clamp(min=0) + epsilon
    covariance = both - mean * fixed_mean
    ratio = covariance / (variance * fixed_variance)
    a, loss = 2 * ratio * inverse, 1 - covariance * ratio
    if weight is not None:
        a, loss = a * weight, loss * weight
    b = a * covariance / variance
    return line_sums(loss) / mean.shape[1], torch.cat([a, b, a * fixed_mean - b * mean], 1)


def _derivative(warped: Tensor, fixed: Tensor, sums: Tensor, weight: Tensor | None = None) -> Tensor:
    """Derivative of the loss from the box sums of what :func:`_correlation` returns."""
    of_a, of_b, of_both = sums.chunk(3, 1)
    derivative = (warped * of_b - fixed * of_a + of_both) / warped.shape[1]
    return derivative if weight is None else derivative * weight
