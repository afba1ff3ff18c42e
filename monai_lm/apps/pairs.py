"""The work behind ``monai-lm refine``: from the files of a pair to those of its refined field, in physical space.

Fixed and moving image may lie on different grids and an affine may lead from one to the other. The moving image is
brought onto the fixed grid for the optimisation; what is written is sampled once, from the image as it was, through
affine and field together. Fields are files in ITK's convention or another of :mod:`monai_lm.io`, and lead from
points of the fixed to points of the moving image, affine included.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_lm.alignment import MODES, Alignment, align
from monai_lm.apps.commands import landmark_error, write_field
from monai_lm.apps.guides import beside_of, check_guide, masks_of, said_of
from monai_lm.apps.jacobian import write_jacobian
from monai_lm.apps.plan import live_log, plan_of
from monai_lm.fields.inverses import invert_between
from monai_lm.fields.space import Grid, through_affine
from monai_lm.io import file_suffix, write_affine
from monai_lm.io.formats import check_format, check_grid
from monai_lm.io.images import Field, Pair, load_pair, unmeasured
from monai_lm.io.nifti import label_type, replacing, save_nifti
from monai_lm.io.outputs import (
    as_json,
    check_not_inputs,
    check_outputs,
    made,
    pair_outputs,
    report_possible,
)
from monai_lm.io.provenance import Recipe, describe, machine, pair_recipe, settings_of
from monai_lm.kernels.devices import find_device
from monai_lm.report.case import Case, checked_case
from monai_lm.report.findings import Assessment, assess
from monai_lm.report.page import write_case
from monai_lm.solver.lesion import checked_lesion, outside
from monai_lm.solver.refinement import check_keywords, refine
from monai_lm.solver.result import RefinementResult
from monai_lm.solver.uncertainty import uncertainty as uncertainty_of

__all__ = ["check_together", "refine_pair"]


_FURTHER = {
    "warped_label.nii.gz", "jacobian.nii.gz", "uncertainty.nii.gz", "affine.txt", "report.html", "report.png",
}  # fmt: skip
"""What a pair has only if it is asked for."""


@dataclass(frozen=True)
class _Found:
    """What a refinement found, on the fixed grid.

    Attributes:
        onto: the moving image ``(1, 1, *S)`` as it lay before.
        predicted: the field ``(1, n, *S)`` that was refined; ``None``: the identity.
        result: of the refinement.
        used: its settings, for the record.
        away: how far it may be off, ``(1, 1, *S)`` in millimetres; ``None`` where that was not asked for.
    """

    onto: Tensor
    predicted: Tensor | None
    result: RefinementResult
    used: dict[str, Any]
    away: Tensor | None = None


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
    lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    soft_labels: tuple[str | Path, str | Path] | None = None,
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
            :class:`monai_lm.apps.bundle.RegistrationBundle`; instead of ``ddf``. With an ``affine``, the
            identity included, it gets the moving image on the fixed grid, and of an image with a mask or a lesion what
            is not hidden, the rest filled from around; else the files as they are.
        ddf_format: of ``ddf``, see :func:`monai_lm.io.read_ddf`.
        command: recorded as what was called.
        jacobian: write ``jacobian.nii.gz``, the Jacobian determinant of the field that is written, ``affine`` included;
            see :func:`monai_lm.apps.jacobian.jacobian_field`.
        guide: what guides, of ``labels`` and ``points``; see :func:`monai_lm.apps.guides.guides_of`.
        dry_run: read and check everything, write nothing, and return the plan instead; see
            :func:`monai_lm.apps.plan.plan_of`.
        uncertainty: refine a second time, from the fixed to the moving image, and write ``uncertainty.nii.gz``, see
            :func:`monai_lm.uncertainty`; without bundle, guide, lesions and ``symmetric``.
        log_json: file that gets a line of JSON per iteration while they are made, see
            :func:`monai_lm.apps.plan.live_log`; it stays if the refinement fails.
        ddf_before_affine: ``ddf`` ends where the affine of that file begins, as ANTs and greedy write the two, instead
            of leading through both.
        lesion: labels on the fixed grid: where they are not zero images are not compared, and the field follows from
            around; see :func:`monai_lm.refine`.
        moving_lesion: the same on the moving grid.
        soft_labels: probability maps of both images, which guide; see :class:`monai_lm.io.images.Probabilities`.

    Returns:
        What ``metrics.json`` holds: the metrics, before (``…_before``) and after (``…_after``); the ``verdict`` of the
        report (``"good"``, ``"check"`` or ``"bad"``), its ``outcome``, ``headline`` and ``remarks``; ``alignment``,
        what was found first, if that was asked for; and ``provenance``: inputs with their digests, settings, versions.

    Raises:
        FileExistsError: an output exists and ``overwrite`` is false.
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be used.
    """
    check_together(
        ddf, affine, bundle, settings, guide, uncertainty, ddf_before_affine, lesion, moving_lesion, labels, points,
        soft_labels,
    )  # fmt: skip
    if log_json is not None and (settings or {}).get("callback") is not None:
        raise ValueError("settings must have no callback together with log_json, which is one")
    check_keywords("settings", settings or {})
    check_format("ddf_format", ddf_format)
    chosen = find_device(device)
    folder, mode = Path(output_dir), _mode(affine)
    report = report and report_possible()
    names = pair_outputs(file_format, labels is not None, report, jacobian, mode is not None, uncertainty)
    check_outputs(folder, names, overwrite)
    beside = labels, points, mask, moving_mask, lesion, moving_lesion, soft_labels
    pair = load_pair(fixed, moving, None if mode else affine, *beside)
    _check_grids(pair, file_format)
    recipe = pair_recipe(
        fixed, moving, ddf, affine, labels, points, mask, moving_mask, bundle, settings, file_format, ddf_format, guide,
        ddf_before_affine, lesion, moving_lesion, soft_labels,
    )  # fmt: skip
    check_not_inputs(folder, names, recipe.inputs.values())
    _check_log(log_json, overwrite, recipe)
    provenance = {"command": command, **recipe.record(), **machine(), "device": str(chosen)}
    aligned = None if mode is None else _aligned(pair, mode, chosen)
    if aligned is not None and aligned.kind != "none":
        pair = replace(pair, initial=aligned.matrix)
    field = None if ddf is None else _predicted(pair, ddf, ddf_format, ddf_before_affine).to(chosen)
    paths = [str(image.path) for image in (pair.fixed, pair.moving)]
    start = pair.between.start(pair.moving.data.to(chosen), field, paths)
    keywords: dict[str, Any] = {"spacing": pair.fixed.grid.spacing} | dict(settings or {})
    masks = _counting(pair, chosen)
    if dry_run:
        return plan_of(pair, start[0] is not None, keywords, bundle, folder, names, str(chosen), aligned, guide)
    with made(folder):  # what cannot be written to is found before the work
        with live_log(log_json) as told:
            logged: dict[str, Any] = {} if told is None else {"callback": told}
            if bundle is None:
                found = _refined(pair, start, masks, guide, keywords, logged, uncertainty)
            else:
                found = _registered(bundle, pair, start[1], dict(settings or {}) | logged, guide)
        case = _case(pair, found, aligned)
        assessment = assess(case)
        metrics = assessment.values() | _figures(found, aligned) | {"provenance": provenance | {"refine": found.used}}
        (folder / "metrics.json").unlink(missing_ok=True)  # it says that the others are complete
        with made(folder, names):  # half a result would be in the way of the next try
            _write_fields(folder, file_format, pair, found.result.ddf)
            _write_warped(folder, pair, found.result.ddf)
            _write_further(folder, names, pair, found, aligned)
            if report:
                _write_report(folder, pair, case, assessment, provenance)
            with replacing(folder / "metrics.json") as temporary:
                temporary.write_text(as_json(metrics) + "\n")
    if overwrite:
        for name in _FURTHER - set(names):
            (folder / name).unlink(missing_ok=True)
    return metrics


