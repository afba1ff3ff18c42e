"""Guidance by points of the fixed image whose counterparts in the moving image are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.fields.finite import check_number
from monai_lm.fields.sampling import sample_points
from monai_lm.guidance.base import Grid, Guidance, Term

__all__ = ["Keypoints"]


_FAR = 10.0
"""Times the tolerance: the mean distance at which the loss is a half."""


class Keypoints(Guidance):
    """Corresponding points that the map shall take to each other.

    With ``m`` the mean of ``√(d² + τ²) - τ`` over the distances ``d`` in millimetres the loss is ``m / (m + 10 t)``,
    where ``t`` is the tolerance and ``τ² = t² + edge²`` with the finest voxel edge of the level. So every point pulls
    with the same strength however far it is from its counterpart, less within the tolerance, and wrong ones do little
    harm. Its pull reaches as far as the Gaussian on the images' gradient; where several reach, their mean counts.
    Extra memory beside what every guidance needs, 6 V and 3 more with a prediction, where V is one image in float32:
    3 V for a moment.

    Args:
        fixed: ``(B, K, n)`` in voxels of the fixed image. NaN stands for a point that a pair does not have.
        moving: ``(B, K, n)`` in voxels of the moving image: where they shall go.
        weight: how hard they pull, relative to the images.
        spacing: voxel edge per axis of the moving image, in millimetres; ``None``: that of the refinement.
        tolerance: of the points, in millimetres: distances below it hardly count.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, infinite points, a number out of range.
    """

    def __init__(
        self,
        fixed: Tensor,
        moving: Tensor,
        weight: float = 1.0,
        spacing: Sequence[float] | None = None,
        tolerance: float = 1.0,
    ) -> None:
        self.fixed, self.moving = (_points(name, value) for name, value in (("fixed", fixed), ("moving", moving)))
        if self.fixed.shape != self.moving.shape:
            raise ValueError(
                "fixed and moving keypoints must have one shape, got "
                f"{tuple(self.fixed.shape)} and {tuple(self.moving.shape)}"
            )
        if self.fixed.device != self.moving.device:
            raise ValueError(
                f"fixed and moving keypoints must be on one device, got {self.fixed.device} and {self.moving.device}"
            )
        self.known = ~(self.fixed.isnan() | self.moving.isnan()).any(2)
        if empty := (~self.known.any(1)).nonzero().flatten().tolist():
            raise ValueError(f"fixed and moving must have a keypoint in common, got none for pairs {empty}")
        check_number("weight", weight, 0, exclusive=True)
        check_number("tolerance", tolerance, 0, exclusive=True)
        if spacing is not None:
            spacing = tuple(float(s) for s in spacing)
            if len(spacing) != self.fixed.shape[2] or not all(0 < s < math.inf for s in spacing):
                raise ValueError(
                    f"spacing must be {self.fixed.shape[2]} positive numbers, one per axis, got {list(spacing)}"
                )
        self.weight, self.spacing, self.tolerance = float(weight), spacing, float(tolerance)

    @override
    def check(self, fixed: Tensor) -> None:
        """As many pairs and axes as the images ``(B, C, *S)``, and a point of each inside; ValueError if not."""
        n = fixed.dim() - 2
        if (len(self.fixed), self.fixed.shape[2]) != (len(fixed), n):
            raise ValueError(
                f"guidance must have keypoints (B, K, n) = ({len(fixed)}, K, {n}), got shape {tuple(self.fixed.shape)}"
            )
        if self.fixed.device != fixed.device:
            raise ValueError(f"guidance must be on the device of fixed, {fixed.device}, got {self.fixed.device}")
        size = self.fixed.new_tensor(fixed.shape[2:])
        inside = ((self.fixed > -1) & (self.fixed < size)).all(2) & self.known
        if none := (~inside.any(1)).nonzero().flatten().tolist():
            raise ValueError(
                "guidance must have keypoints in voxels of the fixed image, got none inside its grid "
                f"{tuple(fixed.shape[2:])} for pairs {none}"
            )

    @override
    def at(self, grid: Grid) -> Term:
        """The points in voxels of a level."""
        return _Points(self, grid)


class _Points(Term):
    """Keypoints on the grid of a level."""

    def __init__(self, points: Keypoints, grid: Grid) -> None:
        self.grid, self.known = grid, points.known
        fixed, moving = (x.clone() for x in (points.fixed, points.moving))
        for axis in range(len(grid.size)):
            for x in (fixed, moving):
                x[..., axis] = (x[..., axis] - (grid.full[axis] - 1) / 2) / grid.factor[axis]
                x[..., axis] += (grid.size[axis] - 1) / 2
        self.fixed, self.moving = (torch.where(self.known[..., None], x, 0.0) for x in (fixed, moving))
        edges = points.spacing or grid.edges
        self.edges = fixed.new_tensor([e * f for e, f in zip(edges, grid.factor, strict=True)])
        self.finest = min(e * f for e, f in zip(grid.edges, grid.factor, strict=True))
        self.far = _FAR * points.tolerance
        self.tolerance = math.hypot(points.tolerance, self.finest)  # a level knows no better than its voxels
        self.sigma = [max(s, u) for s, u in zip(grid.sigma, grid.unit, strict=True)]

    @override
    def evaluate(self, ddf: Tensor, pull: Tensor | None, weight: float) -> Tensor:
        """Mean robust distance of the points, which saturates at 1, and its force spread around them."""
        missed = self._missed(ddf)
        robust = (missed.square().sum(2) + self.tolerance**2).sqrt()
        mean = ((robust - self.tolerance) * self.known).sum(1) / self.known.sum(1)
        loss = mean / (mean + self.far)
        if pull is not None:
            force = self.force(ddf) / self.finest
            peak = math.prod(max(math.sqrt(2 * math.pi) * s, 1.0) for s in self.sigma)
            counts = self._spread(self.known.to(ddf.dtype), ddf).mul_(peak).clamp_(min=1)
            for axis in range(ddf.shape[1]):
                one = self._spread(force[..., axis], ddf).mul_(peak * weight)
                pull[:, axis] += one.div_(counts)[:, 0]
        return loss.to(ddf.dtype)

    def force(self, ddf: Tensor) -> Tensor:
        """Derivative of every point's robust distance by a compositional update at it, ``(B, K, n)``, per voxel."""
        missed = self._missed(ddf)
        towards = missed / (missed.square().sum(2, keepdim=True) + self.tolerance**2).sqrt() * self.edges
        out = []
        for axis in range(ddf.shape[1]):
            half = torch.zeros_like(self.edges)
            half[axis] = 0.5
            ends = [self.fixed + h + sample_points(ddf, self.fixed + h) for h in (half, -half)]
            out.append(((ends[0] - ends[1]) * towards).sum(2))
        return torch.stack(out, 2) * self.known[..., None]

    def _missed(self, ddf: Tensor) -> Tensor:
        """From every counterpart to where the map takes the point, ``(B, K, n)`` in millimetres."""
        self._to(ddf)
        missed = self.fixed + sample_points(ddf, self.fixed) - self.moving
        return missed * self.edges * self.known[..., None]

    def _to(self, ddf: Tensor) -> None:
        if self.fixed.dtype != ddf.dtype:
            self.fixed, self.moving, self.edges = (x.to(ddf.dtype) for x in (self.fixed, self.moving, self.edges))

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values at the points ``(B, K)``, brought to the voxels around them and smoothed, ``(B, 1, *S)``."""
        sizes = self.grid.size
        spread = values.new_zeros(len(values), torch.Size(sizes).numel())
        at = [self.fixed[..., a].clamp(0, s - 1) for a, s in enumerate(sizes)]
        lower = [p.floor().clamp(max=s - 2) for p, s in zip(at, sizes, strict=True)]
        for corner in product((0, 1), repeat=len(sizes)):
            index, w = torch.zeros_like(lower[0], dtype=torch.long), values
            for p, low, c, s in zip(at, lower, corner, sizes, strict=True):
                index = index * s + low.long() + c
                w = w * (p - low if c else 1 - (p - low))
            spread.scatter_add_(1, index, w)
        out = torch.empty(len(values), 1, *sizes, dtype=like.dtype, device=like.device)
        kernels.smooth(spread.view_as(out), self.sigma, out)
        return out


def _points(name: str, value: Any) -> Tensor:
    """Points ``(B, K, n)``, detached, floating point; NaN is allowed."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 3 or value.shape[2] not in (2, 3) or not value.numel():
        raise ValueError(f"{name} must be keypoints (B, K, n) in voxels, n 2 or 3, got shape {tuple(value.shape)}")
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if bool(value.isinf().any()):
        raise ValueError(f"{name} must not have infinite keypoints")
    return value
