"""The ``monai-lm`` command."""

from __future__ import annotations

import platform
import shlex
import sys
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

import monai_lm
from monai_lm.apps.cli_fields import apply, compose, convert, evaluate, invert, jacobian
from monai_lm.apps.console import both, console, show
from monai_lm.apps.demo import run_demo
from monai_lm.apps.options import (
    Alignment,
    Count,
    Kernels,
    Measure,
    Memory,
    Positive,
    Readable,
    Regularization,
    Resolution,
    Scale,
    Weight,
    Written,
)
from monai_lm.apps.parser import Parser, as_typed
from monai_lm.solver.regularizer import REGULARIZERS, Regularizer

__all__ = ["main"]

# What takes long to import is imported by the commands that need it.


def refine(
    fixed: str,
    moving: str,
    output_dir: str,
    ddf: str | None = None,
    affine: str | None = None,
    fixed_label: str | None = None,
    moving_label: str | None = None,
    fixed_points: str | None = None,
    moving_points: str | None = None,
    fixed_mask: str | None = None,
    moving_mask: str | None = None,
    fixed_lesion: str | None = None,
    moving_lesion: str | None = None,
    fixed_soft_labels: str | None = None,
    moving_soft_labels: str | None = None,
    overwrite: bool = False,
    json: bool = False,
    dry_run: bool = False,
    log_json: str | None = None,
    **options: Any,
) -> None:
    """Refine a predicted field for two NIfTI images, or register them from the identity.

    Args:
        fixed: image that stays.
        moving: image that is warped onto it; its grid may be another one.
        output_dir: gets ddf, inverse, warped (and warped_label) .nii.gz, metrics.json, report.html and report.png.
        ddf: predicted field: ITK/ANTs (NIfTI, .h5, .tfm, .mha, .nrrd), FSL, NiftyReg, AFNI, SPM, MONAI voxel NIfTI, or
            Learn2Reg .npz.
        affine: auto, center, rigid or affine aligns the images first; or a file with the affine from fixed to moving
            points: ITK .mat, .txt, .tfm, .h5, FreeSurfer's .lta, or a plain 4x4 in RAS millimetres.
        fixed_label: labels of the fixed image, to measure with.
        moving_label: labels of the moving image, to warp and measure.
        fixed_points: landmarks in the fixed image, a .csv in RAS millimetres (ANTs' in LPS), Slicer's .fcsv or
            .mrk.json, or .vtk.
        moving_points: the same points in the moving image.
        fixed_mask: weights in [0, 1] on the fixed grid: the similarity counts where they are not zero.
        moving_mask: the same on the grid of the moving image.
        fixed_lesion: labels on the fixed grid; where they are not zero, as in a tumour, images are not compared, and
            the field follows from around as smoothly as can be.
        moving_lesion: the same on the grid of the moving image, wherever the field leads there.
        fixed_soft_labels: probabilities of labels in the fixed image, a 4D NIfTI of one volume for each, as the softmax
            of a segmentation network; they guide, and are not measured.
        moving_soft_labels: the same labels of the moving image.
        overwrite: replace outputs that exist.
        json: print the metrics as JSON.
        dry_run: read and check everything, print what would be done, and write nothing.
        log_json: file that gets a line of JSON per iteration while they are made.
        options: see :func:`_options`.
    """
    from monai_lm.apps import pairs

    how = _options(**options)
    if sys.stderr.isatty():
        how["settings"]["progress"] = True
    labels, points = both("label", fixed_label, moving_label), both("points", fixed_points, moving_points)
    soft_labels = both("soft_labels", fixed_soft_labels, moving_soft_labels)
    metrics = pairs.refine_pair(
        fixed,
        moving,
        output_dir,
        ddf,
        affine,
        labels,
        points,
        fixed_mask,
        moving_mask,
        overwrite=overwrite,
        dry_run=dry_run,
        log_json=log_json,
        lesion=fixed_lesion,
        moving_lesion=moving_lesion,
        soft_labels=soft_labels,
        **how,
    )
    show(metrics, json)


