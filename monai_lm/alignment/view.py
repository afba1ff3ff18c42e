"""Two images at one resolution under a linear map: how unlike they are, and which way the map should change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.fields.space import Grid, through_affine, to_world
from monai_lm.kernels.devices import widest_float
from monai_lm.kernels.reference import eulerian_gradient, positions
from monai_lm.similarity import Similarity
from monai_lm.solver.pyramid import SHORTEST, Level, make_level, shrink

__all__ = ["Look", "View", "levels_of", "shrunk_grid"]

_LARGEST, _LONGEST = 2**20, 32
"""Voxels of the finest level at most, and voxels along the longest axis of the coarsest."""

_BEAT = 5**0.5 / 2
"""By how much the fixed image's voxels are longer, see :func:`_off_beat`."""

_BLOCK = 4
"""Edge of the blocks that halves are made of."""

_OVERLAP = 0.25
"""Part of the smaller of the two grids that must lie in the other."""


def levels_of(grid: Grid) -> list[Level]:
    """Reductions of the fixed grid, coarse to fine, each twice as fine as the one before."""
    scale, out = 1.0, [_off_beat(grid, 1.0)]
    while max(out[-1].size) > _LONGEST:
        scale *= 2
        level = _off_beat(grid, scale)
        if level.size == out[-1].size:
            break
        out.append(level)
    fine = [level for level in out if np.prod(level.size) <= _LARGEST] or out[-1:]
    return fine[::-1]


def _off_beat(grid: Grid, scale: float) -> Level:
    """A level whose voxels are longer yet, along every axis, so that they do not keep step with the moving image's.

    Linear interpolation averages noise, but not on the voxels themselves. If all of them can be met at once, as in two
    images on one grid, whatever map leads between them makes noisy images more alike, and is taken for the true one.
    """
    level, size, factor = make_level(grid.size, grid.spacing, scale), [], []
    for length, short in zip(grid.size, level.factor, strict=True):
        voxels = 2 * math.ceil(length / (short * _BEAT) / 2 - 1e-9)
        fits = voxels >= min(length, SHORTEST)
        size.append(voxels if fits else min(length, SHORTEST))
        factor.append(short * _BEAT if fits else length / size[-1])
    return replace(level, size=tuple(size), factor=tuple(factor))


def shrunk_grid(grid: Grid, level: Level) -> Grid:
    """Where the voxels of a level of a grid lie."""
    n, step = len(grid.size), np.eye(4)
    for axis in range(n):
        step[axis, axis] = level.factor[axis]
        step[axis, 3] = (grid.size[axis] - 1) / 2 - (level.size[axis] - 1) / 2 * level.factor[axis]
    return Grid(level.size, grid.affine @ step)


