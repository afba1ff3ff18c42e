"""Metrics and statistics that every method is measured with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import warp


def mean_dice(fixed_label: Tensor, moving_label: Tensor, ddf: Tensor | None = None) -> float:
    """Mean Dice over the labels that both maps have, after warping ``moving_label`` (nearest neighbour)."""
    moved = moving_label if ddf is None else warp(moving_label.float(), ddf, mode="nearest")
    a, b = fixed_label.flatten().long(), moved.flatten().long()
    size = int(max(a.max(), moving_label.max())) + 1
    count_a, count_b = torch.bincount(a, minlength=size), torch.bincount(b, minlength=size)
    both = torch.bincount(a[a == b], minlength=size)
    present = (count_a > 0) & (torch.bincount(moving_label.flatten().long(), minlength=size) > 0)
    present[0] = False
    return float((2 * both[present] / (count_a + count_b)[present]).mean())


def paired_bootstrap(difference: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % bootstrap interval."""
    values = np.asarray(difference)
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (10000, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
