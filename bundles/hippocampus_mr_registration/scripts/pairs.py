"""Pairs of images for the inference configuration."""

from __future__ import annotations

import json
import random
from itertools import permutations
from pathlib import Path

from .data import SPLIT, subject_files

__all__ = ["draw_pairs"]


def draw_pairs(dataset_dir: str | Path, part: str = "test", count: int = 4, seed: int = 0) -> list[dict[str, str]]:
    """Draw different ordered pairs of subjects of one part of the split.

    Args:
        dataset_dir: folder with ``images``/``labels`` or, as the Decathlon archive has it, ``imagesTr``/``labelsTr``.
        part: name in ``configs/split.json``.
        count: how many pairs.
        seed: of the drawing.

    Returns:
        The files of every pair: ``fixed``, ``moving``, ``fixed_label``, ``moving_label``.

    Raises:
        FileNotFoundError: a subject's image or label is not in ``dataset_dir``.
        ValueError: more pairs than there are.
    """
    choices = list(permutations(json.loads(SPLIT.read_text())[part], 2))
    if not 0 < count <= len(choices):
        raise ValueError(f"count must be between 1 and {len(choices)}, the ordered pairs of {part}, got {count}")
    pairs = []
    for names in random.Random(seed).sample(choices, count):
        fixed, moving = (subject_files(dataset_dir, name) for name in names)
        pairs.append(
            {
                "fixed": str(fixed["image"]),
                "moving": str(moving["image"]),
                "fixed_label": str(fixed["label"]),
                "moving_label": str(moving["label"]),
            }
        )
    return pairs
