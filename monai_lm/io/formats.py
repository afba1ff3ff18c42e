"""Reading and writing fields by the name of a format, and telling the format of a file.

To add a format, give its functions a name in ``_TABLE``; ``tests/io/test_formats.py`` holds every one there to the same
laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.fields.space import Grid
from monai_lm.io.afni import check_afni_grid, is_afni, read_afni_ddf
from monai_lm.io.freesurfer import (
    MGH_SUFFIXES,
    check_mgh_grid,
    is_freesurfer,
    read_freesurfer_ddf,
    write_freesurfer_ddf,
)
from monai_lm.io.fsl import read_fsl_ddf, write_fsl_ddf
from monai_lm.io.itk import ASK, check_itk_grid, read_itk_ddf, write_itk_ddf
from monai_lm.io.itk_images import read_itk_image_ddf, write_itk_image_ddf
from monai_lm.io.itk_transform import TRANSFORM_SUFFIXES, read_itk_transform, write_itk_transform
from monai_lm.io.m3z import MORPH_SUFFIXES, read_m3z_ddf
from monai_lm.io.nifti import open_nifti
from monai_lm.io.niftyreg import is_niftyreg, read_niftyreg_ddf
from monai_lm.io.vectors import read_millimetre_ddf
from monai_lm.io.voxel import VOXELS, read_learn2reg_ddf, read_voxel_ddf, write_learn2reg_ddf, write_voxel_ddf

__all__ = [
    "FORMATS",
    "READABLE",
    "check_format",
    "check_grid",
    "file_suffix",
    "file_suffixes",
    "guess_format",
    "is_of_two_grids",
    "read_ddf",
    "says",
    "says_where",
    "write_ddf",
]


@dataclass(frozen=True)
class Format:
    """How fields of a format are read and written.

    Attributes:
        says: what its numbers are.
        read: makes ``(n, *S)`` in voxels and the affine of its grid of a path and what it ``asks`` for.
        write: writes a field ``(n, *S)`` in voxels on the grid of an affine to a path; ``None``: it is read only.
        asks: which arguments of :func:`read_ddf` the functions take, as the files do not say it.
        tells: which arguments of :func:`write_ddf` only the writer takes, as the files say it.
        suffixes: of its files; what is written gets the first.
        planes: whether it holds fields in 2D.
        has_affine: whether its files say where the fixed grid lies; else its functions know no affine.
        of_two_grids: whether its numbers mean something only beside the grid of the moving image, which is not in it.
        check_grid: raises for a grid that it cannot hold; see :func:`check_grid`.
    """

    says: str
    read: Callable[..., Any]
    write: Callable[..., None] | None = None
    asks: tuple[str, ...] = ("moving_affine",)
    tells: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".nii.gz", ".nii")
    planes: bool = True
    has_affine: bool = True
    of_two_grids: bool = False
    check_grid: Callable[[str, Grid], None] | None = None

    @property
    def suffix(self) -> str:
        """What its files end in that are written."""
        return self.suffixes[0]


_LPS, _RAS = (f"displacements of points, {name} mm" for name in ("LPS", "RAS"))
_ITK_IMAGES = Format(_LPS, read_itk_image_ddf, write_itk_image_ddf, check_grid=check_itk_grid)
_TABLE = {
    "itk": Format(f"{_LPS} (intent 1006: RAS)", read_itk_ddf, write_itk_ddf, check_grid=check_itk_grid),
    "itk_transform": Format(
        _LPS,
        read_itk_transform,
        write_itk_transform,
        ("moving_affine", "size", "fixed_affine"),
        suffixes=TRANSFORM_SUFFIXES,
        check_grid=check_itk_grid,
    ),
    "metaimage": replace(_ITK_IMAGES, suffixes=(".mha", ".mhd")),
    "nrrd": replace(_ITK_IMAGES, suffixes=(".nrrd", ".nhdr")),
    "fsl": Format(
        "displacements or positions, mm of FSL's scaled voxels",
        read_fsl_ddf,
        write_fsl_ddf,
        ("moving_affine", "moving_size", "relative"),
        planes=False,
        of_two_grids=True,
    ),
    "voxel": Format("displacements in voxels", read_voxel_ddf, write_voxel_ddf, (), of_two_grids=True),
    "learn2reg": Format(
        "displacements in voxels",
        read_learn2reg_ddf,
        write_learn2reg_ddf,
        ("size",),
        suffixes=(".npz",),
        planes=False,
        has_affine=False,
        of_two_grids=True,
    ),
    "niftyreg": Format("displacements of points, or positions, RAS mm", read_niftyreg_ddf),
    "freesurfer": Format(
        "displacements or positions, RAS mm or voxels of its source, as the file says",
        read_freesurfer_ddf,
        write_freesurfer_ddf,
        tells=("moving_size",),
        suffixes=MGH_SUFFIXES,
        planes=False,
        check_grid=check_mgh_grid,
    ),
    "m3z": Format(
        "positions, voxels of its source or RAS mm, as the file says",
        read_m3z_ddf,
        suffixes=MORPH_SUFFIXES,
        planes=False,
    ),
    "afni": Format(_LPS, read_afni_ddf, planes=False, check_grid=check_afni_grid),
    "ras": Format(_RAS, partial(read_millimetre_ddf, kind="ras")),
    "lps": Format(_LPS, partial(read_millimetre_ddf, kind="lps")),
    "positions": Format("positions that voxels are led to, RAS mm", partial(read_millimetre_ddf, kind="positions")),
}

_NIFTI = (".nii.gz", ".nii")

FORMATS = tuple(name for name, found in _TABLE.items() if found.write)
"""What fields are written in."""

READABLE = tuple(_TABLE)
"""What fields are read from: besides, NiftyReg's, AFNI's, FreeSurfer's morphs, and millimetres of any kind."""


