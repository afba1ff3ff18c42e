"""Global normalised cross-correlation."""

from __future__ import annotations

from torch import Tensor

from monai_lm.similarity.base import Similarity

__all__ = ["NCC"]


class NCC(Similarity):
    """``1 - ρ²`` with ``ρ`` the correlation of the two images, times the number of voxels.

    Invariant to ``a I + b`` of either image, so also to inverted contrast.

    Args:
        epsilon: added to both variances, as a fraction of the variance of the whole image.
    """

    standardized = True

    def __init__(self, epsilon: float = 1e-6) -> None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = float(epsilon)

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        (fixed,) = reference
        axes = tuple(range(2, warped.dim()))
        i = warped - warped.mean(axes, keepdim=True)
        j = fixed - fixed.mean(axes, keepdim=True)
        covariance = (i * j).mean(axes, keepdim=True)
        variance = (i * i).mean(axes, keepdim=True) + self.epsilon
        ratio = covariance / (variance * ((j * j).mean(axes, keepdim=True) + self.epsilon))
        voxels, channels = fixed[0, 0].numel(), warped.shape[1]
        loss = voxels * (1 - covariance * ratio).flatten(1).mean(1)
        derivative = 2 * ratio * (covariance / variance * i - j) / channels
        return loss, derivative
