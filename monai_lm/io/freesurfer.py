"""FreeSurfer's warps in MGH files (``.mgz``), as ``mri_warp_convert`` and ``mri_synthmorph`` write them; by nibabel.

The version in the header says what a volume is, 3 for a warp. Behind the data, tags say what the numbers are and where
the source lies, the moving image. Tested with surfa, FreeSurfer's package.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_lm.fields.space import check_affine
from monai_lm.io.content import check_file, look_of
from monai_lm.io.nifti import errors_of
from monai_lm.io.vectors import places, to_voxels

__all__ = ["MGH_SUFFIXES", "is_warp", "open_mgh", "read_freesurfer_ddf"]

MGH_SUFFIXES = (".mgz", ".mgh")

_WARP = 3  # the intent of a warp from target to source; 4 is that of its inverse
_START = 284  # where the data begin
_PARAMETERS = 20  # bytes of scan parameters behind them
_GEOMETRY = ">i3i3f9f3f512s"
_TAG_GEOMETRIES, _TAG_META, _TAG_SHEARED = 10, 13, 15
_LENGTHLESS = (1, 2, 11, 12, 20)  # what cannot be skipped
_OLD_TRANSFORM = 30
_CRS, _CRS_DISPLACEMENT, _RAS, _RAS_DISPLACEMENT = range(4)


def open_mgh(path: str | Path) -> tuple[Any, int, bytes]:
    """An MGH image, its intent, and what follows its data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no MGH file, or is cut off.
    """
    check_file(path)
    with errors_of(path, "MGH file"):
        content = gzip.decompress(Path(path).read_bytes()) if _is_deflated(path) else Path(path).read_bytes()
    version = int.from_bytes(content[:4], "big")
    if version & 0xFF != 1 or version >> 24:
        raise ValueError(f"{path} must be a whole MGH file, got {look_of(path)}")
    with errors_of(path, "MGH file"):
        image = nib.MGHImage.from_bytes(b"\0\0\0\1" + content[4:])  # nibabel knows no intents
        end = _START + int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
        if end > len(content):
            raise ValueError(f"a header of {end} bytes in a file of {len(content)}")
    return image, version >> 8, content[end:]


def _is_deflated(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".mgz"


def is_warp(path: str | Path) -> bool:
    """Whether an MGH file says that it holds a warp."""
    return open_mgh(path)[1] == _WARP


def read_freesurfer_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a warp of FreeSurfer's in any of its four ways: positions or displacements, in voxels or RAS millimetres.

    Args:
        path: ``.mgz`` or ``.mgh`` of ``(X, Y, Z, 3)`` on the fixed grid (the target), with FreeSurfer's tags.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file, the fixed one.

    Returns:
        The displacement in voxels, ``(3, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no MGH file, is cut off, is no warp, does not say what its numbers are or, if they are voxels,
            where the source lies, is not finite, or an affine is singular.
    """
    image, intent, tags = open_mgh(path)
    shape = tuple(int(s) for s in image.shape)
    if intent != _WARP or len(shape) != 4 or shape[3] != 3:
        raise ValueError(
            f"{path} must be a warp of FreeSurfer's, (X, Y, Z, 3) with the intent {_WARP}, got shape {shape} and the "
            f"intent {intent}"
        )
    with errors_of(path, "MGH file of a warp"):
        kind, source = _meant(tags)
        data = np.moveaxis(np.asanyarray(image.dataobj), -1, 0).astype(np.float64)
    if not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    affine = check_affine(f"affine of {path}", image.affine)
    if kind in (_CRS, _CRS_DISPLACEMENT):
        if source is None:
            raise ValueError(f"{path} must say where its source lies, whose voxels its numbers are, got none")
        source = check_affine(f"affine of the source in {path}", source)
        voxels = data + (places(np.eye(4), data.shape[1:]) if kind == _CRS_DISPLACEMENT else 0)
        data = np.einsum("ij,j...->i...", source[:3, :3], voxels) + source[:3, 3].reshape(3, 1, 1, 1)
    vectors = data if kind == _RAS_DISPLACEMENT else data - places(affine, data.shape[1:])
    return to_voxels(path, vectors, affine, moving_affine, np.eye(4)), affine


def _meant(tags: bytes) -> tuple[int, np.ndarray | None]:
    """What the numbers of a warp are, and the affine of its source, if it is told; ValueError for what is cut off."""
    kind, at = -1, _PARAMETERS
    source: np.ndarray | None = None
    while at + 4 <= len(tags):
        tag, at = struct.unpack_from(">i", tags, at)[0], at + 4
        if tag == 0 or tag in _LENGTHLESS:
            break
        if tag == _TAG_GEOMETRIES:
            length = 2 * struct.calcsize(_GEOMETRY)
        else:
            width = ">i" if tag == _OLD_TRANSFORM else ">q"
            length, at = struct.unpack_from(width, tags, at)[0], at + struct.calcsize(width)
        if not 0 <= length <= len(tags) - at:
            raise ValueError(f"the tag {tag} of {length} bytes, {len(tags) - at} bytes before the end")
        if tag == _TAG_GEOMETRIES and source is None:
            source = _geometry(tags, at)
        elif tag == _TAG_SHEARED:
            source = _geometry(tags, at, is_sheared=True)
        elif tag == _TAG_META:
            kind = struct.unpack_from(">i", tags, at)[0]
        at += length
    if kind not in range(4):
        raise ValueError(f"{'none' if kind == -1 else kind} as what its numbers are, not 0, 1, 2 or 3")
    return kind, source


def _geometry(tags: bytes, at: int, is_sheared: bool = False) -> np.ndarray | None:
    """The voxel-to-RAS affine of a geometry; none if it says that it is not valid."""
    form = _GEOMETRY.replace("512s", "3f512s") if is_sheared else _GEOMETRY
    values = struct.unpack_from(form, tags, at)
    if not values[0]:
        return None
    size, edges, directions, centre = (np.array(values[a:b], float) for a, b in ((1, 4), (4, 7), (7, 16), (16, 19)))
    shear = np.eye(3)
    if is_sheared:
        shear[0, 1], shear[0, 2], shear[1, 2] = values[19:22]
    out = np.eye(4)
    out[:3, :3] = directions.reshape(3, 3).T @ np.diag(edges) @ shear
    out[:3, 3] = centre - out[:3, :3] @ (size / 2)
    return out
