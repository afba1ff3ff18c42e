"""Images from any file that holds them: NIfTI, FreeSurfer's ``.mgz``, pictures, and what SimpleITK reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_lm.fields.space import check_affine
from monai_lm.io.freesurfer import MGH_SUFFIXES, open_mgh
from monai_lm.io.nifti import errors_of, load_nifti
from monai_lm.io.pictures import PICTURE_SUFFIXES, load_picture, says_resolution
from monai_lm.io.simpleitk import IMAGE_SUFFIXES, load_itk, says_spacing

__all__ = ["load_volume", "says_edges"]


def load_volume(path: str | Path, finite: bool = True, label: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read an image of real numbers, in the format of its suffix, of any other suffix as NIfTI.

    Args:
        path: the file.
        finite: whether the numbers must be finite.
        label: whether they are labels, which a picture may keep as the numbers of its palette.

    Returns:
        The data, ``(X, Y, Z, …)`` float32 or float64, and the ``(4, 4)`` voxel-to-RAS affine in millimetres.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a broken file, one of another format, or what :func:`monai_lm.io.nifti.load_nifti` refuses.
    """
    data, affine = _load(path, label)
    if finite and not np.isfinite(data).all():
        masked = "" if label else ", and a mask (fixed_mask, moving_mask) or a lesion hides them"
        raise ValueError(
            f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values; np.nan_to_num makes "
            f"zeros of NaN{masked}"
        )
    return data, affine


def says_edges(path: str | Path) -> bool:
    """Whether the file of an image says how long the edges of its voxels are; where it does not, they are 1 mm."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return says_spacing(path)
    return suffix not in PICTURE_SUFFIXES or says_resolution(path)


def _load(path: str | Path, label: bool) -> tuple[np.ndarray, np.ndarray]:
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return load_itk(path, finite=False)
    if suffix in MGH_SUFFIXES:
        return _load_mgh(path)
    if suffix in PICTURE_SUFFIXES:
        return load_picture(path, label)
    return load_nifti(path, any_unit=True, finite=False)[:2]


def _load_mgh(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    image = open_mgh(path)[0]
    with errors_of(path, "MGH file"):
        data = np.asanyarray(image.dataobj)
    data = np.require(data, np.float32 if data.dtype.newbyteorder("=") == np.float32 else np.float64, "W")
    return data, check_affine(f"affine of {path}", image.affine)
