"""What a field is worth on a batch that has labels or landmarks, pair by pair."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor

from monai_lm.fields import fold_count, warp
from monai_lm.metrics import sd_log_jacobian, target_registration_error

__all__ = ["compare_labels", "images_of", "label_overlap", "measure", "spacing_of", "tensor_of"]


def tensor_of(batch: Mapping[str, Any], key: str) -> Tensor:
    """An entry of a batch as a plain floating-point tensor; KeyError that says what a batch must have."""
    if key not in batch:
        raise KeyError(f"a batch must have {key!r} for what the module is asked to do, got {sorted(batch)}")
    value = batch[key]
    return (value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)).float()


def images_of(batch: Mapping[str, Any]) -> Tensor:
    """Moving and fixed image as the channels of one tensor, ``(B, 2, *S)``."""
    moving, fixed = tensor_of(batch, "moving"), tensor_of(batch, "fixed")
    if moving.shape != fixed.shape or fixed.shape[1] != 1:
        raise ValueError(
            f"fixed and moving must be (B, 1, *S) on one grid, got {tuple(fixed.shape)} and {tuple(moving.shape)}"
        )
    return torch.cat([moving, fixed], 1)


def spacing_of(image: Any, pair: int = 0) -> tuple[float, ...]:
    """Voxel edges of a pair's image ``(B, C, *S)`` in millimetres; ones where it does not say."""
    n = image.dim() - 2
    if not isinstance(image, MetaTensor):
        return (1.0,) * n
    affine = image.affine if image.affine.dim() == 2 else image.affine[pair]
    return tuple(float(length) for length in torch.linalg.vector_norm(affine[:n, :n].double(), dim=0))


def label_overlap(
    warped: Tensor, fixed: Tensor, spacing: Sequence[float] | None = None
) -> tuple[dict[int, float], dict[int, float]]:
    """Dice and, given a spacing, 95 % Hausdorff distance in millimetres, of every label above 0 of one pair.

    Label maps are ``(*S)``. One label at a time: 138 structures of a brain as channels would take gigabytes.
    A label that only one of the maps has gets a Dice of 0 and a NaN for its distance.
    """
    dice, hd95 = {}, {}
    for value in torch.cat([warped.unique(), fixed.unique()]).unique().tolist():
        if value == 0:
            continue
        masks = (warped == value).float()[None, None], (fixed == value).float()[None, None]
        dice[int(value)] = float(compute_dice(*masks, include_background=True, ignore_empty=False))
        if spacing is not None:
            distance = float("nan")
            if all(mask.any() for mask in masks):
                with warnings.catch_warnings():  # MONAI's about a deprecated argument of its own
                    warnings.simplefilter("ignore", FutureWarning)
                    distance = float(
                        compute_hausdorff_distance(
                            *masks, include_background=True, percentile=95, spacing=list(spacing)
                        )
                    )
            hd95[int(value)] = distance
    return dice, hd95


def compare_labels(
    warped: Tensor, fixed: Tensor, spacings: Sequence[Sequence[float]] | None = None
) -> dict[str, Tensor]:
    """``dice`` of label maps ``(B, 1, *S)``, and, given the spacing of every pair, ``hd95`` in millimetres, ``(B,)``.

    Means over the labels above 0 that either map of the pair has; ``hd95`` over those that both have, so that two
    fields are compared on other labels where one of them loses a structure. NaN where there is no label.
    """
    pairs = [
        label_overlap(w[0], f[0], None if spacings is None else spacings[i])
        for i, (w, f) in enumerate(zip(warped, fixed, strict=True))
    ]
    out = {"dice": [list(dice.values()) for dice, _ in pairs]}
    if spacings is not None:
        out["hd95"] = [list(hd95.values()) for _, hd95 in pairs]
    return {
        name: torch.stack([torch.tensor(v, dtype=torch.float32).nanmean() for v in values]).to(warped.device)
        for name, values in out.items()
    }


def measure(batch: Mapping[str, Any], ddf: Tensor, surfaces: bool = False) -> dict[str, Tensor]:
    """Metrics of a field ``(B, n, *S)`` in voxels, ``(B,)`` each.

    ``folds`` (folded cells) and ``sdlogj`` always; ``dice`` and, with ``surfaces``, ``hd95`` where there are label
    maps, see :func:`compare_labels`; ``tre`` (mm), mean over the landmarks, where there are some.
    """
    out = {"folds": fold_count(ddf).float(), "sdlogj": sd_log_jacobian(ddf)}
    if "fixed_label" in batch and "moving_label" in batch:
        warped = warp(tensor_of(batch, "moving_label"), ddf, mode="nearest")
        spacings = [spacing_of(batch["fixed"], pair) for pair in range(len(ddf))]
        out |= compare_labels(warped, tensor_of(batch, "fixed_label"), spacings if surfaces else None)
    if "fixed_points" in batch and "moving_points" in batch:
        fixed_points, moving_points = (tensor_of(batch, key) for key in ("fixed_points", "moving_points"))
        spacings = [spacing_of(batch["fixed"], pair) for pair in range(len(ddf))]
        errors = target_registration_error(ddf, fixed_points, moving_points, ddf.new_tensor(spacings))
        out["tre"] = errors.nanmean(1)
    return out
