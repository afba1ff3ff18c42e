"""The work behind ``monai-lm``: from files to files, in physical space.

Fixed and moving image may lie on different grids and an affine may lead from one to the other. The moving image is
brought onto the fixed grid for the optimisation; what is written is sampled once, from the image as it was, through
affine and field together. Fields are files in ITK's convention or another of :mod:`monai_lm.fileio`, and lead from
points of the fixed to points of the moving image, affine included.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.bundles import RegistrationBundle
from monai_lm.devices import find_device, widest_float
from monai_lm.fields import compose, fold_count, sample_points
from monai_lm.fileio import file_suffix, read_ddf, write_ddf
from monai_lm.fileio.files import label_type, replacing, save_nifti
from monai_lm.fileio.formats import check_grid
from monai_lm.fileio.points import POINT_SUFFIXES
from monai_lm.inverses import InverseReport, inspect_inverse, invert_between
from monai_lm.metrics import compare_labels, sd_log_jacobian
from monai_lm.refinement import refine
from monai_lm.result import RefinementResult
from monai_lm.space import (
    fixed_to_moving,
    from_space,
    resample_moving,
    spacing_of,
    through_affine,
    to_space,
    to_voxel,
    to_world,
)
from monai_lm.volumes import Field, Image, Pair, load_pair, load_points

__all__ = ["apply_field", "compose_fields", "convert_field", "evaluate_field", "invert_field", "refine_pair"]


def refine_pair(
    fixed: str | Path,
    moving: str | Path,
    output_dir: str | Path,
    ddf: str | Path | None = None,
    affine: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    mask: str | Path | None = None,
    file_format: str = "itk",
    device: str = "auto",
    overwrite: bool = False,
    report: bool = True,
    settings: Mapping[str, Any] | None = None,
    bundle: str | Path | None = None,
    ddf_format: str = "auto",
) -> dict[str, Any]:
    """Refine or register two files.

    Args:
        fixed: image that stays.
        moving: image that is warped onto it.
        output_dir: gets ``ddf``, ``inverse``, ``warped`` and, with labels, ``warped_label`` (``.nii.gz``),
            ``metrics.json``, ``report.html`` and its summary ``report.png``.
        ddf: predicted field; ``None`` starts from the identity.
        affine: from fixed to moving points, applied after the field; ``None``: the world spaces agree.
        labels: label maps of the fixed and the moving image, to warp and to measure.
        points: landmarks in the fixed and the moving image, to measure; see :func:`monai_lm.fileio.read_points`.
        mask: weights in [0, 1] on the fixed grid: the similarity counts where they are not zero.
        file_format: of the fields written.
        device: ``"auto"`` takes a GPU if there is one.
        overwrite: replace what is in ``output_dir``; a former run's report and warped labels do not stay.
        report: write the report; its Dice is that of labels brought onto the fixed grid first, ``metrics.json`` samples
            them once.
        settings: keyword arguments of :func:`monai_lm.refine`; with a bundle, those that replace its own.
        bundle: folder of a MONAI bundle that predicts the field and refines it, see
            :class:`monai_lm.bundles.RegistrationBundle`; instead of ``ddf``, without ``mask``. With an ``affine``, the
            identity included, it gets the moving image on the fixed grid, else both files as they are.
        ddf_format: of ``ddf``, see :func:`monai_lm.fileio.read_ddf`.

    Returns:
        The metrics, before (``…_before``) and after.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used.
    """
    given = [name for name, value in (("ddf", ddf), ("mask", mask)) if value is not None]
    if bundle is not None and given:
        raise ValueError(f"{' and '.join(given)} cannot be used together with bundle, which predicts by itself")
    folder, suffix = Path(output_dir), file_suffix(file_format)
    names = ["warped.nii.gz", "metrics.json", f"ddf{suffix}", f"inverse{suffix}"]
    names += ["warped_label.nii.gz"] * bool(labels) + ["report.html", "report.png"] * report
    free(folder, names, overwrite)
    pair = load_pair(fixed, moving, affine, labels, points, mask)
    f, m = pair.fixed, pair.moving
    file_suffix(file_format, len(f.size))
    for image in (f, m):  # the field lies on the one grid, its inverse on the other
        check_grid(file_format, str(image.path), image.affine, len(f.size))
    chosen = find_device(device)
    start = torch.zeros(1, len(f.size), *f.size, device=chosen)
    predicted = None if ddf is None else Field(ddf, f, m, ddf_format).ddf.to(chosen)
    if predicted is not None:  # what leads to moving voxels, as a field on the fixed grid before the affine
        start = predicted = from_space(predicted, np.eye(4), fixed_to_moving(f.affine, m.affine, pair.initial))
    onto = pair.brought(m, torch.zeros_like(start))
    keywords: dict[str, Any] = {"spacing": spacing_of(f.affine, len(f.size))} | dict(settings or {})
    weight = None if pair.mask is None else pair.mask.data.to(chosen)
    with _made(folder):  # what cannot be written to is found before the work
        if bundle is None:
            result = refine(f.data.to(chosen), onto, predicted, weight, **keywords)
        else:
            start, result = _registered(bundle, pair, chosen, settings)
            predicted = start
    before, after = _measure(start, pair), _measure(result.ddf, pair)
    metrics: dict[str, Any] = {f"{key}_before": value for key, value in before.items()} | after
    metrics |= {
        "loss_before": float(result.initial_loss), "loss": float(result.final_loss), "seconds": result.seconds,
        "folds_predicted": int(result.predicted_folds), "repair_shift": float(result.repair_shift),
    }  # fmt: skip
    _write_fields(folder, suffix, file_format, pair, result.ddf)
    _write_warped(folder, pair, result.ddf)
    if report:
        _report(folder / "report.html", pair, onto, result, predicted, keywords)
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(as_json(metrics) + "\n")
    if overwrite:
        for name in {"warped_label.nii.gz", "report.html", "report.png"} - set(names):
            (folder / name).unlink(missing_ok=True)
    return metrics


def _registered(
    bundle: str | Path, pair: Pair, device: torch.device, settings: Mapping[str, Any] | None
) -> tuple[Tensor, RefinementResult]:
    """A bundle's prediction and its refinement, on the fixed grid; after an affine, of what that brings there."""
    registration, f = RegistrationBundle(bundle, device, settings), pair.fixed
    with TemporaryDirectory() as folder:
        moving: str | Path = pair.moving.path
        if pair.initial is not None:
            moving = Path(folder) / f"{Path(moving).name.split('.')[0]}.nii.gz"
            still = torch.zeros(1, len(f.size), *f.size)
            m = pair.moving
            onto = resample_moving(m.data, still, f.affine, m.affine, pair.initial, padding_mode="zeros")
            save_nifti(moving, onto[0, 0].numpy(), f.affine, "none")
        predicted, result = registration.register(f.path, moving, f.size, f.affine)
    if result is None:
        raise ValueError(f"bundle {bundle} must refine what it predicts, its refine is None")
    return predicted, result


