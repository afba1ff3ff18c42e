"""Guidance by label maps of both images: soft Dice of any of their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.ndimage import find_objects
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.fields.finite import check_number
from monai_lm.guidance.base import Grid, Guidance, Term

__all__ = ["Labels", "dice_loss"]

_STRENGTH = 10.0
"""How hard a border pulls that is off by its width. So a weight of 1 takes the Dice of guided labels of a pair of each
validation set up by .13 (brain at 2 mm), .10 (hippocampus) and .24 (cardiac); with 1 in this place by .06, .06, .16."""
_FEW = 4  # voxels: where displacements differ by less, boxes are not looked at more closely


class Labels(Guidance):
    """Labels that shall lie on each other: the mean over labels of one minus soft Dice, ``2 Σ F W / (Σ F² + Σ W²)``.

    ``F`` is the fixed and ``W`` the warped moving label, both smoothed. Every border pulls with the same strength,
    whatever the size and the number of labels: with a weight of 1 where it is off by its width ten times as hard as
    images do. Labels are handled one by one, in the boxes that hold them, which takes about 1 ms per label and
    iteration on a CPU core for a brain at 2 mm. Extra memory beside what every guidance needs, 6 V and 3 more with a
    prediction, where V is one image in float32: 4 V for a moment, and the boxes, which are .4 to .9 V for a few organs
    and 8.6 V for the 138 structures of a brain.

    Args:
        fixed: ``(B, 1, *S)`` whole numbers, on the grid of the images; 0 is background.
        moving: ``(B, 1, *S)``, the same of the moving image.
        weight: how hard they pull, relative to the images.
        values: the labels that count; ``None``: all but 0 that both maps of a pair have. A pair that lacks one of them
            in either map goes without it.
        sigma: standard deviation of the Gaussian on every label, in voxels of a level's finest axis.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, values that are not whole numbers or that no pair has, a number out of
            range.
    """

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        weight: float = 1.0,
        values: Sequence[int] | None = None,
        sigma: float = 1.0,
    ) -> None:
        self.fixed, self.moving = (_labels(name, value) for name, value in (("fixed", fixed), ("moving", moving)))
        if self.fixed.shape != self.moving.shape:
            raise ValueError(
                f"fixed and moving labels must have one shape, got {tuple(self.fixed.shape)} and "
                f"{tuple(self.moving.shape)}"
            )
        if self.fixed.device != self.moving.device:
            raise ValueError(
                f"fixed and moving labels must be on one device, got {self.fixed.device} and {self.moving.device}"
            )
        check_number("weight", weight, 0, exclusive=True)
        check_number("sigma", sigma, 0)
        pairs = zip(self.fixed, self.moving, strict=True)
        common = [sorted(set(f.unique().tolist()) & set(m.unique().tolist())) for f, m in pairs]
        self.values = [[v for v in found if (v if values is None else v in values)] for found in common]
        self._fixed_boxes = [_bounds(f, found) for f, found in zip(self.fixed, self.values, strict=True)]
        self._moving_boxes = [_bounds(m, found) for m, found in zip(self.moving, self.values, strict=True)]
        if values is not None and (missing := sorted(set(values) - {v for found in common for v in found})):
            raise ValueError(f"values must be labels that both maps have, got {missing}, which no pair has")
        if empty := [pair for pair, found in enumerate(self.values) if not found]:
            raise ValueError(f"fixed and moving must have a label in common, got none for pairs {empty}")
        self.weight, self.sigma = float(weight), float(sigma)

    @override
    def check(self, fixed: Tensor) -> None:
        expected = (len(fixed), 1, *fixed.shape[2:])
        if tuple(self.fixed.shape) != expected:
            raise ValueError(
                f"guidance must have labels (B, 1, *S) = {expected} on the grid of fixed, got shape "
                f"{tuple(self.fixed.shape)}"
            )
        if self.fixed.device != fixed.device:
            raise ValueError(f"guidance must be on the device of fixed, {fixed.device}, got {self.fixed.device}")

    @override
    def at(self, grid: Grid) -> Term:
        return _Overlap(self, grid)


@dataclass(frozen=True)
class _Box:
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

    def meet(self, other: _Box) -> _Box | None:
        """What two boxes share."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return _Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def within(self, other: _Box) -> _Box:
        """The same part, counted from the start of a box around it."""
        return _Box(*(tuple(a - b for a, b in zip(ends, other.start, strict=True)) for ends in (self.start, self.stop)))


