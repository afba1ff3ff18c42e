"""Soft Dice of structures of both images, each in the boxes that hold it: the term of every guidance by labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.guidance.base import Grid, Term

__all__ = ["Box", "Overlap", "Structure", "dice_loss"]

_STRENGTH = 10.0
"""How hard a border pulls that is off by its width. So a weight of 1 takes the Dice of guided labels of a pair of each
validation set up by .13 (brain at 2 mm), .10 (hippocampus) and .24 (cardiac); with 1 in this place by .06, .06, .16."""
_FEW = 4  # voxels: where displacements differ by less, boxes are not looked at more closely


@dataclass(frozen=True)
class Box:
    """Part of a grid.

    Attributes:
        start: first voxel per axis.
        stop: the voxel after the last one, per axis.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def of(self, volume: Tensor) -> Tensor:
        """Its part of ``(…, *S)``."""
        for dim, (a, b) in enumerate(zip(self.start, self.stop, strict=True), start=volume.dim() - len(self.start)):
            volume = volume.narrow(dim, a, b - a)
        return volume

    def meet(self, other: Box) -> Box | None:
        """What two boxes share."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, other: Box) -> Box:
        """The same part, counted from the start of a box around it."""
        return Box(*(tuple(a - b for a, b in zip(ends, other.start, strict=True)) for ends in (self.start, self.stop)))


@dataclass(frozen=True)
class Structure:
    """What shall lie on each other in one pair.

    Attributes:
        pair: its number in the batch.
        fixed_box: part of the images' grid outside of which the fixed map is zero.
        fixed: the fixed map in any box, ``(*box)``, from 0 to 1.
        moving_box: the same of the moving map.
        moving: the same of the moving map.
    """

    pair: int
    fixed_box: Box
    fixed: Callable[[Box], Tensor]
    moving_box: Box
    moving: Callable[[Box], Tensor]


@dataclass(frozen=True)
class _Soft:
    """A structure of one pair, smoothed on the grid of a level: boxes, and what is in them, ``(1, 1, *box)`` each."""

    pair: int
    fixed_box: Box
    fixed: Tensor
    moving_box: Box
    moving: Tensor


class Overlap(Term):
    """Structures on the grid of a level: the mean over those of a pair of one minus soft Dice.

    Args:
        structures: of all pairs, at least one of each.
        grid: of the level.
        sigma: standard deviation of the Gaussian on every map, in voxels of the level's finest axis.
    """

    def __init__(self, structures: Sequence[Structure], grid: Grid, sigma: float) -> None:
        self.grid = grid
        self.count = Counter(one.pair for one in structures)
        along = [sigma * unit for unit in grid.unit]
        self.soft = []
        for one in structures:
            fixed = _soft(one.fixed, one.fixed_box, grid, along)
            moving = _soft(one.moving, one.moving_box, grid, along)
            self.soft.append(_Soft(one.pair, *fixed, *moving))
        finest = max(range(len(grid.unit)), key=lambda axis: grid.unit[axis])
        blur = sigma**2 + grid.sigma[finest] ** 2 + 0.3  # of a voxel's width, 1/12, and of the sampling
        # of a border that is off by its width the push, smoothed, is one over this, without the strength
        self.strength = _STRENGTH * 2 * math.sqrt(2 * math.pi * blur)

    @override
    def evaluate(self, ddf: Tensor, pull: Tensor | None, weight: float) -> Tensor:
        """One minus the mean soft Dice of a pair, and the smoothed push of all borders."""
        loss = ddf.new_zeros(len(ddf))
        push = None if pull is None else torch.zeros_like(pull)
        for label, box in zip(self.soft, self._boxes(ddf), strict=True):
            one = slice(label.pair, label.pair + 1)
            loss[one] += 1.0 / self.count[label.pair] if box is None else self._label(label, box, ddf[one], push, one)
        if pull is not None and push is not None:
            smooth = torch.empty_like(push[:, :1])
            for axis in range(pull.shape[1]):
                kernels.smooth(push[:, axis : axis + 1].contiguous(), self.grid.sigma, smooth)
                pull[:, axis : axis + 1].add_(smooth, alpha=weight * self.strength)
        return loss

    def _label(self, label: _Soft, box: Box, ddf: Tensor, push: Tensor | None, one: slice) -> Tensor:
        """The loss of a label, over the number of labels, and its push, in the box that the warped one is in."""
        field = box.of(ddf).clone()
        for axis, (here, there) in enumerate(zip(box.start, label.moving_box.start, strict=True)):
            field[:, axis] += here - there
        warped = torch.empty(1, 1, *field.shape[2:], dtype=ddf.dtype, device=ddf.device)
        kernels.sample(label.moving.to(ddf.dtype), field, None, None, None, warped)
        fixed = torch.zeros_like(warped)
        if (both := box.meet(label.fixed_box)) is not None:
            both.within(box).of(fixed).copy_(both.within(label.fixed_box).of(label.fixed))
        loss, derivative = dice_loss(warped, fixed, label.fixed.square().sum())
        if push is not None:
            kernels.gradient(warped, derivative, [0.0] * field.shape[1], field)
            box.of(push[one]).add_(field)
        return loss / self.count[label.pair]

    def _boxes(self, ddf: Tensor) -> list[Box | None]:
        """For every label the voxels that the map may take into its box of the moving image."""
        per_pair = _ranges(list(ddf.split(1)))
        boxes = [self._box(label, *per_pair[label.pair]) for label in self.soft]
        closer = [
            k
            for k, label in enumerate(self.soft)
            if boxes[k] is not None and max(b - a for a, b in zip(*per_pair[label.pair], strict=True)) > _FEW
        ]
        parts = [box.of(ddf[self.soft[k].pair]).unsqueeze(0) for k in closer if (box := boxes[k]) is not None]
        for k, found in zip(closer, _ranges(parts), strict=True):
            boxes[k] = self._box(self.soft[k], *found)
        return boxes

    def _box(self, label: _Soft, low: list[float], high: list[float]) -> Box | None:
        """The voxels that displacements in a range may take into the label's box; ``None`` if there are none."""
        start, stop = [], []
        ends = zip(label.moving_box.start, label.moving_box.stop, self.grid.size, low, high, strict=True)
        for first, last, size, least, most in ends:
            a = 0 if first == 0 else math.floor(first - most)  # beyond the border the label continues
            b = size if last == size else math.ceil(last - least)
            a, b = max(0, a), min(size, b)
            if a >= b:
                return None
            if b - a < 2:
                a, b = max(0, min(a, size - 2)), min(size, max(b, a + 2))
            start.append(a)
            stop.append(b)
        return Box(tuple(start), tuple(stop))


