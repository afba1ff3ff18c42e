"""Jacobians, folds, and keeping maps free of them.

A grid cell is *folded* when any of its digital-diffeomorphism determinants is not positive: in 3D the eight corner
tetrahedra (all combinations of one-sided differences) and the two central tetrahedra, in 2D the four corner triangles.
Fields are continued by their border value, so the ring of cells around the grid counts too.

Source: Liu et al., "On Finite Difference Jacobian Computation in Deformable Image Registration", IJCV 2024.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_lm.fields.algebra import compose
from monai_lm.fields.smoothing import box_sum, gaussian_smooth, gaussian_taps, inverse_window_counts

__all__ = ["MARGIN", "fold_count", "folded_cells", "jacobian_determinant", "repair", "repair_in_place"]

_SLAB = {"cpu": 2**18, "gpu": 2**21}
"""Cells whose determinants are computed at a time: on a CPU what they need shall stay in its cache; on a GPU an
operation on them shall take longer than its launch, and twenty of its results shall not matter."""

_Box = list[tuple[int, int]]
"""First and last index, the last not in it, along every axis."""

_TILE = {"cpu": 24, "gpu": 128}
"""Edge in voxels of the tiles that are repaired one by one; a GPU has some five waits for each in every round."""

_MOST_WORK = 6
"""Voxels that a repair smooths, as multiples of those there are; white noise of five voxels takes three."""

MARGIN = 1e-3
"""Determinants are kept above this, so that rounding (float32, other software) cannot turn a cell over."""


def jacobian_determinant(ddf: Tensor) -> Tensor:
    """Determinant of the Jacobian of ``id + ddf`` by central differences (one-sided at the edges).

    Args:
        ddf: ``(B, n, *S)`` in voxels, every axis at least 2 long.

    Returns:
        ``(B, *S)``; 1 for the identity, dimensionless, independent of the voxel spacing.
    """
    n = ddf.shape[1]
    columns = []
    for axis in range(n):
        derivative = list(torch.gradient(ddf, dim=2 + axis)[0].unbind(1))
        derivative[axis] = derivative[axis] + 1
        columns.append(derivative)
    return _determinant(columns)


def _determinant(columns: list[list[Tensor]]) -> Tensor:
    """Determinant of the 2×2 or 3×3 matrix whose columns are lists of component tensors."""
    if len(columns) == 2:
        (a, b), (c, d) = columns
        return a * d - b * c
    (a0, a1, a2), (b0, b1, b2), (c0, c1, c2) = columns
    return a0 * (b1 * c2 - b2 * c1) + a1 * (b2 * c0 - b0 * c2) + a2 * (b0 * c1 - b1 * c0)


def _cell_determinants(padded: Tensor) -> Iterator[Tensor]:
    """Yield the determinants ``(B, *(P - 1))`` of every cell of a field ``(B, n, *P)``, 1 for the identity."""
    n = padded.shape[1]
    cells = [s - 1 for s in padded.shape[2:]]

    def at(component: Tensor, corner: tuple[int, ...]) -> Tensor:
        for axis, bit in enumerate(corner):
            if component.shape[1 + axis] != cells[axis]:
                component = component.narrow(1 + axis, bit, cells[axis])
        return component

    # edges[a][c]: component c of the map's difference along axis a, between neighbours
    edges = []
    for axis in range(n):
        difference = list(torch.diff(padded, dim=2 + axis).unbind(1))
        difference[axis] = difference[axis] + 1
        edges.append(difference)

    def edge(axis: int, corner: tuple[int, ...]) -> list[Tensor]:
        return [at(component, corner) for component in edges[axis]]

    for corner in product((0, 1), repeat=n):
        yield _determinant([edge(axis, corner) for axis in range(n)])
    if n == 3:
        for tetrahedron in _CENTRAL:
            columns = []
            for first, second in tetrahedron:
                columns.append([a + b for a, b in zip(edge(*first), edge(*second), strict=True)])
            yield 0.5 * _determinant(columns)


# The two central tetrahedra, {000, 011, 101, 110} and {111, 100, 010, 001}: each face diagonal from the first corner is
# the sum of two edges (axis, corner where the edge starts); the second one's overall sign is that of the first.
_CENTRAL = (
    (((1, (0, 0, 0)), (2, (0, 1, 0))), ((0, (0, 0, 0)), (2, (1, 0, 0))), ((0, (0, 0, 0)), (1, (1, 0, 0)))),
    (((1, (1, 0, 1)), (2, (1, 0, 0))), ((0, (0, 1, 1)), (2, (0, 1, 0))), ((0, (0, 1, 1)), (1, (0, 0, 1)))),
)


def folded_cells(ddf: Tensor, margin: float = 0.0, outer: Tensor | None = None) -> Tensor:
    """Cells with a determinant ``<= margin``, as a mask ``(B, *(S + 1))`` over the grid's cells and the ring around it.

    Cell ``i`` along an axis lies between voxels ``i - 1`` and ``i``. Works slab by slab: beside the mask, it needs no
    memory to speak of.

    Args:
        ddf: ``(B, n, *S)`` in voxels.
        margin: smallest determinant that still counts as folded; 0 is the definition.
        outer: ``(B, n, *M)`` field that is applied after ``ddf``: the cells of the composed map are looked at.
    """
    ring = torch.Size(s + 1 for s in ddf.shape[2:])
    thickness = max(1, _SLAB[_kind(ddf)] // (ddf.shape[0] * ring[1:].numel()))
    folded = torch.empty(ddf.shape[0], *ring, dtype=torch.bool, device=ddf.device)
    whole = [(0, length) for length in ring[1:]]
    for first in range(0, ring[0], thickness):
        last = min(first + thickness, ring[0])
        folded[:, first:last] = _folded_in([(first, last), *whole], ddf, margin, outer)
    return folded


def _folded_in(box: _Box, ddf: Tensor, margin: float, outer: Tensor | None) -> Tensor:
    """Which cells of a box are folded; see :func:`folded_cells`."""
    around: _Box = []
    pads: list[int] = []
    for (first, last), size in zip(box, ddf.shape[2:], strict=True):  # they have the voxels [first - 1, last)
        start, stop = max(first - 1, 0), min(last, size)
        around.append((start, stop))
        pads = [start - first + 1, last - stop, *pads]
    part = ddf[_index(around)].to(torch.promote_types(ddf.dtype, torch.float32))
    if outer is not None:
        # filled on the device: copying a number there would make the host wait
        part = compose(
            outer, part, tuple(torch.full((), float(a), dtype=part.dtype, device=part.device) for a, _ in around)
        )
    return _folded(F.pad(part, pads, mode="replicate"), margin)


def _kind(tensor: Tensor) -> str:
    """Of the device, for what depends on it."""
    return "cpu" if tensor.device.type == "cpu" else "gpu"


def _index(box: _Box) -> tuple[Any, ...]:
    """Index of a box in a tensor whose last axes are those of the grid."""
    return (..., *(slice(first, last) for first, last in box))


def _cells(box: _Box) -> _Box:
    """The cells that voxels of a box belong to."""
    return [(first, last + 1) for first, last in box]


def _folded(padded: Tensor, margin: float) -> Tensor:
    """Folded cells ``(B, *(P - 1))`` of a field ``(B, n, *P)``."""
    folded: Tensor | None = None
    for determinant in _cell_determinants(padded):
        bad = ~(determinant > margin)  # NaN counts as folded
        folded = bad if folded is None else folded | bad
    assert folded is not None  # for mypy
    return folded


def fold_count(ddf: Tensor) -> Tensor:
    """Count the folded cells of each field of a batch.

    Args:
        ddf: ``(B, n, *S)`` in voxels.

    Returns:
        ``(B,)`` int64; cells at a NaN count. Where it is zero, the non-diffeomorphic volume (NDV; in 2D area) is zero.
    """
    return torch.stack(
        [torch.count_nonzero(cells) for cells in folded_cells(ddf)]
    )  # a sum copies to eight bytes a cell


def _near(cells: Tensor, reach: int) -> Tensor:
    """Smooth weight in [0, 1] on voxels ``(B, 1, *S)``: 1 at the voxels of marked cells, 0 beyond twice ``reach``."""
    pool = F.max_pool2d if cells.dim() == 3 else F.max_pool3d
    voxels = pool(cells.unsqueeze(1).float(), 2, stride=1)
    wide = (box_sum(voxels, reach) > 0.5).float()
    soft = box_sum(wide, reach) * inverse_window_counts(wide, reach)
    return torch.maximum(voxels, soft)


def repair(
    ddf: Tensor,
    outer: Tensor | None = None,
    margin: float = MARGIN,
    rounds: int = 100,
    deadline: float = float("inf"),
) -> Tensor:
    """Unfold a map by the least local smoothing that does it; the field keeps its value away from the folds.

    Folded cells and their surroundings are smoothed again and again, with a Gaussian and a reach that grow only while
    the count of folded cells does not fall. A field that resists is shrunk towards its mean, as little as it takes:
    when the rounds are over, when they have smoothed six times as many voxels as there are, or at the deadline.

    Args:
        ddf: ``(B, n, *S)`` in voxels, finite.
        outer: ``(B, n, *M)`` field without folds that is applied after; the composed map is what must not fold.
            Default: identity.
        margin: smallest determinant that still counts as folded.
        rounds: most rounds of local smoothing.
        deadline: ``time.perf_counter()`` after which no further round begins.

    Returns:
        ``(B, n, *S)``; ``ddf`` itself (the same tensor) if nothing folded.

    Raises:
        ValueError: from ``monai_lm.fields``, a field that is not finite.
    """
    folded = folded_cells(ddf, margin, outer)
    if not bool(folded.any()):
        return ddf
    out = ddf.clone()
    _repair_pairs(out, folded, outer, margin, rounds, deadline)
    return out


def repair_in_place(ddf: Tensor, outer: Tensor | None = None, margin: float = MARGIN, rounds: int = 100) -> bool:
    """:func:`repair` without a copy of the field; whether anything folded."""
    folded = folded_cells(ddf, margin, outer)
    if not bool(folded.any()):
        return False
    _repair_pairs(ddf, folded, outer, margin, rounds, float("inf"))
    return True


def _repair_pairs(
    ddf: Tensor, folded: Tensor, outer: Tensor | None, margin: float, rounds: int, deadline: float
) -> None:
    """Repair the pairs that fold, in place; one by one: a pair must not depend on its batch."""
    for index in folded.flatten(1).any(1).nonzero().flatten().tolist():
        pair = slice(index, index + 1)
        _unfold(ddf[pair], folded[pair], None if outer is None else outer[pair], margin, rounds, deadline)


def _smooth_near(field: Tensor, folded: Tensor, sigma: float) -> list[_Box]:
    """Smooth a field ``(1, n, *S)`` in and around its folded cells, in place; box by box, because those are few.

    A box is computed with so much around it that the result is that of the whole field at once.

    Returns:
        The boxes, each within a tile, outside of which nothing has changed.
    """
    reach, size = max(1, round(sigma)), field.shape[2:]
    wide = torch.promote_types(field.dtype, torch.float32)
    edge = _TILE[_kind(field)]
    parts = []
    for tile in _tiles_near(folded, 2 * reach, edge):
        core = [(number * edge, min((number + 1) * edge, length)) for number, length in zip(tile, size, strict=True)]
        around = _grown(core, 2 * reach + 1, size)
        weight = _near(folded[_index(_cells(around))], reach)[_index(_seen_from(around, core))]
        near = weight[0, 0].nonzero()
        low, high = torch.stack([near.amin(0), near.amax(0)]).tolist()
        inner = [(first, last + 1) for first, last in zip(low, high, strict=True)]
        box = [(first + start, last + start) for (first, last), (start, _) in zip(inner, core, strict=True)]
        around = _grown(box, len(gaussian_taps(sigma)) - 1, size)
        values, within = field[_index(around)].to(wide), _index(_seen_from(around, box))
        smooth, values, weight = gaussian_smooth(values, sigma)[within], values[within], weight[_index(inner)]
        parts.append((box, torch.where(weight == 0, values, values + weight * (smooth - values))))
    for box, smooth in parts:  # when none needs the old values any more
        field[_index(box)] = smooth
    return [box for box, _ in parts]


def _grown(box: _Box, margin: int, size: torch.Size) -> _Box:
    """A box with a margin, as far as the grid reaches."""
    return [(max(first - margin, 0), min(last + margin, s)) for (first, last), s in zip(box, size, strict=True)]


def _seen_from(outer: _Box, box: _Box) -> _Box:
    """A box, counted from the first voxel of another one."""
    return [(first - start, last - start) for (first, last), (start, _) in zip(box, outer, strict=True)]


def _tiles_near(folded: Tensor, reach: int, edge: int) -> list[tuple[int, ...]]:
    """Tiles, by their number along every axis, that have a voxel within ``reach`` of one of a folded cell's."""
    near = folded[0]
    for axis in range(near.dim()):  # cell i has the voxels i - 1 and i
        starts = range(0, near.shape[axis] - 1, edge)
        slabs = [
            near.narrow(axis, low := max(0, t - reach), min(near.shape[axis], t + edge + reach + 1) - low)
            for t in starts
        ]
        near = torch.stack([slab.any(axis) for slab in slabs], axis)
    return [tuple(tile) for tile in near.nonzero().tolist()]


