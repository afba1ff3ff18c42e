"""ITK's transform files (``.h5``, ``.tfm``, ``.txt``): affines, fields and composites of both; through SimpleITK.

ANTs (``--write-composite-transform``), fMRIPrep (``_xfm.h5``) and Slicer write them. They map points of the fixed image
to points of the moving image in LPS millimetres; of a composite the last part comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.fields.space import Grid, check_affine
from monai_lm.io.content import check_file, look_of
from monai_lm.io.itk import check_itk_grid
from monai_lm.io.itk_hdf5 import is_hdf5, read_hdf5_parts
from monai_lm.io.itk_images import lps_vectors
from monai_lm.io.itk_parts import Part, assembled, text_parts
from monai_lm.io.nifti import replacing
from monai_lm.io.simpleitk import errors_of_itk, grid_of, itk_grid, simpleitk, vector_image
from monai_lm.io.vectors import LPS, components_first, to_voxels

__all__ = ["TRANSFORM_SUFFIXES", "applied_parts", "linear_matrix", "read_itk_transform", "write_itk_transform"]

TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt")


def write_itk_transform(
    path: str | Path,
    ddf: np.ndarray,
    affine: np.ndarray,
    moving_affine: np.ndarray | None = None,
    initial: np.ndarray | None = None,
) -> None:
    """Write a voxel field as ITK's displacement field transform, float64, whole or not at all.

    Args:
        path: ``.h5`` (``.hdf5``), or the text ``.tfm`` (``.txt``), which is large; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid; default: ``affine``.
        initial: ``(4, 4)`` in RAS millimetres, applied after the field: the file is a composite of both, as ANTs'.

    Raises:
        ValueError: what :func:`monai_lm.io.write_itk_ddf` refuses, another suffix, an ``initial`` that leads out of the
            plane of a field in 2D, or SimpleITK is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in TRANSFORM_SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(TRANSFORM_SUFFIXES)}, got {path.name!r}")
    vectors, grid = lps_vectors(ddf, affine, moving_affine)
    sitk = simpleitk(path)
    transform = sitk.DisplacementFieldTransform(vector_image(sitk, vectors.astype(np.float64), grid))
    if initial is not None:
        transform = sitk.CompositeTransform([_affine_transform(sitk, initial, len(grid.size)), transform])
    with replacing(path) as temporary, errors_of_itk(path, "file that can be written"):
        sitk.WriteTransform(transform, str(temporary))


def _affine_transform(sitk: Any, initial: np.ndarray, n: int) -> Any:
    matrix = LPS @ check_affine("initial", initial) @ LPS
    if n == 2 and max(np.abs(matrix[2, :2]).max(), np.abs(matrix[:2, 2]).max()) > 1e-6:
        raise ValueError(f"initial must keep to the plane of a field in 2D, got the matrix\n{initial}")
    out = sitk.AffineTransform(n)
    out.SetMatrix(matrix[:n, :n].ravel().tolist())
    out.SetTranslation(matrix[:n, 3].tolist())
    return out


def read_itk_transform(
    path: str | Path,
    moving_affine: np.ndarray | None = None,
    size: Sequence[int] | None = None,
    fixed_affine: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read any of ITK's transforms (linear, displacement field, B-spline, composites) as one field.

    Args:
        path: ``.h5``, ``.hdf5``, ``.tfm`` or ``.txt``.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the fixed grid.
        size: voxel counts of the fixed grid.
        fixed_affine: its ``(4, 4)`` voxel-to-RAS affine. The transform is sampled on that grid, as ITK would; outside
            of a field it is the identity there. Default for these two: the grid of the displacement field that is
            applied first.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: SimpleITK is missing or does not know the transform, the file is cut off, it begins with no
            displacement field and the fixed grid is not given, that grid is sheared or of another dimension, or what it
            says is not finite.
    """
    transform = _load(path)
    sitk = simpleitk(path)
    if size is None or fixed_affine is None:
        grid = _own_grid(path, transform)
    else:
        grid = Grid(tuple(int(s) for s in size), check_affine("fixed_affine", fixed_affine))
        check_itk_grid("fixed_affine", grid)
    n = transform.GetDimension()
    if min(grid.size) < 1:
        raise ValueError(f"{path} must lie on a grid of voxels, got the size {grid.size}")
    if n != len(grid.size):
        raise ValueError(f"{path} must be a transform in {len(grid.size)}D as the fixed grid is, got one in {n}D")
    with errors_of_itk(path, "ITK transform file"):
        image = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, **itk_grid(grid))
    data = np.moveaxis(sitk.GetArrayFromImage(image), range(n), range(n)[::-1])
    if not np.isfinite(data).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(data)).sum())} NaN or infinite values")
    vectors, affine = components_first(path, data if n == 3 else np.expand_dims(data, 2), grid.affine)
    return to_voxels(path, vectors, affine, moving_affine, LPS), affine


def linear_matrix(path: str | Path, parts: list[Part]) -> tuple[np.ndarray, int]:
    """The matrix ``(4, 4)`` in LPS millimetres of a linear transform of parts in a file, and its dimension.

    Raises:
        ValueError: SimpleITK is missing or does not know the transform, or it is not linear.
    """
    transform = assembled(path, parts)
    if not transform.IsLinear():
        names = [part.GetName() for part in _parts_of(transform)]
        raise ValueError(
            f"{path} must hold a linear transform, got {names}; give it as the field (ddf), "
            "with the affines that it contains"
        )
    n, out = transform.GetDimension(), np.eye(4)
    start = np.array(transform.TransformPoint([0.0] * n))
    out[:n, 3] = start
    for axis in range(n):
        out[:n, axis] = np.array(transform.TransformPoint(np.eye(n)[axis].tolist())) - start
    return out, n


def applied_parts(path: str | Path) -> tuple[list[str], bool]:
    """The classes of the parts of a file, as they are applied one after the other, and whether all are linear."""
    transform = _load(path)
    return [part.GetName() for part in _parts_of(transform)[::-1]], bool(transform.IsLinear())


def _parts_of(transform: Any) -> list[Any]:
    """The parts of a transform of SimpleITK's, composites within composites opened, the last applied first."""
    if not hasattr(transform, "GetNumberOfTransforms"):
        return [transform]
    inner = [transform.GetNthTransform(i) for i in range(transform.GetNumberOfTransforms())]
    return [part for one in inner for part in _parts_of(one)]


def _load(path: str | Path) -> Any:
    check_file(path)
    return assembled(path, _read_parts(path))


def _read_parts(path: str | Path) -> list[Part]:
    if is_hdf5(path):
        return read_hdf5_parts(path)
    content = Path(path).read_bytes()
    if not content.startswith(b"#Insight Transform File"):
        raise ValueError(f"{path} must be a whole ITK transform file, HDF5 or text, got {look_of(path)}")
    return text_parts(path, content.decode("utf-8", "replace"))


def _own_grid(path: str | Path, transform: Any) -> Grid:
    """The grid of the displacement field that comes first; ValueError where none does."""
    parts = _parts_of(transform)
    if not parts or not hasattr(parts[-1], "GetDisplacementField"):
        raise ValueError(
            f"{path} must begin with a displacement field to say on which grid it lies, got "
            f"{[part.GetName() for part in parts[::-1]]} in the order in which they are applied; give the fixed image, "
            "on whose grid it is sampled (--fixed, or size and fixed_affine of read_ddf)"
        )
    return grid_of(str(path), parts[-1].GetDisplacementField())
