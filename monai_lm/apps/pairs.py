"""The work behind ``monai-lm refine``: from the files of a pair to those of its refined field, in physical space.

Fixed and moving image may lie on different grids and an affine may lead from one to the other. The moving image is
brought onto the fixed grid for the optimisation; what is written is sampled once, from the image as it was, through
affine and field together. Fields are files in ITK's convention or another of :mod:`monai_lm.io`, and lead from
points of the fixed to points of the moving image, affine included.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from monai_lm.alignment import MODES, Alignment, align
from monai_lm.apps.bundle import RegistrationBundle
from monai_lm.apps.commands import landmark_error, write_field
from monai_lm.apps.guides import check_guide, guides_of
from monai_lm.apps.jacobian import write_jacobian
from monai_lm.apps.plan import plan_of, write_log
from monai_lm.fields.inverses import invert_between
from monai_lm.fields.space import resample_moving, through_affine
from monai_lm.io import file_suffix, write_affine
from monai_lm.io.formats import check_grid
from monai_lm.io.images import Field, Pair, load_pair
from monai_lm.io.nifti import label_type, replacing, save_nifti
from monai_lm.io.outputs import (
    as_json,
    check_not_inputs,
    check_outputs,
    made,
    pair_outputs,
    report_possible,
)
from monai_lm.io.provenance import describe, machine, pair_recipe, settings_of
from monai_lm.kernels.devices import find_device
from monai_lm.report.case import Case, checked_case
from monai_lm.report.findings import Assessment, assess
from monai_lm.report.page import write_case
from monai_lm.solver.refinement import refine
from monai_lm.solver.result import RefinementResult
from monai_lm.solver.uncertainty import uncertainty as uncertainty_of

__all__ = ["refine_pair"]


_FURTHER = {
    "warped_label.nii.gz", "jacobian.nii.gz", "uncertainty.nii.gz", "affine.txt", "report.html", "report.png",
}  # fmt: skip
"""What a pair has only if it is asked for."""


def refine_pair(
    fixed: str | Path,
    moving: str | Path,
    output_dir: str | Path,
    ddf: str | Path | None = None,
    affine: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
    file_format: str = "itk",
    device: str = "auto",
    overwrite: bool = False,
    report: bool = True,
    settings: Mapping[str, Any] | None = None,
    bundle: str | Path | None = None,
    ddf_format: str = "auto",
    command: str | None = None,
    jacobian: bool = False,
    guide: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    log_json: str | Path | None = None,
    uncertainty: bool = False,
    ddf_before_affine: bool = False,
) -> dict[str, Any]:
    """Refine or register two files.

    Args:
        fixed: image that stays.
        moving: image that is warped onto it.
        output_dir: gets ``ddf``, ``inverse``, ``warped`` and, with labels, ``warped_label`` (``.nii.gz``),
            ``metrics.json``, ``report.html`` and its summary ``report.png``.
        ddf: predicted field; ``None`` starts from the identity.
        affine: from fixed to moving points, applied after the field; ``None``: the world spaces agree. Or how to find
            it first, ``"auto"``, ``"center"``, ``"rigid"`` or ``"affine"``, see :func:`monai_lm.align`; it is written,
            too, to ``affine.txt``.
        labels: label maps of the fixed and the moving image, to warp and to measure.
        points: landmarks in the fixed and the moving image, to measure; see :func:`monai_lm.io.read_points`.
        mask: weights in [0, 1] on the fixed grid: the similarity counts where they are not zero.
        moving_mask: the same on the moving grid; what is under its zeros is warped, but not seen by the refinement.
        file_format: of the fields written.
        device: ``"auto"`` takes a GPU if there is one.
        overwrite: replace what is in ``output_dir``; a former run's report, warped labels and Jacobian
            do not stay.
        report: write the report; left out with a warning where matplotlib is missing.
        settings: keyword arguments of :func:`monai_lm.refine`; with a bundle, those that replace its own.
        bundle: folder of a MONAI bundle that predicts the field and refines it, see
            :class:`monai_lm.apps.bundle.RegistrationBundle`; instead of ``ddf``, without masks. With an
            ``affine``, the identity included, it gets the moving image on the fixed grid, else both files as they are.
        ddf_format: of ``ddf``, see :func:`monai_lm.io.read_ddf`.
        command: recorded as what was called.
        jacobian: write ``jacobian.nii.gz``, the Jacobian determinant of the field that is written, ``affine`` included;
            see :func:`monai_lm.apps.jacobian.jacobian_field`.
        guide: what guides, of ``labels`` and ``points``; see :func:`monai_lm.apps.guides.guides_of`.
        dry_run: read and check everything, write nothing, and return the plan instead; see
            :func:`monai_lm.apps.plan.plan_of`.
        uncertainty: refine a second time, from the fixed to the moving image, and write ``uncertainty.nii.gz``, see
            :func:`monai_lm.solver.uncertainty.uncertainty`; without bundle, guide and ``symmetric``.
        log_json: file that gets a line of JSON per iteration, see :class:`monai_lm.solver.result.Iteration`.
        ddf_before_affine: ``ddf`` ends where the affine of that file begins, as ANTs and greedy write the two, instead
            of leading through both.

    Returns:
        What ``metrics.json`` holds: the metrics, before (``…_before``) and after (``…_after``); the ``verdict`` of the
        report (``"good"``, ``"check"`` or ``"bad"``), its ``outcome``, ``headline`` and ``remarks``; ``alignment``,
        what was found first, if that was asked for; and ``provenance``: inputs with their digests, settings, versions.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used.
    """
    own = {"ddf": ddf, "mask": mask, "moving_mask": moving_mask}
    given = [name for name, value in own.items() if value is not None]
    if bundle is not None and given:
        raise ValueError(f"{' and '.join(given)} cannot be used together with bundle, which predicts by itself")
    if ddf_before_affine and (ddf is None or affine is None or affine in MODES):
        raise ValueError(f"ddf_before_affine needs the files ddf and affine, got {ddf} and {affine}")
    check_guide(guide, labels, points, bundle)
    others = {"bundle": bundle, "guide": guide, "symmetric": (settings or {}).get("symmetric") or None}
    if uncertainty and (given := [name for name, value in others.items() if value is not None]):
        raise ValueError(f"uncertainty cannot be told together with {' and '.join(given)}")
    folder, suffix = Path(output_dir), file_suffix(file_format)
    report = report and report_possible()
    mode = affine if isinstance(affine, str) and affine in MODES else None
    if affine is not None and mode is None and not Path(affine).is_file():
        raise FileNotFoundError(f"affine must be a file or one of {list(MODES)}, found no file {affine}")
    names = pair_outputs(file_format, labels is not None, report, jacobian, mode is not None, uncertainty)
    check_outputs(folder, names, overwrite)
    pair = load_pair(fixed, moving, None if mode else affine, labels, points, mask, moving_mask)
    file_suffix(file_format, len(pair.fixed.grid.size))
    for image in (pair.fixed, pair.moving):  # the field lies on the one grid, its inverse on the other
        check_grid(file_format, str(image.path), image.grid)
    recipe = pair_recipe(
        fixed, moving, ddf, affine, labels, points, mask, moving_mask, bundle, settings, file_format, ddf_format, guide,
        ddf_before_affine,
    )  # fmt: skip
    chosen = find_device(device)
    check_not_inputs(folder, names, recipe.inputs.values())
    if log_json is not None:
        log = Path(log_json).absolute()
        check_outputs(log.parent, [log.name], overwrite, "the folder of log_json")
        check_not_inputs(log.parent, [log.name], recipe.inputs.values())
    provenance = {"command": command, **recipe.record(), **machine(), "device": str(chosen)}
    aligned = None if mode is None else _aligned(pair, mode, chosen)
    if aligned is not None and aligned.kind != "none":
        pair = replace(pair, initial=aligned.matrix)
    field = None if ddf is None else _predicted(pair, ddf, ddf_format, ddf_before_affine).to(chosen)
    paths = [str(image.path) for image in (pair.fixed, pair.moving)]
    predicted, onto = pair.between.start(pair.moving.data.to(chosen), field, paths)
    keywords: dict[str, Any] = {"spacing": pair.fixed.grid.spacing} | dict(settings or {})
    weight = None if pair.mask is None else pair.mask.data.to(chosen)
    if dry_run:
        return plan_of(pair, predicted is not None, keywords, bundle, folder, names, str(chosen))
    away: Tensor | None = None
    with made(folder):  # what cannot be written to is found before the work
        if bundle is None:
            shown, hides = onto, None
            if pair.moving_mask is not None:
                shown, hides = pair.between.masked(pair.moving.data.to(chosen), pair.moving_mask.data.to(chosen))
            beside: dict[str, Any] = {"moving_mask": hides, "guidance": guides_of(pair, guide, chosen)}
            result = refine(pair.fixed.data.to(chosen), shown, predicted, weight, **beside, **keywords)
            used = settings_of(keywords | {"guidance": guide})
            if uncertainty:
                images = pair.fixed.data.to(chosen), shown, result.ddf, predicted, weight
                away = uncertainty_of(*images, moving_mask=hides, **keywords).cpu()
        else:
            predicted, result, used = _registered(bundle, pair, chosen, settings)
    case = _case(pair, onto, result, predicted, used, aligned, away)
    found = assess(case)
    metrics = found.values() | {
        "loss_before": float(result.initial_loss), "loss_after": float(result.final_loss), "seconds": result.seconds,
        "folds_predicted": int(result.predicted_folds), "repair_shift": float(result.repair_shift),
        "prediction_used": None if result.prediction_used is None else not result.unused,
        **({} if aligned is None else {"alignment": aligned.values() | {"text": str(aligned)}}),
        **({} if away is None else {"uncertainty_mm": float(away.mean())}),
        "provenance": provenance | {"refine": used},
    }  # fmt: skip
    (folder / "metrics.json").unlink(missing_ok=True)  # it says that the others are complete
    with made(folder, names):  # half a result would be in the way of the next try
        _write_fields(folder, suffix, file_format, pair, result.ddf)
        _write_warped(folder, pair, result.ddf)
        if aligned is not None:
            write_affine(folder / "affine.txt", aligned.matrix, len(pair.fixed.grid.size))
        if away is not None:
            save_nifti(folder / "uncertainty.nii.gz", away[0, 0].numpy(), pair.fixed.grid.affine, "none")
        if jacobian:
            here = pair.fixed.grid
            whole = through_affine(result.ddf, here.affine, here.affine, pair.initial)
            write_jacobian(folder / "jacobian.nii.gz", whole, here)
        if report:
            _write_report(folder, pair, case, found, provenance)
        if log_json is not None:
            write_log(log_json, result.history[0])
        with replacing(folder / "metrics.json") as temporary:
            temporary.write_text(as_json(metrics) + "\n")
    if overwrite:
        for name in _FURTHER - set(names):
            (folder / name).unlink(missing_ok=True)
    return metrics


def _predicted(pair: Pair, ddf: str | Path, ddf_format: str, before_affine: bool) -> Tensor:
    """A field of a file from voxels of the fixed to voxels of the moving grid, the affine included."""
    if before_affine:
        return pair.whole(Field(ddf, pair.fixed, None, ddf_format).ddf)
    return Field(ddf, pair.fixed, pair.moving, ddf_format).ddf


def _aligned(pair: Pair, mode: str, device: torch.device) -> Alignment:
    """Where the moving image lies to the fixed one, looked for where the masks say."""
    masks = [None if image is None else image.data.to(device) for image in (pair.mask, pair.moving_mask)]
    f, m = pair.fixed, pair.moving
    images = f.data.to(device), m.data.to(device)
    return align(*images, f.grid.affine, m.grid.affine, mode, mask=masks[0], moving_mask=masks[1])


def _registered(
    bundle: str | Path, pair: Pair, device: torch.device, settings: Mapping[str, Any] | None
) -> tuple[Tensor, RefinementResult, dict[str, Any]]:
    """A bundle's prediction, its refinement and its settings, on the fixed grid; after an affine, of what that brings.

    ValueError for a bundle that does not refine, before it predicts.
    """
    registration, f = RegistrationBundle(bundle, device, settings), pair.fixed.grid
    if registration.inferer.refine is None:
        raise ValueError(f"bundle {bundle} must refine what it predicts, its refine is None")
    with TemporaryDirectory() as folder:
        moving: str | Path = pair.moving.path
        if pair.initial is not None:
            moving = Path(folder) / f"{Path(moving).name.split('.')[0]}.nii.gz"
            still, m = torch.zeros(1, len(f.size), *f.size), pair.moving
            onto = resample_moving(m.data, still, f.affine, m.grid.affine, pair.initial, padding_mode="zeros")
            save_nifti(moving, onto[0, 0].numpy(), f.affine, "none")
        predicted, result = registration.register(pair.fixed.path, moving, f)
    assert result is not None  # for mypy
    return predicted, result, {"bundle": str(bundle), **describe(registration.inferer.refine)}


def _write_fields(folder: Path, suffix: str, file_format: str, pair: Pair, ddf: Tensor) -> None:
    f, m = pair.fixed.grid, pair.moving.grid
    back, residual = invert_between(ddf, f.affine, m.affine, pair.initial, m.size)
    if missed := int((residual > 0.01).sum()):
        warnings.warn(f"the inverse did not converge in {missed} voxels, see monai-lm invert", stacklevel=3)
    for name, field, here, there in (("ddf", pair.whole(ddf), f, m), ("inverse", back, m, f)):
        write_field(folder / f"{name}{suffix}", field, here, there, file_format)


def _write_warped(folder: Path, pair: Pair, ddf: Tensor) -> None:
    warped = pair.brought(pair.moving, ddf).cpu()
    save_nifti(folder / "warped.nii.gz", warped[0, 0].numpy(), pair.fixed.grid.affine, "none")
    if pair.labels:
        label = pair.brought(pair.labels[1], ddf).cpu()
        kind = label_type(label.numpy())
        save_nifti(folder / "warped_label.nii.gz", label[0, 0].numpy(), pair.fixed.grid.affine, "none", kind)


def _write_report(folder: Path, pair: Pair, case: Case, found: Assessment, provenance: Mapping[str, Any]) -> None:
    shown = {"command": provenance["command"]} if provenance["command"] else {}
    for role, file in provenance["inputs"].items():
        shown[role] = f"{file['path']} ({file['bytes']} bytes, SHA-256 {file['sha256'][:16]}…)"
    title = f"{pair.moving.path.name} onto {pair.fixed.path.name}"
    write_case(folder / "report.html", case, found, title, folder / "report.png", shown)


def _case(
    pair: Pair,
    onto: Tensor,
    result: RefinementResult,
    predicted: Tensor | None,
    settings: Mapping[str, Any],
    aligned: Alignment | None,
    away: Tensor | None,
) -> Case:
    """The pair as the report sees it, on the fixed grid."""
    labels: Any = None
    if pair.labels:
        fixed_label, moving_label = pair.labels
        labels = fixed_label.data, lambda ddf: pair.brought(moving_label, ddf)
    return checked_case(
        pair.fixed.data, onto, result, predicted, pair.fixed.grid.affine, labels,
        (lambda ddf: landmark_error(ddf, pair)) if pair.points else None, settings,
        None if pair.mask is None else pair.mask.data, "not registered" if pair.initial is None else "affine only",
        None if aligned is None else str(aligned), away,
    )  # fmt: skip
