"""Local normalised cross-correlation with its exact derivative in closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.similarity.base import Similarity

__all__ = ["LNCC", "box_sum"]


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
        weight = self._inverse_counts(fixed)
        mean = self._sum(fixed) * weight
        variance = (self._sum(fixed * fixed) * weight - mean * mean).clamp(min=0) + self.epsilon
        return fixed, mean, variance

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        fixed, fixed_mean, fixed_variance = reference
        weight = self._inverse_counts(warped)
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

    def _inverse_counts(self, image: Tensor) -> Tensor:
        """One over the number of voxels in each window, ``(1, 1, *S)``."""
        n = image.dim() - 2
        out = image.new_ones(1)
        for axis, size in enumerate(image.shape[2:]):
            i = torch.arange(size, device=image.device)
            count = (i + self.radius).clamp(max=size - 1) - (i - self.radius).clamp(min=0) + 1
            out = out / count.to(image.dtype).view([1, 1] + [-1 if a == axis else 1 for a in range(n)])
        return out


def box_sum(x: Tensor, radius: int) -> Tensor:
    """Sum over cubic windows ``2 radius + 1`` wide, zero outside; separable, its own adjoint.

    Args:
        x: ``(B, C, *S)``.
        radius: half width in voxels.
    """
    n = x.dim() - 2
    for axis in range(n):
        dim, size = axis + 2, x.shape[axis + 2]
        pads = [0, 0] * (n - 1 - axis) + [radius, radius]
        padded = F.pad(x, pads)
        out = padded.narrow(dim, 0, size)
        for k in range(1, 2 * radius + 1):
            out = out + padded.narrow(dim, k, size)
        x = out
    return x
