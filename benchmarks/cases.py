"""Pairs that rules and defaults are chosen on: of every set the validation part, never what results are reported on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation import half_size
from benchmarks.data import BRAIN_SPLIT, brain_image, data_root, hippocampus_pairs
from monai_lm import refine
from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import resample_moving
from monai_lm.io.images import Image

__all__ = ["SETS", "Case", "case_of"]


class Case(NamedTuple):
    """A pair on one grid.

    Attributes:
        fixed: ``(1, 1, *S)``.
        moving: ``(1, 1, *S)``.
        labels: of the fixed and of the moving image, ``(1, 1, *S)``.
        spacing: voxel edge per axis, in millimetres; ``None``: 1.
        ddf: predicted displacement ``(1, n, *S)`` in voxels, or ``None``.
    """

    fixed: Tensor
    moving: Tensor
    labels: tuple[Tensor, Tensor]
    spacing: tuple[float, ...] | None = None
    ddf: Tensor | None = None


def _hippocampi() -> Iterator[Case]:
    for pair in hippocampus_pairs("validation", 50, seed=1):
        tensors = {key: torch.as_tensor(value)[None].float() for key, value in pair.items()}
        yield Case(tensors["fixed"], tensors["moving"], (tensors["fixed_label"], tensors["moving_label"]))


def _brains() -> Iterator[Case]:
    """Ordered pairs of the validation subjects at 2 mm."""
    for subjects in permutations(BRAIN_SPLIT["validation"], 2):
        images = [half_size(brain_image(subject, "t1")) for subject in subjects]
        labels = [brain_image(subject, "seg")[:, :, ::2, ::2, ::2] for subject in subjects]
        yield Case(images[0], images[1], (labels[0], labels[1]))


def _listed(folder: str) -> Callable[[], Iterator[Case]]:
    """Pairs of a ``pairs.csv``; where it says so, the centres of the volumes are laid on each other."""

    def make() -> Iterator[Case]:
        root = data_root(folder)
        with (root / "pairs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        yield from (case_of(root, row) for row in rows)

    return make


def case_of(root: Path, row: Mapping[str, str]) -> Case:
    """The pair of a line of ``pairs.csv`` in a folder, on the fixed grid."""
    fixed, moving, label, other = (Image(root / row[k]) for k in ("fixed", "moving", "fixed_seg", "moving_seg"))
    initial = np.eye(4)
    if row["align"] == "center":
        middles = [(g.affine @ [*((s - 1) / 2 for s in g.size), 1])[:3] for g in (fixed.grid, moving.grid)]
        initial[:3, 3] = middles[1] - middles[0]
    still, grids = torch.zeros(1, 3, *fixed.grid.size), (fixed.grid.affine, moving.grid.affine)
    onto = resample_moving(moving.data, still, *grids, initial)
    brought = resample_moving(other.data, still, *grids, initial, "nearest", "zeros")
    return Case(fixed.data, onto, (label.data, brought), fixed.grid.spacing)


def _predictions() -> Iterator[Case]:
    """Brain pairs with what a third-party network predicts for them, folds and all."""
    root = data_root("predictions")
    for path in sorted(root.glob("*.npz")):
        subjects = path.stem.split("_")[-2:]
        images = [Image(root / f"{subject}_t1.nii.gz") for subject in subjects]
        labels = [Image(root / f"{subject}_seg.nii.gz", label=True) for subject in subjects]
        ddf = torch.from_numpy(np.load(path)["ddf"]).float()[None]
        yield Case(images[0].data, images[1].data, (labels[0].data, labels[1].data), None, ddf)


def _informed() -> Iterator[Case]:
    """Brains at 2 mm with a field that knows every fourth structure of some size: what images alone do not tell."""
    for case in _brains():
        fixed_label, moving_label = case.labels
        sizes = zip(*fixed_label.unique(return_counts=True), strict=True)
        known = [int(value) for value, count in sizes if value and count > 300][::4]
        channels = [
            torch.cat([image / image.std(), *(4 * gaussian_smooth((label == k).float(), 1.0) for k in known)], 1)
            for image, label in ((case.fixed, fixed_label), (case.moving, moving_label))
        ]
        yield case._replace(ddf=refine(*channels, similarity="mse", smooth_residual=1.0).ddf)


SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "hippocampus": _hippocampi, "brain": _brains, "cardiac": _listed("cardiac"), "abdomen": _listed("abdomen"),
    "predictions": _predictions, "informed": _informed,
}  # fmt: skip
"""Brains at 2 mm and hippocampi of the validation subjects, and what the shared data hold for validation alone; of the
last two with predictions, a network's that fold, and smooth ones that know labels."""
