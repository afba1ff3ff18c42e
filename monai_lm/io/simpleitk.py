"""What goes through SimpleITK, an optional dependency: its import, its grids, images of MetaImage and NRRD."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.fields.space import Grid, check_affine
from monai_lm.io.content import check_file, look_of

__all__ = [
    "IMAGE_SUFFIXES",
    "errors_of_itk",
    "grid_of",
    "itk_grid",
    "load_itk",
    "reader_of",
    "says_spacing",
    "simpleitk",
    "vector_image",
]

IMAGE_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
"""Files of images and of fields that are read here."""

_DEFLATED = re.compile(rb"CompressedDataSize\s*=\s*(\d+)", re.IGNORECASE)
_HEADER = 2**16
"""Bytes that a header is looked for in."""

_FLIP = np.array([-1.0, -1.0, 1.0])


def simpleitk(path: str | Path) -> Any:
    """The module; a ValueError that names the extra where it is missing, which a file is in want of."""
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(
            f"{path} must be read and written with SimpleITK, in the itk extra: pip install 'monai_lm[itk]'"
        ) from error
    return SimpleITK


@contextmanager
def errors_of_itk(path: str | Path, what: str) -> Iterator[None]:
    """What a broken file makes SimpleITK raise, as a ValueError that names the file."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        said = re.sub(r"\s+", " ", str(error)).strip()
        said = re.sub(r"\(0x[0-9a-f]+\)", "", said.rpartition("ERROR: ")[2])[-240:].strip(": ")
        raise ValueError(f"{path} must be a whole {what}, got {type(error).__name__}: {said}") from error


def itk_grid(grid: Grid) -> dict[str, Any]:
    """Size, origin, spacing and direction of a grid in LPS, as SimpleITK takes them; of two axes in the plane."""
    n = len(grid.size)
    directions = grid.affine[:n, :n] / np.array(grid.spacing)
    return {
        "size": [int(s) for s in grid.size],
        "outputOrigin": (_FLIP[:n] * grid.affine[:n, 3]).tolist(),
        "outputSpacing": [float(s) for s in grid.spacing],
        "outputDirection": (_FLIP[:n, None] * directions).ravel().tolist(),
    }


def grid_of(name: str, image: Any) -> Grid:
    """Where an image of SimpleITK's, in 2D or 3D, lies; ValueError for a direction that is singular."""
    n, affine = image.GetDimension(), np.eye(4)
    affine[:n, :n] = _FLIP[:n, None] * np.reshape(image.GetDirection(), (n, n)) * np.array(image.GetSpacing())
    affine[:n, 3] = _FLIP[:n] * np.array(image.GetOrigin())
    return Grid(tuple(image.GetSize()), check_affine(f"affine of {name}", affine + 0.0))


