"""Metrics and statistics that every method is measured with, and what a method is told to minimise."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.fields.metrics import compare_labels
from monai_lm.similarity.lookup import MEASURES


def mean_dice(fixed_label: Tensor, moving_label: Tensor, ddf: Tensor | None = None) -> float:
    """Mean Dice after warping ``moving_label`` (nearest neighbour), as ``monai_lm.fields.metrics`` has it."""
    moved = moving_label.float() if ddf is None else warp(moving_label.float(), ddf, mode="nearest")
    return float(compare_labels(moved, fixed_label)["dice"])


def paired_bootstrap(difference: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % bootstrap interval."""
    values = np.asarray(difference)
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (10000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def similarity_of(told: Any) -> Any:
    """What ``monai_lm.refine`` takes for a name, for ``{name: {argument: value}}``, or for a list of them."""
    if isinstance(told, list | tuple):
        return [similarity_of(one) for one in told]
    if isinstance(told, dict):
        ((name, given),) = told.items()
        return MEASURES[name](**given)
    return told
