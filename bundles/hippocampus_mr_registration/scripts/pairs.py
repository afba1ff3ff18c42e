"""Pairs of images for the inference configuration: which ones, what they are called, what is written of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Hashable, Iterable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from .data import SPLIT, subject_files

__all__ = ["OnFixedGridd", "draw_pairs", "name_pairs"]


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


def name_pairs(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give every pair a ``name`` of its own, ``<fixed>__<moving>``; namesakes are numbered from 2 on.

    Raises:
        ValueError: a pair without ``fixed`` or ``moving``.
    """
    named, taken = [], set()
    for index, pair in enumerate(pairs):
        if missing := {"fixed", "moving"} - set(pair):
            raise ValueError(
                f"pair {index} must have the keys fixed and moving, {sorted(missing)} missing: {dict(pair)}"
            )
        stem = "__".join(re.sub(r"\.nii(\.gz)?$", "", Path(pair[key]).name) for key in ("fixed", "moving"))
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        named.append({**pair, "name": name})
    return named


class OnFixedGridd(MapTransform):
    """Give fields and warped images the affine of the fixed image and the name of the pair, for the files of them.

    Args:
        keys: what lies on the fixed grid; missing ones are left out.
        fixed_key: the fixed image, a ``MetaTensor``.
        moving_key: the moving image, a ``MetaTensor``; a field file needs its place in space, too.
        name_key: the name of the pair.
    """

    def __init__(
        self, keys: KeysCollection, fixed_key: str = "fixed", moving_key: str = "moving", name_key: str = "name"
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.fixed_key = fixed_key
        self.moving_key = moving_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the metadata of ``keys``."""
        d = dict(data)
        for key in self.key_iterator(d):
            meta = {"filename_or_obj": f"{d[self.name_key]}.nii.gz", "moving_affine": d[self.moving_key].affine}
            d[key] = MetaTensor(d[key], affine=d[self.fixed_key].affine, meta=meta)
        return d
