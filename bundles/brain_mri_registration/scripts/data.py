"""Brains of the MICCAI 2012 multi-atlas challenge, and the views of them that the segmenter is trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    Orientationd,
    ScaleIntensityRangePercentilesd,
)
from torch import Tensor
from torch.utils.data import Dataset

from monai_lm.fields import gaussian_smooth, integrate

from .labels import MIRRORED, STRUCTURES, TISSUES

__all__ = ["RandomViews", "invented_contrast", "load_subjects", "subject_files", "to_classes"]

SPLIT = Path(__file__).parent.parent / "configs" / "split.json"


def subject_files(root: str | Path, name: str) -> dict[str, Path]:
    """Find ``NNNN_t1.nii.gz`` and ``NNNN_seg.nii.gz`` of a subject.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    files = {key: Path(root) / f"{name}_{kind}.nii.gz" for key, kind in (("image", "t1"), ("label", "seg"))}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: the data folder must hold NNNN_t1.nii.gz and NNNN_seg.nii.gz, skull-stripped and "
                f"affinely aligned, got {Path(root).absolute()}"
            )
    return files


def load_subjects(root: str | Path, part: str) -> list[dict[str, Tensor]]:
    """Load the subjects of a part (``train``, ``validation``, ``test``) of the split.

    Returns:
        A dictionary per subject: ``image`` ``(1, *S)`` in [0, 1] and ``label`` ``(1, *S)``, classes 0 to 139 as uint8,
        array axes pointing right, forward and up. Values that are not in the protocol, some voxels of some subjects,
        count as background.
    """
    transform = Compose(
        [
            LoadImaged(["image", "label"], image_only=True),
            EnsureChannelFirstd(["image", "label"]),
            Orientationd(["image", "label"], axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            ScaleIntensityRangePercentilesd("image", lower=0.0, upper=99.8, b_min=0.0, b_max=1.0, clip=True),
            Lambdad("label", to_classes, overwrite=True),
        ]
    )
    names = json.loads(SPLIT.read_text())[part]
    return [{k: v.as_tensor() for k, v in transform(subject_files(root, name)).items()} for name in names]


def to_classes(label: Tensor) -> Tensor:
    """Label values to classes; what is none of the structures becomes background."""
    classes = torch.zeros(256, dtype=torch.uint8)
    classes[list(STRUCTURES)] = torch.arange(len(STRUCTURES), dtype=torch.uint8)
    return classes[label.long()]


class RandomViews(Dataset):
    """Random views of random subjects: deformed, mirrored, cut out, in a real or an invented contrast.

    Args:
        subjects: what :func:`load_subjects` returned.
        count: how many views; each is the same whenever and by whichever process it is made.
        size: edges of a view in voxels, multiples of 16 from 48: on a grid of 2 voxels, where the segmenter would end
            with less, the gradient of a convolution in bfloat16 is wrong on CPUs, at times NaN (torch 2.13, oneDNN).
        synthetic: how often the contrast is invented from the label map (SynthMorph, Hoffmann et al. 2022).
        seed: of all draws.
    """

    def __init__(
        self,
        subjects: list[dict[str, Tensor]],
        count: int,
        size: tuple[int, int, int],
        synthetic: float = 0.5,
        seed: int = 0,
    ) -> None:
        if len(size) != 3 or any(s < 48 or s % 16 for s in size):
            raise ValueError(f"size must be three multiples of 16 from 48, got {tuple(size)}")
        self.subjects, self.count, self.size, self.synthetic, self.seed = subjects, count, size, synthetic, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be below {self.count}, got {index}")
        draw = _Draw(self.seed, index)
        subject = self.subjects[draw.whole(len(self.subjects))]
        image, label, centre = self._deformed(subject["image"][None], subject["label"][None], draw)
        if draw.uniform() < 0.5:
            image, label = image.flip(2), torch.tensor(MIRRORED, dtype=torch.uint8)[label.long()].flip(2)
            centre = centre * torch.tensor([-1.0, 1.0, 1.0])
        if draw.uniform() < self.synthetic:
            image = _invented(image, label, draw)
        return {"image": _worn(image, draw)[0], "label": label[0], "centre": centre}

    def _deformed(self, image: Tensor, label: Tensor, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
        """A random affine map and diffeomorphism on a random box, whose centre (from the brain's) is returned too."""
        whole = torch.tensor(image.shape[2:])
        size = torch.tensor(self.size)
        margin = torch.tensor([12, 15, 8])  # what is background in every subject
        middle = (whole - size) // 2
        low, high = torch.minimum(margin, middle), torch.maximum(whole - margin - size, middle)
        corner = low + (draw.values(3) * (high - low + 1)).long()
        coarse = [s // 8 for s in self.size]
        velocity = draw.normal(1, 3, *coarse)
        velocity = gaussian_smooth(velocity, [draw.uniform(1.0, 3.0)] * 3)
        velocity *= draw.uniform(0.0, 0.6) / velocity.std()  # voxels of 8 mm
        field = 8 * F.interpolate(integrate(velocity, 5), size=self.size, mode="trilinear")
        matrix = torch.eye(3) + 0.06 * draw.normal(3, 3)
        axes = [torch.arange(s) + float(c) - float(w - 1) / 2 for s, c, w in zip(self.size, corner, whole, strict=True)]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        points = torch.einsum("ij,jxyz->ixyz", matrix, points) + field[0] + 4 * draw.normal(3, 1, 1, 1)
        inside = image[0, 0] > 0
        brain = torch.stack([_span(inside, axis).sum() / 2 for axis in range(3)])
        centre = corner + (size - 1) / 2 - brain  # before the deformation: what that shifts is for robustness
        grid = (points / ((whole - 1) / 2).view(3, 1, 1, 1)).flip(0).permute(1, 2, 3, 0)[None]
        image = F.grid_sample(image, grid, mode="bilinear", align_corners=True)
        return image, F.grid_sample(label.float(), grid, mode="nearest", align_corners=True).to(torch.uint8), centre


def invented_contrast(image: Tensor, label: Tensor, seed: int) -> Tensor:
    """The brain ``(1, 1, *S)`` with classes ``(1, 1, *S)`` in a random contrast, as the views have it."""
    draw = _Draw(seed, 0)
    return _worn(_invented(image, label, draw), draw)


def _span(inside: Tensor, axis: int) -> Tensor:
    """First and last index along an axis of what is true in ``(*S)``."""
    return inside.movedim(axis, 0).flatten(1).any(1).nonzero()[[0, -1], 0]


class _Draw:
    """Random numbers that follow from a seed and the number of a view."""

    def __init__(self, seed: int, index: int) -> None:
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + index)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def whole(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def values(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _invented(image: Tensor, label: Tensor, draw: _Draw) -> Tensor:
    """Every tissue gets a random mean; noise and, at times, some of the real image's texture come on top."""
    means = draw.values(max(TISSUES) + 1)
    if draw.uniform() < 0.8:
        means[0] = 0.0
    out = means[torch.tensor(TISSUES)][label.long()]
    inside = image > 0.02  # cerebrospinal fluid between the gyri has no label
    out = torch.where(inside & (label == 0), draw.values(1), out)
    if draw.uniform() < 0.6:
        share = draw.uniform(0.3, 1.0)
        out = share * out + (1 - share) * (image if draw.uniform() < 0.5 else (1 - image) * inside)
    out = out + draw.uniform(0.0, 0.08) * draw.normal(*out.shape)
    return gaussian_smooth(out, [draw.uniform(0.3, 1.0)] * 3)


def _worn(image: Tensor, draw: _Draw) -> Tensor:
    """Gamma, bias field, noise; then the range of the values is [0, 1] again."""
    image = image.clamp(0, 1) ** math.exp(0.25 * float(draw.normal(1)))
    bias = draw.normal(1, 1, 3, 4, 3)
    bias = F.interpolate(bias, size=image.shape[2:], mode="trilinear", align_corners=True)
    image = image * torch.exp(draw.uniform(0.0, 0.2) * bias)
    image = image + draw.uniform(0.0, 0.03) * draw.normal(*image.shape)
    low, high = torch.quantile(image.flatten()[::7], torch.tensor([0.002, 0.998]))
    return ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
