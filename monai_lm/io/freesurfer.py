"""FreeSurfer's warps in MGH files (``.mgz``), as ``mri_warp_convert`` and ``mri_synthmorph`` write them; by nibabel.

The version in the header says what a volume is, 3 for a warp. Behind the data, tags say what the numbers are and where
source and target lie, the moving and the fixed image; in NIfTI files they are an extension of the header. Tested with
surfa, FreeSurfer's package.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from monai_lm.fields.space import Grid, check_affine, is_sheared
from monai_lm.io.content import check_file, look_of
from monai_lm.io.nifti import check_ddf, errors_of, load_nifti, open_nifti, replacing
from monai_lm.io.vectors import places, to_voxels

__all__ = [
    "GEOMETRIES",
    "MGH_SUFFIXES",
    "check_mgh_grid",
    "geometries",
    "in_ras",
    "is_freesurfer",
    "is_warp",
    "open_mgh",
    "read_freesurfer_ddf",
    "write_freesurfer_ddf",
]

MGH_SUFFIXES = (".mgz", ".mgh")

_WARP = 3  # the intent of a warp from target to source; 4 is that of its inverse
_START = 284  # where the data begin
_PARAMETERS = 20  # bytes of scan parameters behind them
_PLACE = ">i3i3f9f3f"  # a geometry, but for the shear, and the name of its file
_GEOMETRY, _SHEARED = _PLACE + "512s", _PLACE + "3f512s"
GEOMETRIES = 2 * struct.calcsize(_GEOMETRY)  # bytes of source and target
_TAG_GEOMETRIES, _TAG_META, _TAG_SHEARED, _TAG_END = 10, 13, 15, -1
_EXTENSION = 14  # of NIfTI, FreeSurfer's
_LENGTHLESS = (1, 2, 11, 12, 20)  # what cannot be skipped
_OLD_TRANSFORM = 30
_CRS, _CRS_DISPLACEMENT, _RAS, _RAS_DISPLACEMENT = range(4)


class _Tags(NamedTuple):
    """What the tags of a warp say.

    Attributes:
        kind: what its numbers are.
        spacing: voxels of the target from one of its voxels to the next.
        source: the affine of the moving image, if it is told.
        target: the affine of the fixed image, if it is told.
    """

    kind: int
    spacing: int
    source: np.ndarray | None
    target: np.ndarray | None


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
    """Whether an MGH or NIfTI file says that it holds a warp."""
    if Path(path).suffix.lower() in MGH_SUFFIXES:
        return open_mgh(path)[1] == _WARP
    return is_freesurfer(open_nifti(path).header)


def read_freesurfer_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a warp of FreeSurfer's in any of its four ways: positions or displacements, in voxels or RAS millimetres.

    Args:
        path: ``.mgz`` or ``.mgh`` of ``(X, Y, Z, 3)`` on the fixed grid (the target), with FreeSurfer's tags, or NIfTI
            ``(X, Y, Z, 1, 3)`` with these tags as an extension; a fourth component, of labels, is not looked at. A warp
            of every second voxel of the target lies on their grid.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file, the fixed one.

    Returns:
        The displacement in voxels, ``(3, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no MGH or NIfTI file, is cut off, is no warp, does not say what its numbers are or, of voxels,
            where their source lies, is not finite, or an affine is singular.
    """
    data, affine, said = (_in_mgh if Path(path).suffix.lower() in MGH_SUFFIXES else _in_nifti)(path)
    if said.spacing > 1:  # then mri_warp_convert writes the place of the target, not of every second voxel
        if said.target is None:
            raise ValueError(
                f"{path} must say where its target lies, of whose voxels it has only every {said.spacing}th"
            )
        affine = said.target @ np.diag([*[said.spacing] * 3, 1])
    affine = check_affine(f"affine of {path}", affine)
    if said.kind in (_CRS, _CRS_DISPLACEMENT):
        if said.kind == _CRS_DISPLACEMENT:
            data = data + said.spacing * places(np.eye(4), data.shape[1:])
        data = in_ras(path, data, said.source)
    vectors = data if said.kind == _RAS_DISPLACEMENT else data - places(affine, data.shape[1:])
    return to_voxels(path, vectors, affine, moving_affine, np.eye(4)), affine


