"""Reading and writing fields by the name of a format, and telling the format of a file.

To add a format, give its functions a name in ``_TABLE``; ``tests/io/test_formats.py`` holds every one there to the same
laws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.fields.space import Grid
from monai_lm.io.fsl import read_fsl_ddf, write_fsl_ddf
from monai_lm.io.itk import ASK, check_itk_grid, read_itk_ddf, write_itk_ddf
from monai_lm.io.nifti import open_nifti
from monai_lm.io.niftyreg import is_niftyreg, read_niftyreg_ddf
from monai_lm.io.vectors import read_millimetre_ddf
from monai_lm.io.voxel import VOXELS, read_learn2reg_ddf, read_voxel_ddf, write_learn2reg_ddf, write_voxel_ddf

__all__ = ["FORMATS", "READABLE", "check_grid", "file_suffix", "guess_format", "read_ddf", "write_ddf"]


@dataclass(frozen=True)
class Format:
    """How fields of a format are read and written.

    Attributes:
        read: makes ``(n, *S)`` in voxels and the affine of its grid of a path and what it ``asks`` for.
        write: writes a field ``(n, *S)`` in voxels on the grid of an affine to a path; ``None``: it is read only.
        asks: which arguments of :func:`read_ddf` the functions take, as the files do not say it.
        suffix: of its files.
        planes: whether it holds fields in 2D.
        has_affine: whether its files say where the fixed grid lies; else its functions know no affine.
        check_grid: raises for a grid that it cannot hold; see :func:`check_grid`.
    """

    read: Callable[..., Any]
    write: Callable[..., None] | None = None
    asks: tuple[str, ...] = ("moving_affine",)
    suffix: str = ".nii.gz"
    planes: bool = True
    has_affine: bool = True
    check_grid: Callable[[str, Grid], None] | None = None


_TABLE = {
    "itk": Format(read_itk_ddf, write_itk_ddf, check_grid=check_itk_grid),
    "fsl": Format(read_fsl_ddf, write_fsl_ddf, ("moving_affine", "moving_size", "relative"), planes=False),
    "voxel": Format(read_voxel_ddf, write_voxel_ddf, ()),
    "learn2reg": Format(
        read_learn2reg_ddf, write_learn2reg_ddf, ("size",), suffix=".npz", planes=False, has_affine=False
    ),
    "niftyreg": Format(read_niftyreg_ddf),
    **{name: Format(partial(read_millimetre_ddf, kind=name)) for name in ("ras", "lps", "positions")},
}

FORMATS = tuple(name for name, found in _TABLE.items() if found.write)
"""What fields are written in."""

READABLE = tuple(_TABLE)
"""What fields are read from: besides, NiftyReg's, and millimetres that do not say what they are."""


def guess_format(path: str | Path) -> str:
    """Tell the format of a file of a field by what it says of itself.

    ``.npz`` is Learn2Reg's, as any suffix but NIfTI's tells its format. A NIfTI file is NiftyReg's or in voxels if the
    name of its intent says so, FSL's if it has one of FNIRT's intents, ITK's if it has five dimensions and one of the
    vector intents (1006, 1007). All others need to be named: ``(X, Y, Z, 3)`` without an intent may be in voxels or in
    millimetres of any system.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no format's suffix, is of another shape, or does not say what it is.
    """
    by_suffix = {found.suffix: name for name, found in _TABLE.items() if found.suffix != ".nii.gz"}
    if Path(path).suffix in by_suffix:
        return by_suffix[Path(path).suffix]
    image = open_nifti(path)
    shape, intent, name = image.shape, int(image.header["intent_code"]), image.header["intent_name"].item()
    if is_niftyreg(image.header):
        return "niftyreg"
    if name == VOXELS.encode():
        return "voxel"
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
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
    relative: bool | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a field in any of the formats.

    Args:
        path: the file.
        file_format: one of ``READABLE``, or ``"auto"``, see :func:`guess_format`; ``"ras"``, ``"lps"`` and
            ``"positions"`` are explained at :func:`monai_lm.io.read_millimetre_ddf`.
        size: voxel counts of the fixed grid, for Learn2Reg's half resolution.
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
    if file_format == "auto":
        file_format = guess_format(path)
    _check_format(file_format, READABLE)
    found = _TABLE[file_format]
    given = {"size": size, "moving_affine": moving_affine, "moving_size": moving_size, "relative": relative}
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
        moving_size: its voxel counts, for FSL's files; default: those of the field.

    Raises:
        ValueError: an unknown format, or a field that it cannot hold, see the writers.
    """
    _check_format(file_format)
    found = _TABLE[file_format]
    assert found.write is not None  # for mypy: it is one of FORMATS
    given = {"moving_affine": moving_affine, "moving_size": moving_size}
    found.write(path, ddf, *[affine] * found.has_affine, **{k: v for k, v in given.items() if k in found.asks})


def check_grid(file_format: str, name: str, grid: Grid) -> None:
    """ValueError if a format cannot hold fields on a grid, named for the message."""
    check = _TABLE[file_format].check_grid
    if check is not None:
        check(name, grid)


def file_suffix(file_format: str, axes: int = 3) -> str:
    """What files of a format end in; ValueError for an unknown format, or one not for 2D."""
    _check_format(file_format)
    if axes == 2 and not _TABLE[file_format].planes:
        fit = " or ".join(repr(name) for name in FORMATS if _TABLE[name].planes)
        raise ValueError(f"file_format must be {fit} for 2D fields, got {file_format!r}")
    return _TABLE[file_format].suffix


def _check_format(file_format: str, known: tuple[str, ...] = FORMATS) -> None:
    if file_format not in known:
        raise ValueError(f"file_format must be one of {known}, got {file_format!r}")
