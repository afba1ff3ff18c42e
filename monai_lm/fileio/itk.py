"""Displacement fields in ITK's convention, which ANTs and Slicer share; tested with SimpleITK."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["write_itk_ddf"]


def write_itk_ddf(
    path: str | Path, ddf: np.ndarray, affine: np.ndarray, moving_affine: np.ndarray | None = None
) -> None:
    """Write a voxel field as a NIfTI displacement field in LPS millimetres.

    The file is ``(X, Y, Z, 1, 3)`` float32 (2D: ``(X, Y, 1, 1, 2)``) with the vector intent, on the fixed grid, in the
    same pull-back direction. It is written beside its place and then renamed, so there is never half a file.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS-millimetre affine of the fixed grid.
        moving_affine: that of the moving grid, if it is another one: the file maps points of the fixed image's space to
            points of the moving image's, ``A_m (x + u(x)) - A_f x``.

    Raises:
        ValueError: the field is not ``(n, *S)`` with ``n = len(S)`` 2 or 3, or the affine not an invertible 4×4.
    """
    path = Path(path)
    ddf, affine = np.asarray(ddf, dtype=np.float64), np.asarray(affine, dtype=np.float64)
    n = ddf.ndim - 1
    if n not in (2, 3) or ddf.shape[0] != n:
        raise ValueError(f"ddf must be (n, *S) with n = len(S) = 2 or 3, got shape {ddf.shape}")
    if not np.isfinite(ddf).all():
        raise ValueError(f"ddf must be finite, got {int((~np.isfinite(ddf)).sum())} NaN or infinite values")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError(f"affine must be an invertible (4, 4) matrix, got shape {affine.shape}:\n{affine}")
    moving_affine = affine if moving_affine is None else np.asarray(moving_affine, dtype=np.float64)
    if moving_affine.shape != (4, 4) or not np.isfinite(moving_affine).all():
        raise ValueError(
            f"moving_affine must be a finite (4, 4) matrix, got shape {moving_affine.shape}:\n{moving_affine}"
        )
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name!r}")
    ras = np.einsum("ij,j...->...i", moving_affine[:n, :n], ddf)
    between = moving_affine - affine
    if between.any():
        voxels = np.stack(np.meshgrid(*[np.arange(s) for s in ddf.shape[1:]], indexing="ij"), -1)
        ras = ras + voxels @ between[:n, :n].T + between[:n, 3]
    lps = ras * np.array([-1.0, -1.0, 1.0])[:n]
    data = lps[..., None, :] if n == 3 else lps[:, :, None, None, :]
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
