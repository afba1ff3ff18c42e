"""Coarse-to-fine levels: their sizes, their voxel spacing, their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields import gaussian_smooth

__all__ = ["Level", "automatic_scales", "make_level", "shrink"]

_COARSEST = 16  # voxels; automatic levels below half resolution shrink no axis to fewer
_SHORTEST = 8  # voxels; axes are not shrunk below this


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        scale: nominal reduction against the finest grid.
        size: voxels per axis.
        unit: length of the metric's unit in voxels of each axis: 1 along the finest axis, less along coarser ones.
    """

    scale: float
    size: tuple[int, ...]
    unit: tuple[float, ...]

    def in_voxels(self, sigma: float) -> tuple[float, ...]:
        """A length in units of the finest voxel edge, as voxels of every axis."""
        return tuple(sigma * u for u in self.unit)


def make_level(size: Sequence[int], spacing: Sequence[float], scale: float) -> Level:
    """Shrink the axes that are finer than ``scale`` times the finest one, as far as their length allows.

    Args:
        size: voxels per axis of the finest grid.
        spacing: voxel edge per axis, in any unit.
        scale: reduction of the finest axis, at least 1.
    """
    finest = min(spacing)
    shape, edges = [], []
    for length, edge in zip(size, spacing, strict=True):
        factor = max(1.0, scale * finest / edge)
        voxels = length if factor == 1 else max(min(length, _SHORTEST), round(length / factor))
        shape.append(voxels)
        edges.append(edge * (length - 1) / (voxels - 1))
    unit = min(edges)
    return Level(scale, tuple(shape), tuple(unit / e for e in edges))


def automatic_scales(size: Sequence[int], spacing: Sequence[float], predicted: bool) -> tuple[int, ...]:
    """Scales for images of this size: from the identity as coarse as the images allow, from a prediction two levels."""
    scales = []
    for scale in (2, 1) if predicted else (8, 4, 2, 1):
        level = make_level(size, spacing, scale)
        shrunk = [new for new, old in zip(level.size, size, strict=True) if new < old]
        if scale == 1 or (shrunk and min(shrunk) >= (_COARSEST if scale > 2 else _SHORTEST)):
            scales.append(scale)
    return tuple(scales)


def shrink(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resample an image onto a coarser grid with the same corner voxels, low-pass filtered first.

    Args:
        image: ``(B, C, *S)``.
        size: voxels per axis, each at most as many as the image has.
    """
    if tuple(image.shape[2:]) == tuple(size):
        return image
    sigma = [0.5 * (old - 1) / (new - 1) if new < old else 0.0 for old, new in zip(image.shape[2:], size, strict=True)]
    mode = "bilinear" if image.dim() == 4 else "trilinear"
    return F.interpolate(gaussian_smooth(image, sigma), size=tuple(size), mode=mode, align_corners=True)
