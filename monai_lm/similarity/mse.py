"""Mean squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity.base import KernelSimilarity, Range

__all__ = ["MSE"]


class MSE(KernelSimilarity):
    """``(I - J)²`` per voxel, for images of the same modality and intensity scale.

    Both images of a pair are divided by the largest absolute intensity of the two.
    """

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """Bring the intensities of a pair into [-1, 1], both by the same factor."""
        sums = [kernels.image_sums(image.contiguous()) for image in (fixed, moving)]
        largest = torch.stack([s[:, :, :2].abs().flatten(1).amax(1) for s in sums]).amax(0)
        factor = 1 / largest.clamp(min=torch.finfo(torch.float32).tiny)
        both = factor[:, None].expand(-1, fixed.shape[1])
        return (torch.zeros_like(both), both), (torch.zeros_like(both), both)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :func:`monai_lm.kernels.reference.mse`."""
        fixed, shift, factor, weight = reference
        return kernels.mse(warped, fixed, shift, factor, weight, out)
