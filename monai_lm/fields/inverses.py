"""The inverse of a field between two grids, and where and why it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import invert
from monai_lm.fields.algebra import compose, lengths
from monai_lm.fields.space import fixed_to_moving, spacing_of, through_affine, to_world
from monai_lm.fields.topology import folded_cells

__all__ = ["InverseReport", "inspect_inverse", "invert_between"]

_MISSED = 0.01
"""A residual in voxels that counts as not converged."""


def invert_between(
    ddf: Tensor,
    affine: np.ndarray,
    moving_affine: np.ndarray,
    initial: np.ndarray | None,
    moving_size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Invert a field that stays on the fixed grid and the affine after it, at the voxels of the moving grid.

    Args:
        ddf: ``(B, n, *S)`` displacement in voxels of the fixed grid; see :func:`monai_lm.fields.space.through_affine`.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid.
        initial: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image, or ``None``.
        moving_size: voxel counts of the moving grid.

    Returns:
        ``(B, n, *moving_size)`` displacement from voxels of the moving to voxels of the fixed grid, and the residual
        ``(B, *moving_size)`` in voxels of the fixed grid, see :func:`monai_lm.fields.invert`.
    """
    return invert(ddf, moving_size, grid=np.linalg.inv(fixed_to_moving(affine, moving_affine, initial)))


@dataclass(frozen=True)
class InverseReport:
    """What an inverse is worth; as text, lines for the command line.

    Attributes:
        missed: largest distance in voxels of the moving grid by which first the field, then the inverse, miss the
            identity, an eighth of the grid away from its border and where the field leads into the moving grid; NaN
            where it does nowhere. It has in it that the inverse is interpolated between voxels.
        residual: largest distance in millimetres by which first the inverse, then the field, miss the identity, at the
            voxels of the moving grid that the fixed image comes to without folding; NaN if there are none.
        voxels: of the moving grid.
        outside: how many of them nothing of the fixed image comes to: the inverse continues it by its border there.
        sides: ends of the fixed image, ``"left"``, ``"inferior"``, …, that these lie beyond.
        folded: how many lie where the field folds, which has no inverse there.
        failed: how many did not converge although the field does not fold there.
        places: the worst of the last two, by their names, in RAS millimetres.
    """

    missed: float
    residual: float
    voxels: int
    outside: int
    sides: tuple[str, ...]
    folded: int
    failed: int
    places: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        lines = [
            f"field and inverse miss the identity by at most {self.missed:.4f} voxel away from the border, "
            f"inverse and field by at most {self.residual:.4f} mm where the fixed image comes to"
        ]
        if self.outside:
            lines.append(
                f"{self.outside} of {self.voxels} voxels lie outside the image of the fixed grid, beyond its "
                f"{', '.join(self.sides)} end: nothing of the fixed image comes there"
            )
        reasons = {"folded": "lie where the field folds: it has no inverse there", "failed": "did not converge"}
        for name, place in self.places.items():
            where = ", ".join(f"{x:.1f}" for x in place)
            count = getattr(self, name)
            lines.append(f"{count} of {self.voxels} voxels {reasons[name]}; the worst is at ({where}) mm")
        return "\n".join(lines)


def inspect_inverse(
    ddf: Tensor, inverse: Tensor, residual: Tensor, affine: np.ndarray, moving_affine: np.ndarray
) -> InverseReport:
    """Look where the inverse of a field fails and why.

    Args:
        ddf: ``(1, n, *S)`` displacement in voxels of the fixed grid, that stays on it, any affine included.
        inverse: ``(1, n, *M)`` from :func:`invert_between`.
        residual: ``(1, *M)`` likewise, in voxels of the fixed grid.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid.
    """
    size, missed = ddf.shape[2:], residual[0]
    points = [inverse[0, axis] + _along(axis, missed.shape, inverse) for axis in range(len(size))]
    beyond = [((p < -_MISSED), (p > s - 1 + _MISSED)) for p, s in zip(points, size, strict=True)]
    outside = torch.stack([side for sides in beyond for side in sides]).any(0)
    whole = through_affine(ddf, affine, moving_affine)
    folded = _folded(ddf, whole, points, missed.shape) & ~outside
    failed = (missed >= _MISSED) & ~outside & ~folded
    good = missed[~(outside | folded)]
    ends = [_ENDS[code] for code in nib.aff2axcodes(affine)[: len(size)]]
    return InverseReport(
        missed=_round_trip(whole, inverse),
        residual=float(good.max()) * max(spacing_of(affine, len(size))) if good.numel() else float("nan"),
        voxels=missed.numel(),
        outside=int(outside.sum()),
        sides=tuple(
            end
            for axis, sides in zip(ends, beyond, strict=True)
            for end, side in zip(axis, sides, strict=True)
            if bool((side & outside).any())
        ),
        folded=int(folded.sum()),
        failed=int(failed.sum()),
        places={
            name: _worst(missed, mask, moving_affine)
            for name, mask in (("folded", folded), ("failed", failed))
            if bool(mask.any())
        },
    )


_ENDS = {
    "R": ("left", "right"), "L": ("right", "left"), "A": ("posterior", "anterior"), "P": ("anterior", "posterior"),
    "S": ("inferior", "superior"), "I": ("superior", "inferior"),
}  # fmt: skip
"""Where an axis begins and ends, by the direction that it runs in."""


def _folded(ddf: Tensor, whole: Tensor, points: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Voxels of the moving grid that come from folded cells, or that those are led to, ``(*M)``."""
    inner = (slice(1, -1),) * len(size)  # about the grid, the border value of an affine may fold
    cells = folded_cells(ddf)[0][inner]
    folded = cells[tuple(p.clamp(0, s - 1).long() for p, s in zip(points, cells.shape, strict=True))]
    for corner in product((0, 1), repeat=len(size)):  # a cell's voxels
        voxels = cells.nonzero() + torch.tensor(corner, device=cells.device)
        led = (voxels + torch.stack([component[tuple(voxels.T)] for component in whole[0]], 1)).round().long()
        led = led[((led >= 0) & (led < torch.tensor(size, device=cells.device))).all(1)]
        folded[tuple(led.T)] = True
    return folded


def _round_trip(ddf: Tensor, inverse: Tensor) -> float:
    """First the field, then the inverse; see :attr:`InverseReport.missed`."""
    missed = lengths(compose(inverse, ddf))[0]
    shown = torch.zeros_like(missed, dtype=torch.bool)
    shown[tuple(slice(s // 8, s - s // 8) for s in missed.shape)] = True
    for axis, length in enumerate(inverse.shape[2:]):  # voxels that are led out of the inverse's grid are none of its
        target = ddf[0, axis] + _along(axis, missed.shape, ddf)
        shown &= (target >= 0) & (target <= length - 1)
    return float(missed[shown].max()) if bool(shown.any()) else float("nan")


def _along(axis: int, size: Sequence[int], like: Tensor) -> Tensor:
    """Voxel numbers along an axis, ready to be added to ``(*S)``."""
    voxels = torch.arange(size[axis], dtype=like.dtype, device=like.device)
    return voxels.view([-1 if a == axis else 1 for a in range(len(size))])


def _worst(missed: Tensor, mask: Tensor, affine: np.ndarray) -> tuple[float, ...]:
    """Where the residual ``(*M)`` is largest among marked voxels, in RAS millimetres."""
    voxel = (missed + 1).mul(mask).flatten().argmax()
    index = torch.stack(torch.unravel_index(voxel, missed.shape))
    return tuple(to_world(index.double(), affine).tolist())
