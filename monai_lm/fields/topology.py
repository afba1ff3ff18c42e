"""Jacobians, folds, and keeping maps free of them.

A grid cell is *folded* when any of its digital-diffeomorphism determinants is not positive: in 3D the eight corner
tetrahedra (all combinations of one-sided differences) and the two central tetrahedra, in 2D the four corner triangles.
Fields are continued by their border value, so the ring of cells around the grid counts too.

Source: Liu et al., "On Finite Difference Jacobian Computation in Deformable Image Registration", IJCV 2024.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, max_pool3d

from monai_lm import kernels
from monai_lm.fields.finite import check_finite
from monai_lm.kernels.reference import determinant

__all__ = [
    "LOG_FLOOR",
    "MARGIN",
    "fold_count",
    "folded_cells",
    "inside_of",
    "jacobian_determinant",
    "repair",
    "repair_in_place",
]

_MOST_WORK = 4
"""Voxels that a repair smooths, as multiples of those there are; white noise of five voxels takes three and a half."""

MARGIN = 1e-3
"""Determinants are kept above this, so that rounding (float32, other software) cannot turn a cell over."""

LOG_FLOOR = 1e-3
"""Smaller determinants, negative ones included, count as this where a logarithm is taken."""

_GOAL = 1e-2
"""What a repair brings them above: cells that are left at the margin fold again at the next step, and while their
neighbours are smoothed. On three pairs of abdomens and five hearts (validation) Dice rose by .02 and .004 and repair
took a quarter less than with the margin itself; with .1, all steep places are smoothed away."""


def jacobian_determinant(ddf: Tensor) -> Tensor:
    """Determinant of the Jacobian of ``id + ddf`` by central differences (one-sided at the edges).

    Args:
        ddf: ``(B, n, *S)`` in voxels, every axis at least 2 long.

    Returns:
        ``(B, *S)``; 1 for the identity, dimensionless, independent of the voxel spacing.

    Raises:
        ValueError: an axis of one voxel.
    """
    if min(ddf.shape[2:]) < 2:
        raise ValueError(f"ddf must be at least 2 voxels long along every axis, got shape {tuple(ddf.shape)}")
    n = ddf.shape[1]
    columns = []
    for axis in range(n):
        derivative = list(torch.gradient(ddf, dim=2 + axis)[0].unbind(1))
        derivative[axis] = derivative[axis] + 1
        columns.append(derivative)
    return determinant(columns)


def folded_cells(ddf: Tensor, margin: float = 0.0, outer: Tensor | None = None) -> Tensor:
    """Cells with a determinant ``<= margin``, as a mask ``(B, *(S + 1))`` over the grid's cells and the ring around it.

    Cell ``i`` along an axis lies between voxels ``i - 1`` and ``i``.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        margin: smallest determinant that still counts as folded; 0 is the definition.
        outer: ``(B, n, *M)`` field that is applied after ``ddf``: the cells of the composed map are looked at.
    """
    _check(ddf, outer)
    folded = torch.empty(len(ddf), *(s + 1 for s in ddf.shape[2:]), dtype=torch.bool, device=ddf.device)
    kernels.unfolded(ddf.contiguous(), None if outer is None else outer.contiguous(), margin, folded)
    return folded


def fold_count(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count the folded cells of each field of a batch.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        mask: ``(B, 1, *S)``, not zero inside: cells count that have at least one corner voxel inside. Default: all
            cells, the ring around the grid included.

    Returns:
        ``(B,)`` int64; cells at a NaN count. Where it is zero, the non-diffeomorphic volume (NDV; in 2D area) is zero.

    Raises:
        ValueError: a field or a mask of another shape, or a mask that is not finite, or empty for a pair.
    """
    _check(ddf, None)
    if mask is None:
        return kernels.unfolded(ddf.detach().contiguous(), None, 0.0, None)
    inside, pool = inside_of(mask, ddf).float(), max_pool2d if ddf.shape[1] == 2 else max_pool3d
    cells = pool(inside, 2, stride=1, padding=1)[:, 0] > 0
    return (folded_cells(ddf.detach()) & cells).flatten(1).sum(1)


def inside_of(mask: Tensor, ddf: Tensor) -> Tensor:
    """Where a mask of a field ``(B, n, *S)`` is not zero, ``(B, 1, *S)`` bool; a GPU is waited for.

    Raises:
        ValueError: a mask of another shape, one that is not finite, or one that is empty for a pair.
    """
    if mask.shape != (expected := (len(ddf), 1, *ddf.shape[2:])):
        raise ValueError(f"mask must be (B, 1, *S) = {expected} on the grid of ddf, got shape {tuple(mask.shape)}")
    check_finite("mask", mask)
    inside = mask.to(ddf.device) != 0
    if empty := (~inside.flatten(1).any(1)).nonzero().flatten().tolist():
        raise ValueError(f"mask must not be zero everywhere, got that for pairs {empty}")
    return inside


