"""ITK's transforms in HDF5 (``.h5``), read by pyfive: on damaged files ITK's HDF5 and h5py's crash or never end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.content import look_of
from monai_lm.io.simpleitk import grid_of, simpleitk

__all__ = ["is_hdf5", "load_hdf5"]

_SUFFIXES = (".h5", ".hdf5")

_NUMBERS = (("TransformParameters", "TranformParameters"), ("TransformFixedParameters", "TranformFixedParameters"))
"""What the numbers of a transform are called; before version 5 ITK left out a letter."""

_KIND = re.compile(r"(\w+)_(?:double|float)_([23])_\2(?:_([0-3]))?", re.ASCII)
"""Class, dimension and, of B-splines other than cubic ones, the order of one of ITK's transforms."""

_SAME = {"MatrixOffsetTransformBase": "AffineTransform", "Rigid2DTransform": "Euler2DTransform"}
_OF_ANY_DIMENSION = (
    "AffineTransform", "BSplineTransform", "MatrixOffsetTransformBase", "ScaleTransform", "TranslationTransform",
)  # fmt: skip

_MOST_DEFLATED = 1032
"""Bytes that one of a compressed file makes, at most."""

Part = tuple[str, np.ndarray, np.ndarray]
"""Class, parameters and fixed parameters of one of ITK's transforms."""


def is_hdf5(path: str | Path) -> bool:
    """Whether a file begins as HDF5 does, or should by its name."""
    if Path(path).suffix.lower() in _SUFFIXES:
        return True
    with Path(path).open("rb") as file:
        return file.read(4) == b"\x89HDF"


def load_hdf5(path: str | Path) -> Any:
    """The transform of SimpleITK's that a file holds: one, or a composite.

    Raises:
        KeyError: a class that SimpleITK does not have.
        ValueError: SimpleITK or pyfive is missing, the file is damaged, or it does not hold one transform.
    """
    sitk, parts = simpleitk(path), _read_parts(path)
    is_composite = parts[0][0].startswith("CompositeTransform_")
    if not is_composite and len(parts) > 1:
        raise ValueError(f"{path} must hold one transform or one composite, got {[kind for kind, _, _ in parts]}")
    made = [_made(sitk, path, part) for part in parts[is_composite:]]
    if not is_composite:
        return made[0]
    return sitk.CompositeTransform(made) if made else sitk.CompositeTransform(int(parts[0][0].split("_")[2]))


def _read_parts(path: str | Path) -> list[Part]:
    """All transforms of a file, in its order."""
    try:
        import pyfive
    except ImportError as error:
        raise ValueError(f"{path} must be read with pyfive, in the itk extra: pip install 'monai_lm[itk]'") from error
    try:
        with pyfive.File(str(path), "r") as file:
            return _parts(file["TransformGroup"], Path(path).stat().st_size)
    except PermissionError:
        raise
    except Exception as error:  # a file that is damaged makes pyfive raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, pyfive.core.InvalidHDF5File):
            said = look_of(path)
        raise ValueError(f"{path} must be a whole ITK transform file in HDF5, got {said}") from error


def _parts(transforms: Any, size: int) -> list[Part]:
    if not len(transforms) or set(transforms) != {str(k) for k in range(len(transforms))}:
        raise ValueError(f"in TransformGroup {sorted(transforms)[:5]}, not '0', '1' and so on")
    return [_part(transforms[str(k)], size) for k in range(len(transforms))]


def _part(group: Any, size: int) -> Part:
    """One transform of a file of ``size`` bytes."""
    names = group["TransformType"][()]
    name = names[0] if len(names) == 1 else ""
    kind = name.decode("ascii") if isinstance(name, bytes) else str(name)
    kind = kind.rstrip("\0")
    if not re.fullmatch(_KIND, kind):
        raise ValueError(f"the class {kind[:80]!r}, not one of ITK's in 2D or 3D")
    parameters, fixed = (_numbers(group, names, size) for names in _NUMBERS)
    return kind, parameters, fixed


def _numbers(group: Any, names: tuple[str, ...], size: int) -> np.ndarray:
    """A row of numbers, float64; empty if there is none."""
    name = next((name for name in names if name in group), None)
    if name is None:
        return np.empty(0)
    found = group[name]
    if len(found.shape) != 1 or found.dtype.kind not in "fiu":
        raise ValueError(f"{name} of shape {found.shape} and type {found.dtype}, not a row of numbers")
    if not found.shape[0]:
        return np.empty(0)
    if found.shape[0] * found.dtype.itemsize > size * (1 if found.chunks is None else _MOST_DEFLATED):
        raise ValueError(f"{name} of {found.shape[0]} numbers in a file of {size} bytes")
    values = np.asarray(found[()], np.float64)
    if values.shape != found.shape:
        raise ValueError(f"{name} of shape {values.shape}, not {found.shape}")
    return values


def _made(sitk: Any, path: str | Path, part: Part) -> Any:
    """A transform of SimpleITK's of its class and its numbers."""
    name, n, order = re.fullmatch(_KIND, part[0]).groups()  # type: ignore[union-attr]
    n = int(n)
    if name in ("DisplacementFieldTransform", "BSplineTransform"):
        _check_vectors(path, n, *part[1:])
    if name == "DisplacementFieldTransform":
        return _field(sitk, path, n, *part[1:])
    if name == "IdentityTransform":
        return sitk.Transform(n, sitk.sitkIdentity)
    maker = getattr(sitk, _SAME.get(name, name), None)
    if maker is None or name == "CompositeTransform" or not name.endswith(("Transform", "Base")):
        raise KeyError(part[0])
    of_n = (n, int(order or 3)) if name == "BSplineTransform" else (n,)
    out = maker(*of_n) if name in _OF_ANY_DIMENSION else maker()
    fixed = [*part[2], 0.0] if name == "Euler3DTransform" and len(part[2]) == 3 else part[2].tolist()
    out.SetFixedParameters(fixed)
    wanted, got = (len(out.GetFixedParameters()), len(out.GetParameters())), (len(fixed), len(part[1]))
    if out.GetDimension() != n or wanted != got:
        raise ValueError(
            f"{path} must have {wanted[0]} fixed and {wanted[1]} other parameters for {part[0]}, "
            f"got {got[0]} and {got[1]}"
        )
    out.SetParameters(part[1].tolist())
    return out


def _check_vectors(path: str | Path, n: int, vectors: np.ndarray, fixed: np.ndarray) -> None:
    """ValueError for fixed parameters that are no grid, or one of another number of vectors."""
    size = fixed[:n]
    if len(fixed) != n * (n + 3) or not np.isfinite(fixed).all() or (size < 1).any() or (size != size.round()).any():
        raise ValueError(f"{path} must say where its grid lies in {n * (n + 3)} numbers, got {fixed.tolist()[:18]}")
    if size.prod() * n != len(vectors):
        raise ValueError(f"{path} must hold {n} numbers for each of {size.tolist()} voxels, got {len(vectors)} in all")


def _field(sitk: Any, path: str | Path, n: int, vectors: np.ndarray, fixed: np.ndarray) -> Any:
    """A displacement field of vectors, the components fastest, then the axes, on the grid of its fixed parameters."""
    image = sitk.GetImageFromArray(vectors.reshape(*fixed[:n].astype(int)[::-1], n), isVector=True)
    image.SetOrigin(fixed[n : 2 * n].tolist())
    image.SetSpacing(fixed[2 * n : 3 * n].tolist())
    image.SetDirection(fixed[3 * n :].tolist())
    grid_of(str(path), image)  # which can be inverted
    return sitk.DisplacementFieldTransform(image)
