"""What guides the refinement of files: their labels and landmarks, on the fixed grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.space import to_voxel
from monai_lm.guidance import Guidance, Keypoints, Labels
from monai_lm.io.images import Pair

__all__ = ["check_guide", "guides_of"]


def check_guide(guide: Mapping[str, Any] | None, labels: Any, points: Any, bundle: Any) -> None:
    """Whether what shall guide is there; ValueError if not."""
    if guide is None:
        return
    if bundle is not None:
        raise ValueError("guide_labels and guide_points cannot be used together with bundle")
    chosen = guide.get("labels")
    if isinstance(chosen, str) and chosen != "all":
        raise ValueError(f"guide_labels must be a list of labels or 'all', got {chosen!r}")
    for name, wanted, given in (("labels", chosen, labels), ("points", guide.get("points"), points)):
        if wanted and given is None:
            one = name.removesuffix("s") if name == "labels" else name
            raise ValueError(f"guide_{name} needs fixed_{one} and moving_{one}, got none")


def guides_of(pair: Pair, guide: Mapping[str, Any] | None, device: torch.device) -> list[Guidance] | None:
    """What guides a pair: ``labels``, a list or ``"all"``, and ``points``, whether they do, with a ``weight``."""
    if guide is None:
        return None
    out: list[Guidance] = []
    weight, chosen = float(guide.get("weight", 1.0)), guide.get("labels")
    if chosen and pair.labels:
        still = torch.zeros(1, len(pair.fixed.grid.size), *pair.fixed.grid.size, device=device)
        maps = pair.labels[0].data.to(device), pair.brought(pair.labels[1], still)
        out.append(Labels(*maps, weight, None if chosen == "all" else [int(v) for v in chosen]))
    if guide.get("points") and pair.points:
        here = pair.fixed.grid.affine
        there = here if pair.initial is None else np.asarray(pair.initial) @ here
        fixed, moving = (_voxels(p, a).to(device) for p, a in zip(pair.points, (here, there), strict=True))
        out.append(Keypoints(fixed, moving, weight, pair.fixed.grid.spacing))
    return out


def _voxels(points: Tensor, affine: np.ndarray) -> Tensor:
    """Points ``(N, n)`` in RAS millimetres as ``(1, N, n)`` in voxels."""
    return to_voxel(points, affine).to(torch.float32)[None]
