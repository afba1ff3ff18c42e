"""ITK's transforms, class and numbers, as SimpleITK's: ITK's readers crash, or go on, where numbers are missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.simpleitk import errors_of_itk, grid_of, simpleitk

__all__ = ["KIND", "Part", "assembled", "text_parts"]

KIND = re.compile(r"(\w+)_(?:double|float)_([23])_\2(?:_([0-3]))?", re.ASCII)
"""Class, dimension and, of B-splines other than cubic ones, the order of one of ITK's transforms."""

_SAME = {"MatrixOffsetTransformBase": "AffineTransform", "Rigid2DTransform": "Euler2DTransform"}
_OF_ANY_DIMENSION = (
    "AffineTransform", "BSplineTransform", "MatrixOffsetTransformBase", "ScaleTransform", "TranslationTransform",
)  # fmt: skip

Part = tuple[str, np.ndarray, np.ndarray]
"""Class, parameters and fixed parameters of one of ITK's transforms."""


def text_parts(path: str | Path, text: str) -> list[Part]:
    """``Transform:``, ``Parameters:`` and ``FixedParameters:`` of each transform of ITK's text."""
    parts: list[Part] = []
    head, *blocks = re.split(r"^Transform:", text, flags=re.MULTILINE)
    if odd := [line for line in head.split("\n") if line.strip(" \t\r") and not line.startswith("#")]:
        raise ValueError(f"{path} must have lines of Transform, Parameters and FixedParameters, got {odd[0][:40]!r}")
    for block in blocks:
        lines = block.split("\n")
        values = {}
        for line in lines[1:]:
            key, _, rest = line.partition(":")
            if key in ("Parameters", "FixedParameters"):
                values[key] = _numbers(path, key, rest)
            elif line.strip(" \t\r") and not line.startswith("#"):
                raise ValueError(f"{path} must have lines of Parameters and FixedParameters, got {line[:40]!r}")
        empty = np.array([])
        parts.append((lines[0].strip(), values.get("Parameters", empty), values.get("FixedParameters", empty)))
    return parts


def _numbers(path: str | Path, key: str, text: str) -> np.ndarray:
    """Numbers between spaces, as C++ reads them: Python takes more for a space, and ``1_0`` for ten."""
    message = f"{path} must have numbers as {key}, got {text.strip()[:80]!r}"
    if not re.fullmatch(r"[\s\da-zA-Z.+-]*", text, re.ASCII):
        raise ValueError(message)
    try:
        return np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise ValueError(message) from error


def assembled(path: str | Path, parts: Sequence[Part]) -> Any:
    """The transform of SimpleITK's that a file holds: one, or a composite, which comes before its parts.

    Raises:
        ValueError: SimpleITK is missing or has no such class, or it is not one transform with all of its numbers.
    """
    sitk = simpleitk(path)
    is_composite = bool(parts) and parts[0][0].startswith("CompositeTransform_")
    if not is_composite and len(parts) != 1:
        raise ValueError(f"{path} must hold one transform or one composite, got {[kind for kind, _, _ in parts]}")
    with errors_of_itk(path, "ITK transform file"):
        made = [_made(sitk, path, part) for part in parts[is_composite:]]
        if not is_composite:
            return made[0]
        return sitk.CompositeTransform(made) if made else sitk.CompositeTransform(_kind(path, parts[0][0])[1])


def _kind(path: str | Path, kind: str) -> tuple[str, int, int]:
    """Class, dimension and order of splines."""
    found = KIND.fullmatch(kind)
    if found is None:
        raise ValueError(f"{path} must hold transforms of ITK's in 2D or 3D, got {kind[:80]!r}")
    return found[1], int(found[2]), int(found[3] or 3)


def _made(sitk: Any, path: str | Path, part: Part) -> Any:
    """A transform of SimpleITK's of its class and its numbers."""
    name, n, order = _kind(path, part[0])
    if name in ("DisplacementFieldTransform", "BSplineTransform"):
        _check_vectors(path, n, *part[1:])
    if name == "DisplacementFieldTransform":
        return _field(sitk, path, n, *part[1:])
    if name == "IdentityTransform":
        return sitk.Transform(n, sitk.sitkIdentity)
    maker = getattr(sitk, _SAME.get(name, name), None)
    if name == "CompositeTransform" or not (isinstance(maker, type) and issubclass(maker, sitk.Transform)):
        raise ValueError(f"{path} must hold transforms that SimpleITK has, got another ({part[0]})")
    of_n = (n, order) if name == "BSplineTransform" else (n,)
    out = maker(*of_n) if name in _OF_ANY_DIMENSION else maker()
    fixed = [] if name == "TranslationTransform" else part[2].tolist()
    if name == "Euler3DTransform" and len(fixed) == 3:
        fixed = [*fixed, 0.0]  # the order of its angles
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
