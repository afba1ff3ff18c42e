"""Real pairs of two modalities: ultrasound and MR of prostates, which have little in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

import monai_lm
from monai_lm.fields import fold_count, warp
from monai_lm.fields.metrics import compare_labels, target_registration_error
from monai_lm.fields.space import resample_moving

__all__ = ["prostate"]

_EDGE = 0.8
"""Of a voxel, in millimetres; the files have images of half the size, with the edges of the whole ones."""

_LOST = 0.01
"""Dice by which a pair that got worse is counted."""


class _Pair(NamedTuple):
    """An ultrasound image, MR on its own grid, and glands and landmarks in both, in voxels."""

    fixed: Tensor
    moving: Tensor
    glands: tuple[Tensor, Tensor]
    points: tuple[Tensor, Tensor]


def prostate(
    folder: str,
    half: str = "B",
    similarities: tuple[str, ...] = ("lncc", "auto", "mind", "mi"),
    starts: tuple[str, ...] = ("gland", "middle"),
) -> None:
    """Refine ultrasound and MR of prostates with ``smooth_residual`` .6 and ``"auto"``, and align them.

    Dice of the gland, mean distance of landmarks in millimetres, and how many pairs lose a hundredth of Dice.

    Args:
        folder: ``data/test/nifti/paired`` of a checkout of github.com/DeepRegNet/DeepReg.
        half: A, cases of even numbers, on which bounds were chosen, or B.
        similarities: names of measures.
        starts: ``gland`` lays the centroids of the glands on each other, ``middle`` the middles of the images.
    """
    pairs = list(_pairs(Path(folder), half))
    if not pairs:
        raise ValueError(f"folder must hold */fixed_images/case*.nii.gz of half {half}, got none in {folder}")
    print(f"{len(pairs)} pairs of half {half}")
    print(
        "| start | measure | Dice before | .6 | auto | mm before | .6 | auto | worse: .6 | auto |\n" + "|---" * 10 + "|"
    )
    folds = 0
    for start in starts:
        begun = [_begun(pair, start) for pair in pairs]
        before = [_quality(pair, torch.zeros(1, 3, *pair.fixed.shape[2:])) for pair in begun]
        for similarity in similarities:
            columns = []
            for smooth in (0.6, "auto"):
                after = []
                for pair in begun:
                    how: dict[str, Any] = {"smooth_residual": smooth, "spacing": (_EDGE,) * 3}
                    ddf = monai_lm.refine(pair.fixed, pair.moving, similarity=similarity, **how).ddf
                    folds += int(fold_count(ddf))
                    after.append(_quality(pair, ddf))
                columns.append(after)
            dice, far = ([[values[k] for values in column] for column in (before, *columns)] for k in (0, 1))
            worse = [sum(b < a - _LOST for a, b in zip(dice[0], column, strict=True)) for column in dice[1:]]
            cells = [f"{_mean(x):.3f}" for x in dice] + [f"{_mean(x):.2f}" for x in far] + [f"{x}" for x in worse]
            print(f"| {start} | {similarity} | {' | '.join(cells)} |", flush=True)
    print(f"{folds} folds\n| alignment | taken | Dice |\n|---|---|---|")
    for mode in (None, "center", "rigid", "affine", "auto"):
        found = [_aligned(pair, mode) for pair in pairs]
        taken, overlap = sum(moved for moved, _ in found), fmean(dice for _, dice in found)
        print(f"| {mode or 'as they are'} | {taken} | {overlap:.3f} |", flush=True)


def _pairs(folder: Path, half: str) -> Iterator[_Pair]:
    for path in sorted(folder.glob("*/fixed_images/*.nii.gz"), key=lambda path: path.name):
        if "AB"[int(path.name[4:10]) % 2] != half:
            continue
        images, glands, points = [], [], []
        for role in ("fixed", "moving"):
            files = (path.parents[1] / f"{role}_{kind}" / path.name for kind in ("images", "labels"))
            stored: list[Any] = [nib.load(file) for file in files]
            image, labels = (torch.from_numpy(one.get_fdata(dtype=np.float32)) for one in stored)
            labels = labels if labels.dim() == 4 else labels[..., None]  # the gland, then landmarks, one a channel
            images.append(image[None, None])
            glands.append(labels[None, None, ..., 0])
            points.append(torch.stack([_centroid(one) for one in labels.unbind(-1)])[None])
        yield _Pair(images[0], images[1], (glands[0], glands[1]), (points[0], points[1]))


def _centroid(mask: Tensor) -> Tensor:
    """``(3,)`` in voxels, NaN of an empty mask."""
    return (mask > 0.5).nonzero().float().mean(0)


def _begun(pair: _Pair, start: str) -> _Pair:
    """The pair with MR brought onto the grid of the ultrasound image by a shift."""
    if start == "gland":
        shift = pair.points[1][0, 0] - pair.points[0][0, 0]
    else:
        sizes = (torch.tensor(image.shape[2:]) for image in (pair.moving, pair.fixed))
        shift = torch.sub(*sizes) / 2
    shifted = np.eye(4)
    shifted[:3, 3] = shift.numpy()
    still = torch.zeros(1, 3, *pair.fixed.shape[2:])
    here = (still, np.eye(4), np.eye(4), shifted)
    moving, gland = resample_moving(pair.moving, *here), resample_moving(pair.glands[1], *here, padding_mode="zeros")
    return pair._replace(moving=moving, glands=(pair.glands[0], gland), points=(pair.points[0], pair.points[1] - shift))


def _quality(pair: _Pair, ddf: Tensor) -> tuple[float, float]:
    """Dice of the gland, and mean distance of the landmarks in millimetres, NaN where there are none."""
    edges = torch.full((1, 3), _EDGE)
    away = target_registration_error(ddf, pair.points[0][:, 1:], pair.points[1][:, 1:], edges)
    return _dice(pair.glands[0], warp(pair.glands[1], ddf, padding_mode="zeros")), float(away.nanmean())


def _aligned(pair: _Pair, mode: str | None) -> tuple[bool, float]:
    """Whether ``monai_lm.align`` moves the images, whose files begin at one corner, and the Dice of the gland."""
    grid, matrix = np.diag([_EDGE, _EDGE, _EDGE, 1.0]), np.eye(4)
    if mode is not None:
        matrix = monai_lm.align(pair.fixed, pair.moving, grid, grid, mode).matrix
    still = torch.zeros(1, 3, *pair.fixed.shape[2:])
    gland = resample_moving(pair.glands[1], still, grid, grid, matrix, padding_mode="zeros")
    return not np.allclose(matrix, np.eye(4)), _dice(pair.glands[0], gland)


def _dice(one: Tensor, other: Tensor) -> float:
    return float(compare_labels((other > 0.5).int(), (one > 0.5).int())["dice"])


def _mean(values: Sequence[float]) -> float:
    return float(np.nanmean(values))
