"""The work behind ``monai-lm``: from files to files, in physical space.

Fixed and moving image may lie on different grids and an affine may lead from one to the other. The moving image is
brought onto the fixed grid for the optimisation; what is written is sampled once, from the image as it was, through
affine and field together. Fields are files in ITK's convention or another of :mod:`monai_lm.fileio`, and lead from
points of the fixed to points of the moving image, affine included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.evaluation import compare_labels
from monai_lm.fields import compose, fold_count, invert, sample_points
from monai_lm.fileio import read_affine, read_ddf, write_ddf
from monai_lm.fileio.files import label_type, load_nifti, replacing, save_nifti
from monai_lm.fileio.formats import file_suffix
from monai_lm.metrics import sd_log_jacobian
from monai_lm.refinement import refine
from monai_lm.result import RefinementResult
from monai_lm.space import fixed_to_moving, from_space, resample_moving, spacing_of, through_affine, to_voxel, to_world

__all__ = ["Image", "apply_field", "compose_fields", "convert_field", "evaluate_field", "invert_field", "refine_pair"]


class Image:
    """A 2D or 3D image or label map from a file.

    Args:
        path: NIfTI file of one volume.

    Attributes:
        data: ``(1, 1, *S)`` float32.
        affine: ``(4, 4)`` voxel-to-RAS affine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not NIfTI, is cut off, is not finite, holds several volumes, or has a singular affine.
    """

    def __init__(self, path: str | Path) -> None:
        values, self.affine, _ = load_nifti(path)
        shape = values.shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in (2, 3) or min(shape) < 2:
            raise ValueError(f"{path} must hold one 2D or 3D volume, got shape {values.shape}")
        self.path = Path(path)
        self.data = torch.from_numpy(values.reshape(shape).astype(np.float32))[None, None]

    @property
    def size(self) -> tuple[int, ...]:
        """Voxel counts."""
        return tuple(self.data.shape[2:])

    def check_labels(self) -> Image:
        """Itself, if it holds whole numbers of at least 0; else ValueError."""
        if bool((self.data != self.data.round()).any()) or float(self.data.min()) < 0:
            raise ValueError(f"{self.path} must hold labels, whole numbers of at least 0, got other values")
        return self


class Field:
    """A displacement field from a file, seen from a fixed to a moving grid.

    Args:
        path: the file.
        fixed: image on the grid the field lives on; ``None`` takes the grid from the file.
        moving: image the field leads to; ``None``: the same grid.
        file_format: see :func:`monai_lm.fileio.read_ddf`.
    """

    def __init__(
        self, path: str | Path, fixed: Image | None = None, moving: Image | None = None, file_format: str = "auto"
    ) -> None:
        moving_affine = fixed.affine if fixed and not moving else moving.affine if moving else None
        size = None if fixed is None else fixed.size
        moving_size = moving.size if moving else size
        values, affine = read_ddf(path, file_format, size=size, moving_affine=moving_affine, moving_size=moving_size)
        if affine is None and fixed is None:
            raise ValueError(f"{path} does not say where it lies: an image on its grid must be given")
        self.affine = affine if affine is not None else fixed.affine  # type: ignore[union-attr]
        self.moving_affine = self.affine if moving_affine is None else moving_affine
        self.ddf = torch.from_numpy(np.ascontiguousarray(values))[None].float()
        if fixed is not None:
            self._check_grid(path, fixed)

    def _check_grid(self, path: str | Path, fixed: Image) -> None:
        size = tuple(self.ddf.shape[2:])
        corners = np.array([[0, 0, 0, 1], [*(s - 1 for s in size), *[0] * (3 - len(size)), 1]])
        apart = np.abs(corners @ (self.affine - fixed.affine).T).max()
        if size != fixed.size or apart > 0.1 * min(spacing_of(fixed.affine)):
            hint = "" if size != fixed.size else f"; affines\n{self.affine}\nand\n{fixed.affine}"
            raise ValueError(
                f"{path} must lie on the grid of the fixed image {fixed.path}, {fixed.size} voxels, got {size}{hint}\n"
                "(a field belongs to the image it was made for as fixed; were fixed and moving exchanged?)"
            )


def refine_pair(
    fixed: str | Path,
    moving: str | Path,
    output_dir: str | Path,
    ddf: str | Path | None = None,
    affine: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    file_format: str = "itk",
    device: str = "auto",
    overwrite: bool = False,
    report: bool = True,
    settings: Mapping[str, Any] | None = None,
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
        points: landmarks in the fixed and the moving image, to measure; see :func:`read_points`.
        file_format: of the fields written.
        device: ``"auto"`` takes a GPU if there is one.
        overwrite: replace what is in ``output_dir``.
        report: write the report; its Dice is that of labels brought onto the fixed grid first, ``metrics.json`` samples
            them once.
        settings: keyword arguments of :func:`monai_lm.refine`.

    Returns:
        The metrics, before (``…_before``) and after.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used.
    """
    folder, suffix = Path(output_dir), file_suffix(file_format)
    names = ["warped.nii.gz", "metrics.json", f"ddf{suffix}", f"inverse{suffix}"]
    names += ["warped_label.nii.gz"] * bool(labels) + ["report.html", "report.png"] * report
    free(folder, names, overwrite)
    f, m = Image(fixed), Image(moving)
    if len(f.size) != len(m.size):
        raise ValueError(f"fixed and moving must both be 2D or 3D, got shapes {f.size} and {m.size}")
    maps = [Image(path).check_labels() for path in labels] if labels else None
    landmarks = [torch.from_numpy(read_points(path)) for path in points] if points else None
    initial = None if affine is None else read_affine(affine)
    chosen = _device(device)
    start = torch.zeros(1, len(f.size), *f.size)
    predicted = None if ddf is None else Field(ddf, f, m).ddf
    if predicted is not None:  # what leads to moving voxels, as a field on the fixed grid before the affine
        predicted = from_space(predicted, np.eye(4), fixed_to_moving(f.affine, m.affine, initial))
    onto = resample_moving(m.data, start, f.affine, m.affine, initial)
    keywords: dict[str, Any] = {"spacing": spacing_of(f.affine, len(f.size))} | dict(settings or {})
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written to is found before the work
    start_on_device = None if predicted is None else predicted.to(chosen)
    result = refine(f.data.to(chosen), onto.to(chosen), start_on_device, **keywords)
    refined = result.ddf.cpu()
    before = _measure(start if predicted is None else predicted, f, m, initial, maps, landmarks)
    after = _measure(refined, f, m, initial, maps, landmarks)
    metrics: dict[str, Any] = {f"{key}_before": value for key, value in before.items()} | after
    metrics |= {
        "loss_before": float(result.initial_loss), "loss": float(result.final_loss), "seconds": result.seconds,
        "folds_predicted": int(result.predicted_folds), "repair_shift": float(result.repair_shift),
    }  # fmt: skip
    _write_pair(folder, suffix, file_format, f, m, maps, initial, refined)
    if report:
        _report(folder / "report.html", f, m, onto, maps, landmarks, initial, result, predicted, keywords)
    with replacing(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def _write_pair(
    folder: Path,
    suffix: str,
    file_format: str,
    fixed: Image,
    moving: Image,
    maps: Sequence[Image] | None,
    initial: np.ndarray | None,
    ddf: Tensor,
) -> None:
    whole = through_affine(ddf, fixed.affine, moving.affine, initial)
    write_ddf(
        folder / f"ddf{suffix}", whole[0].numpy(), fixed.affine, file_format,
        moving_affine=moving.affine, moving_size=moving.size,
    )  # fmt: skip
    back = _inverse(ddf, fixed.affine, moving.affine, initial, moving.size)
    write_ddf(
        folder / f"inverse{suffix}", back[0].numpy(), moving.affine, file_format,
        moving_affine=fixed.affine, moving_size=fixed.size,
    )  # fmt: skip
    warped = resample_moving(moving.data, ddf, fixed.affine, moving.affine, initial)
    save_nifti(folder / "warped.nii.gz", warped[0, 0].numpy(), fixed.affine, "none")
    if maps:
        label = resample_moving(maps[1].data, ddf, fixed.affine, maps[1].affine, initial, "nearest", "zeros")
        save_nifti(folder / "warped_label.nii.gz", label[0, 0].numpy(), fixed.affine, "none", label_type(label.numpy()))


def _report(
    path: Path,
    fixed: Image,
    moving: Image,
    onto: Tensor,
    maps: Sequence[Image] | None,
    landmarks: Sequence[Tensor] | None,
    initial: np.ndarray | None,
    result: RefinementResult,
    predicted: Tensor | None,
    settings: Mapping[str, Any],
) -> None:
    """The page shows, and measures, what has been brought onto the fixed grid."""
    from monai_lm.report import write_report

    labels, points = None, None
    if maps:
        still = torch.zeros_like(result.ddf).cpu()
        label = resample_moving(maps[1].data, still, fixed.affine, maps[1].affine, initial, "nearest", "zeros")
        labels = (maps[0].data, label)
    if landmarks and initial is None:
        points = (to_voxel(landmarks[0], fixed.affine), to_voxel(landmarks[1], fixed.affine))
    title = f"{moving.path.name} onto {fixed.path.name}"
    write_report(
        path, fixed.data, onto, result, prediction=predicted, affine=fixed.affine, labels=labels, landmarks=points,
        settings=dict(settings), title=title, png=path.with_suffix(".png"),
    )  # fmt: skip


def _measure(
    ddf: Tensor,
    fixed: Image,
    moving: Image,
    initial: np.ndarray | None,
    maps: Sequence[Image] | None,
    landmarks: Sequence[Tensor] | None,
) -> dict[str, float]:
    """Metrics of a field on the fixed grid, with the affine after it."""
    out = {"folds": float(fold_count(ddf)), "sdlogj": float(sd_log_jacobian(ddf))}
    if maps:
        if maps[0].size != fixed.size:
            raise ValueError(f"{maps[0].path} must lie on the grid {fixed.size} of its image, got {maps[0].size}")
        label = resample_moving(maps[1].data, ddf, fixed.affine, maps[1].affine, initial, "nearest", "zeros")
        spacing = spacing_of(fixed.affine, len(fixed.size))
        out |= {key: float(value) for key, value in compare_labels(label, maps[0].data, [spacing]).items()}
    if landmarks:
        if landmarks[0].shape != landmarks[1].shape:
            shapes = [tuple(points.shape) for points in landmarks]
            raise ValueError(f"points must be as many in the fixed as in the moving image, got shapes {shapes}")
        moved = _move(
            landmarks[0], through_affine(ddf, fixed.affine, moving.affine, initial), fixed.affine, moving.affine
        )
        out["tre"] = float(torch.linalg.vector_norm(moved - landmarks[1], dim=1).mean())
    return out


def _move(points: Tensor, ddf: Tensor, fixed_affine: np.ndarray, moving_affine: np.ndarray) -> Tensor:
    """Points ``(N, n)`` in RAS millimetres, led by a field from the fixed to the moving grid."""
    voxels = to_voxel(points.double(), fixed_affine)
    return to_world(voxels + sample_points(ddf.double(), voxels[None])[0], moving_affine)


def _inverse(
    ddf: Tensor,
    affine: np.ndarray,
    moving_affine: np.ndarray,
    initial: np.ndarray | None,
    moving_size: Sequence[int],
) -> Tensor:
    """Field on the moving grid back to voxels of the fixed grid: first the affine's inverse, then the field's."""
    still = ddf.new_zeros(1, ddf.shape[1], *moving_size)
    back = None if initial is None else np.linalg.inv(initial)
    return compose(invert(ddf)[0], through_affine(still, moving_affine, affine, back))


def apply_field(
    ddf: str | Path,
    source: str | Path,
    output: str | Path,
    fixed: str | Path | None = None,
    moving: str | Path | None = None,
    label: bool = False,
    overwrite: bool = False,
    file_format: str = "auto",
) -> None:
    """Warp an image or a label map onto the grid of a field, or lead points of the fixed image to the moving one.

    Args:
        ddf: the field.
        source: NIfTI image on the moving side, or points (``.csv``, ``.fcsv``) of the fixed image.
        output: a file of the same kind.
        fixed: image on the field's grid, where the field's file does not say where it lies.
        moving: image that the field leads to; for voxel fields between different grids.
        label: take the nearest label instead of interpolating.
        overwrite: replace ``output``.
        file_format: of the field.
    """
    output = Path(output)
    free(output.parent, [output.name], overwrite)
    grid = None if fixed is None else Image(fixed)
    if Path(source).suffix in (".csv", ".fcsv"):
        field = Field(ddf, grid, None if moving is None else Image(moving), file_format)
        points = torch.from_numpy(read_points(source))
        moved = _move(points, field.ddf, field.affine, field.moving_affine)
        with replacing(output) as temporary:
            np.savetxt(temporary, moved.numpy(), delimiter=",", header="x,y,z"[: 2 * points.shape[1] - 1], comments="")
        return
    image = Image(source)
    if label:
        image.check_labels()
    field = Field(ddf, grid, image, file_format)
    mode, outside = ("nearest", "zeros") if label else ("bilinear", "border")
    inner = from_space(field.ddf, np.eye(4), fixed_to_moving(field.affine, image.affine))
    warped = resample_moving(image.data, inner, field.affine, image.affine, None, mode, outside)
    save_nifti(output, warped[0, 0].numpy(), field.affine, "none", label_type(warped.numpy()) if label else np.float32)


def invert_field(
    ddf: str | Path,
    output: str | Path,
    moving: str | Path | None = None,
    file_format: str = "itk",
    overwrite: bool = False,
) -> float:
    """Write the inverse of a field, on the grid of the ``moving`` image (default: the field's own).

    Returns:
        Largest distance in voxels that inverse and field together miss the identity by, where the grids overlap.
    """
    output = Path(output)
    free(output.parent, [output.name], overwrite)
    image = None if moving is None else Image(moving)
    field = Field(ddf, None, image)
    size = tuple(field.ddf.shape[2:]) if image is None else image.size
    inner = from_space(field.ddf, np.eye(4), fixed_to_moving(field.affine, field.moving_affine))
    inverse = _inverse(inner, field.affine, field.moving_affine, None, size)
    write_ddf(
        output, inverse[0].numpy(), field.moving_affine, file_format,
        moving_affine=field.affine, moving_size=tuple(field.ddf.shape[2:]),
    )  # fmt: skip
    missed = torch.linalg.vector_norm(compose(inverse, field.ddf), dim=1)[0]
    inside = [slice(s // 8, s - s // 8) for s in missed.shape]
    return float(missed[tuple(inside)].max())


def compose_fields(first: str | Path, second: str | Path, output: str | Path, overwrite: bool = False) -> None:
    """Write the field that takes a point through ``first``, then through ``second``, on the grid of ``first``."""
    output = Path(output)
    free(output.parent, [output.name], overwrite)
    outer = Field(second)
    values, affine = read_ddf(first, moving_affine=outer.affine)
    inner = torch.from_numpy(np.ascontiguousarray(values))[None].float()
    if affine is None:
        raise ValueError(f"{first} does not say where it lies; convert it to a NIfTI field first")
    whole = compose(outer.ddf, inner)  # from voxels of the first grid to voxels of the second, where the second leads
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
) -> dict[str, float]:
    """Folds and SDlogJ of a field and, with labels or landmarks, Dice, HD95 (mm) and TRE (mm)."""
    f, m = Image(fixed), Image(moving)
    field = Field(ddf, f, m, file_format)
    inner = from_space(field.ddf, np.eye(4), fixed_to_moving(f.affine, m.affine))
    maps = [Image(path).check_labels() for path in labels] if labels else None
    landmarks = [torch.from_numpy(read_points(path)) for path in points] if points else None
    return _measure(inner, f, m, None, maps, landmarks)


def read_points(path: str | Path) -> np.ndarray:
    """Landmarks ``(N, n)`` in RAS millimetres, float64.

    ``.csv``: a line per point, after a header or not, in RAS millimetres. ``.fcsv``: Slicer's, in the coordinate system
    that it says (LPS or RAS).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold points.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    signs, columns = np.ones(3), slice(None)
    if path.suffix == ".fcsv":
        system = next((line.split("=")[1].strip() for line in lines if line.startswith("# CoordinateSystem")), "")
        if system not in ("LPS", "RAS", "0", "1"):
            raise ValueError(f"{path} must say its CoordinateSystem, LPS or RAS, got {system!r}")
        signs = np.array([-1.0, -1.0, 1.0]) if system in ("LPS", "1") else signs
        lines, columns = [line for line in lines if not line.startswith("#")], slice(1, 4)
    rows = [line.split(",")[columns] for line in lines]
    try:
        values = [[float(v) for v in row] for row in (rows if not rows or _numeric(rows[0]) else rows[1:])]
        points = np.array(values, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} must hold points, numbers separated by commas: {error}") from error
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not np.isfinite(points).all():
        raise ValueError(f"{path} must hold points of 2 or 3 finite coordinates, got shape {points.shape}")
    return points * signs[: points.shape[1]]


def _numeric(row: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in row)
    except ValueError:
        return False


def free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """FileExistsError if one of the names is taken in the folder and must not be replaced."""
    taken = [name for name in names if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(str(folder / n) for n in taken)} exists; --overwrite replaces it")


def _device(name: str) -> torch.device:
    """A device that is there; ``"auto"`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be auto or one that torch has here, got {name!r}: {error}") from error
    return device