def as_json(values: Mapping[str, Any]) -> str:
    """JSON, which knows no NaN: null in its place."""
    return json.dumps(
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}, indent=1
    )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there, and gone again if it was not and the work fails."""
    new = next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"output_dir must be a folder, got the file {folder}") from error
    try:
        yield
    except BaseException:
        while new is not None and folder != new.parent and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
        raise


def _write_fields(folder: Path, suffix: str, file_format: str, pair: Pair, ddf: Tensor) -> None:
    f, m = pair.fixed, pair.moving
    whole = through_affine(ddf, f.affine, m.affine, pair.initial)
    write_ddf(
        folder / f"ddf{suffix}",
        whole[0].cpu().numpy(),
        f.affine,
        file_format,
        moving_affine=m.affine,
        moving_size=m.size,
    )
    back, residual = invert_between(ddf, f.affine, m.affine, pair.initial, m.size)
    if missed := int((residual > 0.01).sum()):
        warnings.warn(f"the inverse did not converge in {missed} voxels, see monai-lm invert", stacklevel=3)
    write_ddf(
        folder / f"inverse{suffix}",
        back[0].cpu().numpy(),
        m.affine,
        file_format,
        moving_affine=f.affine,
        moving_size=f.size,
    )


def _write_warped(folder: Path, pair: Pair, ddf: Tensor) -> None:
    warped = pair.brought(pair.moving, ddf).cpu()
    save_nifti(folder / "warped.nii.gz", warped[0, 0].numpy(), pair.fixed.affine, "none")
    if pair.labels:
        label = pair.brought(pair.labels[1], ddf).cpu()
        kind = label_type(label.numpy())
        save_nifti(folder / "warped_label.nii.gz", label[0, 0].numpy(), pair.fixed.affine, "none", kind)


def _report(
    path: Path,
    pair: Pair,
    onto: Tensor,
    result: RefinementResult,
    predicted: Tensor | None,
    settings: Mapping[str, Any],
) -> None:
    """The page shows, and measures, what has been brought onto the fixed grid."""
    from monai_lm.report import write_report

    labels, points, affine = None, None, pair.fixed.affine
    if pair.labels:
        labels = (pair.labels[0].data, pair.brought(pair.labels[1], torch.zeros_like(result.ddf)))
    if pair.points and pair.initial is None:
        points = (to_voxel(pair.points[0], affine), to_voxel(pair.points[1], affine))
    write_report(
        path, pair.fixed.data, onto, result, prediction=predicted, affine=affine, labels=labels, landmarks=points,
        settings=dict(settings), title=f"{pair.moving.path.name} onto {pair.fixed.path.name}",
        png=path.with_suffix(".png"),
    )  # fmt: skip


def _measure(ddf: Tensor, pair: Pair) -> dict[str, float]:
    """Metrics of a field on the fixed grid, with the affine after it."""
    out = {"folds": float(fold_count(ddf)), "sdlogj": float(sd_log_jacobian(ddf))}
    if pair.labels:
        label, fixed = pair.brought(pair.labels[1], ddf), pair.labels[0].data.to(ddf.device)
        spacing = spacing_of(pair.fixed.affine, len(pair.fixed.size))
        out |= {key: float(value) for key, value in compare_labels(label, fixed, [spacing]).items()}
    if pair.points:
        moved = _move(pair.points[0], ddf, pair.fixed.affine, pair.initial)
        out["tre"] = float(torch.linalg.vector_norm(moved - pair.points[1].to(moved), dim=1).mean())
    return out


def _move(points: Tensor, ddf: Tensor, affine: np.ndarray, initial: np.ndarray | None = None) -> Tensor:
    """Points ``(N, n)`` in RAS millimetres, led by a field on the fixed grid, then by an affine in RAS millimetres."""
    voxels = to_voxel(points.to(ddf.device, widest_float(ddf.device)), affine)
    return to_world(voxels + sample_points(ddf, voxels[None])[0], affine if initial is None else initial @ affine)


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
            :func:`monai_lm.fileio.read_points`.
        output: a NIfTI file, or points as ``.csv``.
        fixed: image on the field's grid, where the field's file does not say where it lies.
        moving: image that the field leads to; for voxel fields between different grids.
        label: take the nearest label instead of interpolating.
        overwrite: replace ``output``.
        file_format: of the field.
        device: where it is computed; ``"auto"`` takes a GPU if there is one.
    """
    output, chosen = Path(output), find_device(device)
    free(output.parent, [output.name], overwrite)
    grid, target = (None if path is None else Image(path) for path in (fixed, moving))
    if Path(source).name.lower().endswith(POINT_SUFFIXES):
        if output.suffix != ".csv":
            raise ValueError(f"output must end in .csv for points, got {output.name!r}")
        field = Field(ddf, grid, target, file_format)
        points = load_points(source, field.ddf.shape[1])
        moved = _move(points, field.inner().to(chosen), field.affine).cpu()
        with replacing(output) as temporary:
            np.savetxt(temporary, moved.numpy(), delimiter=",", header="x,y,z"[: 2 * points.shape[1] - 1], comments="")
        return
    image = Image(source, label)
    if not output.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"output must end in .nii or .nii.gz for an image, got {output.name!r}")
    field = Field(ddf, grid, target or image, file_format)
    mode, outside = ("nearest", "zeros") if label else ("bilinear", "border")
    ddf_inside, data = field.inner().to(chosen), image.data.to(chosen)
    warped = resample_moving(data, ddf_inside, field.affine, image.affine, None, mode, outside).cpu()
    save_nifti(output, warped[0, 0].numpy(), field.affine, "none", label_type(warped.numpy()) if label else np.float32)


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
    free(output.parent, [output.name], overwrite)
    image = None if moving is None else Image(moving)
    field = Field(ddf, None, image, ddf_format)
    size = tuple(field.ddf.shape[2:]) if image is None else image.size
    inner, affines = field.inner().to(chosen), (field.affine, field.moving_affine)
    inverse, residual = invert_between(inner, *affines, None, size)
    write_ddf(
        output, inverse[0].cpu().numpy(), field.moving_affine, file_format,
        moving_affine=field.affine, moving_size=tuple(field.ddf.shape[2:]),
    )  # fmt: skip
    return inspect_inverse(inner, inverse, residual, *affines)