def cohort(
    pairs: str, output_dir: str, affine: Alignment | None = None, overwrite: bool = False, **options: Any
) -> None:
    """Refine every pair of a list, as ``refine`` does; started again, it goes on where it stopped.

    Args:
        pairs: .csv, .tsv or .json with fixed, moving and, where there are any, fixed_label, moving_label, fixed_points,
            moving_points, fixed_mask, moving_mask, fixed_lesion, moving_lesion, fixed_soft_labels, moving_soft_labels,
            ddf, affine, name. Relative paths start from its folder.
        output_dir: gets a folder per pair, and metrics.csv.
        affine: auto, center, rigid or affine aligns the pairs first that have no affine of their own.
        overwrite: do pairs again that are complete, and replace what other files or settings left.
        options: see :func:`_options`.
    """
    from monai_lm.apps.cohort import refine_cohort

    how = _options(**options) | {"affine": affine}
    rows, failed = refine_cohort(pairs, output_dir, overwrite, sys.stderr.isatty(), **how)
    print(f"{len(rows)} pairs complete, see {Path(output_dir) / 'metrics.csv'}" if rows else "no pair is complete")
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} pairs failed:{reasons}")


def sequence(
    series: str,
    output_dir: str,
    reference: int = 0,
    label: str | None = None,
    mask: str | None = None,
    similarity: list[Measure] | Measure = "lncc",
    smooth_residual: Weight | Literal["auto"] = "auto",
    device: str = "auto",
    file_format: Written = "itk",
    overwrite: bool = False,
) -> None:
    """Register every frame of a series to one of them, each helped by its neighbour: motion over time.

    Args:
        series: NIfTI file of several volumes (x, y, z, t), or planes (x, y, 1, t).
        output_dir: gets warped.nii.gz, the series at rest, a field per frame, motion.csv and metrics.json.
        reference: frame that stays, from 0; negative from the end.
        label: labels on the reference; motion.csv has the motion of each.
        mask: weights in [0, 1] on the reference: the similarity counts where they are not zero. Motion is told over it,
            else over the labels, else over the foreground.
        similarity: lncc, mapped_lncc, mi, mind, mse, ncc, or auto: one of the first two; or several, coarse to fine,
            as mi,lncc.
        smooth_residual: how smooth the fields are kept, in voxels, as 0.6, or auto: smoother where images tell little.
        device: auto, cpu, cuda, cuda:1, ...
        file_format: of the fields written, from the reference to the frames.
        overwrite: replace outputs that exist.
    """
    from monai_lm.apps.sequence import register_sequence

    settings = {"similarity": similarity, "smooth_residual": smooth_residual}
    how: dict[str, Any] = {"settings": settings, "command": shlex.join(["monai-lm", *sys.argv[1:]])}
    shown = sys.stderr.isatty()
    rows = register_sequence(series, output_dir, reference, label, mask, file_format, device, overwrite, shown, **how)
    over = next(row["over"] for row in rows if "over" in row)
    print(f"{len(rows)} frames, see {Path(output_dir) / 'motion.csv'}: motion over the {over}")


def _options(
    bundle: str | None = None,
    ddf_format: Readable = "auto",
    ddf_before_affine: bool = False,
    similarity: list[Measure] | Measure = "lncc",
    scales: list[Scale] | Literal["auto"] = "auto",
    iterations: Count | list[Count] | Literal["auto"] = "auto",
    step: Positive = 0.5,
    smooth_residual: Weight | Literal["auto"] = "auto",
    regularizer: Regularization | None = None,
    regularizer_weight: Weight | None = None,
    symmetric: bool = False,
    seconds: Positive | None = None,
    memory: Memory = "auto",
    kernels: Kernels = "auto",
    device: str = "auto",
    file_format: Written = "itk",
    report: bool = True,
    jacobian: bool = False,
    uncertainty: bool = False,
    guide_labels: list[int] | Literal["all"] | None = None,
    guide_points: bool = False,
    guide_weight: Positive | None = None,
) -> dict[str, Any]:
    """What ``refine`` and ``cohort`` share, as arguments of :func:`monai_lm.apps.pairs.refine_pair`.

    Args:
        bundle: folder of a MONAI bundle that predicts the field and refines it; what differs from the defaults below
            replaces its settings.
        ddf_format: of predicted fields, where their files do not say: voxel, ras, lps, positions, fsl.
        ddf_before_affine: a predicted field ends where the file of its affine begins, as ANTs and greedy write the two;
            otherwise it leads through both.
        similarity: lncc, mapped_lncc, mi, mind, mse, ncc, or auto: one of the first two; or several, coarse to fine,
            as mi,lncc.
        scales: reduction per level, coarse to fine, as 4,2,1, or auto.
        iterations: most iterations per level, one number for all or as 100,50,25, or auto.
        step: largest displacement per iteration, in voxels.
        smooth_residual: how smooth the field is kept, in voxels, as 0.6, or auto: smoother where images tell little.
        regularizer: of the field, in millimetres, beside the similarity: diffusion, bending or sliding.
        regularizer_weight: how much it counts.
        symmetric: refine field and inverse together, so that the order of the images does not matter.
        seconds: time budget of a pair.
        memory: auto, full or half.
        kernels: auto, native or reference (plain PyTorch).
        device: auto, cpu, cuda, cuda:1, ...
        file_format: of the fields written: itk, itk_transform, metaimage, nrrd, fsl, voxel, learn2reg or freesurfer.
        report: write report.html and .png, if matplotlib is there (pip install 'monai_lm[report]').
        jacobian: write jacobian.nii.gz, the Jacobian determinant of the field that is written, initial affine included.
        uncertainty: write uncertainty.nii.gz, how far the field may be off, in mm, by the way back; not with
            symmetric, bundle, guides or lesions.
        guide_labels: labels of fixed_label and moving_label that guide the refinement: a list, as 1,3, or all.
        guide_points: whether fixed_points and moving_points guide the refinement.
        guide_weight: how hard they pull, relative to the images; default 1.
    """
    guided = guide_labels is not None or guide_points
    settings = {
        "similarity": similarity, "scales": scales, "iterations": iterations, "step": step,
        "smooth_residual": smooth_residual, "regularizer": _weighed(regularizer, regularizer_weight),
        "symmetric": symmetric, "seconds": seconds, "memory": memory, "kernels": kernels,
    }  # fmt: skip
    if bundle is not None:
        defaults = signature(monai_lm.refine).parameters
        settings = {name: value for name, value in settings.items() if value != defaults[name].default}
    return {
        "bundle": bundle, "ddf_format": ddf_format, "ddf_before_affine": ddf_before_affine,
        "device": device, "file_format": file_format, "report": report,
        "jacobian": jacobian, "uncertainty": uncertainty,
        "guide": {"labels": guide_labels, "points": guide_points, "weight": guide_weight or 1.0}
        if guided or guide_weight is not None
        else None,
        "settings": settings, "command": shlex.join(["monai-lm", *sys.argv[1:]]),
    }  # fmt: skip