def guess_format(path: str | Path) -> str:
    """Tell the format of a file of a field by what it says of itself.

    ``.npz`` is Learn2Reg's, as any suffix but NIfTI's tells its format. A NIfTI file is FreeSurfer's if FreeSurfer's
    extension says that it is a warp, NiftyReg's or in voxels if the name of its intent says so, AFNI's if AFNI's
    extension names its volumes ``x_delta`` and so on, SPM's positions if it has five dimensions and is described as a
    ``Deformation`` or has vectors named ``Mapping``, FSL's if it has one of FNIRT's intents, ITK's if it has five
    dimensions and one of the vector intents (1006, 1007). All others need to be named: ``(X, Y, Z, 3)`` without an
    intent may be in voxels or in millimetres of any system.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no format's suffix, is of another shape, or does not say what it is.
    """
    by_suffix = {end: name for name, found in _TABLE.items() for end in found.suffixes if end not in _NIFTI}
    if (end := Path(path).suffix.lower()) in by_suffix:
        return by_suffix[end]
    image = open_nifti(path)
    shape, intent, name = image.shape, int(image.header["intent_code"]), image.header["intent_name"].item()
    if is_freesurfer(image.header):
        return "freesurfer"
    if is_niftyreg(image.header):
        return "niftyreg"
    if name == VOXELS.encode():
        return "voxel"
    if is_afni(image.header):
        return "afni"
    described = intent == 0 and image.header["descrip"].item() == b"Deformation"
    if len(shape) == 5 and shape[-1] == 3 and (described or (intent == 1007 and name == b"Mapping")):
        return "positions"  # SPM's
    if intent in (1006, 1007) and len(shape) == 5:
        return "itk"
    if intent in (2006, 2007, 2008, 2009, 2016):
        return "fsl"
    if len(shape) in (4, 5) and (shape[-1] == 3 or (shape[-1] == 2 and shape[2:-1] in ((1,), (1, 1)))):
        raise ValueError(f"{path} must say what its vectors are, got shape {shape} and intent {intent}; {ASK}")
    raise ValueError(f"{path} must hold a displacement field, got shape {shape} and intent {intent}")