def _in_mgh(path: str | Path) -> tuple[np.ndarray, np.ndarray, _Tags]:
    """The numbers of a warp, ``(3, *S)`` float64, the affine of its header, and what its tags say."""
    image, intent, tags = open_mgh(path)
    shape = tuple(int(s) for s in image.shape)
    if intent != _WARP or len(shape) != 4 or shape[3] not in (3, 4):
        raise ValueError(
            f"{path} must be a warp of FreeSurfer's, (X, Y, Z, 3) or (X, Y, Z, 4) with the intent {_WARP}, got shape "
            f"{shape} and the intent {intent}"
        )
    with errors_of(path, "MGH file of a warp"):
        said = _said(tags, _PARAMETERS)
        data = np.moveaxis(np.asanyarray(image.dataobj)[..., :3], -1, 0).astype(np.float64)
    if not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    return data, image.affine, said


def _in_nifti(path: str | Path) -> tuple[np.ndarray, np.ndarray, _Tags]:
    """The same of a warp in NIfTI, whose tags are in FreeSurfer's extension of the header."""
    tags = _extension(open_nifti(path).header)
    if tags is None:
        raise ValueError(f"{path} must have FreeSurfer's extension of a warp to be FreeSurfer's, got none")
    data, affine, _ = load_nifti(path)
    if data.ndim not in (4, 5) or data.shape[-1] not in (3, 4) or data.shape[3:-1] not in ((), (1,)):
        raise ValueError(f"{path} must be (X, Y, Z, 1, 3) or (X, Y, Z, 1, 4) to be a warp, got shape {data.shape}")
    with errors_of(path, "NIfTI file of a warp"):
        said = _said(tags, 4, in_nifti=True)
    return np.moveaxis(data.reshape(*data.shape[:3], -1)[..., :3], -1, 0).astype(np.float64), affine, said


def is_freesurfer(header: Any) -> bool:
    """Whether the header of a NIfTI file has FreeSurfer's extension, which says that it is a warp."""
    return _extension(header) is not None


def _extension(header: Any) -> bytes | None:
    """FreeSurfer's extension of a NIfTI header: a sign, the intent, a version, and tags; none if it is no warp's."""
    found = [bytes(one.get_content()) for one in header.extensions if one.get_code() == _EXTENSION]
    return next((content for content in found if content[1:3] == _WARP.to_bytes(2, "big")), None)


def in_ras(path: str | Path, voxels: np.ndarray, source: np.ndarray | None) -> np.ndarray:
    """Voxels ``(3, *S)`` of a source as RAS millimetres; ValueError if it does not say where it lies."""
    if source is None:
        raise ValueError(f"{path} must say where its source lies, whose voxels its numbers are, got none")
    source = check_affine(f"affine of the source in {path}", source)
    return np.einsum("ij,j...->i...", source[:3, :3], voxels) + source[:3, 3].reshape(3, 1, 1, 1)


def write_freesurfer_ddf(
    path: str | Path,
    ddf: np.ndarray,
    affine: np.ndarray,
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
) -> None:
    """Write a field as a warp of FreeSurfer's, whole or not at all: displacements in RAS millimetres.

    Args:
        path: ``.mgz`` or ``.mgh``; its folder is made if missing.
        ddf: ``(3, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid, the target.
        moving_affine: that of the moving grid, the source; default: ``affine``.
        moving_size: its voxel counts; default: those of the field.

    Raises:
        ValueError: a field that is not ``(3, *S)`` or not finite, an affine that is no invertible 4×4, a shear of the
            fixed grid, or another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in MGH_SUFFIXES:
        raise ValueError(f"path must end in .mgz or .mgh, got {path.name!r}")
    field = check_ddf(ddf)
    if len(field) != 3:
        raise ValueError(f"ddf must be (3, *S) for FreeSurfer, got shape {field.shape}")
    target = Grid(field.shape[1:], check_affine("affine", affine))
    there = target.affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    source = Grid(target.size if moving_size is None else tuple(int(s) for s in moving_size), there)
    check_mgh_grid("affine", target)
    led = np.einsum("ij,j...->i...", source.affine[:3, :3], field + places(np.eye(4), target.size))
    vectors = led + source.affine[:3, 3].reshape(3, 1, 1, 1) - places(target.affine, target.size)
    image = nib.MGHImage(np.moveaxis(vectors, 0, -1).astype(np.float32), target.affine)
    content = (_WARP << 8 | 1).to_bytes(4, "big") + image.to_bytes()[4:]
    content = content[: _START + 4 * vectors.size].ljust(_START + 4 * vectors.size + _PARAMETERS, b"\0")
    content += struct.pack(">i", _TAG_GEOMETRIES) + _packed(source) + _packed(target)
    content += struct.pack(">iq", _TAG_SHEARED, 2 * struct.calcsize(_SHEARED)) + _packed(source, True)
    content += _packed(target, True) + struct.pack(">iqiif", _TAG_META, 12, _RAS_DISPLACEMENT, 1, 0.0)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(content) if _is_deflated(path) else content)


def check_mgh_grid(name: str, grid: Grid) -> None:
    """ValueError for a sheared grid of the field, which FreeSurfer's files do not hold."""
    if is_sheared(grid.affine):
        raise ValueError(
            f"{name} must have voxel axes at right angles for FreeSurfer's files, got the affine\n{grid.affine}\n"
            "resample the image first (nibabel.processing.resample_to_output), or write file_format='voxel', which "
            "holds it"
        )


