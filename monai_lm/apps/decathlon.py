"""A real pair for people without data: the Medical Segmentation Decathlon's hippocampus images."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.apps import DecathlonDataset
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ResizeWithPadOrCropd
from torch import Tensor

from monai_lm.fields import fold_count, warp
from monai_lm.io.datalist import read_json
from monai_lm.solver.refinement import refine

__all__ = ["register_pair"]

_TASK = "Task04_Hippocampus"


def register_pair(root: Path, fixed: int, moving: int) -> str:
    """Register two of the training images from the identity and say what it brought to their labels.

    Args:
        root: folder that holds ``Task04_Hippocampus``; the archive is fetched into it if that is not whole.
        fixed: index of the fixed image.
        moving: index of the moving image.

    Raises:
        ValueError: no such folder, or an index out of range.
    """
    if not root.is_dir():
        raise ValueError(f"root_dir must be an existing folder, got {str(root)!r}")
    dataset = DecathlonDataset(
        root, _TASK, section="training", val_frac=0.0, cache_num=0, download=not _whole(root / _TASK), progress=True
    )
    for name, index in (("fixed", fixed), ("moving", moving)):
        if not 0 <= index < len(dataset.data):
            raise ValueError(f"{name} must be between 0 and {len(dataset.data) - 1}, got {index}")
    load = Compose(
        [
            LoadImaged(["image", "label"], image_only=True),
            EnsureChannelFirstd(["image", "label"]),
            ResizeWithPadOrCropd(["image", "label"], (64, 64, 64)),
        ]
    )
    (fixed_image, fixed_label), (moving_image, moving_label) = (
        (item["image"].as_tensor()[None], item["label"].as_tensor()[None])
        for item in (load({k: dataset.data[i][k] for k in ("image", "label")}) for i in (fixed, moving))
    )
    result = refine(fixed_image, moving_image, progress=True)
    before = _dice(fixed_label, moving_label)
    after = _dice(fixed_label, warp(moving_label, result.ddf, mode="nearest"))
    folds = int(fold_count(result.ddf))
    return f"mean Dice of the two labels {before:.3f} -> {after:.3f}, {folds} folds, {result.seconds:.1f} s"


def _whole(folder: Path) -> bool:
    """Whether everything that the folder's list names is there; unpacking may have been interrupted."""
    listing = folder / "dataset.json"
    if not listing.is_file():
        return False
    named = [entry[key] for entry in read_json("dataset", listing)["training"] for key in ("image", "label")]
    return all((folder / name).is_file() for name in named)


def _dice(fixed: Tensor, moving: Tensor) -> float:
    scores = DiceMetric(include_background=False)(one_hot(moving, 3), one_hot(fixed, 3))
    assert isinstance(scores, Tensor)
    return float(torch.nanmean(scores))