def _check(ddf: Tensor, outer: Tensor | None) -> None:
    """ValueError for what is no field, or an outer one that does not fit: kernels read what they are told is there."""
    for name, field in (("ddf", ddf), ("outer", outer)):
        if field is not None and (field.dim() not in (4, 5) or field.shape[1] != field.dim() - 2):
            raise ValueError(f"{name} must be (B, n, *S) with n = len(S) = 2 or 3, got shape {tuple(field.shape)}")
    if outer is not None and (outer.shape[:2] != ddf.shape[:2] or min(outer.shape[2:]) < 2):
        raise ValueError(
            f"outer must be (B, n, *M) for a field {tuple(ddf.shape)}, every axis at least 2 voxels long, "
            f"got shape {tuple(outer.shape)}"
        )


def repair(
    ddf: Tensor,
    outer: Tensor | None = None,
    margin: float = MARGIN,
    rounds: int = 100,
    deadline: float = float("inf"),
    goal: float = _GOAL,
) -> Tensor:
    """Unfold a map by the least local smoothing that does it; the field keeps its value away from the folds.

    Where cells are folded, these, those nearly folded and their surroundings are smoothed
    again and again, with a Gaussian and a reach that grow while the count does not fall, and shrink again while it
    does. A field that resists is
    shrunk towards its mean, as little as it takes: when the rounds are over, when they have smoothed four times as many
    voxels as there are, or at the deadline.

    Args:
        ddf: ``(B, n, *S)`` in voxels, finite.
        outer: ``(B, n, *M)`` field without folds that is applied after; the composed map is what must not fold.
            Default: identity.
        margin: smallest determinant that still counts as folded.
        rounds: most rounds of local smoothing.
        deadline: ``time.perf_counter()`` after which no further round begins.
        goal: what determinants are brought above, once one is at the margin.

    Returns:
        ``(B, n, *S)``; ``ddf`` itself (the same tensor) if nothing folded, else a field that autograd knows nothing of.

    Raises:
        ValueError: shapes that do not fit; from ``monai_lm.fields``, a field that is not finite.
    """
    _check(ddf, outer)
    pairs = _folded_pairs(ddf, outer, margin)
    if not pairs:
        return ddf
    out = ddf.detach().clone(memory_format=torch.contiguous_format)
    _repair_pairs(out, pairs, outer, max(margin, goal), rounds, deadline)
    return out


def repair_in_place(ddf: Tensor, outer: Tensor | None = None, margin: float = MARGIN, rounds: int = 100) -> bool:
    """:func:`repair` without a copy of the field, which is contiguous; whether anything folded."""
    pairs = _folded_pairs(ddf, outer, margin)
    _repair_pairs(ddf, pairs, outer, max(margin, _GOAL), rounds, float("inf"))
    return bool(pairs)


def _folded_pairs(ddf: Tensor, outer: Tensor | None, margin: float) -> list[int]:
    """Which pairs have folded cells; nothing is stored for it."""
    count = kernels.unfolded(ddf.contiguous(), None if outer is None else outer.contiguous(), margin, None)
    return [pair for pair, cells in enumerate(count.tolist()) if cells]


def _repair_pairs(
    ddf: Tensor, pairs: list[int], outer: Tensor | None, goal: float, rounds: int, deadline: float
) -> None:
    """Repair some pairs in place, one by one: a pair must not depend on its batch."""
    for index in pairs:
        pair = slice(index, index + 1)
        _unfold(ddf[pair], None if outer is None else outer[pair].contiguous(), goal, rounds, deadline)


def _unfold(field: Tensor, outer: Tensor | None, margin: float, rounds: int, deadline: float) -> None:
    """Repair one pair ``(1, n, *S)``, in place; what is looked at is what was rounded."""
    folded = folded_cells(field, margin, outer)
    count, sigma, before, smoothed = int(torch.count_nonzero(folded)), 1.0, None, 0
    for _ in range(rounds):
        if count == 0:
            return
        if smoothed > _MOST_WORK * folded.numel() or time.perf_counter() > deadline:
            break
        if before is not None:
            sigma = min(sigma * 1.25, 8.0) if count > 0.7 * before else max(sigma / 1.25, 1.0)
        before = count
        count, voxels = kernels.mend(field, outer, folded, sigma, margin)[0].tolist()
        smoothed += voxels
    _shrink(field, outer, margin)


def _shrink(field: Tensor, outer: Tensor | None, margin: float) -> None:
    """Bring a field ``(1, n, *S)`` so much nearer to its mean that nothing folds, in place; at last to zero."""
    whole = field.to(torch.promote_types(field.dtype, torch.float32), copy=True)
    mean = whole.mean(dim=tuple(range(2, field.dim())), keepdim=True)
    best, step = 0.0, 0.5
    field.copy_(whole)
    if not bool(_folded_pairs(field, outer, margin)):
        return
    for _ in range(8):
        field.copy_(torch.lerp(mean, whole, best + step))
        if not bool(_folded_pairs(field, outer, margin)):
            best += step
        step /= 2
    field.copy_(torch.lerp(mean, whole, best))
    if bool(_folded_pairs(field, outer, margin)):
        field.zero_()
