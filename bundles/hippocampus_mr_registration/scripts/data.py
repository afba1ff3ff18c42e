"""Hippocampus images of the Medical Segmentation Decathlon, task 4, on one grid, and how training varies them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
)
from torch import Tensor
from torch.utils.data import Dataset

SPLIT = Path(__file__).parent.parent / "configs" / "split.json"
GRID = (64, 64, 64)


def subject_files(root: str | Path, name: str) -> dict[str, Path]:
    """Find the ``image`` and the ``label`` of a subject.

    Args:
        root: folder with ``images``/``labels`` or, as the Decathlon archive has it, ``imagesTr``/``labelsTr``.
        name: of the subject, e.g. ``hippocampus_001``.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    suffix = "" if (Path(root) / "images").is_dir() else "Tr"
    files = {key: Path(root) / f"{key}s{suffix}" / f"{name}.nii.gz" for key in ("image", "label")}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: the data folder must hold images/ and labels/, or imagesTr/ and labelsTr/ as the "
                f"Decathlon's Task04_Hippocampus does, got {Path(root).absolute()}"
            )
    return files


def load_subjects(root: str | Path, part: str, grid: tuple[int, ...] = GRID) -> list[dict[str, Tensor]]:
    """Load the subjects of a part (``train``, ``validation``, ``test``) of the split, centred on ``grid``.

    Args:
        root: folder with ``images``/``labels`` or, as the Decathlon archive has it, ``imagesTr``/``labelsTr``.
        part: name in ``configs/split.json``.
        grid: voxel counts of the common grid; images are padded or cropped about their centre.

    Returns:
        A dictionary per subject: ``name``, ``image`` ``(1, *grid)`` in [0, 1] and ``label`` ``(1, *grid)``.

    Raises:
        FileNotFoundError: a subject's image or label is not in ``root``.
    """
    names = json.loads(SPLIT.read_text())[part]
    transform = Compose(
        [
            LoadImaged(["image", "label"], image_only=True),
            EnsureChannelFirstd(["image", "label"]),
            ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0.0, b_max=1.0, clip=True),
            ResizeWithPadOrCropd(["image", "label"], grid),
        ]
    )
    subjects = []
    for name in names:
        files = subject_files(root, name)
        subjects.append({"name": name} | {k: transform(files)[k].as_tensor() for k in ("image", "label")})
    return subjects


def augmentation(image: str = "image", label: str = "label") -> Compose:
    """Random pose, size, blur, contrast and noise of an image and its label map; the arguments are their keys."""
    return Compose(
        [
            RandAffined(
                [image, label],
                prob=0.8,
                rotate_range=(0.3, 0.3, 0.3),
                shear_range=(0.1,) * 6,
                translate_range=(3, 3, 3),
                scale_range=(0.2, 0.2, 0.2),
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.3, 0.8), sigma_y=(0.3, 0.8), sigma_z=(0.3, 0.8)),
            RandAdjustContrastd(image, prob=0.5, gamma=(0.7, 1.5)),
            RandGaussianNoised(image, prob=0.3, std=0.05),
        ]
    )


def pair_augmentation() -> Compose:
    """:func:`augmentation` of either image of a pair, and left and right of both exchanged at random."""
    keys = ["fixed", "fixed_label", "moving", "moving_label"]
    return Compose(
        [
            augmentation("fixed", "fixed_label"),
            augmentation("moving", "moving_label"),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
        ]
    )


class SubjectDataset(Dataset):
    """Images and labels of single subjects.

    Args:
        subjects: what :func:`load_subjects` returned.
        augment: mirror left and right, and apply :func:`augmentation`.
    """

    def __init__(self, subjects: list[dict[str, Any]], augment: bool = False) -> None:
        self.subjects = subjects
        self.augmentation = Compose([augmentation(), RandFlipd(["image", "label"], 0.5, 0)]) if augment else None

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        subject = {key: self.subjects[index][key] for key in ("image", "label")}
        if self.augmentation is None:
            return subject
        return {key: value.as_tensor() for key, value in self.augmentation(subject).items()}
