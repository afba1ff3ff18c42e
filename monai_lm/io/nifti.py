"""What the formats share: whole files or none, NIfTI with errors that name the file, checked fields."""

from __future__ import annotations

import csv
import gzip
import math
import struct
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError
from nibabel.spatialimages import HeaderDataError

from monai_lm.fields.space import check_affine, is_sheared
from monai_lm.io.content import check_file, look_of

__all__ = [
    "check_ddf",
    "check_length",
    "errors_of",
    "label_type",
    "load_nifti",
    "open_nifti",
    "replacing",
    "save_nifti",
    "write_table",
]

_BROKEN = (
    ImageFileError, HeaderDataError, MGHError, EOFError, KeyError, MemoryError, OSError, OverflowError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip
"""What nibabel raises for files that are cut off, or whose headers say nonsense."""

_MOST_DEFLATED = 1032
"""Bytes that one of a gzip file makes, at most."""

_MILLIMETRES = {"mm": 1.0, "unknown": 1.0, "micron": 1e-3, "meter": 1e3}

_OTHERS = {
    (".h5", ".hdf5", ".tfm", ".txt"): "an ITK transform, which is read as a field (file_format='itk_transform')",
    (".mha", ".mhd"): "MetaImage, which is read as an image or as a field (file_format='metaimage')",
    (".nrrd", ".nhdr"): "NRRD, which is read as an image or as a field (file_format='nrrd')",
    (".mat", ".lta"): "a linear transform, which is read as an affine",
    (".npz",): "Learn2Reg's, which is read as a field (file_format='learn2reg')",
    (".mgz", ".mgh"): "MGH, which is read as an image or, if it says that it is a warp, as a field "
    "(file_format='freesurfer')",
    (".m3z", ".m3d"): "FreeSurfer's morph, which is read as a field (file_format='m3z')",
    (".head", ".brik"): "AFNI's dataset; 3dcopy makes a NIfTI file of it",
}
"""What is taken for a NIfTI file, by the suffix, and what to do with it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path``, same suffixes, to write to; renamed to ``path`` if nothing failed, else removed.

    The folder is made if missing. A reader sees the old file, or the new one, never half of one. An ``OSError``, such
    as that of a full disk, names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_ddf(ddf: Any) -> np.ndarray:
    """A finite field ``(n, *S)``, ``n = len(S)`` 2 or 3, as float32 or float64; ValueError for any other."""
    field = np.asarray(ddf)
    dtype = np.float32 if field.dtype in (np.float16, np.float32) else np.float64
    field = np.require(field, dtype, ("C", "W"))  # as torch takes it
    n = field.ndim - 1
    if n not in (2, 3) or field.shape[0] != n:
        raise ValueError(f"ddf must be (n, *S) with n = len(S) = 2 or 3, got shape {field.shape}")
    if not np.isfinite(field).all():
        raise ValueError(f"ddf must be finite, got {int((~np.isfinite(field)).sum())} NaN or infinite values")
    return field


def save_nifti(
    path: str | Path,
    data: np.ndarray,
    affine: np.ndarray,
    intent: str | int,
    dtype: type = np.float32,
    name: str = "",
    seconds: float | None = None,
) -> None:
    """Write data with qform, sform, units, an intent and perhaps its name, whole or not at all.

    Of data whose fourth axis is time, ``seconds`` are from one volume to the next.

    A qform holds no shear: a sheared affine is written as the sform alone.

    Raises:
        ValueError: ``path`` does not end in ``.nii`` or ``.nii.gz``.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name!r}")
    image = nib.Nifti1Image(np.asarray(data, dtype=dtype), affine)
    image.header.set_intent(intent, name=name, allow_unknown=True)
    image.header.set_xyzt_units("mm", None if seconds is None else "sec")
    if seconds is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], seconds))
    image.set_sform(affine, 1)
    if is_sheared(affine):
        image.set_qform(None, 0)
    else:
        image.set_qform(affine, 1)
    with replacing(path) as temporary:
        nib.save(image, temporary)


@contextmanager
def errors_of(path: str | Path, what: str = "NIfTI file") -> Iterator[None]:
    """What a broken file makes nibabel raise, as a ValueError that names the file."""
    try:
        yield
    except PermissionError:
        raise
    except _BROKEN as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ImageFileError):  # which says no more than that
            said = look_of(path)
        elif isinstance(error, KeyError):
            said = f"an unknown code {error} in it"
        raise ValueError(f"{path} must be a whole {what}, got {said}") from error


