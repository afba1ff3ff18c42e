"""Displacement fields in MetaImage (``.mha``) and NRRD (``.nrrd``), as ITK and Slicer write them; through SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from monai_lm.fields.space import Grid, check_affine, to_space
from monai_lm.io.itk import check_itk_grid
from monai_lm.io.nifti import check_ddf, replacing
from monai_lm.io.simpleitk import errors_of_itk, load_itk, reader_of, simpleitk, vector_image
from monai_lm.io.vectors import LPS, components_first, to_voxels

__all__ = ["lps_vectors", "read_itk_image_ddf", "write_itk_image_ddf"]


def lps_vectors(ddf: np.ndarray, affine: np.ndarray, moving_affine: np.ndarray | None) -> tuple[np.ndarray, Grid]:
    """A voxel field ``(n, *S)`` as displacements of points ``(*S, n)``, LPS mm, and its grid; see `write_itk_ddf`."""
    field = check_ddf(ddf)
    grid = Grid(field.shape[1:], check_affine("affine", affine))
    moving_affine = grid.affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    check_itk_grid("affine", grid)
    vectors = to_space(torch.from_numpy(field)[None], LPS @ grid.affine, LPS @ moving_affine)[0].numpy()
    return np.moveaxis(vectors, 0, -1), grid


def write_itk_image_ddf(
    path: str | Path, ddf: np.ndarray, affine: np.ndarray, moving_affine: np.ndarray | None = None
) -> None:
    """Write a voxel field as ``.mha`` or ``.nrrd``: float32 vectors in LPS millimetres, whole or not at all.

    In 2D the file is one of a plane, which does not keep where along the third axis it lies.

    Args:
        path: ``.mha`` or ``.nrrd``; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid; default: ``affine``.

    Raises:
        ValueError: what :func:`monai_lm.io.write_itk_ddf` refuses, another suffix, or SimpleITK is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mha", ".nrrd"):
        raise ValueError(f"path must end in .mha or .nrrd, got {path.name!r}")
    vectors, grid = lps_vectors(ddf, affine, moving_affine)
    sitk = simpleitk(path)
    image = vector_image(sitk, vectors.astype(np.float32), grid)
    with replacing(path) as temporary, errors_of_itk(path, "file that can be written"):
        sitk.WriteImage(image, str(temporary), True, imageIO=reader_of(path))


def read_itk_image_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a displacement field from ``.mha``, ``.mhd``, ``.nrrd`` or ``.nhdr``, in LPS millimetres.

    Args:
        path: an image of two or three components in 2D or 3D, on the fixed grid.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: SimpleITK is missing, it is none of these or cut off, holds no vectors, an NRRD file names another
            space than LPS (ITK turns the grid of one in RAS, and leaves its vectors as they are), it is not finite,
            leads out of the plane of its grid, or an affine is singular.
    """
    data, affine = load_itk(path)
    _check_space(path)
    vectors, affine = components_first(path, data, affine)
    return to_voxels(path, vectors, affine, moving_affine, LPS), affine


def _check_space(path: str | Path) -> None:
    """ValueError for an NRRD file that names another space than LPS."""
    if reader_of(path) != "NrrdImageIO":
        return
    with Path(path).open("rb") as file:
        header = re.split(rb"\r?\n\r?\n", file.read(1 << 16))[0].decode("latin-1")
    said = re.search(r"^space\s*:\s*(.*?)\s*$", header, re.MULTILINE)
    if said and said[1].lower() not in ("left-posterior-superior", "lps"):
        raise ValueError(
            f"{path} must have the space left-posterior-superior, for its vectors are taken as LPS millimetres, got "
            f"{said[1]!r}; write it anew with ITK or Slicer, or as NIfTI and say file_format='ras'"
        )
