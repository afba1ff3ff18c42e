"""No NaN in what a function of fields is given: it would become an index, or nothing at all, without a word."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_finite"]


def check_finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity, else ValueError; a GPU is waited for."""
    slabs = tensor.split(max(1, 2**20 // max(1, tensor[:, :, :1].numel())), 2) if tensor.dim() > 2 else [tensor]
    bad = int(sum((~torch.isfinite(slab)).sum() for slab in slabs))  # slab by slab: a field is large
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")
