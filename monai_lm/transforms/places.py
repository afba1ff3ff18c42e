"""Whether images and fields with affines fit each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import PadListDataCollate
from monai.utils import TraceKeys

__all__ = [
    "check_item",
    "check_same_axes",
    "check_target",
    "has_affine",
    "leads_into",
    "same_affine",
    "same_axes",
    "same_directions",
]


def has_affine(image: Any) -> bool:
    """Whether an image says where it is; MONAI gives an identity affine to tensors that do not."""
    return isinstance(image, MetaTensor) and not torch.equal(
        image.affine, torch.eye(len(image.affine)).to(image.affine)
    )


def check_item(name: str, image: Any) -> None:
    """ValueError for a batch, and for an image or field that still has the size of the batch that it was in."""
    if image is None:
        return
    described, shape = isinstance(image, MetaTensor), tuple(np.shape(image))
    if described and image.is_batch:
        raise ValueError(
            f"{name} must be one item (C, *S), got a batch {shape}; monai.data.decollate_batch makes items of it"
        )
    if len(shape) not in (3, 4):
        raise ValueError(f"{name} must be one item, (C, H, W) or (C, H, W, D), got shape {shape}")
    last = image.applied_operations[-1] if described and image.applied_operations else {}
    if isinstance(last, dict) and last.get(TraceKeys.CLASS_NAME) == PadListDataCollate.__name__:
        raise ValueError(
            f"{name} must have its own size, got {shape}, to which pad_list_data_collate padded it; "
            "DataLoader(collate_fn=list) leaves items as they are"
        )


def same_axes(image: MetaTensor, other: MetaTensor) -> bool:
    """Whether the voxel axes have one direction and spacing; origins may differ."""
    return same_directions(image.affine, other.affine, min(image.dim(), other.dim()) - 1)


def same_directions(affine: Any, other: Any, n: int) -> bool:
    """Whether the first ``n`` voxel axes of two affines have one direction and length, to a thousandth."""
    a, b = (torch.as_tensor(x)[:n, :n].cpu().double() for x in (affine, other))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def same_affine(a: Any, b: Any) -> bool:
    """Whether two 4×4 put voxels at the same places, to a thousandth of a voxel and of a millimetre."""
    x, y = (torch.as_tensor(m).cpu().double() for m in (a, b))
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-3 * min(1.0, float(x[:3, :3].abs().max())))


def leads_into(ddf: Any, image: Any) -> bool:
    """Whether a field was made or read for this very moving grid, which may then be any other than the field's."""
    target = ddf.meta.get("moving_affine") if isinstance(ddf, MetaTensor) else None
    return target is not None and isinstance(image, MetaTensor) and same_affine(target, image.affine)


def check_same_axes(name: str, image: Any, other_name: str, other: Any) -> None:
    """ValueError unless the voxel axes, where known, agree: a displacement in voxels is another length otherwise."""
    if has_affine(image) and has_affine(other) and not same_axes(image, other):
        raise ValueError(
            f"{name} and {other_name} must have voxel axes of the same direction and spacing, got affines\n"
            f"{image.affine.tolist()}\nand\n{other.affine.tolist()}\nresample one onto the other first"
        )


def check_target(ddf: Any, moving: Any) -> None:
    """ValueError if a field was loaded for a moving image whose axes are not those of this one."""
    target = ddf.meta.get("moving_affine") if isinstance(ddf, MetaTensor) else None
    if target is not None and has_affine(moving) and not same_directions(target, moving.affine, len(ddf)):
        raise ValueError(
            f"ddf must lead into the voxels of moving, with the affine\n{moving.affine.tolist()}\n"
            f"got a field for a moving image with\n{torch.as_tensor(target).tolist()}"
        )
