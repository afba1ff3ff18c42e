"""Jacobian determinants of fields as files: the work behind ``monai-lm jacobian`` and ``refine --jacobian``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from monai_lm.fields import jacobian_determinant
from monai_lm.fields.space import Grid
from monai_lm.fields.topology import LOG_FLOOR
from monai_lm.io.formats import check_format
from monai_lm.io.images import Field, Image
from monai_lm.io.nifti import save_nifti
from monai_lm.io.outputs import check_outputs
from monai_lm.kernels.devices import find_device

__all__ = ["jacobian_field", "write_jacobian"]


def jacobian_field(
    ddf: str | Path,
    output: str | Path,
    log: bool = False,
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    overwrite: bool = False,
    ddf_format: str = "auto",
    device: str = "auto",
) -> None:
    """Write the Jacobian determinant of a field, on its grid.

    It is that of the whole map in the file, in space: an affine that the field contains counts, how large the voxels
    of either grid are does not.

    Args:
        ddf: the field.
        output: a NIfTI file.
        log: the natural logarithm instead; determinants below 1e-3, negative ones included, count as 1e-3.
        fixed: image on the field's grid, where the field's file does not say where it lies.
        moving: image that the field leads to; for voxel fields between different grids.
        overwrite: replace ``output``.
        ddf_format: of the field.
        device: where it is computed; ``"auto"`` takes a GPU if there is one.
    """
    output, chosen = Path(output), find_device(device)
    if not output.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"output must end in .nii or .nii.gz for an image, got {output.name!r}")
    check_outputs(output.parent, [output.name], overwrite, "the output's folder")
    check_format("ddf_format", ddf_format)
    grid, target = (None if path is None else Image(path) for path in (fixed, moving))
    field = Field(ddf, grid, target, ddf_format)
    write_jacobian(output, field.inner().to(chosen), field.grid, log)


def write_jacobian(path: Path, ddf: Tensor, grid: Grid, log: bool = False) -> None:
    """Write the determinant, or its logarithm, of a field ``(1, n, *S)`` in voxels of the grid it lies on, float32."""
    determinant = jacobian_determinant(ddf)
    out = determinant.clamp(min=LOG_FLOOR).log() if log else determinant
    save_nifti(path, out[0].cpu().numpy(), grid.affine, "none")