def check_together(
    ddf: str | Path | None = None,
    affine: str | Path | None = None,
    bundle: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    guide: Mapping[str, Any] | None = None,
    uncertainty: bool = False,
    ddf_before_affine: bool = False,
    lesion: str | Path | None = None,
    moving_lesion: str | Path | None = None,
    labels: tuple[str | Path, str | Path] | None = None,
    points: tuple[str | Path, str | Path] | None = None,
    soft_labels: tuple[str | Path, str | Path] | None = None,
) -> None:
    """ValueError for arguments of :func:`refine_pair` that exclude each other, or need others, whatever the files are.

    That is a bundle and a field, what guides or gives way and symmetric settings, any of these and uncertainty.
    FileNotFoundError for a bundle that is not there.
    """
    if ddf_before_affine and (ddf is None or affine is None or affine in MODES):
        raise ValueError(f"ddf_before_affine needs ddf and affine, both files, got {ddf} and {affine}")
    if bundle is not None and ddf is not None:
        raise ValueError("ddf cannot be used together with bundle, which predicts by itself")
    if bundle is not None and not Path(bundle).is_dir():
        raise FileNotFoundError(f"bundle must be a folder, found none at {bundle}")
    symmetric = (settings or {}).get("symmetric")
    options = {"guide_labels": (guide or {}).get("labels"), "guide_points": (guide or {}).get("points")}
    files = {
        "fixed_lesion": lesion, "moving_lesion": moving_lesion, "fixed_soft_labels and moving_soft_labels": soft_labels,
    }  # fmt: skip
    if symmetric and (given := _given(options) or _given(files)):
        raise ValueError(f"{given} cannot be used together with symmetric")
    if uncertainty and (given := _given({"bundle": bundle, "symmetric": symmetric} | options) or _given(files)):
        raise ValueError(f"uncertainty cannot be told together with {given}")
    check_guide(guide, labels, points, soft_labels)