def open_nifti(path: str | Path) -> Any:
    """A NIfTI image whose data are not read yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, or its header is cut off.
    """
    check_file(path)
    suffix = Path(path).suffix.lower()
    if other := next((text for ends, text in _OTHERS.items() if suffix in ends), None):
        raise ValueError(f"{path} must be a NIfTI file, got the suffix of {other}")
    with errors_of(path):
        image = nib.load(path)
    kind = type(image).__name__
    if not kind.startswith("Nifti"):
        raise ValueError(f"{path} must be a NIfTI file, got a {kind}")
    return image


def check_length(path: str | Path, image: Any) -> None:
    """ValueError for a file that cannot hold the data of its header, before memory is taken for them."""
    size = Path(path).stat().st_size
    most = size if Path(path).suffix.lower() in (".nii", ".mgh") else _MOST_DEFLATED * size
    if (claimed := math.prod(image.shape) * image.get_data_dtype().itemsize) > most:
        raise ValueError(f"a header of {claimed} bytes of data in a file of {size}")


def _check_sum(path: str | Path) -> None:
    """An error of gzip or zlib for a compressed file whose check sum is wrong, which nibabel does not read up to."""
    if Path(path).suffix.lower() == ".gz":
        with gzip.open(path) as file:
            while file.read(2**24):
                pass


def _check_place(path: str | Path, header: Any, any_unit: bool) -> float:
    """Millimetres per unit of the header; warn where programs disagree about where the image lies.

    ValueError for units other than millimetres, unless any will do.
    """
    with errors_of(path):
        unit = header.get_xyzt_units()[0]
    if _MILLIMETRES[unit] != 1 and not any_unit:
        raise ValueError(
            f"{path} must be in millimetres, got {unit}, which says of what unit the grid is and not of what its "
            "vectors are; bring both to millimetres and say so (nibabel: header.set_xyzt_units('mm'))"
        )
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes == (0, 0):
        warnings.warn(
            f"{path} does not say where it lies: it is centred at the origin, ITK puts a corner there", stacklevel=4
        )
    elif min(codes) > 0 and not _agree(header):
        warnings.warn(f"{path} has two affines that differ: its sform is used, ITK may use its qform", stacklevel=4)
    return _MILLIMETRES[unit]


def _agree(header: Any) -> bool:
    """Whether sform and qform do; a quaternion that is none does not."""
    try:
        qform = header.get_qform()
    except ValueError:
        return False
    return np.allclose(header.get_sform(), qform, rtol=1e-3, atol=1e-2)


def label_type(label: np.ndarray) -> type[np.generic]:
    """Smallest unsigned type that holds the labels."""
    return next(t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if int(label.max()) <= np.iinfo(t).max)


def load_nifti(path: str | Path, any_unit: bool = False, finite: bool = True) -> tuple[np.ndarray, np.ndarray, Any]:
    """Read a NIfTI file of real numbers.

    Args:
        path: the file.
        any_unit: whether it may be in metres or micrometres: its numbers are no lengths.
        finite: whether they must be finite.

    Returns:
        The data, float32 or (if stored as anything but that) float64, in native byte order; the ``(4, 4)`` affine, in
        millimetres; the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, does not hold finite real numbers, its affine is singular, or it is
            in another unit than millimetres where not any will do.
    """
    image = open_nifti(path)
    scale = _check_place(path, image.header, any_unit)
    with errors_of(path):
        check_length(path, image)
        data = np.asanyarray(image.dataobj)
        _check_sum(path)
    if data.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold real numbers, got dtype {data.dtype}")
    if data.dtype.itemsize == 8 and data.dtype.kind in "iu" and data.size and max(data.max(), -data.min()) > 2**53:
        raise ValueError(f"{path} must hold numbers up to {2**53}, which float64 can tell apart, got {data.max()}")
    data = np.require(data, np.float32 if data.dtype.newbyteorder("=") == np.float32 else np.float64, "W")
    if data.size == 0:
        raise ValueError(f"{path} must hold voxels, got shape {data.shape}")
    if finite and not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    affine = check_affine(f"affine of {path}", image.affine)
    return data, affine if scale == 1 else np.diag([scale, scale, scale, 1.0]) @ affine, image.header


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, whole or not at all, with every column that a row has; returns the path."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
