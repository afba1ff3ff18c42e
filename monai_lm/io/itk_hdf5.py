"""ITK's transforms in HDF5 (``.h5``), read by pyfive: on damaged files ITK's HDF5 and h5py's crash or never end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.content import look_of
from monai_lm.io.itk_parts import KIND, Part

__all__ = ["is_hdf5", "read_hdf5_parts"]

_SUFFIXES = (".h5", ".hdf5")

_NUMBERS = (("TransformParameters", "TranformParameters"), ("TransformFixedParameters", "TranformFixedParameters"))
"""What the numbers of a transform are called; before version 5 ITK left out a letter."""

_MOST_DEFLATED = 1032
"""Bytes that one of a compressed file makes, at most."""


def is_hdf5(path: str | Path) -> bool:
    """Whether a file begins as HDF5 does, or should by its name."""
    if Path(path).suffix.lower() in _SUFFIXES:
        return True
    with Path(path).open("rb") as file:
        return file.read(4) == b"\x89HDF"


def read_hdf5_parts(path: str | Path) -> list[Part]:
    """All transforms of a file, in its order.

    Raises:
        ValueError: pyfive is missing, or the file is damaged.
    """
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
        if (look := look_of(path)) != "HDF5":
            said = look
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
    if not KIND.fullmatch(kind):
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
