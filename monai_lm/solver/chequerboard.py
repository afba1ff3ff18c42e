"""A grid in two colours, so that either can be refined without what the other shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK", "colours", "divided", "in_halves"]

BLOCK = 6
"""Edge of a block in voxels of its level: wider than the windows of the measures."""


def divided(size: Sequence[int]) -> int:
    """How many axes of a grid are divided: those with the voxels of two blocks or more."""
    return sum(length >= 2 * BLOCK for length in size)


def colours(size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """What either half of a grid has, ``(2, 1, *S)`` of zeros and ones; all, both of them, where it is too small.

    Axes with fewer voxels than two blocks are not divided.
    """
    block = torch.zeros(*size, dtype=torch.long, device=device)
    for axis, length in enumerate(size):
        number = torch.arange(length, device=device) // (BLOCK if length >= 2 * BLOCK else length)
        block = block + number.view(-1, *[1] * (len(size) - axis - 1))
    dark = (block % 2).float()
    return torch.stack([dark, 1 - dark])[:, None] if bool(dark.any()) else torch.ones(2, 1, *size, device=device)


def in_halves(fixed: Tensor) -> Tensor:
    """Images ``(2 B, C, *S)`` with weights as their last channel, which count in one half of the grid for each half.

    Weights keep their mean, one; a pair that has none in its half keeps them all.
    """
    own = colours(fixed.shape[2:], fixed.device).repeat_interleave(len(fixed) // 2, 0).to(fixed.dtype)
    weight = fixed[:, -1:] * own
    mean = weight.mean(tuple(range(1, weight.dim())), keepdim=True)
    weight = torch.where(mean > 0, weight / mean.clamp(min=1e-12), fixed[:, -1:])
    return torch.cat([fixed[:, :-1], weight], 1)
