"""What the formats share: whole files or none, NIfTI with errors that name the file, checked fields."""

from __future__ import annotations

import csv
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

from monai_lm.fields.space import check_affine, is_sheared

__all__ = ["check_ddf", "label_type", "load_nifti", "open_nifti", "replacing", "save_nifti", "write_table"]


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
) -> None:
    """Write data with qform, sform, units, an intent and perhaps its name, whole or not at all.

    A qform holds no shear: a sheared affine is written as the sform alone.

    Raises:
        ValueError: ``path`` does not end in ``.nii`` or ``.nii.gz``.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {path.name!r}")
    image = nib.Nifti1Image(np.asarray(data, dtype=dtype), affine)
    image.header.set_intent(intent, name=name, allow_unknown=True)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    if is_sheared(affine):
        image.set_qform(None, 0)
    else:
        image.set_qform(affine, 1)
    with replacing(path) as temporary:
        nib.save(image, temporary)


@contextmanager
def _errors_of(path: str | Path) -> Iterator[None]:
    """What a broken file makes nibabel raise, as a ValueError that names the file."""
    try:
        yield
    except PermissionError:
        raise
    except (ImageFileError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole NIfTI file, got {type(error).__name__}: {error}") from error


def open_nifti(path: str | Path) -> Any:
    """A NIfTI image whose data are not read yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, or its header is cut off.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    with _errors_of(path):
        image = nib.load(path)
    kind = type(image).__name__
    if not kind.startswith("Nifti"):
        raise ValueError(f"{path} must be a NIfTI file, got a {kind}")
    return image


def _check_place(path: str | Path, header: Any) -> None:
    """ValueError for units other than millimetres; warn where programs disagree about where the image lies."""
    if (unit := header.get_xyzt_units()[0]) not in ("mm", "unknown"):
        raise ValueError(f"{path} must be in millimetres, got {unit}")
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes == (0, 0):
        warnings.warn(
            f"{path} does not say where it lies: it is centred at the origin, ITK puts a corner there", stacklevel=4
        )
    elif min(codes) > 0 and not np.allclose(header.get_sform(), header.get_qform(), rtol=1e-3, atol=1e-2):
        warnings.warn(f"{path} has two affines that differ: its sform is used, ITK may use its qform", stacklevel=4)


def label_type(label: np.ndarray) -> type[np.generic]:
    """Smallest unsigned type that holds the labels."""
    return next(t for t in (np.uint8, np.uint16, np.uint32, np.uint64) if int(label.max()) <= np.iinfo(t).max)


def load_nifti(path: str | Path, finite: bool = True) -> tuple[np.ndarray, np.ndarray, Any]:
    """Read a NIfTI file of real numbers, which must be ``finite`` unless told otherwise.

    Returns:
        The data, float32 or (if stored as anything but that) float64, in native byte order; the ``(4, 4)`` affine; the
        header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, does not hold finite real numbers, or its affine is singular.
    """
    image = open_nifti(path)
    _check_place(path, image.header)
    with _errors_of(path):
        data = np.asanyarray(image.dataobj)
    if data.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold real numbers, got dtype {data.dtype}")
    if data.dtype.itemsize == 8 and data.dtype.kind in "iu" and data.size and max(data.max(), -data.min()) > 2**53:
        raise ValueError(f"{path} must hold numbers up to {2**53}, which float64 can tell apart, got {data.max()}")
    data = np.require(data, np.float32 if data.dtype.newbyteorder("=") == np.float32 else np.float64, "W")
    if finite and not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    return data, check_affine(f"affine of {path}", image.affine), image.header


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, whole or not at all, with every column that a row has; returns the path."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
