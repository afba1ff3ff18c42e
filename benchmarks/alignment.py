"""What ``monai_lm.align`` takes by itself: where the truth is known, how far it is off; else whether labels agree."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.ablation import half_size
from benchmarks.cases import SETS
from benchmarks.data import BRAIN_SPLIT, brain_image, data_root
from monai_lm.fields.metrics import compare_labels
from monai_lm.fields.space import resample_moving
from monai_lm.io.images import Image

MAPS = {"still": (0.0, 0.0), "rigid": (9.0, 0.0), "stretched by 2 %": (9.0, 0.02)}
"""Degrees, and how much longer the one axis, and shorter the other, is."""

NOISE = (0.0, 0.3, 1.0)
"""Standard deviation of the noise in that of the brain's intensities."""


class _Pair(NamedTuple):
    images: tuple[Tensor, Tensor]
    affines: tuple[np.ndarray, np.ndarray]
    labels: tuple[Tensor, Tensor]


def alignment(pairs: int = 4) -> None:
    """Align with ``auto``: brains at 2 mm to themselves, moved and with noise, then pairs of different people.

    Prints how often which kind of map was taken, the mean distance to the truth inside the brain, in millimetres, or
    the mean Dice of the labels as they are, after a rigid map, and after the one that ``auto`` takes.

    Args:
        pairs: of every real set, and of every made one, at most; there are five brains.
    """
    print("| brains, moved by | noise | taken | mm off |\n|---|---|---|---|")
    for name in MAPS:
        for noise in NOISE:
            found = [_known(subject, name, noise) for subject in BRAIN_SPLIT["validation"][:pairs]]
            print(f"| {name} | {noise} | {_taken(kind for kind, _ in found)} | {fmean(d for _, d in found):.2f} |")
    print("| pairs | taken | Dice | rigid | auto |\n|---|---|---|---|---|")
    for name, made in {
        "hippocampus": _on_one_grid("hippocampus"),
        "brain": _on_one_grid("brain"),
        "brain_native": _native(),
        "cardiac": _listed("cardiac"),
        "abdomen": _listed("abdomen"),
    }.items():
        rows = [_unknown(pair) for pair in islice(made, pairs)]
        dice = " | ".join(f"{fmean(row[k] for row in rows):.3f}" for k in ("none", "rigid", "auto"))
        print(f"| {name} | {_taken(row['kind'] for row in rows)} | {dice} |")


def _taken(kinds: Any) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _known(subject: str, name: str, noise: float) -> tuple[str, float]:
    """Kind of the map that is found of a brain to itself, and its mean distance to the true one inside the brain."""
    degrees, stretch = MAPS[name]
    image = brain_image(subject, "t1")
    image = image / image[image > 0].std()
    fixed, affine = half_size(image), np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = 0.5  # a voxel of half the size is the mean of eight
    truth, turn = np.eye(4), np.radians(degrees)
    truth[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    truth[:3, :3] = truth[:3, :3] @ np.diag([1 + stretch, 1.0, 1 - stretch])
    middle = (np.array(image.shape[2:]) - 1) / 2
    truth[:3, 3] = middle - truth[:3, :3] @ middle + (np.array([4.0, -3.0, 5.0]) if degrees else 0)
    still = torch.zeros(1, 3, *image.shape[2:])
    moving = half_size(resample_moving(image, still, np.eye(4), np.eye(4), np.linalg.inv(truth), padding_mode="zeros"))
    generator = torch.Generator().manual_seed(int(subject))
    noisy = [x + noise * torch.randn(x.shape, generator=generator) for x in (fixed, moving)]
    found = monai_lm.align(noisy[0], noisy[1], affine, affine)
    inside = (fixed[0, 0] > 0).nonzero().numpy() @ affine[:3, :3].T + affine[:3, 3]
    between = found.matrix - truth
    return found.kind, float(np.linalg.norm(inside @ between[:3, :3].T + between[:3, 3], axis=1).mean())


def _unknown(pair: _Pair) -> dict[str, Any]:
    """Dice of a pair by no map, by a rigid one, and by what ``auto`` takes, and which that is."""
    found = {mode: monai_lm.align(*pair.images, *pair.affines, mode) for mode in ("rigid", "auto")}
    still = torch.zeros(1, 3, *pair.images[0].shape[2:])
    row: dict[str, Any] = {"kind": found["auto"].kind}
    for name, matrix in {"none": np.eye(4), **{mode: own.matrix for mode, own in found.items()}}.items():
        brought = resample_moving(pair.labels[1].float(), still, *pair.affines, matrix, "nearest", "zeros")
        row[name] = float(compare_labels(brought, pair.labels[0])["dice"])
    return row


def _on_one_grid(name: str) -> Iterator[_Pair]:
    edge = 2.0 if name == "brain" else 1.0
    for case in SETS[name]():
        affine = np.diag([edge, edge, edge, 1.0])
        yield _Pair((case.fixed, case.moving), (affine, affine), case.labels)


def _native() -> Iterator[_Pair]:
    root = data_root("brain_native")
    for subjects in (("1001", "1006"), ("1006", "1001")):
        yield _files(*((root / f"{subject}_t1.nii.gz", root / f"{subject}_seg.nii.gz") for subject in subjects))


def _listed(folder: str) -> Iterator[_Pair]:
    root = data_root(folder)
    with (root / "pairs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield _files(*((root / row[k], root / row[f"{k}_seg"]) for k in ("fixed", "moving")))


def _files(fixed: tuple[Any, Any], moving: tuple[Any, Any]) -> _Pair:
    images = [Image(image) for image, _ in (fixed, moving)]
    labels = [Image(label, label=True).data for _, label in (fixed, moving)]
    grids = images[0].grid.affine, images[1].grid.affine
    return _Pair((images[0].data, images[1].data), grids, (labels[0], labels[1]))
