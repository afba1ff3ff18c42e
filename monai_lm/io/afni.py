"""Warps of AFNI (``3dQwarp``, ``3dNwarpCat``) in NIfTI: displacements in AFNI's DICOM order, LPS millimetres."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.fields.space import Grid
from monai_lm.io.nifti import load_nifti, open_nifti
from monai_lm.io.vectors import LPS, components_first, to_voxels

__all__ = ["check_afni_grid", "is_afni", "read_afni_ddf"]

_ECODE, _LABELS = 4, ["x_delta", "y_delta", "z_delta"]


def _labels(header: Any) -> list[str] | None:
    """What AFNI's extension calls the volumes of a file; ``None`` where there is no such extension."""
    contents = [extension.get_content() for extension in header.extensions if extension.get_code() == _ECODE]
    if not contents:
        return None
    text = contents[0].decode("latin-1") if isinstance(contents[0], bytes) else str(contents[0])
    said = re.search(r'atr_name="BRICK_LABS"[^>]*>\s*"(.*?)"', text, re.DOTALL)
    return said[1].strip().split("~") if said else []


def is_afni(header: Any) -> bool:
    """Whether the header of a NIfTI file says that it is a warp of AFNI's."""
    return (_labels(header) or [])[:3] == _LABELS


def check_afni_grid(name: str, grid: Grid) -> None:
    """ValueError for a grid whose axes are not those of space, to a tenth of a degree."""
    along = np.abs(grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)).max(axis=0)
    if along.min() < np.cos(np.radians(0.1)):
        raise ValueError(
            f"{name} must lie along the axes of space for AFNI's warps, which leave obliquity out of account, got the "
            f"affine\n{grid.affine}\nmake the warp of images after 3dWarp -deoblique"
        )


def read_afni_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read AFNI's warp, whose first three volumes are displacements in LPS millimetres, from base to source.

    Args:
        path: NIfTI file ``(X, Y, Z, 1, 3)`` or ``(X, Y, Z, 3)``, or with more volumes, on the grid of the base, whose
            AFNI extension names the first ``x_delta``, ``y_delta`` and ``z_delta``.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the source; default: that of the file.

    Returns:
        The displacement in voxels, ``(3, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, does not say that it is a warp of AFNI's, lies on an oblique grid,
            which AFNI takes for a straight one, or is not finite.
    """
    header = open_nifti(path).header
    if not is_afni(header):
        labels = _labels(header)
        said = "no extension of AFNI's" if labels is None else f"volumes named {labels}"
        raise ValueError(
            f"{path} must name its volumes {_LABELS} to be a warp of AFNI's, got {said}; say file_format='lps' if it "
            "holds displacements in AFNI's DICOM order"
        )
    data, affine, _ = load_nifti(path)
    check_afni_grid(str(path), Grid(data.shape[:3], affine))
    if data.ndim not in (4, 5) or data.shape[-1] < 3:
        raise ValueError(f"{path} must be (X, Y, Z, 1, 3) to be AFNI's, got shape {data.shape}")
    vectors, affine = components_first(path, data[..., :3], affine)
    return to_voxels(path, vectors, affine, moving_affine, LPS), affine
