"""Displacement fields in ITK's convention, which ANTs and Slicer share; tested with SimpleITK."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["write_itk_ddf"]


def write_itk_ddf(path: str | Path, ddf: np.ndarray, affine: np.ndarray) -> None:
    """Write a voxel field as a NIfTI displacement field in LPS millimetres.

    The file is ``(X, Y, Z, 1, 3)`` float32 (2D: ``(X, Y, 1, 1, 2)``) with the vector intent, on the fixed grid, in the
    same pull-back direction. It is written beside its place and then renamed, so there is never half a file.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS-millimetre affine of the fixed grid.

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
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name!r}")
    ras = np.einsum("ij,j...->...i", affine[:n, :n], ddf)
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