def _given(arguments: Mapping[str, Any]) -> str:
    """The names of those that are given."""
    return " and ".join(name for name, value in arguments.items() if value)


def _mode(affine: str | Path | None) -> str | None:
    """How an affine is to be found, ``None`` if it is a file or there is none; FileNotFoundError for no such file."""
    if isinstance(affine, str) and affine in MODES:
        return affine
    if affine is not None and not Path(affine).is_file():
        raise FileNotFoundError(f"affine must be a file or one of {list(MODES)}, found no file {affine}")
    return None


def _check_grids(pair: Pair, file_format: str) -> None:
    """ValueError for grids that a format cannot hold fields on: the field lies on the one, its inverse on the other."""
    file_suffix(file_format, len(pair.fixed.grid.size))
    for image in (pair.fixed, pair.moving):
        check_grid(file_format, str(image.path), image.grid)


def _check_log(log_json: str | Path | None, overwrite: bool, recipe: Recipe) -> None:
    """Find out before the work whether the log can be written, and replaces no input."""
    if log_json is not None:
        log = Path(log_json).absolute()
        check_outputs(log.parent, [log.name], overwrite, "the folder of log_json")
        check_not_inputs(log.parent, [log.name], recipe.inputs.values(), "log_json")


def _predicted(pair: Pair, ddf: str | Path, ddf_format: str, before_affine: bool) -> Tensor:
    """A field of a file from voxels of the fixed to voxels of the moving grid, the affine included."""
    if before_affine:
        return pair.whole(Field(ddf, pair.fixed, None, ddf_format).ddf)
    return Field(ddf, pair.fixed, pair.moving, ddf_format).ddf


def _counting(pair: Pair, device: torch.device) -> list[Tensor | None]:
    """Masks of the fixed and of the moving image, on their own grids, without the lesions."""
    out: list[Tensor | None] = []
    for image, own, hole in ((pair.fixed, pair.mask, pair.lesion), (pair.moving, pair.moving_mask, pair.moving_lesion)):
        mask, lesion = (None if x is None else x.data.to(device) for x in (own, hole))
        lesion = checked_lesion(lesion, image.data.to(device), str(hole and hole.path), str(image.path))
        out.append(outside(mask, lesion, "mask"))
    return out


def _aligned(pair: Pair, mode: str, device: torch.device) -> Alignment:
    """Where the moving image lies to the fixed one, looked for where the masks say."""
    masks = _counting(pair, device)
    f, m = pair.fixed, pair.moving
    images = f.data.to(device), m.data.to(device)
    return align(*images, f.grid.affine, m.grid.affine, mode, mask=masks[0], moving_mask=masks[1])


def _refined(
    pair: Pair,
    start: tuple[Tensor | None, Tensor],
    masks: Sequence[Tensor | None],
    guide: Mapping[str, Any] | None,
    keywords: Mapping[str, Any],
    logged: Mapping[str, Any],
    uncertainty: bool,
) -> _Found:
    """Refine on the fixed grid, from a field, if any, and the moving image there; with ``uncertainty`` back, too.

    ``keywords`` are those of :func:`monai_lm.refine`, ``logged`` is its ``callback``, of the way there only.
    """
    predicted, onto = start
    weight, moving_weight = masks
    device, shown, hides = onto.device, onto, None
    if moving_weight is not None:
        hole = None if pair.moving_lesion is None else pair.moving_lesion.data.to(device)
        shown, hides = pair.between.masked(pair.moving.data.to(device), moving_weight, hole)
    beside = {"moving_mask": hides} | beside_of(pair, guide, device)
    fixed = pair.fixed.data.to(device)
    result = refine(fixed, shown, predicted, weight, **beside | dict(keywords) | dict(logged))
    away = None
    if uncertainty:
        away = uncertainty_of(fixed, shown, result.ddf, predicted, weight, moving_mask=hides, **keywords).cpu()
    return _Found(onto, predicted, result, settings_of({**keywords, "guidance": said_of(pair, guide) or None}), away)


