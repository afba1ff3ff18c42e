"""Mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm.similarity.base import LocalSimilarity, Range, line_sums

__all__ = ["MSE"]


class MSE(LocalSimilarity):
    """``(I - J)²`` per voxel, for images of the same modality and intensity scale.

    Both images of a pair are divided by the largest absolute intensity of the two.
    """

    halo = 0
    weighable = True

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """Bring the intensities of a pair into [-1, 1], both by the same factor."""
        axes, wide = tuple(range(1, fixed.dim())), torch.promote_types(fixed.dtype, torch.float32)
        extremes = [
            f(image, axes, keepdim=True).to(wide).abs() for f in (torch.amin, torch.amax) for image in (fixed, moving)
        ]
        largest = torch.stack(extremes).amax(0).clamp(min=torch.finfo(wide).tiny)
        channels = fixed.shape[1]
        factor = (1 / largest).expand(-1, channels, *[-1] * (fixed.dim() - 2))
        return (torch.zeros_like(factor), factor), (torch.zeros_like(factor), factor)

    def evaluate_lines(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss per line ``(B, rows, columns)`` and derivative ``(B, C, *S)``; see :class:`LocalSimilarity`."""
        fixed, *weight = reference
        difference = (warped - fixed) / warped.shape[1]
        difference = difference * weight[0] if weight else difference
        return line_sums(difference * (warped - fixed)), 2 * difference
