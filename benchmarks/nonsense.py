"""Pairs as they are, in other contrasts, far off, noisy, and nonsense in place of the moving image."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import SETS, Case
from benchmarks.contrasts import recolored
from benchmarks.textures import stained, textured, ultrasound
from monai_lm import refine
from monai_lm.fields import gaussian_smooth, warp

__all__ = ["KINDS", "UNFIT", "Trial", "trial"]

KINDS: tuple[str, ...] = (
    "real, lncc", "real, mi", "real, mind", "inverted, lncc", "like T2, mi", "random, mi", "known 1 .06, lncc",
    "known 3 .06, lncc", "shifted .1, lncc", "shifted .2, lncc", "shifted .3, lncc", "shifted .4, lncc",
    "shifted .2, mi", "like T2, lncc", "random, lncc", "inverted, mse", "known 0 .06, lncc", "known 0 .15, lncc",
    "like T2, mind", "like T2, mapped_lncc", "random, mind", "random, mapped_lncc", "known 3 .06, mi",
    "known 3 .06, mind", "known 0 .06, mi", "begun, mi", "begun, mind", "begun random, mi", "begun random, mind",
    "begun random, mapped_lncc", "noise 0, lncc", "noise 1, lncc", "noise 2, lncc", "noise 4, lncc", "noise 1, mi",
    "noise 4, mi", "mirrored 0, lncc", "mirrored 1, lncc", "mirrored 2, lncc", "mirrored 0, mi", "mirrored 1, mi",
    "mirrored 2, mi", "other organ, lncc", "other organ, mi",
)  # fmt: skip
"""The moving image and the measure. ``known``: a smooth field of so many voxels on average, and noise of such a part of
the range on both images; 0 is a pair that lies exactly already. ``shifted``: by such a part of the image along an axis.
``begun``: from what LNCC found between the images of one contrast. ``ultrasound``, ``stained``: see
:mod:`benchmarks.textures`. ``noise``: smoothed by so many voxels."""


UNFIT = ("like T2, lncc", "random, lncc", "inverted, mse")
"""Of these kinds those whose measure expects another contrast: to doubt them is right, even if Dice rose."""


class Trial(NamedTuple):
    """What is to be registered.

    Attributes:
        case: the pair.
        similarity: name of the measure.
        nonsense: whether no field can be right.
        truth: ``(1, n, *S)`` voxels, the true field, or None.
        start: ``(1, n, *S)`` voxels, the field to start from, or None.
    """

    case: Case
    similarity: str
    nonsense: bool = False
    truth: Tensor | None = None
    start: Tensor | None = None


def trial(case: Case, kind: str, seed: int, name: str) -> Trial | None:
    """A trial of :data:`KINDS` made of a case of the set ``name``; None for an axis that it does not have."""
    what, similarity = kind.split(", ")
    what, *values = what.split(" ") if what not in ("like T2", "other organ") else (what,)
    n = case.fixed.dim() - 2
    generator = torch.Generator().manual_seed(seed)
    if what in ("inverted", "like T2", "random"):
        return Trial(case._replace(moving=recolored(case.moving, what, seed)), similarity)
    if what == "ultrasound":
        return Trial(case._replace(moving=ultrasound(case.moving, seed)), similarity)
    if what == "stained":
        sections = textured(case.fixed, seed), stained(case.moving, seed)
        return Trial(case._replace(fixed=sections[0], moving=sections[1]), similarity)
    if what == "begun":
        start = refine(case.fixed, case.moving, spacing=case.spacing).ddf
        moving = recolored(case.moving, values[0], seed) if values else case.moving
        return Trial(case._replace(moving=moving), similarity, start=start)
    if what == "known":
        return _known(case, float(values[0]), float(values[1]), generator, similarity)
    if what == "shifted":
        return Trial(_shifted(case, float(values[0]), seed), similarity)
    if what == "noise":
        noise = torch.randn(case.moving.shape, generator=generator)
        sigma = float(values[0])
        return Trial(case._replace(moving=gaussian_smooth(noise, sigma) if sigma else noise), similarity, True)
    if what == "mirrored":
        if int(values[0]) >= n:
            return None
        axis = 2 + int(values[0])
        labels = case.labels[0], case.labels[1].flip(axis)
        return Trial(case._replace(moving=case.moving.flip(axis), labels=labels), similarity, True)
    if what == "other organ":
        return Trial(case._replace(moving=_other(name, case.moving)), similarity, True)
    return Trial(case, similarity)


def _known(case: Case, voxels: float, level: float, generator: torch.Generator, similarity: str) -> Trial:
    """The moving image warped as fixed, labels too, and noise on both."""
    size, n = case.moving.shape[2:], case.moving.dim() - 2
    truth = gaussian_smooth(torch.randn(1, n, *size, generator=generator), 6.0)
    truth = voxels * truth / truth.square().sum(1).sqrt().mean()
    values = case.moving.flatten()
    range_ = float(values[:: max(1, len(values) // 10**6)].quantile(0.99) - values.min())
    images = [
        image + level * range_ * torch.randn(image.shape, generator=generator)
        for image in (warp(case.moving, truth), case.moving)
    ]
    labels = warp(case.labels[1], truth, mode="nearest"), case.labels[1]
    return Trial(case._replace(fixed=images[0], moving=images[1], labels=labels), similarity, truth=truth)


def _shifted(case: Case, part: float, seed: int) -> Case:
    """Image and labels moved along an axis, either way, and continued by their border."""
    draw = random.Random(seed)
    size = case.moving.shape[2:]
    axis, sign = draw.randrange(len(size)), draw.choice((-1, 1))
    ddf = torch.zeros(1, len(size), *size)
    ddf[:, axis] = sign * part * size[axis]
    labels = case.labels[0], warp(case.labels[1], ddf, mode="nearest")
    return case._replace(moving=warp(case.moving, ddf), labels=labels)


def _other(name: str, moving: Tensor) -> Tensor:
    """An image of another set on the grid of this one, with its largest intensity: a brain, or for brains a heart."""
    image = _first("cardiac" if name == "brain" else "brain")
    if moving.dim() == 4:
        image = image[..., image.shape[-1] // 2]
    mode = "bilinear" if moving.dim() == 4 else "trilinear"
    image = F.interpolate(image, size=moving.shape[2:], mode=mode, align_corners=True)
    return image * (moving.max() / image.max())


@cache
def _first(name: str) -> Tensor:
    return next(SETS[name]()).fixed
