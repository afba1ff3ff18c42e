"""The work behind the commands of ``monai-lm`` that take a field: apply, invert, compose, convert, evaluate."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import compose, sample_points
from monai_lm.fields.algebra import lengths
from monai_lm.fields.inverses import InverseReport, inspect_inverse, invert_between
from monai_lm.fields.metrics import measure
from monai_lm.fields.space import Grid, move_to_grid, resample_moving, share_inside, through_affine, to_voxel, to_world
from monai_lm.io import FORMATS, file_suffix, guess_format, read_ddf, write_ddf
from monai_lm.io.formats import check_format, is_of_two_grids, says_where
from monai_lm.io.images import Field, Image, Pair, load_pair, load_points, unmeasured
from monai_lm.io.nifti import label_type, replacing, save_nifti
from monai_lm.io.outputs import (
    check_field_output,
    check_outputs,
)
from monai_lm.io.points import POINT_SUFFIXES
from monai_lm.kernels.devices import find_device, widest_float

__all__ = [
    "apply_field", "compose_fields", "convert_field", "evaluate_field", "invert_field", "landmark_error", "write_field",
]  # fmt: skip


def apply_field(
    ddf: str | Path,
    source: str | Path,
    output: str | Path,
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    label: bool = False,
    overwrite: bool = False,
    file_format: str = "auto",
    device: str = "auto",
) -> None:
    """Warp an image or a label map onto the grid of a field, or lead points of the fixed image to the moving one.

    Args:
        ddf: the field.
        source: NIfTI image on the moving side, or points of the fixed image, see
            :func:`monai_lm.io.read_points`.
        output: a NIfTI file, or points as ``.csv``.
        fixed: image on the field's grid, where the field's file does not say where it lies.
        moving: image that the field leads to; for voxel fields between different grids.
        label: take the nearest label instead of interpolating.
        overwrite: replace ``output``.
        file_format: of the field.
        device: where it is computed; ``"auto"`` takes a GPU if there is one.

    Warns:
        UserWarning: the field never leads into the image.
    """
    output, chosen = Path(output), find_device(device)
    of_points = Path(source).name.lower().endswith(POINT_SUFFIXES)
    if of_points and output.suffix != ".csv":
        raise ValueError(f"output must end in .csv for points, got {output.name!r}")
    if not of_points and not output.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"output must end in .nii or .nii.gz for an image, got {output.name!r}")
    check_outputs(output.parent, [output.name], overwrite, "the output's folder")
    grid, target = (None if path is None else Image(path) for path in (fixed, moving))
    if of_points:
        field = Field(ddf, grid, target, file_format)
        points = load_points(source, field.ddf.shape[1])
        moved = _move(points, field.inner().to(chosen), field.grid.affine).cpu()
        with replacing(output) as temporary:
            np.savetxt(temporary, moved.numpy(), delimiter=",", header="x,y,z"[: 2 * points.shape[1] - 1], comments="")
        return
    image = Image(source, label)
    field = Field(ddf, grid, target or image, file_format)
    mode, outside = ("nearest", "zeros") if label else ("bilinear", "border")
    inner, data, affine = field.inner().to(chosen), image.data.to(chosen), field.grid.affine
    warped = resample_moving(data, inner, affine, image.grid.affine, None, mode, outside).cpu()
    if not resample_moving(torch.ones_like(data), inner, affine, image.grid.affine, None, "nearest", "zeros").any():
        warnings.warn(
            f"the field never leads into {source}: does it lie where the field's moving image did?", stacklevel=2
        )
    save_nifti(output, warped[0, 0].numpy(), affine, "none", label_type(warped.numpy()) if label else np.float32)


def invert_field(
    ddf: str | Path,
    output: str | Path,
    moving: str | Path | None = None,
    file_format: str = "itk",
    overwrite: bool = False,
    ddf_format: str = "auto",
    device: str = "auto",
) -> InverseReport:
    """Write the inverse of a field, on the grid of the ``moving`` image (default: the field's own).

    Args:
        ddf: the field.
        output: its inverse.
        moving: image on whose grid the inverse shall lie.
        file_format: of the output.
        overwrite: replace ``output``.
        ddf_format: of the field.
        device: where it is computed; ``"auto"`` takes a GPU if there is one.

    Returns:
        How far inverse and field miss the identity, where, and why.
    """
    output, chosen = Path(output), find_device(device)
    check_field_output(output, file_format, overwrite)
    check_format("ddf_format", ddf_format)
    field = Field(ddf, None, None if moving is None else Image(moving), ddf_format)
    file_suffix(file_format, field.ddf.shape[1])
    inner, affines = field.inner().to(chosen), (field.grid.affine, field.moving.affine)
    inverse, residual = invert_between(inner, *affines, None, field.moving.size)
    write_field(output, inverse, field.moving, field.grid, file_format)
    return inspect_inverse(inner, inverse, residual, *affines)


def compose_fields(
    first: str | Path,
    second: str | Path,
    output: str | Path,
    overwrite: bool = False,
    first_format: str = "auto",
    second_format: str = "auto",
    moving: str | Path | None = None,
) -> None:
    """Write the field that takes a point through ``first``, then through ``second``, on the grid of ``first``.

    Args:
        first: field that leads to the grid of ``second``.
        second: field from there.
        output: ITK field.
        overwrite: replace ``output``.
        first_format: of ``first``.
        second_format: of ``second``.
        moving: image that ``second`` leads to, if it is in voxels of another grid than its own.
    """
    output = Path(output)
    check_field_output(output, "itk", overwrite)
    check_format("first_format", first_format)
    check_format("second_format", second_format)
    outer = Field(second, None, None if moving is None else Image(moving), second_format)
    values, affine = read_ddf(first, first_format, moving_affine=outer.grid.affine, moving_size=outer.grid.size)
    inner = torch.from_numpy(np.ascontiguousarray(values))[None].float()
    if affine is None:
        raise ValueError(f"{first} does not say where it lies; convert it to a NIfTI field first")
    inside = share_inside(inner, outer.grid.size)
    if inside == 0:
        raise ValueError(f"{first} must lead to the grid of {second}, it leads no voxel there")
    if inside < 0.999:
        warnings.warn(
            f"{1 - inside:.1%} of the voxels of {first} are led to where {second} does not reach; it is continued "
            "there by its border value",
            stacklevel=2,
        )
    write_field(output, compose(outer.inner(), inner), Grid(values.shape[1:], affine), outer.grid, "itk")


def convert_field(
    ddf: str | Path,
    output: str | Path,
    to: str,
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    file_format: str = "auto",
    overwrite: bool = False,
    resample: bool = False,
) -> None:
    """Write a field in another format.

    Args:
        ddf: the field.
        output: the new file.
        to: its format.
        fixed: image on the field's grid, where its file does not say where it lies.
        moving: image that the field leads to, if its grid is another one.
        file_format: of ``ddf``.
        overwrite: replace ``output``.
        resample: bring the field to the grid of ``fixed``, if it is another one: its vectors go along, linear in
            between, extended by its border. Then ``moving`` must be given if either format is in voxels of it.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used, or an image that is needed is not given.
    """
    output = Path(output)
    check_format("to", to, FORMATS)
    check_field_output(output, to, overwrite)
    source, target = (None if path is None else Image(path) for path in (fixed, moving))
    if not resample:
        field = Field(ddf, source, target, file_format)
        write_field(output, field.ddf, field.grid, field.moving, to)
        return
    if source is None:
        raise ValueError("resample must be used together with fixed, the image on whose grid the field shall lie")
    found = guess_format(ddf) if file_format == "auto" else file_format
    if not says_where(found):
        raise ValueError(
            f"{ddf} must say where it lies to be resampled, {found} fields do not; convert it to voxel first, with an "
            "image on its own grid as fixed"
        )
    field, grid = Field(ddf, None, target, found), source.grid
    if target is None and not grid.is_close(field.grid) and (of := {n for n in (found, to) if is_of_two_grids(n)}):
        raise ValueError(
            f"moving must be given to resample {ddf} from its grid, {field.grid.size} voxels, to that of {fixed}, "
            f"{grid.size}: {' and '.join(sorted(of))} fields are in voxels of the moving image. Of two images that a "
            "network saw on one grid, give the one that it saw as moving"
        )
    moved = move_to_grid(field.inner(), field.grid.affine, grid.size, grid.affine)
    end = target.grid if target else grid
    write_field(output, through_affine(moved, grid.affine, end.affine), grid, end, to)


def evaluate_field(
    ddf: str | Path,
    fixed: str | Path,
    moving: str | Path,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    file_format: str = "auto",
    device: str = "auto",
    mask: str | Path | None = None,
) -> dict[str, float]:
    """Folds and SDlogJ of a field, inside a mask, and, with labels or landmarks, Dice, HD95 (mm) and TRE (mm)."""
    chosen = find_device(device)
    pair = load_pair(fixed, moving, None, labels, points, mask)
    if said := unmeasured(pair.fixed, pair.moving):
        warnings.warn(said, stacklevel=2)
    field = Field(ddf, pair.fixed, pair.moving, file_format)
    return _measure(field.inner().to(chosen), pair)


def _measure(ddf: Tensor, pair: Pair) -> dict[str, float]:
    """Metrics of a field on the fixed grid, with the affine after it; folds and SDlogJ inside the mask."""
    labels = distances = None
    if pair.labels:
        labels = pair.brought(pair.labels[1], ddf), pair.labels[0].data.to(ddf.device)
    if pair.points:
        distances = ddf.new_tensor([[landmark_error(ddf, pair)]], dtype=widest_float(ddf.device))
    mask = None if pair.mask is None else pair.mask.data
    return {k: float(value) for k, value in measure(ddf, labels, distances, [pair.fixed.grid.spacing], mask).items()}


def landmark_error(ddf: Tensor, pair: Pair) -> float:
    """Mean distance of a pair's landmarks in millimetres, under a field on the fixed grid and the affine after it."""
    assert pair.points is not None  # for mypy
    moved = _move(pair.points[0], ddf, pair.fixed.grid.affine, pair.initial)
    return float(lengths(moved - pair.points[1].to(moved)).mean())


def _move(points: Tensor, ddf: Tensor, affine: np.ndarray, initial: np.ndarray | None = None) -> Tensor:
    """Points ``(N, n)`` in RAS millimetres, led by a field on the fixed grid, then by an affine in RAS millimetres."""
    voxels = to_voxel(points.to(ddf.device, widest_float(ddf.device)), affine)
    return to_world(voxels + sample_points(ddf, voxels[None])[0], affine if initial is None else initial @ affine)


def write_field(path: Path, ddf: Tensor, grid: Grid, moving: Grid, file_format: str) -> None:
    """Write a field ``(1, n, *S)`` that leads from voxels of its grid to voxels of the moving grid."""
    values = ddf[0].cpu().numpy()
    write_ddf(path, values, grid.affine, file_format, moving_affine=moving.affine, moving_size=moving.size)
