"""Training pairs of any contrast whose deformation is known: real brains and images painted onto their label maps.

Two training subjects are registered once, with their labels, by :func:`monai_lm.refine`. Both are then deformed at
random, and what leads from one to the other is known: no refinement, no image and no label is needed in the loop.

Source: Hoffmann et al., "SynthMorph: learning contrast-invariant registration without acquired images", IEEE
Transactions on Medical Imaging 2022, for the images; distilling refined fields is ours.
"""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
    ScaleIntensity,
)
from torch import Tensor
from torch.utils.data import Dataset

from monai_lm import refine
from monai_lm.fields import compose, gaussian_smooth, integrate, resample, warp
from monai_lm.similarity import LNCC, MSE, Combined

CORTEX = 100  # label values from here on are parts of the cortex, which has one contrast
RIGHT = (23, 31, 36, 38, 40, 44, 47, 49, 51, 55, 57, 59, 61, 63, 75)
LEFT = (30, 32, 37, 39, 41, 45, 48, 50, 52, 56, 58, 60, 62, 64, 76)  # the same structures on the other side


class SynthesisDataset(Dataset):
    """Random ordered pairs, drawn anew every time.

    An item has ``fixed`` and ``moving`` ``(1, *S)`` in [0, 1], and ``ddf`` ``(n, *S / 2)``, the known displacement from
    fixed to moving in voxels of its grid, NaN outside the brain.

    Args:
        subjects: dictionaries with ``image`` and ``label`` ``(1, *S)``.
        matches: what :func:`matching_fields` returned for them.
        pairs: how many an epoch has.
        synthetic: probability that an image is painted instead of real.
        motion: standard deviation of the random deformation at most, in voxels of the coarse grid.
    """

    def __init__(
        self,
        subjects: list[dict[str, Any]],
        matches: dict[tuple[int, int], Tensor],
        pairs: int,
        synthetic: float = 0.3,
        motion: float = 1.0,
    ) -> None:
        self.subjects, self.matches, self.pairs = subjects, matches, pairs
        self.synthetic, self.motion = synthetic, motion
        self.appearance = Compose(
            [
                RandGaussianSmooth(sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0), sigma_z=(0.3, 1.0), prob=0.3),
                RandBiasField(degree=3, coeff_range=(0.0, 0.15), prob=0.4),
                ScaleIntensity(),
                RandAdjustContrast(prob=0.5, gamma=(0.6, 1.6)),
                RandGaussianNoise(prob=0.5, std=0.05),
            ]
        )

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        f, m = (random.randrange(len(self.subjects)) for _ in range(2))
        coarse = tuple(s // 2 for s in self.subjects[f]["image"].shape[1:])
        to_fixed, _ = random_deformation(coarse, random.uniform(0, self.motion))
        to_moving, back = random_deformation(coarse, random.uniform(0, self.motion))
        # fixed is F(x + p(x)), moving M(x + q(x)) and F(x) matches M(x + u(x)): p, then u, then the inverse of q
        ddf = compose(back, to_fixed if f == m else compose(self.matches[f, m], to_fixed))
        fixed = self._image(f, to_fixed)
        inside = F.avg_pool3d(fixed, 2) > 0  # nothing can be known about the motion of what is empty
        return {"fixed": fixed, "moving": self._image(m, to_moving), "ddf": torch.where(inside, ddf[0], torch.nan)}

    def _image(self, number: int, ddf: Tensor) -> Tensor:
        """A subject, deformed, in a contrast of its own."""
        subject = self.subjects[number]
        fine = resample(ddf, subject["image"].shape[1:])
        if random.random() < self.synthetic:
            image = painted(warp(subject["label"][None].float(), fine, mode="nearest")[0].long())
        else:
            image = warp(subject["image"][None], fine)[0]
        return torch.as_tensor(self.appearance(image)).clone() * (image > 0)


def matching_fields(subjects: list[dict[str, Any]], file: str | Path) -> dict[tuple[int, int], Tensor]:
    """Fields ``(1, n, *S / 2)`` between all ordered pairs of subjects, registered with their labels, kept in a file.

    The labels are matched as six channels of random values, the same for every subject, beside the image.
    """
    if Path(file).is_file():
        kept: dict[tuple[int, int], Tensor] = torch.load(file, weights_only=True)
        return kept
    values = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 0.0
    channels = [
        torch.cat([s["image"][None], gaussian_smooth(values[:, s["label"][0].long()][None], 1.0)], 1) for s in subjects
    ]
    similarity = Combined([LNCC(), MSE()], channels=[1, 6], weights=[1.0, 10.0])
    coarse = [s // 2 for s in channels[0].shape[2:]]
    fields = {}
    for f, m in permutations(range(len(subjects)), 2):
        settings: dict[str, Any] = {"scales": (4, 2, 1), "iterations": (50, 30, 15), "compile": True}
        ddf = refine(channels[f], channels[m], similarity=similarity, **settings).ddf
        fields[f, m] = resample(ddf, coarse)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(fields, file)
    return fields


def random_deformation(size: tuple[int, ...], motion: float) -> tuple[Tensor, Tensor]:
    """Field ``(1, n, *size)`` in voxels without folds, and its inverse: noise of three wavelengths, then a random pose.

    Args:
        size: voxel counts.
        motion: standard deviation of the displacement, in voxels.
    """
    n = len(size)
    velocity = torch.zeros(1, n, *size)
    for nodes in (4, 8, 14):
        noise = torch.randn(1, n, *[nodes] * n) * motion / 1.7
        velocity += F.interpolate(noise, size=size, mode="trilinear", align_corners=True)
    matrix, shift = torch.eye(n) + torch.randn(n, n) * 0.02, torch.randn(n) * 0.5
    centre = torch.tensor([(s - 1) / 2 for s in size])
    pose = _affine_field(size, matrix, centre - matrix @ centre + shift)
    inverse = torch.linalg.inv(matrix)
    unpose = _affine_field(size, inverse, -inverse @ (centre - matrix @ centre + shift))
    return compose(pose, integrate(velocity, 5)), compose(integrate(-velocity, 5), unpose)


def _affine_field(size: tuple[int, ...], matrix: Tensor, shift: Tensor) -> Tensor:
    """Displacement ``(1, n, *size)`` of ``x ↦ matrix x + shift``."""
    n = len(size)
    voxels = torch.stack(torch.meshgrid(*[torch.arange(s, dtype=torch.float32) for s in size], indexing="ij"))
    return (torch.einsum("ij,j...->i...", matrix - torch.eye(n), voxels) + shift.view(-1, *[1] * n))[None]


def painted(label: Tensor) -> Tensor:
    """Image ``(1, *S)`` of a label map: a grey per structure, mostly one for both sides and all of the cortex."""
    greys = torch.rand(256) * 0.9 + 0.1
    greys[0] = 0.0
    if random.random() < 0.9:
        greys[list(LEFT)] = greys[list(RIGHT)]
        greys[CORTEX:] = greys[CORTEX]
    return greys[label]
