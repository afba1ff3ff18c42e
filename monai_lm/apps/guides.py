"""What belongs to a pair of files beside its images, on the grids where those are compared: what guides, and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.space import Grid, to_voxel
from monai_lm.guidance import Guidance, Keypoints, Labels, SoftLabels
from monai_lm.io.images import Image, Pair, Probabilities
from monai_lm.solver.between import Between

__all__ = ["beside_of", "check_guide", "guides_of", "masks_of", "said_of"]


def check_guide(guide: Mapping[str, Any] | None, labels: Any, points: Any, soft_labels: Any) -> None:
    """Whether what shall guide is there; ValueError if not."""
    if guide is None:
        return
    if not guide.get("labels") and not guide.get("points") and soft_labels is None:
        raise ValueError(
            "guide_weight needs guide_labels, guide_points or fixed_soft_labels and moving_soft_labels, got "
            f"{guide.get('weight')} alone"
        )
    chosen = guide.get("labels")
    if isinstance(chosen, str) and chosen != "all":
        raise ValueError(f"guide_labels must be a list of labels or 'all', got {chosen!r}")
    for name, wanted, given in (("labels", chosen, labels), ("points", guide.get("points"), points)):
        if wanted and given is None:
            one = name.removesuffix("s") if name == "labels" else name
            raise ValueError(f"guide_{name} needs fixed_{one} and moving_{one}, got none")


def guides_of(
    pair: Pair, guide: Mapping[str, Any] | None, device: torch.device, grids: tuple[Grid, Grid] | None = None
) -> list[Guidance] | None:
    """What guides a pair.

    Args:
        pair: its images, labels, points and soft labels, which guide wherever they are given.
        guide: ``labels``, a list or ``"all"``, and ``points``, whether they do, with a ``weight``.
        device: where the images are.
        grids: of the fixed and of the moving image as they are compared, voxel by voxel, the moving one where the
            affine of the pair starts; ``None``: both are on the fixed grid.
    """
    if guide is None and pair.soft_labels is None:
        return None
    guide = guide or {}
    out: list[Guidance] = []
    here, there = grids or (pair.fixed.grid, pair.fixed.grid)
    weight, chosen = float(guide.get("weight", 1.0)), guide.get("labels")
    if chosen and pair.labels:
        fixed_map, moving_map = (
            _brought(image, grid, initial, device)
            for image, grid, initial in zip(pair.labels, (here, there), (None, pair.initial), strict=True)
        )
        out.append(Labels(fixed_map, moving_map, weight, None if chosen == "all" else [int(v) for v in chosen]))
    if pair.soft_labels:
        fixed_soft, moving_soft = (
            _brought(maps, grid, initial, device, "bilinear")
            for maps, grid, initial in zip(pair.soft_labels, (here, there), (None, pair.initial), strict=True)
        )
        out.append(SoftLabels(fixed_soft, moving_soft, weight))
    if guide.get("points") and pair.points:
        affines = here.affine, there.affine if pair.initial is None else np.asarray(pair.initial) @ there.affine
        fixed, moving = (_voxels(p, a).to(device) for p, a in zip(pair.points, affines, strict=True))
        out.append(Keypoints(fixed, moving, weight, there.spacing))
    return out


def said_of(pair: Pair, guide: Mapping[str, Any] | None) -> dict[str, Any]:
    """What guides a pair, for the record: what :func:`guides_of` takes, and of soft labels how many there are."""
    return dict(guide or {}) | ({} if pair.soft_labels is None else {"soft_labels": pair.soft_labels[0].data.shape[1]})


def beside_of(
    pair: Pair, guide: Mapping[str, Any] | None, device: torch.device, grids: tuple[Grid, Grid] | None = None
) -> dict[str, Any]:
    """What belongs to a pair beside its images and masks, as keyword arguments of :func:`monai_lm.refine`.

    The arguments are those of :func:`guides_of`.
    """
    out: dict[str, Any] = {"guidance": guides_of(pair, guide, device, grids)}
    ways = zip(grids or (pair.fixed.grid, pair.fixed.grid), (None, pair.initial), strict=True)
    for (name, image), (grid, initial) in zip(
        (("lesion", pair.lesion), ("moving_lesion", pair.moving_lesion)), ways, strict=True
    ):
        out[name] = None if image is None else _brought(image, grid, initial, device)
    return out


def masks_of(pair: Pair, device: torch.device, grids: tuple[Grid, Grid]) -> dict[str, Tensor]:
    """The masks of a pair, as keyword arguments of :func:`monai_lm.refine`; zero where a grid is larger than they are.

    ValueError for one that shows nothing of its grid. The arguments are those of :func:`guides_of`.
    """
    out = {}
    for name, image, grid, initial in zip(
        ("mask", "moving_mask"), (pair.mask, pair.moving_mask), grids, (None, pair.initial), strict=True
    ):
        if image is not None:
            out[name] = _brought(image, grid, initial, device, "bilinear").clamp_(0, 1)  # rounding may exceed 1
            if not bool(out[name].any()):
                raise ValueError(f"{image.path} must show something of what the bundle looks at, it is zero there")
    return out


def _brought(
    image: Image | Probabilities, grid: Grid, initial: np.ndarray | None, device: torch.device, mode: str = "nearest"
) -> Tensor:
    """Labels, probabilities or a mask on another grid, ``(1, K, *S)``."""
    return Between(grid, image.grid, initial).brought(image.data.to(device), None, mode, "zeros")


def _voxels(points: Tensor, affine: np.ndarray) -> Tensor:
    """Points ``(N, n)`` in RAS millimetres as ``(1, N, n)`` in voxels."""
    return to_voxel(points, affine).to(torch.float32)[None]
