"""Series of images in one file: the work behind ``monai-lm sequence``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm.fields import warp
from monai_lm.fields.algebra import lengths
from monai_lm.fields.space import Grid
from monai_lm.io import file_suffix, write_ddf
from monai_lm.io.images import Image
from monai_lm.io.nifti import load_nifti, replacing, save_nifti, write_table
from monai_lm.io.outputs import as_json, check_not_inputs, check_outputs, made
from monai_lm.io.provenance import Recipe, machine, settings_of
from monai_lm.kernels.devices import find_device
from monai_lm.report.case import Case, checked_case
from monai_lm.report.findings import assess
from monai_lm.solver.refinement import check_keywords
from monai_lm.solver.sequence import refine_sequence

__all__ = ["register_sequence"]


def register_sequence(
    series: str | Path,
    output_dir: str | Path,
    reference: int = 0,
    label: str | Path | None = None,
    mask: str | Path | None = None,
    file_format: str = "itk",
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> list[dict[str, Any]]:
    """Register every frame of a series to one of them; see :func:`monai_lm.refine_sequence`.

    Args:
        series: NIfTI file of several volumes, or of several planes over time (``(x, y, 1, t)``).
        output_dir: gets ``warped.nii.gz``, the series at rest; ``ddf_0003`` and so on, the fields from the reference to
            the frames; ``motion.csv``, a row per frame; and ``metrics.json``.
        reference: frame that stays, from 0; negative from the end.
        label: labels on the reference; the motion of each is told.
        mask: weights in [0, 1] on the reference: the similarity counts, and motion is told, where they are not zero.
        file_format: of the fields.
        device: ``"auto"`` takes a GPU if there is one.
        overwrite: replace what is in ``output_dir``; fields of frames that are none any more do not stay.
        progress: show a progress bar.
        settings: keyword arguments of :func:`monai_lm.refine`.
        command: recorded as what was called.

    Returns:
        The rows of ``motion.csv``: ``frame``, ``time`` in seconds; the mean, 95th percentile and largest length of the
        motion in millimetres, ``over`` the ``mask``, else over all ``labels``, else over the ``foreground``, where the
        reference is brighter than Otsu's threshold; its mean over each label (``mean_mm_3``); folds, SDlogJ, losses,
        the verdict and the names of its remarks.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used, no such frame, or frames that are not finite or of one value.
    """
    folder, chosen = Path(output_dir), find_device(device)
    check_keywords("settings", settings or {})
    frames, grid, step = _read(series)
    suffix = file_suffix(file_format, len(grid.size))
    labels, weight = (None if path is None else _on(grid, path, path is label, series) for path in (label, mask))
    keywords: dict[str, Any] = {"spacing": grid.spacing} | dict(settings or {})
    results = refine_sequence(frames.to(chosen), reference, None if weight is None else weight.to(chosen), **keywords)
    still = reference % len(frames)
    names = ["metrics.json", "motion.csv", "warped.nii.gz"]
    names += [f"ddf_{k:04d}{suffix}" for k in range(len(frames)) if k != still]
    check_outputs(folder, names, overwrite)
    files = {"series": series, "label": label, "mask": mask}
    inputs = {role: Path(path).absolute() for role, path in files.items() if path is not None}
    check_not_inputs(folder, names, inputs.values())
    over = _told_of(frames[still, 0], labels, weight)
    used = settings_of(keywords)
    recipe = Recipe(inputs, used | {"reference": still, "file_format": file_format})
    provenance = {"command": command, **recipe.record(), **machine(), "device": str(chosen)}
    warped, rows = frames.clone(), [{"frame": still, "time": still * step}]
    with made(folder, names):
        (folder / "metrics.json").unlink(missing_ok=True)  # it says that the others are complete
        for k, result in tqdm(results, "sequence", len(frames) - 1, unit="frame", disable=not progress):
            write_ddf(folder / f"ddf_{k:04d}{suffix}", result.ddf[0].cpu().numpy(), grid.affine, file_format)
            frame = frames[k : k + 1]
            warped[k] = warp(frame.to(chosen), result.ddf)[0].cpu()
            case = checked_case(frames[still][None], frame, result, affine=grid.affine, settings=used, mask=weight)
            rows.append(
                {"frame": k, "time": k * step, **_motion(result.ddf.cpu(), grid, labels, *over), **_judged(case)}
            )
        rows.sort(key=lambda row: row["frame"])
        values = warped[:, 0].movedim(0, -1)
        volumes = values if values.dim() == 4 else values.unsqueeze(2)
        save_nifti(folder / "warped.nii.gz", volumes.numpy(), grid.affine, "none", seconds=step)
        write_table(folder / "motion.csv", rows)
        with replacing(folder / "metrics.json") as temporary:
            temporary.write_text(as_json({"provenance": provenance | {"refine": used}}) + "\n")
    for path in folder.glob(f"ddf_[0-9][0-9][0-9][0-9]{suffix}"):  # of a longer series, or of another reference
        if overwrite and path.name not in names:
            path.unlink()
    return rows


def _read(path: str | Path) -> tuple[Tensor, Grid, float]:
    """Frames ``(T, 1, *S)`` of a file, where they lie, and the seconds from one to the next, 1 where none are told."""
    values, affine, header = load_nifti(path, finite=False)
    shape = values.shape
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    thick = [axis for axis, s in enumerate(shape[:3]) if s > 1]
    if len(shape) != 4 or shape[3] < 2 or len(thick) < 2:
        raise ValueError(
            f"{path} must hold several volumes, or planes over time (x, y, 1, t), got shape {values.shape}"
        )
    order = [*thick, *(axis for axis in range(3) if axis not in thick), 3]
    frames = np.moveaxis(values.reshape([shape[axis] for axis in (*thick, 3)]), -1, 0)
    _check_frames(path, frames.reshape(len(frames), -1))
    unit = {"msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1], 1.0)
    step = unit * float(header.get_zooms()[3])
    data = torch.from_numpy(np.ascontiguousarray(frames, np.float32))[:, None]
    return data, Grid(frames.shape[1:], affine[:, order]), step if step > 0 else 1.0


def _check_frames(path: str | Path, frames: np.ndarray) -> None:
    """ValueError that numbers the frames ``(T, N)`` that are not finite, or of one value, in which nothing moves."""
    wrong = {
        "finite, got NaN or infinite values": ~np.isfinite(frames).all(1),
        "images, got but one value": frames.min(1) == frames.max(1),
    }
    for what, bad in wrong.items():
        if bad.any():
            numbers = np.flatnonzero(bad)
            which = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
            raise ValueError(
                f"{path} must have frames that are {what} in {'frame' if len(numbers) == 1 else 'frames'} {which} of "
                f"{len(frames)}, counted from 0; leave {'it' if len(numbers) == 1 else 'them'} out"
            )


def _told_of(reference: Tensor, labels: Tensor | None, mask: Tensor | None) -> tuple[str, Tensor]:
    """Over what motion is told, and where that is, ``(*S)``: mask, else labels, else foreground."""
    if mask is not None:
        return "mask", mask[0, 0] > 0
    if labels is not None and bool((labels != 0).any()):
        return "labels", labels[0, 0] != 0
    return "foreground", reference > _otsu(reference.numpy())


def _otsu(values: np.ndarray) -> float:
    """The threshold that parts values best in two, of 256 (N. Otsu, IEEE Trans. SMC 1979); below the largest value."""
    counts, edges = np.histogram(values, 256)
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    apart = below * (values.size - below) * (total[:-1] / below - (total[-1] - total[:-1]) / (values.size - below)) ** 2
    return float(edges[1 + int(apart.argmax())])


def _on(grid: Grid, path: str | Path, label: bool, series: str | Path) -> Tensor:
    """A label map or a mask ``(1, 1, *S)`` on the grid of a series; ValueError for one on another grid."""
    image = Image(path, label)
    if not grid.is_close(image.grid):
        raise ValueError(
            f"{path} must lie on the grid of the frames of {series}, {grid.size} voxels, got {image.grid.size}; affines"
            f"\n{grid.affine}\nand\n{image.grid.affine}"
        )
    return image.data


def _motion(ddf: Tensor, grid: Grid, labels: Tensor | None, over: str, where: Tensor) -> dict[str, Any]:
    """How far points move, in millimetres: over what is told of, and the mean over each label."""
    moved = lengths(ddf * ddf.new_tensor(grid.spacing).view(1, -1, *[1] * len(grid.size)))[0]
    ordered = moved[where].sort().values
    out: dict[str, Any] = {"over": over, "mean_mm": float(ordered.mean())}
    out |= {"p95_mm": float(ordered[int(0.95 * (len(ordered) - 1))]), "max_mm": float(ordered[-1])}
    if labels is not None:
        for value in labels[labels != 0].unique().tolist():
            out[f"mean_mm_{value}"] = float(moved[labels[0, 0] == value].mean())
    return out


def _judged(case: Case) -> dict[str, Any]:
    """Folds, SDlogJ, losses and the verdict of a frame."""
    found = assess(case)
    return {
        "folds": found.after.folds, "sdlogj": found.after.sdlogj, "loss_before": float(case.result.initial_loss),
        "loss_after": float(case.result.final_loss), "seconds": case.result.seconds, "verdict": found.state,
        "remarks": " ".join(found.remarks),
    }  # fmt: skip
