"""Coarse-to-fine levels: their sizes, their voxel spacing, their images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_lm.fields.smoothing import gaussian_smooth
from monai_lm.kernels.devices import widest_float

__all__ = ["SHORTEST", "Level", "make_level", "move_field", "shrink"]

SHORTEST = 8  # voxels; axes are not shrunk below this
_SLAB = 2**20  # voxels of a field that are moved together


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: a grid that shares its centre with the finest one.

    Attributes:
        scale: nominal reduction against the finest grid.
        size: voxels per axis.
        factor: length of its voxels in voxels of the finest grid, per axis.
        unit: length of the metric's unit in voxels of each axis: 1 along the finest axis, less along coarser ones.
    """

    scale: float
    size: tuple[int, ...]
    factor: tuple[float, ...]
    unit: tuple[float, ...]

    def in_voxels(self, sigma: float) -> tuple[float, ...]:
        """A length in units of the finest voxel edge, as voxels of every axis."""
        return tuple(sigma * u for u in self.unit)


def make_level(size: Sequence[int], spacing: Sequence[float], scale: float) -> Level:
    """Shrink the axes that are finer than ``scale`` times the finest one, as far as their length allows.

    The centre is shared, the factor is exact and the number of voxels even, so that the voxels of a level stay where
    they are when the images are mirrored, or padded equally on both sides.

    Args:
        size: voxels per axis of the finest grid.
        spacing: voxel edge per axis, in any unit.
        scale: reduction of the finest axis, at least 1.
    """
    finest = min(spacing)
    shape, factors = [], []
    for length, edge in zip(size, spacing, strict=True):
        factor = max(1.0, scale * finest / edge)
        voxels = length if factor == 1 else min(length, 2 * math.ceil(length / factor / 2 - 1e-9))
        if voxels < min(length, SHORTEST):
            voxels = min(length, SHORTEST)
            factor = length / voxels
        shape.append(voxels)
        factors.append(factor)
    edges = [edge * factor for edge, factor in zip(spacing, factors, strict=True)]
    unit = min(edges)
    return Level(scale, tuple(shape), tuple(factors), tuple(unit / e for e in edges))


def shrink(image: Tensor, level: Level) -> Tensor:
    """Bring an image onto the grid of a level, low-pass filtered first; channel by channel, for the memory it takes.

    Args:
        image: ``(B, C, *S)`` on the finest grid.
        level: where to.
    """
    n = len(level.size)
    if image.shape[1] > 1 and max(level.factor) > 1:
        return torch.cat([shrink(channel, level) for channel in image.split(1, 1)], 1)
    for axis, factor in enumerate(level.factor):  # the next axis has fewer voxels to filter
        if factor > 1:
            size, ratio, sigma = list(image.shape[2:]), [1.0] * n, [0.0] * n
            size[axis], ratio[axis], sigma[axis] = level.size[axis], factor, 0.5 * factor
            image = _regrid(gaussian_smooth(image, sigma), size, ratio)
    return image


def move_field(ddf: Tensor, old: Level, new: Level, out: Tensor | None = None) -> Tensor:
    """Bring a field from the grid of one level onto that of another, units included.

    Args:
        ddf: ``(B, n, *S)`` in voxels of the old level.
        old: level of the field.
        new: level to move to.
        out: ``(B, n, *S)`` to write to, slab by slab, in a precision of its own; for fields that are large.

    Returns:
        ``(B, n, *S)`` in voxels of the new level.
    """
    out = ddf.new_empty(*ddf.shape[:2], *new.size) if out is None else out
    ratio = [after / before for after, before in zip(new.factor, old.factor, strict=True)]
    rows = max(1, _SLAB * new.size[0] // out[:, 0].numel())
    for first in range(0, new.size[0], rows):
        some = slice(first, first + rows)
        for axis, r in enumerate(ratio):
            values = _regrid(ddf[:, axis : axis + 1], new.size, ratio, some)
            out[:, axis : axis + 1, some] = values if r == 1 else values.div_(r)  # of one size, the field itself
            del values  # before there are the next ones
    return out


def _regrid(values: Tensor, size: Sequence[int], ratio: Sequence[float], rows: slice = slice(None)) -> Tensor:
    """Linear interpolation on a grid with the same centre, its voxels ``ratio`` times as long; the border continues.

    With ``rows``, of the new grid, only those.
    """
    for axis, (count, step) in enumerate(zip(size, ratio, strict=True)):
        dim, length = axis + 2, values.shape[axis + 2]
        some = rows if axis == 0 else slice(None)
        k = torch.arange(count, dtype=widest_float(values.device), device=values.device)[some]
        if len(k) == length and step == 1:
            continue
        at = ((k - (count - 1) / 2) * step + (length - 1) / 2).clamp(0, length - 1)
        lower = at.floor().clamp(max=length - 2)
        weight = (at - lower).to(values.dtype).view(-1, *[1] * (values.dim() - dim - 1))
        index = lower.long()
        below = values.index_select(dim, index)
        values = below.lerp_(values.index_select(dim, index + 1), weight.expand_as(below))
    return values
