"""Fields that follow from around where a mask says so: the harmonic extension, by multigrid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["extend_in_place"]

_SWEEPS = 2  # before the coarser grid and after it
_RELAXED = 0.9
_FEWEST = 4  # voxels of an axis that is halved


def extend_in_place(field: Tensor, inside: Tensor, spacing: Sequence[float], cycles: int) -> None:
    """Bring a field nearer to its harmonic extension, ``Δ u = 0`` inside of a mask, given by what is around.

    That of an affine field is affine, and no value inside is beyond those around. Where the mask meets the border of
    the grid nothing flows through. A cycle leaves about a half of what is missing, or less, and takes 4 volumes per
    component for a moment, as does the mask.

    Args:
        field: ``(B, C, *S)``, floating point, float32 at least; overwritten where ``inside`` is one.
        inside: ``(B, 1, *S)`` of zeros and ones, in the dtype of the field.
        spacing: voxel edge per axis, in any unit.
        cycles: how many V-cycles.
    """
    weights = [(min(spacing) / edge) ** 2 for edge in spacing]
    for _ in range(cycles):
        _cycle(field, inside, weights, None)


def _cycle(field: Tensor, inside: Tensor, weights: Sequence[float], source: Tensor | None) -> None:
    """One V-cycle for ``Δ u = source`` inside."""
    _sweep(field, inside, weights, source)
    halves = [2 if size >= _FEWEST else 1 for size in field.shape[2:]]
    if max(halves) > 1:
        pool, mode = (F.avg_pool2d, "bilinear") if field.dim() == 4 else (F.avg_pool3d, "trilinear")
        missing = pool(_missing(field, inside, weights, source), halves, ceil_mode=True)
        mostly = (pool(inside, halves, ceil_mode=True) > 0.5).to(inside.dtype)
        change = torch.zeros_like(missing)
        _cycle(change, mostly, [w / half**2 for w, half in zip(weights, halves, strict=True)], missing.neg_())
        fine = F.interpolate(change, scale_factor=[float(h) for h in halves], mode=mode, align_corners=False)
        for axis, size in enumerate(field.shape[2:]):
            fine = fine.narrow(axis + 2, 0, size)
        fine.mul_(inside)
        field.addcmul_(fine, _best_share(fine, field, inside, weights, source))
    _sweep(field, inside, weights, source)


def _best_share(
    change: Tensor, field: Tensor, inside: Tensor, weights: Sequence[float], source: Tensor | None
) -> Tensor:
    """How much of a change brings a field nearest in energy, ``(B, C, 1, ...)``.

    A coarse grid mistakes what a change is worth, most where its last voxels stand out over the border: there cycles
    led away without this share.
    """
    axes = tuple(range(2, field.dim()))
    gained = (_missing(field, inside, weights, source) * change).sum(axes, keepdim=True)
    energy = -(_missing(change, inside, weights, None) * change).sum(axes, keepdim=True)
    return torch.where(energy > 0, gained / torch.where(energy > 0, energy, 1.0), 0.0)


def _sweep(field: Tensor, inside: Tensor, weights: Sequence[float], source: Tensor | None) -> None:
    for _ in range(_SWEEPS):
        field.add_(_missing(field, inside, weights, source), alpha=_RELAXED / (2 * sum(weights)))


def _missing(field: Tensor, inside: Tensor, weights: Sequence[float], source: Tensor | None) -> Tensor:
    """``Δ u - source`` inside, zero elsewhere."""
    out = torch.zeros_like(field)
    for axis, weight in enumerate(weights, start=2):
        slope, ends = field.diff(dim=axis).mul_(weight), field.shape[axis] - 1
        out.narrow(axis, 0, ends).add_(slope)
        out.narrow(axis, 1, ends).sub_(slope)
    if source is not None:
        out.sub_(source)
    return out.mul_(inside)