@dataclass(frozen=True)
class _Soft:
    """A label of one pair, smoothed on the grid of a level: boxes, and what is in them, ``(1, 1, *box)`` each."""

    pair: int
    fixed_box: _Box
    fixed: Tensor
    moving_box: _Box
    moving: Tensor


class _Overlap(Term):
    """Labels on the grid of a level."""

    def __init__(self, labels: Labels, grid: Grid) -> None:
        self.grid, self.count = grid, [len(values) for values in labels.values]
        sigma = [labels.sigma * unit for unit in grid.unit]
        self.soft = []
        for pair, values in enumerate(labels.values):
            for value, here, there in zip(values, labels._fixed_boxes[pair], labels._moving_boxes[pair], strict=True):
                fixed = _soft(labels.fixed[pair, 0], value, here, grid, sigma)
                moving = _soft(labels.moving[pair, 0], value, there, grid, sigma)
                self.soft.append(_Soft(pair, *fixed, *moving))
        finest = max(range(len(grid.unit)), key=lambda axis: grid.unit[axis])
        blur = labels.sigma**2 + grid.sigma[finest] ** 2 + 0.3  # of a voxel's width, 1/12, and of the sampling
        # of a border that is off by its width the push, smoothed, is one over this, without the strength
        self.strength = _STRENGTH * 2 * math.sqrt(2 * math.pi * blur)

    @override
    def evaluate(self, ddf: Tensor, pull: Tensor | None, weight: float) -> Tensor:
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

    def _label(self, label: _Soft, box: _Box, ddf: Tensor, push: Tensor | None, one: slice) -> Tensor:
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

    def _boxes(self, ddf: Tensor) -> list[_Box | None]:
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

    def _box(self, label: _Soft, low: list[float], high: list[float]) -> _Box | None:
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
        return _Box(tuple(start), tuple(stop))


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


def _bounds(labels: Tensor, values: Sequence[int]) -> list[_Box]:
    """The boxes that hold every one of some values of a map ``(1, *S)``."""
    found, index = labels[0].unique(return_inverse=True)
    slices = dict(zip(found.tolist(), find_objects(index.cpu().numpy() + 1), strict=True))
    return [_Box(tuple(s.start for s in slices[v]), tuple(s.stop for s in slices[v])) for v in values]


def _soft(labels: Tensor, value: int, held: _Box, grid: Grid, sigma: Sequence[float]) -> tuple[_Box, Tensor]:
    """A label of a map ``(*full)``, in the box that holds it, on a level: low-pass filtered, then smoothed."""
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
    values = (_Box(tuple(near), tuple(far)).of(labels) == value).to(dtype)[None, None]
    box = _Box(tuple(first), tuple(last))
    if any(low_pass):
        values = _smoothed(values, low_pass)
    size = [b - a for a, b in zip(first, last, strict=True)]
    field = torch.zeros(1, n, *size, dtype=dtype, device=labels.device)
    for axis in range(n):
        k = torch.arange(size[axis], dtype=dtype, device=labels.device)
        offset = grid.back(first[axis], axis) - near[axis] + (grid.factor[axis] - 1) * k
        field[:, axis] = offset.view([-1 if a == axis else 1 for a in range(n)])
    out = torch.empty(1, 1, *size, dtype=dtype, device=labels.device)
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


def _labels(name: str, value: Any) -> Tensor:
    """A label map ``(B, 1, *S)`` of whole numbers, as integers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "as_tensor"):  # a MetaTensor
        value = value.as_tensor()
    value = value.detach()
    if value.dim() not in (4, 5) or value.shape[1] != 1 or not value.numel():
        raise ValueError(f"{name} must be labels (B, 1, *S), 2D or 3D, got shape {tuple(value.shape)}")
    whole = value.to(torch.int32)
    if value.is_complex() or not bool((whole == value).all()):
        raise ValueError(f"{name} must hold whole numbers, got other values in labels of {value.dtype}")
    return whole
