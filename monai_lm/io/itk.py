"""Displacement fields in ITK's convention, which ANTs and Slicer share; tested with SimpleITK and ANTs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from monai_lm.fields.space import Grid, check_affine, is_sheared, out_of_plane, to_space
from monai_lm.io.freesurfer import is_freesurfer
from monai_lm.io.nifti import check_ddf, load_nifti, save_nifti
from monai_lm.io.niftyreg import is_niftyreg
from monai_lm.io.vectors import LPS, components_first, looks_like_positions, to_voxels

__all__ = ["check_itk_grid", "read_itk_ddf", "write_itk_ddf"]

ASK = (
    "say file_format='lps' or 'ras' for displacements in millimetres (SynthMorph's are in RAS), 'positions' for where "
    "voxels are led, in RAS millimetres (SPM's y_ files), 'voxel' for voxels (MONAI, Learn2Reg) or 'fsl'"
)
VECTOR, DISPLACEMENT_VECTOR = 1007, 1006  # NIfTI intents; ITK takes the first as it is (LPS), the second as RAS


def check_itk_grid(name: str, grid: Grid) -> None:
    """ValueError for a grid that ITK's files cannot hold: sheared or, of two axes, not in a plane of x and y."""
    if is_sheared(grid.affine):
        raise ValueError(
            f"{name} must have voxel axes at right angles for ITK's files, which hold no shear, got the affine\n"
            f"{grid.affine}\nresample the image first (nibabel.processing.resample_to_output), or write "
            "file_format='voxel', which holds it"
        )
    if len(grid.size) == 2 and out_of_plane(grid.affine):
        raise ValueError(
            f"{name} must lie in a plane of x and y for ITK's files of planes, which know no other, got the affine\n"
            f"{grid.affine}\nwrite file_format='voxel', which holds it"
        )


def write_itk_ddf(
    path: str | Path, ddf: np.ndarray, affine: np.ndarray, moving_affine: np.ndarray | None = None
) -> None:
    """Write a voxel field as a NIfTI displacement field in LPS millimetres.

    The file is ``(X, Y, Z, 1, 3)`` float32 (2D: ``(X, Y, 1, 1, 2)``) with the vector intent, on the fixed grid, in the
    same pull-back direction. It is written beside its place and then renamed, so there is never half a file.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made if missing.
        ddf: ``(n, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS-millimetre affine of the fixed grid.
        moving_affine: that of the moving grid, if it is another one: the file maps points of the fixed image's space to
            points of the moving image's, ``A_m (x + u(x)) - A_f x``.

    Raises:
        ValueError: the field is not ``(n, *S)`` with ``n = len(S)`` 2 or 3, an affine is not an invertible 4×4, or
            ``affine`` is sheared or, in 2D, that of a plane that is not one of x and y: ITK cannot hold those.
    """
    field = check_ddf(ddf)
    affine = check_affine("affine", affine)
    moving_affine = affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    check_itk_grid("affine", Grid(field.shape[1:], affine))
    vectors = to_space(torch.from_numpy(field)[None], LPS @ affine, LPS @ moving_affine)[0].numpy()
    n = len(vectors)
    vectors = np.moveaxis(vectors, 0, -1)
    save_nifti(path, vectors.reshape(*vectors.shape[:n], *[1] * (4 - n), n), affine, VECTOR)


def read_itk_ddf(
    path: str | Path, moving_affine: np.ndarray | None = None, vectors: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI displacement field as ITK, ANTs, SimpleITK and Slicer write it: the inverse of `write_itk_ddf`.

    Args:
        path: NIfTI file ``(X, Y, Z, 1, 3)`` of any real type, on the fixed grid, in millimetres; the fourth axis may
            be missing. 2D: ``(X, Y, 1, 1, 2)``, or ``(X, Y, 1, 1, 3)`` whose third components are zero.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file. The file maps
            points of the fixed image's space to points of the moving image's, whatever their grids.
        vectors: ``"LPS"`` or ``"RAS"``; default: by the intent, as ITK from 5.4 on does: 1007 (vector) is LPS, 1006
            (displacement vector) RAS.

    Returns:
        The displacement in voxels, ``A_m⁻¹ (A_f x + u(x)) − x``, ``(n, *S)`` float32, and the ``(4, 4)`` affine of the
        grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, is not a vector field, has another intent and ``vectors`` is not
            given, holds positions or is NiftyReg's, is not finite, leads out of the plane of its grid, or an affine is
            singular.
    """
    if vectors not in (None, "LPS", "RAS"):
        raise ValueError(f"vectors must be 'LPS', 'RAS' or None, got {vectors!r}")
    data, affine, header = load_nifti(path)
    components, affine = components_first(path, data, affine)
    intent = int(header["intent_code"])
    if vectors is None:
        if is_freesurfer(header):
            raise ValueError(f"{path} must be ITK's, got FreeSurfer's; say file_format='freesurfer'")
        if is_niftyreg(header):
            raise ValueError(f"{path} must be ITK's, got NiftyReg's; say file_format='niftyreg'")
        if intent not in (VECTOR, DISPLACEMENT_VECTOR):
            raise ValueError(f"{path} must have the intent 1007 (vectors in LPS) or 1006 (in RAS), got {intent}; {ASK}")
        if looks_like_positions(components, affine):
            raise ValueError(f"{path} must hold displacements, got what looks like positions in RAS millimetres; {ASK}")
        vectors = "LPS" if intent == VECTOR else "RAS"
    return to_voxels(path, components, affine, moving_affine, LPS if vectors == "LPS" else np.eye(4)), affine
