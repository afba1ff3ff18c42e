"""The commands of ``monai-lm`` that take a field."""

from __future__ import annotations

from monai_lm.apps.console import both, show
from monai_lm.apps.options import Readable, Written

__all__ = ["apply", "compose", "convert", "evaluate", "invert", "jacobian"]

# What takes long to import is imported by the commands that need it.


def apply(
    ddf: str,
    input: str,  # noqa: A002 (what users of a command line expect)
    output: str,
    fixed: str | None = None,
    moving: str | None = None,
    label: bool = False,
    file_format: Readable = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Warp an image or a label map with a field, or lead points of the fixed image to the moving image.

    Args:
        ddf: the field.
        input: NIfTI image on the moving side, or points (.csv, .fcsv, .mrk.json, .vtk) of the fixed image.
        output: warped image, or points as .csv in RAS millimetres.
        fixed: image on the field's grid, for formats that do not say where they lie.
        moving: image that the field leads to, for points and voxel fields.
        label: the image is a label map: nearest neighbour.
        file_format: of the field: auto, itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg, niftyreg,
            freesurfer, m3z, afni, ras, lps or positions.
        device: auto, cpu, cuda, cuda:1, ...
        overwrite: replace an output that exists.
    """
    from monai_lm.apps import commands

    commands.apply_field(ddf, input, output, fixed, moving, label, overwrite, file_format, device)


def invert(
    ddf: str,
    output: str,
    moving: str | None = None,
    file_format: Written = "itk",
    ddf_format: Readable = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Invert a field: from points of the moving to points of the fixed image; says where that fails, and why.

    Args:
        ddf: the field, a NIfTI file.
        output: its inverse.
        moving: image on whose grid the inverse shall lie; default: the field's grid.
        file_format: of the output.
        ddf_format: of the field, where its file does not say.
        device: auto, cpu, cuda, cuda:1, ...
        overwrite: replace an output that exists.
    """
    from monai_lm.apps import commands

    print(commands.invert_field(ddf, output, moving, file_format, overwrite, ddf_format, device))


def jacobian(
    ddf: str,
    output: str,
    log: bool = False,
    fixed: str | None = None,
    moving: str | None = None,
    ddf_format: Readable = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write the Jacobian determinant of a field: of the whole map in the file, an affine that it contains included.

    Args:
        ddf: the field.
        output: NIfTI image on the field's grid, float32.
        log: its natural logarithm; determinants below 1e-3, negative ones included, count as 1e-3.
        fixed: image on the field's grid, for formats that do not say where they lie.
        moving: image that the field leads to, if its grid is another one.
        ddf_format: of the field, where its file does not say.
        device: auto, cpu, cuda, cuda:1, ...
        overwrite: replace an output that exists.
    """
    from monai_lm.apps.jacobian import jacobian_field

    jacobian_field(ddf, output, log, fixed, moving, overwrite, ddf_format, device)


def compose(
    first: str,
    second: str,
    output: str,
    first_format: Readable = "auto",
    second_format: Readable = "auto",
    moving: str | None = None,
    overwrite: bool = False,
) -> None:
    """Compose two fields: a point goes through the first, then through the second.

    Args:
        first: field on the grid that the result lies on.
        second: field on the grid that the first leads to.
        output: ITK field.
        first_format: of the first, where its file does not say.
        second_format: of the second.
        moving: image that the second leads to, if it is in voxels of another grid than its own.
        overwrite: replace an output that exists.
    """
    from monai_lm.apps import commands

    commands.compose_fields(first, second, output, overwrite, first_format, second_format, moving)


def convert(
    ddf: str,
    output: str,
    to: Written,
    fixed: str | None = None,
    moving: str | None = None,
    file_format: Readable = "auto",
    overwrite: bool = False,
    resample: bool = False,
) -> None:
    """Convert a field between formats.

    Args:
        ddf: the field.
        output: the new file.
        to: itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg or freesurfer.
        fixed: image on the field's grid, for formats that do not say where they lie.
        moving: image that the field leads to, if its grid is another one.
        file_format: of the input: auto, itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg, niftyreg,
            freesurfer, m3z, afni, ras, lps or positions.
        overwrite: replace an output that exists.
        resample: bring the field to the grid of ``fixed``, where it lies on another one; to or from voxel, fsl and
            learn2reg, which are in voxels of the moving image, moving must be given, too.
    """
    from monai_lm.apps import commands

    commands.convert_field(ddf, output, to, fixed, moving, file_format, overwrite, resample)


def evaluate(
    ddf: str,
    fixed: str,
    moving: str,
    fixed_label: str | None = None,
    moving_label: str | None = None,
    fixed_points: str | None = None,
    moving_points: str | None = None,
    fixed_mask: str | None = None,
    file_format: Readable = "auto",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Measure a field: folds, SDlogJ and, with labels or landmarks, Dice, HD95 (mm) and TRE (mm).

    Args:
        ddf: the field.
        fixed: image on its grid.
        moving: image that it leads to.
        fixed_label: labels of the fixed image.
        moving_label: labels of the moving image.
        fixed_points: landmarks in the fixed image.
        moving_points: the same points in the moving image.
        fixed_mask: on the fixed grid: folds and SDlogJ count where it is not zero.
        file_format: of the field.
        device: auto, cpu, cuda, cuda:1, ...
        json: print JSON.
    """
    from monai_lm.apps import commands

    labels, points = both("label", fixed_label, moving_label), both("points", fixed_points, moving_points)
    show(commands.evaluate_field(ddf, fixed, moving, labels, points, file_format, device, fixed_mask), json)