def load_itk(path: str | Path, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read MetaImage (``.mha``, ``.mhd``) or NRRD (``.nrrd``, ``.nhdr``) of real numbers, ``finite`` ones or any.

    Returns:
        The data, ``(X, Y, Z)``, of a plane ``(X, Y, 1)``, of vectors with components last, float32 or float64; the
        ``(4, 4)`` voxel-to-RAS affine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: SimpleITK is missing, it is neither of these, is cut off, is not in 2D or 3D, is in colour, does not
            hold finite real numbers, or its affine is singular.
    """
    check_file(path)
    _check_head(path)
    sitk = simpleitk(path)
    with errors_of_itk(path, "MetaImage or NRRD file"):
        image = sitk.ReadImage(str(path), imageIO=reader_of(path))
    n, kind = image.GetDimension(), image.GetPixelIDTypeAsString()
    if n not in (2, 3) or "complex" in kind or "label" in kind:
        raise ValueError(f"{path} must hold real numbers in 2D or 3D, got {kind} in {n}D")
    if image.HasMetaDataKey("NRRD_kinds[pixel]") and "color" in image.GetMetaData("NRRD_kinds[pixel]"):
        raise ValueError(f"{path} must hold numbers or vectors, got colours")
    stored = sitk.GetArrayFromImage(image)
    if reader_of(path) == "MetaImageIO":
        _check_whole(path, image, stored)
    if stored.dtype.itemsize == 8 and stored.dtype.kind in "iu" and np.abs(stored.astype(np.float64)).max() > 2**53:
        raise ValueError(f"{path} must hold numbers up to {2**53}, which float64 can tell apart, got larger ones")
    data = np.moveaxis(stored, range(n), range(n)[::-1])
    data = np.require(data, np.float32 if stored.dtype == np.float32 else np.float64, ("C", "W"))
    if data.size == 0:
        raise ValueError(f"{path} must hold voxels, got shape {data.shape}")
    if finite and not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    return data if n == 3 else np.expand_dims(data, 2), grid_of(str(path), image).affine


def says_spacing(path: str | Path) -> bool:
    """Whether the header of MetaImage or NRRD has the edges of a voxel; ITK takes 1 where it has not."""
    with Path(path).open("rb") as file:
        content = file.read(_HEADER)
    if reader_of(path) == "NrrdImageIO":
        header, said = content.partition(b"\n\n")[0], rb"^(spacings|space directions):"
    else:
        header, said = content.partition(b"ElementDataFile")[0], rb"^(ElementSpacing|ElementSize)\s*="
    return re.search(said, header, re.MULTILINE) is not None


def _check_head(path: str | Path) -> None:
    """ValueError for a file that does not begin as its format does, or of deflated MetaImage that is cut off."""
    content = Path(path).read_bytes()
    if reader_of(path) == "NrrdImageIO":
        if not content.startswith(b"NRRD"):
            raise ValueError(f"{path} must be NRRD, got {look_of(path)}")
        return
    header, _, data = content.partition(b"ElementDataFile")
    if not re.search(rb"^NDims\s*=", header, re.MULTILINE) or not data:
        raise ValueError(f"{path} must be MetaImage, a header from NDims to ElementDataFile, got {look_of(path)}")
    size, (where, _, held) = _DEFLATED.search(header), data.partition(b"\n")
    if size and where.strip(b" =\t\r").upper() == b"LOCAL" and len(held) < int(size[1]):
        raise ValueError(f"{path} must hold {int(size[1])} bytes of data, got {len(held)}")


def _check_whole(path: str | Path, image: Any, stored: np.ndarray) -> None:
    """ValueError for MetaImage whose data are cut off: ITK leaves what is not there as memory happened to be."""
    content = Path(path).read_bytes()
    header, found, data = content.partition(b"ElementDataFile")
    where, _, data = data.partition(b"\n")
    name = where.strip(b" =\t\r").decode("latin-1")
    if not found or len(name.split()) != 1 or "%" in name:
        raise ValueError(f"{path} must have its data in itself or in one file, got ElementDataFile = {name!r}")
    if name.upper() != "LOCAL":
        data = (Path(path).parent / name).read_bytes()
    if size := _DEFLATED.search(header):
        data = data[: int(size[1])]
    is_deflated = re.search(rb"CompressedData\s*=\s*True", header, re.IGNORECASE)
    try:
        held = len(zlib.decompress(data) if is_deflated else data)
    except zlib.error as error:
        raise ValueError(f"{path} must hold whole data, got {error}") from error
    if held < stored.nbytes or (is_deflated and held != stored.nbytes):
        raise ValueError(f"{path} must hold {stored.nbytes} bytes of data, for {image.GetSize()} voxels, got {held}")


def reader_of(path: str | Path) -> str:
    """ITK's reader by the suffix: it would try all others, too."""
    return "NrrdImageIO" if Path(path).suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO"


def vector_image(sitk: Any, data: np.ndarray, grid: Grid) -> Any:
    """Vectors ``(*S, n)`` on a grid as an image of SimpleITK's."""
    n, where = len(grid.size), itk_grid(grid)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(data, range(n), range(n)[::-1])), isVector=True)
    image.SetOrigin(where["outputOrigin"])
    image.SetSpacing(where["outputSpacing"])
    image.SetDirection(where["outputDirection"])
    return image
