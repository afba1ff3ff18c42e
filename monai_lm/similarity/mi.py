"""Mutual information of a joint histogram."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity.base import KernelSimilarity, Range

__all__ = ["MI"]


class MI(KernelSimilarity):
    """``1 - MI / M`` times the number of voxels, with ``M`` the most that the two images could have in common.

    ``M = H - h`` is the entropy of the warped image less that of a single intensity's window. So the loss lies between
    0, where the fixed image tells the warped one, and 1 a voxel. Without the division by ``M``, a field would gain from
    any spread of the warped image's intensities, and leave the true one for it; ``MI`` over the entropy of the fixed
    image does: from a field .13 voxels off, on images of 16³, it went to .26, and this goes to .10.

    Invariant to ``a I + b`` of either image, and nearly so to any map of intensities that can be undone: for images of
    different contrast. Windows are cubic in the warped image and linear in the fixed one. The bins of an image reach
    from its smallest to its largest intensity, those of the warped image as far as the moving one's.

    Args:
        bins: of each image, 8 to 256. More bins resolve more of a smooth image's intensities; fewer bear more noise.
            GPUs have kernels for up to 64.

    Source:
        Mattes et al., "PET-CT image registration in the chest using free-form deformations", IEEE Transactions on
        Medical Imaging 2003.
    """

    invariant = True

    def __init__(self, bins: int = 16) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or not 8 <= bins <= 256:
            raise ValueError(f"bins must be a whole number from 8 to 256, got {bins!r}")
        self.bins = bins

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """Bring the intensities of every image and channel into [0, 1]; a constant becomes 0."""
        return _unit_range(fixed), _unit_range(moving)

    def evaluate_into(self, warped: Tensor, reference: tuple[Any, ...], out: Tensor) -> Tensor:
        """Loss ``(B,)``, and its derivative in ``out`` ``(B, C, *S)``; see :func:`monai_lm.kernels.reference.mi`."""
        fixed, shift, factor, weight = reference
        return kernels.mi(warped, fixed, shift, factor, weight, self.bins, out)

    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and its derivative with respect to ``warped`` as it was passed in, ``(B, C, *S)``."""
        reference, moving = self.prepare(fixed, warped)
        loss, derivative = self.evaluate(moving, reference)
        factor = _unit_range(warped)[1].to(derivative.dtype)[..., None]
        slope, place = derivative.flatten(2), moving.flatten(2)
        upper = (slope * place).sum(2, keepdim=True)  # the range depends on the image, too
        lower = slope.sum(2, keepdim=True) - upper
        slope = slope.scatter_add(2, place.argmin(2, keepdim=True), -lower)
        slope = slope.scatter_add(2, place.argmax(2, keepdim=True), -upper)
        return loss, (slope * factor).view(warped.shape)


def _unit_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and factor that bring every image and channel into [0, 1], ``(B, C)`` each; a constant becomes 0."""
    low, high = kernels.image_sums(image.contiguous())[:, :, :2].unbind(2)
    width = high - low
    wide = width > 1e-6 * torch.maximum(low.abs(), high.abs())
    return low, torch.where(wide, 1 / width, torch.zeros_like(width))