def _said(tags: bytes, at: int, in_nifti: bool = False) -> _Tags:
    """What the tags of a warp say from a byte on, in NIfTI each with its length; ValueError for what is cut off."""
    kind, spacing = -1, 1
    source: np.ndarray | None = None
    target: np.ndarray | None = None
    while at + 4 <= len(tags):
        tag, at = struct.unpack_from(">i", tags, at)[0], at + 4
        if tag in (0, _TAG_END) or (tag in _LENGTHLESS and not in_nifti):
            break
        if tag == _TAG_GEOMETRIES and not in_nifti:
            length = GEOMETRIES
        else:
            width = ">i" if tag == _OLD_TRANSFORM and not in_nifti else ">q"
            length, at = struct.unpack_from(width, tags, at)[0], at + struct.calcsize(width)
        if not 0 <= length <= len(tags) - at:
            raise ValueError(f"the tag {tag} of {length} bytes, {len(tags) - at} bytes before the end")
        if (tag == _TAG_GEOMETRIES and source is None) or tag == _TAG_SHEARED:
            source, target = geometries(tags, at, tag == _TAG_SHEARED, in_nifti)
        elif tag == _TAG_META:
            kind, spacing = struct.unpack_from(">ii", tags, at)
        at += length
    if kind not in range(4):
        raise ValueError(f"{'none' if kind == -1 else kind} as what its numbers are, not 0, 1, 2 or 3")
    return _Tags(kind, max(1, spacing), source, target)


def geometries(
    content: bytes, at: int, is_sheared: bool = False, in_nifti: bool = False
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The voxel-to-RAS affines of source and target; none where it says that it is not valid.

    Behind each is the name of a file, of 512 bytes, in NIfTI of as many as it says.
    """
    form = _PLACE + "3f" * is_sheared
    name = at + struct.calcsize(form)
    length = 4 + struct.unpack_from(">i", content, name)[0] if in_nifti else 512
    if length < 0:
        raise ValueError(f"a name of {length - 4} bytes")
    return _geometry(form, content, at), _geometry(form, content, name + length)


def _geometry(form: str, content: bytes, at: int) -> np.ndarray | None:
    values = struct.unpack_from(form, content, at)
    if not values[0]:
        return None
    size, edges, directions, centre = (np.array(values[a:b], float) for a, b in ((1, 4), (4, 7), (7, 16), (16, 19)))
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = values[19:] or 0
    out = np.eye(4)
    out[:3, :3] = directions.reshape(3, 3).T @ np.diag(edges) @ shear
    out[:3, 3] = centre - out[:3, :3] @ (size / 2)
    return out


def _packed(grid: Grid, is_sheared: bool = False) -> bytes:
    """A geometry as it is in a file; the inverse of :func:`_geometry`."""
    directions, upper = np.linalg.qr(grid.affine[:3, :3])
    signs = np.sign(np.diag(upper))
    directions, upper = directions * signs, upper * signs[:, None]
    edges = np.diag(upper)
    shear = (upper / edges[:, None])[np.triu_indices(3, 1)] if is_sheared else ()
    centre = grid.affine[:3, :3] @ (np.array(grid.size) / 2) + grid.affine[:3, 3]
    form = _SHEARED if is_sheared else _GEOMETRY
    return struct.pack(form, 1, *grid.size, *edges, *directions.T.ravel(), *centre, *shear, b"")