def compose_fields(
    first: str | Path,
    second: str | Path,
    output: str | Path,
    overwrite: bool = False,
    first_format: str = "auto",
    second_format: str = "auto",
) -> None:
    """Write the field that takes a point through ``first``, then through ``second``, on the grid of ``first``."""
    output = Path(output)
    free(output.parent, [output.name], overwrite)
    outer = Field(second, file_format=second_format)
    values, affine = read_ddf(first, first_format, moving_affine=outer.affine)
    inner = torch.from_numpy(np.ascontiguousarray(values))[None].float()
    if affine is None:
        raise ValueError(f"{first} does not say where it lies; convert it to a NIfTI field first")
    # on from voxels of the second grid to voxels of the grid that the second field leads to
    whole = to_space(compose(outer.inner(), inner), np.eye(4), fixed_to_moving(outer.affine, outer.moving_affine))
    write_ddf(output, whole[0].numpy(), affine, "itk", moving_affine=outer.affine)


def convert_field(
    ddf: str | Path,
    output: str | Path,
    to: str,
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    file_format: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write a field in another format; ``fixed`` and ``moving`` are images on the grids it leads from and to."""
    output = Path(output)
    free(output.parent, [output.name], overwrite)
    target = None if moving is None else Image(moving)
    field = Field(ddf, None if fixed is None else Image(fixed), target, file_format)
    write_ddf(
        output, field.ddf[0].numpy(), field.affine, to,
        moving_affine=field.moving_affine, moving_size=None if target is None else target.size,
    )  # fmt: skip


def evaluate_field(
    ddf: str | Path,
    fixed: str | Path,
    moving: str | Path,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    file_format: str = "auto",
    device: str = "auto",
) -> dict[str, float]:
    """Folds and SDlogJ of a field and, with labels or landmarks, Dice, HD95 (mm) and TRE (mm)."""
    chosen = find_device(device)
    pair = load_pair(fixed, moving, None, labels, points)
    field = Field(ddf, pair.fixed, pair.moving, file_format)
    return _measure(field.inner().to(chosen), pair)


def free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """FileExistsError if one of the names is taken in the folder and must not be replaced."""
    taken = [name for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(str(folder / n) for n in taken)} exists; --overwrite replaces it")
