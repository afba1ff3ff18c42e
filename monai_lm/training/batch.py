"""What a field is worth on a batch that has labels or landmarks, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_lm.fields import warp
from monai_lm.fields.metrics import measure, target_registration_error

__all__ = ["images_of", "labels_of", "measure_batch", "spacing_of", "tensor_of"]


def tensor_of(batch: Mapping[str, Any], key: str) -> Tensor:
    """An entry of a batch as a plain floating-point tensor; KeyError that says what a batch must have.

    TypeError for a list of pairs.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch must be a dictionary of tensors, got a {type(batch).__name__}; pairs that cannot be stacked, as "
            "their sizes differ, go one by one, with batch_size=1"
        )
    if key not in batch:
        raise KeyError(f"a batch must have {key!r} for what the module is asked to do, got {sorted(batch)}")
    value = batch[key]
    return (value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)).float()


def labels_of(batch: Mapping[str, Any], key: str) -> Tensor:
    """Label maps of a batch as a plain tensor of their own type, in which every label keeps its value."""
    tensor_of(batch, key)
    value = batch[key]
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)


def images_of(batch: Mapping[str, Any]) -> Tensor:
    """Moving and fixed image as the channels of one tensor, ``(B, 2, *S)``."""
    moving, fixed = tensor_of(batch, "moving"), tensor_of(batch, "fixed")
    if moving.shape != fixed.shape or fixed.shape[1] != 1:
        raise ValueError(
            f"fixed and moving must be (B, 1, *S) on one grid, got {tuple(fixed.shape)} and {tuple(moving.shape)}; "
            "MONAI's ResampleToMatchd brings one onto the other, and RefineDDFd(world=True) registers them as they "
            "are, without a network"
        )
    return torch.cat([moving, fixed], 1)


def spacing_of(image: Any, pair: int = 0) -> tuple[float, ...]:
    """Voxel edges of a pair's image ``(B, C, *S)`` in millimetres; ones where it does not say."""
    n = image.dim() - 2
    if not isinstance(image, MetaTensor):
        return (1.0,) * n
    affine = image.affine if image.affine.dim() == 2 else image.affine[pair]
    return tuple(float(length) for length in torch.linalg.vector_norm(affine[:n, :n].cpu().double(), dim=0))


def measure_batch(batch: Mapping[str, Any], ddf: Tensor, surfaces: bool = False) -> dict[str, Tensor]:
    """What a field ``(B, n, *S)`` in voxels is worth, ``(B,)`` each; see :func:`monai_lm.fields.metrics.measure`.

    Labels and landmarks count where a batch has them; surface distances are for those who ask for ``surfaces``.
    """
    spacings = [spacing_of(batch["fixed"], pair) for pair in range(len(ddf))]
    labels = distances = None
    if "fixed_label" in batch and "moving_label" in batch:
        labels = warp(labels_of(batch, "moving_label"), ddf, mode="nearest"), labels_of(batch, "fixed_label")
    if "fixed_points" in batch and "moving_points" in batch:
        fixed, moving = (tensor_of(batch, key) for key in ("fixed_points", "moving_points"))
        distances = target_registration_error(ddf, fixed, moving, ddf.new_tensor(spacings))
    return measure(ddf, labels, distances, spacings if surfaces else None)