class View:
    """Both images at the resolution of a level.

    Args:
        fixed: ``(1, C, *S)``, as the measure wants it.
        moving: ``(1, C, *M)``.
        grids: where the two lie.
        measure: how they are compared.
        level: of the fixed grid; the moving image is brought to voxels of that length.
    """

    def __init__(
        self, fixed: Tensor, moving: Tensor, grids: tuple[Grid, Grid], measure: Similarity, level: Level
    ) -> None:
        edge = level.scale * min(grids[0].spacing)
        own = make_level(grids[1].size, grids[1].spacing, max(1.0, edge / min(grids[1].spacing)))
        self.fixed, self.shown = shrink(fixed, level), shrink(moving, own)
        self.grids = shrunk_grid(grids[0], level), shrunk_grid(grids[1], own)
        self.measure, self.edge = measure, max(edge, min(self.grids[1].spacing))
        self._reference, self.moving = measure.prepare(self.fixed, self.shown)
        n = len(level.size)
        self._still = torch.zeros(1, n, *level.size, device=fixed.device)
        volumes = [np.prod([s * e for s, e in zip(grid.size, grid.spacing, strict=True)]) for grid in grids]
        self._least = _OVERLAP * min(1.0, volumes[1] / volumes[0])

    def look(self, matrix: np.ndarray) -> Look:
        """The images under a map ``(4, 4)`` in RAS millimetres, from fixed to moving points."""
        f, m = self.grids
        ddf = through_affine(self._still, f.affine, m.affine, matrix)
        inside = _inside(ddf, m.size)
        warped = warp(self.moving, ddf)
        if self.measure.weighs_moving:
            warped[:, :1] *= inside
        loss, derivative = self.measure.evaluate(warped, self._reference)
        value = float(loss) / inside.numel()
        known = np.isfinite(value) and float(inside.mean()) >= self._least
        return Look(self, matrix, value if known else np.inf, warped, derivative)

    @property
    def counted(self) -> float:
        """As how many voxels of the fixed image those of this view are worth, of a measure that weighs them."""
        weight = self.fixed[:, -1].double()
        return float(weight.sum() ** 2 / (weight**2).sum())

    def halves(self) -> tuple[View, View]:
        """Of the fixed image every second block of voxels, and the others, of a measure that weighs them."""
        n, blocks = len(self.grids[0].size), torch.zeros(self.grids[0].size, device=self.fixed.device)
        for axis, length in enumerate(self.grids[0].size):
            number = torch.arange(length, device=blocks.device) // _BLOCK
            blocks = blocks + number.view([-1 if a == axis else 1 for a in range(n)])
        odd = blocks % 2
        first, second = copy(self), copy(self)
        for view, part in ((first, odd), (second, 1 - odd)):
            view.fixed = torch.cat([self.fixed[:, :-1], self.fixed[:, -1:] * part], 1)
            view._reference, view.moving = self.measure.prepare(view.fixed, self.shown)
        return first, second


def _inside(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """One where a field ``(1, n, *S)`` leads into a grid, zero a voxel beyond, linear in between, ``(1, 1, *S)``."""
    out = torch.ones_like(ddf[:, :1])
    for length, at in zip(size, positions(ddf), strict=True):
        out *= (1 + torch.minimum(at, length - 1 - at)).clamp(0, 1)[:, None]
    return out


@dataclass(frozen=True, eq=False)
class Look:
    """One evaluation.

    Attributes:
        view: of what.
        matrix: ``(4, 4)`` the map.
        loss: dissimilarity per voxel; infinite where the images do not overlap.
        warped: the moving image under it.
        derivative: of the loss with respect to that.
    """

    view: View
    matrix: np.ndarray
    loss: float
    warped: Tensor
    derivative: Tensor

    def normal(self, centre: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Slope of the loss along ``x ↦ x + K (x − c)/r + t``, applied before the map, and the sum of its squares.

        Args:
            centre: ``(n,)`` the point ``c`` in RAS millimetres.
            radius: the length ``r`` in millimetres.

        Returns:
            ``(n, n + 1)`` derivative with respect to ``K`` and ``t`` in millimetres, and ``(n (n + 1), n (n + 1))``:
            Levenberg–Marquardt's matrix, which has the slope of each voxel times itself, summed.
        """
        n, affine = len(centre), self.view.grids[0].affine
        g = eulerian_gradient(self.derivative, self.warped)[0]
        there = (g != 0).any(0)
        points = to_world(there.nonzero().to(widest_float(g.device)), affine)
        rows = torch.cat([(points - points.new_tensor(centre)) / radius, torch.ones_like(points[:, :1])], 1)
        in_mm = points.new_tensor(np.linalg.inv(affine[:n, :n]) / there.numel())  # of a step per voxel
        slopes = g[:, there].T.to(points) @ in_mm
        each = (slopes[:, :, None] * rows[:, None]).flatten(1)
        first, second = each.sum(0), each.T @ each
        return first.view(n, n + 1).cpu().double().numpy(), second.cpu().double().numpy()
