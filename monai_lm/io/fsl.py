"""Warp fields in FSL's convention (FNIRT, applywarp, convertwarp); tested with fslpy.

FSL counts millimetres in *scaled voxels*: voxel index times voxel size, from the corner voxel, and the first axis runs
backwards where the affine has a positive determinant (neurological storage). Origin and direction play no part. A warp
lives on the grid of the fixed image (``--ref``) and leads into the scaled voxels of the moving image (``--in``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from monai_lm.fields.space import check_affine, from_space, spacing_of, to_space
from monai_lm.io.nifti import check_ddf, load_nifti, save_nifti
from monai_lm.io.vectors import single

__all__ = ["fsl_space", "read_fsl_ddf", "write_fsl_ddf"]

FNIRT_FIELD, FNIRT_COEFFICIENTS = 2006, (2007, 2008, 2009, 2016)


def fsl_space(affine: np.ndarray, size: Sequence[int], spacing: Sequence[float] | None = None) -> np.ndarray:
    """The ``(4, 4)`` map from voxels of a grid to FSL's millimetres.

    Args:
        affine: ``(4, 4)`` voxel-to-RAS affine of the grid; its handedness and, without ``spacing``, its scale count.
        size: three voxel counts; the first is needed where the first axis runs backwards.
        spacing: three edge lengths in millimetres; default: those of the affine.

    Raises:
        ValueError: another number of axes, or an affine that is no invertible 4×4.
    """
    affine = check_affine("affine", affine)
    if len(size) != 3:
        raise ValueError(f"size must be 3 voxel counts, as FSL's images are 3D, got {tuple(size)}")
    out = np.diag([*(spacing_of(affine) if spacing is None else spacing), 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        out[0, 3] = (size[0] - 1) * out[0, 0]
        out[0, 0] *= -1
    return out


def write_fsl_ddf(
    path: str | Path,
    ddf: np.ndarray,
    affine: np.ndarray,
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
    relative: bool = True,
) -> None:
    """Write a voxel field as FSL's warp, ``(X, Y, Z, 3)`` float32 with FNIRT's intent (2006), whole or not at all.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made if missing.
        ddf: ``(3, *S)`` displacement in voxels.
        affine: ``(4, 4)`` voxel-to-RAS affine of the fixed grid.
        moving_affine: that of the moving grid; default: ``affine``.
        moving_size: its three voxel counts; default: those of the field.
        relative: displacements (``applywarp --rel``) or, if false, positions in the moving image (``--abs``).

    Raises:
        ValueError: a field that is not ``(3, *S)`` or not finite, or an affine that is no invertible 4×4.
    """
    field = check_ddf(ddf)
    if len(field) != 3:
        raise ValueError(f"ddf must be (3, *S), as FSL's images are 3D, got shape {field.shape}")
    affine = check_affine("affine", affine)
    moving_affine = affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    fixed = fsl_space(affine, field.shape[1:])
    moving = fsl_space(moving_affine, field.shape[1:] if moving_size is None else moving_size)
    warp = to_space(torch.from_numpy(field)[None], fixed, moving)[0].numpy()
    if not relative:
        warp = warp + _positions(fixed, field.shape[1:])
    save_nifti(path, np.moveaxis(warp, 0, -1), affine, FNIRT_FIELD)


def read_fsl_ddf(
    path: str | Path,
    moving_affine: np.ndarray | None = None,
    moving_size: Sequence[int] | None = None,
    relative: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read FSL's warp field: the inverse of :func:`write_fsl_ddf`.

    Args:
        path: NIfTI file ``(X, Y, Z, 3)`` on the fixed grid, as FNIRT (``--fout``) and convertwarp write.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the file.
        moving_size: its three voxel counts; default: those of the file.
        relative: displacements, or positions in the moving image; the file does not say. Default: a guess, whichever
            makes the displacement of points in space vary less (sum of the components' standard deviations). FSL's
            tools guess alike, but in scaled voxels, which fails where the axes of the two images point in different
            directions; this guess fails for a warp that turns by more than about 60 degrees or shrinks to nothing.

    Returns:
        The displacement in voxels, ``(3, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no NIfTI file, is cut off, holds FNIRT's coefficients or a field of ITK's, is not ``(X, Y, Z,
            3)``, is not finite, or an affine is singular.
    """
    data, affine, header = load_nifti(path)
    intent = int(header["intent_code"])
    if intent in FNIRT_COEFFICIENTS:
        raise ValueError(
            f"{path} must be a warp field, got FNIRT's coefficients (intent {intent}); "
            "fnirtfileutils --in=… --ref=… --out=… --withaff makes the field"
        )
    if data.ndim != 4 or data.shape[3] != 3 or intent in (1006, 1007) or min(data.shape[:3]) < 2:
        raise ValueError(f"{path} must be (X, Y, Z, 3) to be FSL's, got shape {data.shape} and intent {intent}")
    moving_affine = affine if moving_affine is None else check_affine("moving_affine", moving_affine)
    size = data.shape[:3]
    fixed = fsl_space(affine, size, [float(z) for z in header.get_zooms()[:3]])
    if moving_affine is affine and moving_size is None:
        moving = fixed
    else:
        moving = fsl_space(moving_affine, size if moving_size is None else moving_size)
    warp = np.moveaxis(data, -1, 0)

    def voxels(warp_is_relative: bool) -> torch.Tensor:
        displacement = warp if warp_is_relative else warp - _positions(fixed, size)
        return from_space(torch.from_numpy(np.ascontiguousarray(displacement))[None], fixed, moving)

    if relative is None:
        readings = {kind: voxels(kind) for kind in (True, False)}
        spread = {kind: _spread(to_space(ddf, affine, moving_affine)) for kind, ddf in readings.items()}
        ddf = readings[spread[True] <= spread[False]]
    else:
        ddf = voxels(relative)
    return single(path, ddf[0].numpy()), affine


def _positions(space: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Where the voxels are, ``(3, *S)``, of a space without rotation."""
    axes = [space[a, a] * np.arange(size[a]) + space[a, 3] for a in range(3)]
    return np.stack(np.broadcast_arrays(*np.meshgrid(*axes, indexing="ij", sparse=True)))


def _spread(field: torch.Tensor) -> float:
    return sum(float(component.double().std()) for component in field[0])
