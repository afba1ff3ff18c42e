"""Fields of NiftyReg (``reg_f3d``, ``reg_transform``): RAS millimetres, displacements or positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.nifti import open_nifti
from monai_lm.io.vectors import read_millimetre_ddf

__all__ = ["is_niftyreg", "read_niftyreg_ddf"]

_POSITIONS, _DISPLACEMENTS = 0, 1
_OTHERS: dict[float, str] = {
    2: "the control points of a cubic spline",
    3: "a velocity field as positions",
    4: "a velocity field as displacements",
    5: "the control points of a velocity field",
    6: "the control points of a linear spline",
}
"""What else ``intent_p1`` says."""


def is_niftyreg(header: Any) -> bool:
    """Whether the header of a NIfTI file says that it is a transformation of NiftyReg's."""
    return bool(header["intent_name"].item() == b"NREG_TRANS")


def read_niftyreg_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read NiftyReg's deformation field (positions, ``intent_p1`` 0) or displacement field (1), in RAS millimetres.

    Args:
        path: NIfTI file ``(X, Y, Z, 1, 3)`` (2D: ``(X, Y, 1, 1, 2)``) on the fixed grid, named ``NREG_TRANS``.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, is not NiftyReg's, holds control points or velocities, or is not
            finite.
    """
    header = open_nifti(path).header
    if not is_niftyreg(header):
        raise ValueError(f"{path} must be named NREG_TRANS to be NiftyReg's, got {header['intent_name'].item()!r}")
    kind = float(header["intent_p1"])
    if kind not in (_POSITIONS, _DISPLACEMENTS):
        raise ValueError(
            f"{path} must hold NiftyReg's positions or displacements (intent_p1 0 or 1), got "
            f"{_OTHERS.get(kind, 'something else')} ({kind:g}); "
            f"reg_transform -ref FIXED -def {Path(path).name} FIELD.nii.gz makes a field of it"
        )
    return read_millimetre_ddf(path, "positions" if kind == _POSITIONS else "ras", moving_affine)
