"""Fields in voxels, as this package, MONAI and Learn2Reg hold them: NIfTI, and Learn2Reg's ``.npz``."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from monai_lm.fields.space import check_affine
from monai_lm.io.content import check_file, look_of
from monai_lm.io.nifti import check_ddf, load_nifti, replacing, save_nifti
from monai_lm.io.vectors import components_first, flattened, single

__all__ = ["VOXELS", "read_learn2reg_ddf", "read_voxel_ddf", "write_learn2reg_ddf", "write_voxel_ddf"]

VOXELS = "voxels"
"""The name of the intent of fields that :func:`write_voxel_ddf` wrote."""


def write_voxel_ddf(path: str | Path, ddf: np.ndarray, affine: np.ndarray) -> None:
    """Write a field in voxels as NIfTI, ``(X, Y, Z, 3)`` float32 (2D: ``(X, Y, 1, 2)``) without an intent code.

    That is how MONAI's ``SaveImage`` stores a channel-first tensor, and what Learn2Reg takes since 2022. The name of
    the intent says that it is in voxels, so that :func:`monai_lm.io.guess_format` need not ask.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.

    Raises:
        ValueError: a field that is not ``(n, *S)`` or not finite, or an affine that is no invertible 4×4.
    """
    field = np.moveaxis(check_ddf(ddf), 0, -1)
    if field.shape[-1] == 2:
        field = field[:, :, None]
    save_nifti(path, field, check_affine("affine", affine), "none", name=VOXELS)


def read_voxel_ddf(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a field in voxels from NIfTI, ``(X, Y, Z, 3)`` or ``(X, Y, 1, 2)``, a fifth axis of components also.

    A plane ``(X, Y, 1, 3)`` whose third components are zero is a field in 2D.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, has another shape, or is not finite.
    """
    data, affine, _ = load_nifti(path, any_unit=True)
    vectors, affine = components_first(path, data, affine, in_voxels=True)
    return flattened(path, single(path, vectors)), affine


def write_learn2reg_ddf(path: str | Path, ddf: np.ndarray, half: bool = False) -> None:
    """Write a field as Learn2Reg's ``.npz``: ``(3, X, Y, Z)`` float16 under ``arr_0``, whole or not at all.

    Args:
        path: ``.npz``; its folder is made if missing.
        ddf: ``(3, *S)`` displacement in voxels. Half precision keeps 11 bits: 10 voxels to 1/256.
        half: store every axis at half its length (as the tasks of 2021 except the hippocampus want), corner voxels on
            corner voxels, linearly interpolated, **values still in voxels of full resolution**.

    Raises:
        ValueError: a field that is not ``(3, *S)``, not finite or too large for half precision, or another suffix.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {path.name!r}")
    field = check_ddf(ddf)
    if len(field) != 3:
        raise ValueError(f"ddf must be (3, *S) for Learn2Reg, got shape {field.shape}")
    if half:
        field = _resize(field, [s // 2 for s in field.shape[1:]])
    if np.abs(field).max() > np.finfo(np.float16).max:
        raise ValueError(f"ddf must be below 65504 voxels for half precision, got {np.abs(field).max()}")
    with replacing(path) as temporary:
        np.savez_compressed(temporary, arr_0=field.astype(np.float16))


def read_learn2reg_ddf(path: str | Path, size: Sequence[int] | None = None) -> np.ndarray:
    """Read Learn2Reg's ``.npz``, at full or at half resolution.

    Args:
        path: file with a ``(3, X, Y, Z)`` field in voxels of full resolution under ``arr_0``.
        size: three voxel counts of the fixed image. A field of that size is returned as it is; one of half the size is
            laid over the grid with corner voxels on corner voxels and interpolated linearly, its values unchanged
            (Learn2Reg's evaluation does the same with a quadratic spline). Default: the size of the field.

    Returns:
        The displacement in voxels, ``(3, *size)`` float32; the file knows no affine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ``.npz``, is cut off, has no ``arr_0`` of three components, is not finite, or is neither of
            the full nor of half the size.
    """
    path = Path(path)
    check_file(path)
    if not zipfile.is_zipfile(path):
        look = look_of(path)
        raise ValueError(f"{path} must be a whole .npz file, got {look}{' that is cut off' * look.startswith('a zip')}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            field = archive["arr_0"] if "arr_0" in names else None
    except PermissionError:
        raise
    except (AttributeError, EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole .npz file, got {type(error).__name__}: {error}") from error
    if field is None:
        raise ValueError(f"{path} must hold the array 'arr_0', got {names}")
    if field.dtype.kind not in "fiu" or field.ndim != 4 or len(field) != 3:
        raise ValueError(f"{path} must hold (3, X, Y, Z) real numbers, got shape {field.shape} of {field.dtype}")
    if not np.isfinite(field).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(field)).sum())} NaN or infinite values")
    field = np.require(field, np.float32, ("C", "W"))
    size = field.shape[1:] if size is None else tuple(int(s) for s in size)
    if field.shape[1:] == size:
        return field
    halves = len(size) == 3 and all(h in (s // 2, (s + 1) // 2) for h, s in zip(field.shape[1:], size, strict=True))
    if not halves:
        raise ValueError(f"{path} must be of the size {tuple(size)} or of half of it, got {field.shape[1:]}")
    return _resize(field, size)


def _resize(field: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear interpolation, corner voxels on corner voxels, values as they are."""
    out = F.interpolate(torch.from_numpy(field)[None], size=tuple(size), mode="trilinear", align_corners=True)
    return out[0].numpy()