def info(file: str | None = None, file_format: Readable = "auto", json: bool = False) -> None:
    """What a file is taken for: a field, an affine, points, an image; without one versions and devices.

    Args:
        file: a field, an affine, points, an image or a label map; ``monai-lm info FILE`` will do.
        file_format: of a field that does not say it.
        json: print JSON.
    """
    if file is not None:
        from monai_lm.apps.info import describe_file

        show(describe_file(file, file_format), json)
        return
    from monai_lm.io.provenance import version_of
    from monai_lm.kernels import missing

    packages = ("torch", "monai", "pytorch_lightning", "nibabel")
    out: dict[str, Any] = {"monai_lm": monai_lm.__version__} | {name: version_of(name) for name in packages}
    cuda = torch.cuda.is_available()
    out |= {
        "python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "kernels": missing(torch.device("cuda" if cuda else "cpu")) or "native",
    }  # fmt: skip
    show(out, json)


def demo(output_dir: str = "monai_lm_demo", resolution: Resolution = 2, seed: int = 0) -> None:
    """Refine an imperfect prediction of a known deformation of a real brain; no download.

    Args:
        output_dir: folder for the picture.
        resolution: voxel edge in millimetres, 1 to 4.
        seed: of the deformation, the noise and the error of the prediction.
    """
    print(run_demo(output_dir, resolution, seed))


def _weighed(regularizer: str | None, weight: float | None) -> str | Regularizer | None:
    """A regulariser with a weight of its own, if it has one."""
    if weight is None:
        return regularizer
    if regularizer is None:
        raise ValueError(f"--regularizer_weight needs --regularizer {'|'.join(REGULARIZERS)}, got {weight:g} alone")
    return REGULARIZERS[regularizer](weight)


def main() -> None:
    """Run a subcommand, or print the help without one; see :func:`monai_lm.apps.console.console` for how it ends."""
    commands: dict[str, Any] = {
        command.__name__: command
        for command in (refine, cohort, sequence, apply, invert, jacobian, compose, convert, evaluate, info, demo)
    }
    words = sys.argv[1:]
    if words[:1] == ["info"] and len(words) > 1 and not words[1].startswith("-"):
        words.insert(1, "--file")
    named = {name for word in words if word in commands for name in signature(commands[word]).parameters}
    options = named | set(signature(_options).parameters) if "options" in named else named
    with console("monai-lm", lambda text: as_typed(text, options)):
        how: dict[str, Any] = {"parser_class": Parser, "prog": "monai-lm", "version": monai_lm.__version__}
        auto_cli(commands, args=words or ["--help"], as_positional=False, **how)


if __name__ == "__main__":
    main()
