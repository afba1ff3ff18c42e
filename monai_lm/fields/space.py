"""Voxels and millimetres: affines of grids, fields seen from one space or another, sampling across grids.

A displacement field ``u`` in voxels maps a voxel ``x`` of the fixed grid to the voxel ``x + u(x)`` of the moving grid.
A space gives the voxels of a grid coordinates by a 4×4 matrix: RAS millimetres by the affine of the image, LPS or
FSL's by a matrix of their own. In 2D the in-plane part of a matrix (rows and columns 0, 1 and 3) is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.fields.finite import check_finite
from monai_lm.kernels.devices import widest_float

__all__ = [
    "Grid",
    "check_affine",
    "fixed_to_moving",
    "from_space",
    "is_sheared",
    "move_to_grid",
    "out_of_plane",
    "resample_moving",
    "share_inside",
    "spacing_of",
    "through_affine",
    "to_space",
    "to_voxel",
    "to_world",
]


def check_affine(name: str, affine: Any, in_plane: bool = False) -> np.ndarray:
    """An invertible, finite ``(4, 4)`` matrix with the last row ``0 0 0 1``, as float64; ValueError for any other.

    With ``in_plane``, ``(3, 3)`` with the last row ``0 0 1``, too; the third axis then stays as it is.
    """
    expected = "an invertible (4, 4) matrix with the last row 0 0 0 1" + (", or (3, 3) with 0 0 1" if in_plane else "")
    values = affine.detach().cpu() if isinstance(affine, Tensor) else affine
    try:
        matrix = np.asarray(values, dtype=None if np.iscomplexobj(values) else np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {expected}, got {affine!r}") from error
    whole = matrix
    if in_plane and matrix.shape == (3, 3):
        whole = np.eye(4)
        whole[np.ix_((0, 1, 3), (0, 1, 3))] = matrix
    if (
        whole.shape == (4, 4)
        and np.isrealobj(matrix)
        and np.isfinite(whole).all()
        and np.allclose(whole[3], (0, 0, 0, 1))
    ):
        lengths = np.linalg.norm(whole[:3, :3], axis=0)
        if lengths.min() > 0 and abs(np.linalg.det(whole[:3, :3] / lengths)) > 1e-6:
            return whole
    raise ValueError(f"{name} must be {expected}, got shape {matrix.shape}:\n{matrix}")


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an image lie.

    Attributes:
        size: 2 or 3 voxel counts.
        affine: ``(4, 4)`` voxel-to-RAS affine, float64, see :func:`check_affine`.
    """

    size: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edge lengths of a voxel in millimetres, one per axis."""
        return spacing_of(self.affine, len(self.size))

    def is_close(self, other: Grid) -> bool:
        """Whether another grid has this size and these corners, to a tenth of the shortest edge along x, y and z."""
        if other.size != self.size:
            return False
        corners = np.array([[0, 0, 0, 1], [*(s - 1 for s in self.size), *[0] * (3 - len(self.size)), 1]])
        return float(np.abs(corners @ (other.affine - self.affine).T).max()) / min(self.spacing) <= 0.1


def is_sheared(affine: np.ndarray | Tensor) -> bool:
    """Whether the voxel axes of a ``(4, 4)`` affine are not at right angles, by more than .006 degrees."""
    matrix = check_affine("affine", affine)[:3, :3]
    directions = matrix / np.linalg.norm(matrix, axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4)


def out_of_plane(affine: np.ndarray | Tensor) -> bool:
    """Whether the plane of the first two voxel axes is not one of x and y, by more than .6 degrees."""
    columns = check_affine("affine", affine)[:3, :2]
    return bool(np.abs(columns[2] / np.linalg.norm(columns, axis=0)).max() > 0.01)


def spacing_of(affine: np.ndarray | Tensor, n: int = 3) -> tuple[float, ...]:
    """Edge lengths of a voxel in millimetres, one per array axis, of a ``(4, 4)`` affine; the first ``n``."""
    matrix = check_affine("affine", affine)
    return tuple(float(length) for length in np.linalg.norm(matrix[:3, :n], axis=0))


def to_world(points: Tensor, affine: np.ndarray | Tensor) -> Tensor:
    """Voxel positions ``(..., n)`` to RAS millimetres ``(..., n)``, in the dtype of the points.

    Computed in float64, or what is the widest that the device has.

    Raises:
        ValueError: points that are not ``(..., 2)`` or ``(..., 3)``, or an affine that is no invertible 4×4.
    """
    return _map_points(points, _plane(check_affine("affine", affine), _axes_of(points)))


def to_voxel(points: Tensor, affine: np.ndarray | Tensor) -> Tensor:
    """RAS millimetres ``(..., n)`` to voxel positions ``(..., n)``: the inverse of :func:`to_world`."""
    return _map_points(points, np.linalg.inv(_plane(check_affine("affine", affine), _axes_of(points))))


def fixed_to_moving(
    fixed_affine: np.ndarray | Tensor, moving_affine: np.ndarray | Tensor, initial: np.ndarray | Tensor | None = None
) -> np.ndarray:
    """The map from voxels of the fixed grid to voxels of the moving grid, ``A_m⁻¹ · initial · A_f``.

    Args:
        fixed_affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid.
        initial: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image; default: none.

    Returns:
        ``(4, 4)`` float64.

    Raises:
        ValueError: a matrix that is no invertible 4×4.
    """
    fixed, moving = check_affine("fixed_affine", fixed_affine), check_affine("moving_affine", moving_affine)
    if initial is not None:
        fixed = check_affine("initial", initial) @ fixed
    return np.eye(4) if np.array_equal(fixed, moving) else np.linalg.solve(moving, fixed)  # exact on one grid


def to_space(ddf: Tensor, fixed_space: np.ndarray, moving_space: np.ndarray) -> Tensor:
    """A field in voxels as the displacement of points, ``M (x + u(x)) − F x``.

    Args:
        ddf: ``(B, n, *S)`` displacement in voxels, from voxels of the fixed to voxels of the moving grid.
        fixed_space: ``(4, 4)`` matrix ``F`` from voxels of the fixed grid to coordinates.
        moving_space: ``(4, 4)`` matrix ``M`` from voxels of the moving grid to coordinates.

    Returns:
        ``(B, n, *S)`` in the units of the space, in the dtype of ``ddf``; the sums are in float64
        where the device has it.
    """
    n = ddf.shape[1]
    fixed, moving = _plane(fixed_space, n), _plane(moving_space, n)
    return _affine_sum(ddf, moving[:n, :n], moving - fixed)


def from_space(displacement: Tensor, fixed_space: np.ndarray, moving_space: np.ndarray) -> Tensor:
    """The inverse of :func:`to_space`: the field in voxels, ``M⁻¹ (F x + d(x)) − x``."""
    n = displacement.shape[1]
    fixed, moving = _plane(fixed_space, n), _plane(moving_space, n)
    between = np.linalg.solve(moving, fixed - moving)  # M⁻¹F − 1, exactly zero on one grid
    return _affine_sum(displacement, np.linalg.inv(moving)[:n, :n], between)


def through_affine(
    ddf: Tensor,
    fixed_affine: np.ndarray | Tensor,
    moving_affine: np.ndarray | Tensor,
    initial: np.ndarray | Tensor | None = None,
) -> Tensor:
    """A field that stays on the fixed grid and the affine after it, as one displacement into the moving grid.

    Of a field ``u`` between an image on the fixed grid and a moving image *resampled onto it*, this makes the field
    ``A (x + u(x)) − x``, ``A`` = :func:`fixed_to_moving`, that leads to voxels of the moving image as it was.

    Args:
        ddf: ``(B, n, *S)`` displacement in voxels of the fixed grid.
        fixed_affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid.
        initial: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image; default: none.

    Returns:
        ``(B, n, *S)`` displacement from voxels of the fixed to voxels of the moving grid; what the writers of
        :mod:`monai_lm.io` take, with both affines.

    Raises:
        ValueError: a field of another shape, or a matrix that is no invertible 4×4.
    """
    _check_field(ddf)
    return to_space(ddf, np.eye(4), fixed_to_moving(fixed_affine, moving_affine, initial))


def share_inside(ddf: Tensor, size: Sequence[int]) -> float:
    """Share of the voxels of fields ``(B, n, *S)`` that are led into a grid of ``size`` voxels, in [0, 1]."""
    inside = torch.ones_like(ddf[:, 0], dtype=torch.bool)
    for axis, length in enumerate(size):
        voxels = torch.arange(ddf.shape[2 + axis], dtype=ddf.dtype, device=ddf.device)
        target = ddf[:, axis] + voxels.view([-1 if a == axis else 1 for a in range(len(size))])
        inside &= (target >= -0.5) & (target <= length - 0.5)
    return float(inside.float().mean())


def move_to_grid(
    ddf: Tensor, affine: np.ndarray | Tensor, size: Sequence[int], new_affine: np.ndarray | Tensor
) -> Tensor:
    """See a field on another grid of the same space: positions, directions and units of its vectors go along.

    Args:
        ddf: ``(B, n, *S)`` displacement in voxels of its grid, that stays on that grid (see :func:`through_affine`).
        affine: ``(4, 4)`` voxel-to-RAS affine of its grid.
        size: voxel counts of the new grid.
        new_affine: affine of the new grid.

    Returns:
        ``(B, n, *size)`` displacement in voxels of the new grid; linear in between, extended by the border value.

    Raises:
        ValueError: a field of another shape or one that is not finite, a size that is none, or a matrix that is no
            invertible 4×4.
    """
    _check_field(ddf)
    check_finite("ddf", ddf)
    if len(size) != ddf.shape[1] or not all(isinstance(s, SupportsIndex) and index(s) > 0 for s in size):
        raise ValueError(f"size must be {ddf.shape[1]} whole numbers above 0, got {size!r}")
    still = ddf.new_zeros(ddf.shape[0], ddf.shape[1], *size)
    sampled = resample_moving(ddf, still, new_affine, affine)
    n = ddf.shape[1]
    turn = _plane(fixed_to_moving(affine, new_affine), n)[:n, :n]
    return _affine_sum(sampled, turn, np.zeros((n, n + 1)))


def resample_moving(
    moving: Tensor,
    ddf: Tensor,
    fixed_affine: np.ndarray | Tensor,
    moving_affine: np.ndarray | Tensor,
    initial: np.ndarray | Tensor | None = None,
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> Tensor:
    """Sample a moving image once, through field and affine together, onto the fixed grid.

    The grids may differ in shape, spacing and orientation. There is no low-pass filter: a fixed grid much coarser than
    the moving one aliases. A field of zeros resamples with the affines alone.

    Args:
        moving: ``(B, C, *M)``, every axis at least 2 voxels; floating point, or any type for ``"nearest"``.
        ddf: ``(B, n, *S)`` displacement in voxels of the fixed grid; see :func:`through_affine`.
        fixed_affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid.
        initial: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image; default: none.
        mode: ``"bilinear"`` or ``"nearest"``.
        padding_mode: ``"border"`` or ``"zeros"``.

    Returns:
        ``(B, C, *S)`` in the dtype that :func:`monai_lm.fields.warp` returns.

    Raises:
        ValueError: shapes that do not fit, a field that is not finite, an unknown mode, or a matrix that is no
            invertible 4×4.
    """
    _check_field(ddf)
    if moving.dim() != ddf.dim() or moving.shape[0] != ddf.shape[0]:
        raise ValueError(
            f"moving must be (B, C, *M) for a field (B, n, *S), got shapes {tuple(moving.shape)} and {tuple(ddf.shape)}"
        )
    return warp(moving, through_affine(ddf, fixed_affine, moving_affine, initial), mode, padding_mode)


def _check_field(ddf: Tensor) -> None:
    if ddf.dim() not in (4, 5) or ddf.shape[1] != ddf.dim() - 2:
        raise ValueError(f"ddf must be (B, n, *S) with n = len(S) = 2 or 3, got shape {tuple(ddf.shape)}")


def _axes_of(points: Tensor) -> int:
    if points.dim() == 0 or points.shape[-1] not in (2, 3):
        raise ValueError(f"points must be (..., 2) or (..., 3), got shape {tuple(points.shape)}")
    return int(points.shape[-1])


def _plane(matrix: np.ndarray, n: int) -> np.ndarray:
    """The homogeneous ``(n + 1, n + 1)`` part of a 4×4 for the first ``n`` axes."""
    rows = [*range(n), 3]
    return np.asarray(matrix, dtype=np.float64)[np.ix_(rows, rows)]


def _map_points(points: Tensor, matrix: np.ndarray) -> Tensor:
    n = len(matrix) - 1
    wide = widest_float(points.device)
    linear, offset = (torch.from_numpy(m.copy()).to(wide).to(points.device) for m in (matrix[:n, :n].T, matrix[:n, n]))
    out = points.to(wide) @ linear + offset
    return out.to(points.dtype if points.is_floating_point() else torch.float32)


def _affine_sum(field: Tensor, linear: np.ndarray, grid: np.ndarray) -> Tensor:
    """``linear · field(x) + grid · (x, 1)``, summed widely and component by component, in the dtype of the field."""
    field = field.as_subclass(Tensor)  # the affine of a MetaTensor would be that of another grid
    n, wide = field.shape[1], widest_float(field.device)
    size: Sequence[int] = field.shape[2:]
    rows = []
    for i in range(n):
        row = field.new_full((1,) * (n + 1), grid[i, n], dtype=wide)
        for j in range(n):
            if grid[i, j] != 0:
                voxels = torch.arange(size[j], dtype=wide, device=field.device)
                row = row + grid[i, j] * voxels.view([-1 if a == j else 1 for a in range(-1, n)])
        for j in range(n):
            if linear[i, j] != 0:
                row = row + linear[i, j] * field[:, j].to(wide)
        rows.append(row.expand(field.shape[0], *size).to(field.dtype))
    return torch.stack(rows, 1)