def read_ddf(
    path: str | Path,
    file_format: str = "auto",
    *,
    size: Sequence[int] | None = None,
    fixed_affine: np.ndarray | None = None,
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
    relative: bool | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a field in any of the formats.

    Args:
        path: the file.
        file_format: one of ``READABLE``, or ``"auto"``, see :func:`guess_format`; ``"ras"``, ``"lps"`` and
            ``"positions"`` are explained at :func:`monai_lm.io.read_millimetre_ddf`.
        size: voxel counts of the fixed grid, for Learn2Reg's half resolution and ITK's transforms.
        fixed_affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid, on which ITK's transforms are sampled; default:
            the grid of the field that they begin with.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid, for files in millimetres; default: the file's.
        moving_size: its voxel counts, for FSL's files.
        relative: whether FSL's file holds displacements; default: a guess.

    Returns:
        The displacement in voxels, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on, or ``None``
        for Learn2Reg's, which know none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, or a file that is not of it, see the readers.
    """
    check_format("file_format", file_format)
    if file_format == "auto":
        file_format = guess_format(path)
    found = _TABLE[file_format]
    given = {
        "size": size, "fixed_affine": fixed_affine, "moving_affine": moving_affine, "moving_size": moving_size,
        "relative": relative,
    }  # fmt: skip
    out = found.read(path, **{name: given[name] for name in found.asks})
    return out if found.has_affine else (out, None)


def write_ddf(
    path: str | Path,
    ddf: np.ndarray,
    affine: np.ndarray,
    file_format: str = "itk",
    *,
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
) -> None:
    """Write a field in any of the formats: FSL's relative, Learn2Reg's at full resolution.

    Args:
        path: with the suffix of the format, see :func:`file_suffix`; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        file_format: one of ``FORMATS``.
        moving_affine: that of the moving grid, for files in millimetres; default: ``affine``.
        moving_size: its voxel counts, for FSL's and FreeSurfer's files; default: those of the field.

    Raises:
        ValueError: an unknown format, or a field that it cannot hold, see the writers.
    """
    check_format("file_format", file_format, FORMATS)
    found = _TABLE[file_format]
    assert found.write is not None  # for mypy: it is one of FORMATS
    given = {"moving_affine": moving_affine, "moving_size": moving_size}
    taken = (*found.asks, *found.tells)
    found.write(path, ddf, *[affine] * found.has_affine, **{k: v for k, v in given.items() if k in taken})


def says(file_format: str) -> str:
    """What the numbers of a format are, in a line."""
    return _TABLE[file_format].says


def is_of_two_grids(file_format: str) -> bool:
    """Whether the numbers of a format mean something only beside the grid of the moving image, which is not in it."""
    return _TABLE[file_format].of_two_grids


def says_where(file_format: str) -> bool:
    """Whether files of a format say where the fixed grid lies."""
    return _TABLE[file_format].has_affine


def check_grid(file_format: str, name: str, grid: Grid) -> None:
    """ValueError if a format cannot hold fields on a grid, named for the message."""
    check = _TABLE[file_format].check_grid
    if check is not None:
        check(name, grid)


def file_suffixes(file_format: str) -> tuple[str, ...]:
    """All that files of a format may end in that are written; ValueError for an unknown format."""
    check_format("file_format", file_format, FORMATS)
    return tuple(end for end in _TABLE[file_format].suffixes if end not in (".mhd", ".nhdr"))


def file_suffix(file_format: str, axes: int = 3) -> str:
    """What files of a format end in; ValueError for an unknown format, or one not for 2D."""
    check_format("file_format", file_format, FORMATS)
    if axes == 2 and not _TABLE[file_format].planes:
        fit = " or ".join(repr(name) for name in FORMATS if _TABLE[name].planes)
        raise ValueError(f"file_format must be {fit} for 2D fields, got {file_format!r}")
    return _TABLE[file_format].suffix


def check_format(argument: str, file_format: str, known: tuple[str, ...] = ("auto", *READABLE)) -> None:
    """ValueError that names the argument for a format that is not among the known ones: those that are read."""
    if file_format not in known:
        raise ValueError(f"{argument} must be one of {known}, got {file_format!r}")