def _unfold(field: Tensor, folded: Tensor, outer: Tensor | None, margin: float, rounds: int, deadline: float) -> None:
    """Repair one pair ``(1, n, *S)`` whose folded cells are given, in place; what is looked at is what was rounded."""
    sigma, fewest, smoothed = 1.0, None, 0
    for _ in range(rounds):
        count = int(torch.count_nonzero(folded))
        if count == 0:
            return
        if smoothed > _MOST_WORK * folded.numel() or time.perf_counter() > deadline:
            break
        if fewest is not None and count > 0.7 * fewest:
            sigma = min(sigma * 1.25, 8.0)
        fewest = count if fewest is None else min(fewest, count)
        for box in _smooth_near(field, folded, sigma):
            cells = _cells(box)
            folded[_index(cells)] = _folded_in(cells, field, margin, outer)
            smoothed += math.prod(last - first for first, last in box)
    _shrink(field, outer, margin)


def _shrink(field: Tensor, outer: Tensor | None, margin: float) -> None:
    """Bring a field ``(1, n, *S)`` so much nearer to its mean that nothing folds, in place; at last to zero."""
    whole = field.to(torch.promote_types(field.dtype, torch.float32), copy=True)
    mean = whole.mean(dim=tuple(range(2, field.dim())), keepdim=True)
    best, step = 0.0, 0.5
    field.copy_(whole)
    if not bool(folded_cells(field, margin, outer).any()):
        return
    for _ in range(8):
        field.copy_(mean + (best + step) * (whole - mean))
        if not bool(folded_cells(field, margin, outer).any()):
            best += step
        step /= 2
    field.copy_(mean + best * (whole - mean))
    if bool(folded_cells(field, margin, outer).any()):
        field.zero_()
