"""Vectors in NIfTI files: which axes hold what, and millimetres that do not say whose they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from monai_lm.fields.space import check_affine, from_space, to_world
from monai_lm.io.nifti import load_nifti

__all__ = [
    "LPS",
    "as_nearest",
    "components_first",
    "flattened",
    "looks_like_positions",
    "places",
    "read_millimetre_ddf",
    "single",
    "to_voxels",
]

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def components_first(
    path: str | Path, data: np.ndarray, affine: np.ndarray, in_voxels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a file as ``(n, *S)``, and the affine of their grid.

    Three components of a plane are ``(3, X, Y, 1)``, whichever axis the file has one voxel along, as images in 2D have
    it; those ``in_voxels`` are then in the order of these axes, too.

    Raises:
        ValueError: neither ``(X, Y, Z, 1, 3)``, ``(X, Y, 1, 1, 2)`` nor one of these without its fourth axis.
    """
    shape = data.shape
    n = shape[-1] if len(shape) in (4, 5) else 0
    if n not in (2, 3) or shape[n:-1] != (1,) * (len(shape) - n - 1):
        raise ValueError(
            f"{path} must be (X, Y, Z, 1, 3) or (X, Y, 1, 1, 2), or these without the fourth axis, to hold vectors, "
            f"got shape {shape}"
        )
    vectors = np.moveaxis(data.reshape(*shape[:n], n), -1, 0)
    if n == 3 and sorted(shape[:3])[:2].count(1) == 1:
        order = sorted(range(3), key=lambda axis: shape[axis] == 1)
        vectors, affine = vectors.transpose(0, *(1 + axis for axis in order)), affine[:, [*order, 3]]
        vectors = vectors[order] if in_voxels else vectors
    return vectors, affine


def flattened(path: str | Path, ddf: np.ndarray) -> np.ndarray:
    """A field ``(3, X, Y, 1)`` that stays in its plane as ``(2, X, Y)``; any other as it is.

    Raises:
        ValueError: a field that leads out of its plane, or a grid of one voxel along another axis.
    """
    if len(ddf) == 3 and ddf.shape[3] == 1:
        if (most := float(np.abs(ddf[2]).max())) > 1e-3:
            raise ValueError(
                f"{path} must hold a field in the plane of its grid, {ddf.shape[1:3]} voxels, got one that leads "
                f"out of it by up to {most:.3g} of its thickness"
            )
        ddf = np.ascontiguousarray(ddf[:2, :, :, 0])
    if min(ddf.shape[1:]) < 2:
        raise ValueError(f"{path} must hold a field of at least 2 voxels along every axis, got {ddf.shape[1:]}")
    return ddf


def single(path: str | Path, ddf: np.ndarray) -> np.ndarray:
    """A field as float32; ValueError for one of numbers that do not fit."""
    if not np.abs(ddf).max() <= np.finfo(np.float32).max:
        raise ValueError(
            f"{path} must lead to places that float32 can hold, got displacements up to {np.abs(ddf).max()}"
        )
    return np.ascontiguousarray(ddf, dtype=np.float32)


def to_voxels(
    path: str | Path, vectors: np.ndarray, affine: np.ndarray, moving_affine: np.ndarray | None, space: np.ndarray
) -> np.ndarray:
    """Displacements ``(n, *S)`` of points in millimetres of a space (as RAS or LPS) as a field in voxels, float32.

    Raises:
        ValueError: an affine is singular, two components for a plane of z, or what :func:`flattened` refuses.
    """
    moving_affine = affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    for grid in (affine, moving_affine):
        across = np.cross(*grid[:3, :2].T)
        if len(vectors) == 2 and abs(across[2]) < 1e-6 * np.linalg.norm(across):
            raise ValueError(
                f"{path} must hold three components for a plane at right angles to that of x and y, got two and the "
                f"affine\n{grid}"
            )
    displacement = torch.from_numpy(np.ascontiguousarray(vectors))[None]
    return flattened(path, single(path, from_space(displacement, space @ affine, space @ moving_affine)[0].numpy()))


def read_millimetre_ddf(
    path: str | Path, kind: str, moving_affine: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read vectors in millimetres from a file that does not say what they are.

    Args:
        path: NIfTI file ``(X, Y, Z, 1, 3)`` or ``(X, Y, Z, 3)`` (2D: ``(X, Y, 1, 1, 2)`` or ``(X, Y, 1, 2)``) on the
            fixed grid; its intent is not looked at.
        kind: ``"ras"`` or ``"lps"``: displacements in that system (FreeSurfer and SynthMorph write RAS);
            ``"positions"``: where the voxels are led, in RAS millimetres (SPM's ``y_`` files); voxels that are led
            nowhere, NaN, are displaced as the nearest of the others.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, is not a vector field, is not finite, or an affine is singular.

    Warns:
        UserWarning: positions that are NaN.
    """
    data, affine, _ = load_nifti(path, finite=kind != "positions")
    vectors, affine = components_first(path, data, affine)
    if kind == "positions":
        vectors = _known(path, vectors - places(affine, vectors.shape[1:]))
    return to_voxels(path, vectors, affine, moving_affine, LPS if kind == "lps" else np.eye(4)), affine


def _known(path: str | Path, vectors: np.ndarray) -> np.ndarray:
    """Displacements, those that are NaN as the nearest of the others, with a warning; ValueError for infinite ones."""
    unknown = np.isnan(vectors).any(axis=0)
    if np.isinf(vectors).any() or unknown.all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(vectors)).sum())} NaN or infinite values")
    if unknown.any():
        warnings.warn(
            f"{path} leads {int(unknown.sum())} of {unknown.size} voxels nowhere (NaN): they are displaced as the "
            "nearest of the others",
            stacklevel=4,
        )
    return as_nearest(vectors, unknown)


def as_nearest(vectors: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Displacements ``(n, *S)`` with those of unknown voxels ``(*S)`` as the nearest of the others."""
    if not unknown.any():
        return vectors
    from scipy.ndimage import distance_transform_edt  # SciPy takes a part of a second to import

    nearest = distance_transform_edt(unknown, return_distances=False, return_indices=True)
    return np.stack([axis[tuple(nearest)] for axis in vectors])


def looks_like_positions(vectors: np.ndarray, affine: np.ndarray) -> bool:
    """Whether vectors ``(n, *S)`` are about where their voxels are in RAS millimetres: less than half as uneven so."""
    spread = [sum(float(c.std()) for c in field) for field in (vectors, vectors - places(affine, vectors.shape[1:]))]
    return spread[1] < 0.5 * spread[0]


def places(affine: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Where the voxels of a grid are in RAS millimetres, ``(n, *S)``."""
    voxels = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in size], indexing="ij"), -1)
    return np.moveaxis(to_world(voxels, affine).numpy(), -1, 0)
