"""Few voxels far beyond all others, as metal or a dead pixel leaves them, brought back to the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["squeezed", "without_outliers"]

_FEW = 1e-3
"""Of the voxels: so many, or four, may lie beyond at either end."""

_FAR = 3.0
"""How many ranges of the others outliers lie beyond them: bright vessels do not."""

_MOST, _PART = 1e-2, 1e-2
"""An image is squeezed if all but so many voxels at either end lie in so small a part of its range."""

_SLAB = 2**20


def without_outliers(*images: Tensor) -> list[Tensor]:
    """Images in which few intensities far beyond all others become the largest, or smallest, of those.

    They would stretch bins and scales, and on coarse levels a single one shines over its surroundings. Where there are
    none the image itself is returned. Channels in [0, 1] are left alone where there are several: they may be soft
    labels, of small structures, too.

    Args:
        images: ``(B, C, *S)`` each, finite. A GPU is waited for once.
    """
    found = [_bounds(image) for image in images]
    far = torch.stack([outside.any() for outside, _, _ in found]).tolist()
    return [
        torch.minimum(torch.maximum(image, lower), upper) if some else image
        for image, (_, lower, upper), some in zip(images, found, far, strict=True)
    ]


def squeezed(image: Tensor) -> bool:
    """Whether nearly all voxels of an image share a hundredth of its range, without being of one value.

    A similarity then sees little but the others. Binary images, whose voxels are of one value, are not meant.

    Args:
        image: ``(B, C, *S)``.
    """
    flat = image.flatten(2)
    count = math.ceil(_MOST * flat.shape[2]) + 1
    highest, lowest = _largest(flat, count), -_largest(-flat, count)
    most = highest[..., -1] - lowest[..., -1]
    return bool(((most > 0) & (most < _PART * (highest[..., 0] - lowest[..., 0]))).any())


def _bounds(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which channels have outliers, ``(B, C)``, and what they are clamped to, ``(B, C, 1, …)``."""
    flat = image.flatten(2)
    count = min(max(4, math.ceil(_FEW * flat.shape[2])), (flat.shape[2] - 1) // 2) + 1
    highest, lowest = _largest(flat, count), -_largest(-flat, count)
    high, low = highest[..., -1:], lowest[..., -1:]
    top, bottom = high + _FAR * (high - low), low - _FAR * (high - low)
    far = ((highest[..., :1] > top) | (lowest[..., :1] < bottom)) & (high > low)
    if image.shape[1] > 1:
        far = far & ((highest[..., :1] > 1) | (lowest[..., :1] < 0))
    upper = torch.where(highest <= top, highest, high).amax(2, keepdim=True)
    lower = torch.where(lowest >= bottom, lowest, low).amin(2, keepdim=True)
    bounds = (lower.where(far, -math.inf), upper.where(far, math.inf))
    lower, upper = (bound.to(image.dtype).view(*far.shape[:2], *[1] * (image.dim() - 2)) for bound in bounds)
    return far, lower, upper


def _largest(flat: Tensor, count: int) -> Tensor:
    """The ``count`` largest of ``(B, C, N)``, in float32, falling; slab by slab, for the memory that sorting takes."""
    parts = [slab.topk(min(count, slab.shape[2]), 2).values.float() for slab in flat.split(_SLAB, 2)]
    return torch.cat(parts, 2).topk(count, 2).values if len(parts) > 1 else parts[0]
