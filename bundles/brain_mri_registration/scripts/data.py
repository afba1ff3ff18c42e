"""Brain images and their label maps, on a grid that the network divides."""

from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    ScaleIntensityRangePercentilesd,
    SpatialPadd,
)

SPLIT = Path(__file__).parent.parent / "configs" / "split.json"
GRID = (192, 224, 192)


def subject_files(root: str | Path, name: str) -> dict[str, Path]:
    """The ``image`` and the ``label`` of a subject, ``<name>_t1.nii.gz`` and ``<name>_seg.nii.gz``.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    files = {key: Path(root) / f"{name}_{suffix}.nii.gz" for key, suffix in (("image", "t1"), ("label", "seg"))}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the data folder must hold NNNN_t1.nii.gz and NNNN_seg.nii.gz")
    return files


def load_subjects(root: str | Path, part: str, reduction: int = 2) -> list[dict[str, Any]]:
    """Load the subjects of a part (``train``, ``validation``, ``test``) of the split.

    Args:
        root: folder with ``NNNN_t1.nii.gz`` and ``NNNN_seg.nii.gz``.
        part: name in ``configs/split.json``.
        reduction: of the grid, 192×224×192 voxels after padding at the far end.

    Returns:
        A dictionary per subject: ``name``, ``image`` ``(1, *S)`` in [0, 1] and ``label`` ``(1, *S)``.

    Raises:
        FileNotFoundError: a subject's image or label is not in ``root``.
    """
    transform = Compose(
        [
            LoadImaged(["image", "label"], image_only=True),
            EnsureChannelFirstd(["image", "label"]),
            ScaleIntensityRangePercentilesd("image", lower=0.5, upper=99.5, b_min=0.0, b_max=1.0, clip=True),
            SpatialPadd(["image", "label"], GRID, method="end"),
        ]
    )
    subjects = []
    for name in json.loads(SPLIT.read_text())[part]:
        loaded = transform(subject_files(root, name))
        step = slice(None, None, reduction)
        subjects.append(
            {
                "name": name,
                "image": F.avg_pool3d(loaded["image"].as_tensor()[None], reduction)[0],
                "label": loaded["label"].as_tensor()[:, step, step, step].contiguous(),
            }
        )
    return subjects


def draw_pairs(root: str | Path, part: str = "test", count: int = 4, seed: int = 0) -> list[dict[str, str]]:
    """Seeded, different, ordered pairs of subjects of one part of the split.

    Returns:
        The files of every pair: ``fixed``, ``moving``, ``fixed_label``, ``moving_label``.

    Raises:
        FileNotFoundError: a subject's image or label is not in ``root``.
        ValueError: more pairs than there are.
    """
    choices = [*permutations(json.loads(SPLIT.read_text())[part], 2)]
    if not 0 < count <= len(choices):
        raise ValueError(f"count must be between 1 and {len(choices)}, the ordered pairs of {part}, got {count}")
    pairs = []
    for names in random.Random(seed).sample(choices, count):
        fixed, moving = (subject_files(root, name) for name in names)
        files = {"fixed": fixed["image"], "moving": moving["image"]}
        files |= {"fixed_label": fixed["label"], "moving_label": moving["label"]}
        pairs.append({key: str(file) for key, file in files.items()})
    return pairs