def dice_loss(warped: Tensor, fixed: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """One minus soft Dice, and its derivative by the warped label times half the sum of squares.

    The factor makes the derivative, ``D W - F``, one of a label's border, not of its size.

    Args:
        warped: ``(1, 1, *S)``, where it is not zero.
        fixed: ``(1, 1, *S)``.
        squares: sum of squares of the whole fixed label.

    Returns:
        The loss, and ``(1, 1, *S)``.
    """
    dice = 2 * (warped * fixed).sum() / (squares + warped.square().sum()).clamp(min=1e-20)
    return 1 - dice, dice * warped - fixed


def _ranges(fields: list[Tensor]) -> list[tuple[list[float], list[float]]]:
    """Smallest and largest displacement along every axis, of fields ``(1, n, *S)``; the host waits once."""
    if not fields:
        return []
    ends = torch.stack([torch.stack(torch.aminmax(f.flatten(2), dim=2)) for f in fields])[:, :, 0]
    return [(low, high) for low, high in ends.tolist()]


def _soft(values_in: Callable[[Box], Tensor], held: Box, grid: Grid, sigma: Sequence[float]) -> tuple[Box, Tensor]:
    """A map, in the box that holds it, on a level: low-pass filtered, then smoothed."""
    n, dtype = len(grid.size), torch.float32
    low_pass = [0.5 * f if f > 1 else 0.0 for f in grid.factor]
    near, far, first, last = [], [], [], []
    for axis in range(n):
        reach = math.ceil(3 * low_pass[axis]) + 1
        a, b = held.start[axis] - reach, held.stop[axis] - 1 + reach
        beyond = math.ceil(3 * sigma[axis]) + 1
        near.append(max(0, a))
        far.append(min(grid.full[axis], b + 1))
        first.append(max(0, math.floor(grid.onto(a, axis)) - beyond))
        last.append(min(grid.size[axis], math.ceil(grid.onto(b, axis)) + beyond + 1))
    values = values_in(Box(tuple(near), tuple(far))).to(dtype)[None, None]
    box = Box(tuple(first), tuple(last))
    if any(low_pass):
        values = _smoothed(values, low_pass)
    size = [b - a for a, b in zip(first, last, strict=True)]
    field = torch.zeros(1, n, *size, dtype=dtype, device=values.device)
    for axis in range(n):
        k = torch.arange(size[axis], dtype=dtype, device=values.device)
        offset = grid.back(first[axis], axis) - near[axis] + (grid.factor[axis] - 1) * k
        field[:, axis] = offset.view([-1 if a == axis else 1 for a in range(n)])
    out = torch.empty(1, 1, *size, dtype=dtype, device=values.device)
    kernels.sample(_at_least_two(values), field, None, None, None, out)
    return box, _smoothed(out, sigma) if any(sigma) else out


def _at_least_two(values: Tensor) -> Tensor:
    """The same with every axis two voxels long, its border continued."""
    for dim in range(2, values.dim()):
        if values.shape[dim] < 2:
            values = torch.cat([values, values], dim)
    return values.contiguous()


def _smoothed(values: Tensor, sigma: Sequence[float]) -> Tensor:
    out = torch.empty_like(values)
    kernels.smooth(values.contiguous(), list(sigma), out)
    return out