def _registered(
    bundle: str | Path,
    pair: Pair,
    onto: Tensor,
    settings: Mapping[str, Any],
    guide: Mapping[str, Any] | None,
) -> _Found:
    """A bundle's prediction, refined, on the fixed grid; after an affine, of what that brings ``onto`` it.

    ValueError for a bundle that does not refine, before it predicts.
    """
    from monai_lm.apps.bundle import RegistrationBundle, shown_files  # MONAI takes seconds to import

    registration, f = RegistrationBundle(bundle, onto.device, settings), pair.fixed.grid
    if registration.inferer.refine is None:
        raise ValueError(f"bundle {bundle} must refine what it predicts, its refine is None")

    def beside(*grids: Grid) -> dict[str, Any]:
        """What belongs to the pair, on the grids of the fixed and of the moving image as the bundle has them."""
        both = grids[0], grids[1]
        return beside_of(pair, guide, onto.device, both) | masks_of(pair, onto.device, both)

    with shown_files(pair) as (fixed, moving):
        predicted, result = registration.register(fixed, moving, f, beside)
    assert result is not None  # for mypy
    chosen = {name: value for name, value in registration.inferer.refine.items() if name != "callback"}
    said = said_of(pair, guide)
    used = {"bundle": str(bundle), **describe(chosen)} | ({"guidance": describe(said)} if said else {})
    return _Found(onto, predicted, result, used)


def _figures(found: _Found, aligned: Alignment | None) -> dict[str, Any]:
    """What of the metrics the refinement itself tells."""
    result = found.result
    return {
        "loss_before": float(result.initial_loss), "loss_after": float(result.final_loss), "seconds": result.seconds,
        "folds_predicted": int(result.predicted_folds), "repair_shift": float(result.repair_shift),
        "prediction_used": None if result.prediction_used is None else not result.unused,
        "similarity": result.similarity,
        **({} if result.apart is None else {"apart": float(result.apart)}),
        **({} if result.held is None else {"held": float(result.held)}),
        **({} if aligned is None else {"alignment": aligned.values() | {"text": str(aligned)}}),
        **({} if found.away is None else {"uncertainty_mm": float(found.away.mean())}),
    }  # fmt: skip


def _write_fields(folder: Path, file_format: str, pair: Pair, ddf: Tensor) -> None:
    f, m = pair.fixed.grid, pair.moving.grid
    back, residual = invert_between(ddf, f.affine, m.affine, pair.initial, m.size)
    if missed := int((residual > 0.01).sum()):
        warnings.warn(f"the inverse did not converge in {missed} voxels, see monai-lm invert", stacklevel=3)
    for name, field, here, there in (("ddf", pair.whole(ddf), f, m), ("inverse", back, m, f)):
        write_field(folder / f"{name}{file_suffix(file_format)}", field, here, there, file_format)


def _write_warped(folder: Path, pair: Pair, ddf: Tensor) -> None:
    warped = pair.brought(pair.moving, ddf).cpu()
    save_nifti(folder / "warped.nii.gz", warped[0, 0].numpy(), pair.fixed.grid.affine, "none")
    if pair.labels:
        label = pair.brought(pair.labels[1], ddf).cpu()
        kind = label_type(label.numpy())
        save_nifti(folder / "warped_label.nii.gz", label[0, 0].numpy(), pair.fixed.grid.affine, "none", kind)


def _write_further(folder: Path, names: Sequence[str], pair: Pair, found: _Found, aligned: Alignment | None) -> None:
    """The files that were asked for, report and labels aside."""
    here = pair.fixed.grid
    if aligned is not None:
        write_affine(folder / "affine.txt", aligned.matrix, len(here.size))
    if found.away is not None:
        save_nifti(folder / "uncertainty.nii.gz", found.away[0, 0].numpy(), here.affine, "none")
    if "jacobian.nii.gz" in names:
        whole = through_affine(found.result.ddf, here.affine, here.affine, pair.initial)
        write_jacobian(folder / "jacobian.nii.gz", whole, here)


def _write_report(folder: Path, pair: Pair, case: Case, assessment: Assessment, provenance: Mapping[str, Any]) -> None:
    shown = {"command": provenance["command"]} if provenance["command"] else {}
    for role, file in provenance["inputs"].items():
        shown[role] = f"{file['path']} ({file['bytes']} bytes, SHA-256 {file['sha256'][:16]}…)"
    title = f"{pair.moving.path.name} onto {pair.fixed.path.name}"
    write_case(folder / "report.html", case, assessment, title, folder / "report.png", shown)


def _case(pair: Pair, found: _Found, aligned: Alignment | None) -> Case:
    """The pair as the report sees it, on the fixed grid."""
    labels: Any = None
    said = unmeasured(pair.fixed, pair.moving)
    if pair.labels:
        fixed_label, moving_label = pair.labels
        labels = fixed_label.data, lambda ddf: pair.brought(moving_label, ddf)
    return checked_case(
        pair.fixed.data, found.onto, found.result, found.predicted, pair.fixed.grid.affine, labels,
        (lambda ddf: landmark_error(ddf, pair)) if pair.points else None, found.used,
        None if pair.mask is None else pair.mask.data, "not registered" if pair.initial is None else "affine only",
        None if aligned is None else str(aligned), found.away, {"spacing": said} if said else None,
    )  # fmt: skip
