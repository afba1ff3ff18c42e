"""Pairs of images for the inference configuration."""

from __future__ import annotations

import json
from pathlib import Path

from monai_lm.io import datalist

from .data import SPLIT, subject_files

__all__ = ["draw_pairs"]


def draw_pairs(dataset_dir: str | Path, part: str = "test", count: int = 2, seed: int = 0) -> list[dict[str, str]]:
    """Draw different ordered pairs of subjects of one part of the split.

    Args:
        dataset_dir: folder with ``NNNN_t1.nii.gz`` and ``NNNN_seg.nii.gz``.
        part: name in ``configs/split.json``.
        count: how many pairs, all if there are not as many.
        seed: of the drawing.

    Returns:
        The files of every pair: ``fixed``, ``moving``, ``fixed_label``, ``moving_label``.

    Raises:
        FileNotFoundError: a subject's image or label is not in ``dataset_dir``.
    """
    names = json.loads(SPLIT.read_text())[part]
    subjects = [subject_files(dataset_dir, name) for name in names]
    drawn = datalist.draw_pairs([{"image": str(subject["image"])} for subject in subjects], "random", count, seed)
    roles = {"fixed": 0, "moving": 1}
    return [
        {role: str(subjects[pair[k]]["image"]) for role, k in roles.items()}
        | {f"{role}_label": str(subjects[pair[k]]["label"]) for role, k in roles.items()}
        for pair in drawn
    ]
