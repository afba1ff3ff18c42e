"""Whether the map of uncertainty is large where the field is wrong: of known warps, and on borders of labels."""

from __future__ import annotations

from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.stats import spearmanr
from torch import Tensor

import monai_lm
from benchmarks.cases import SETS, Case
from benchmarks.rows import add_row
from monai_lm.fields import gaussian_smooth, repair, warp
from monai_lm.fields.algebra import lengths
from monai_lm.solver.uncertainty import uncertainty as map_of

__all__ = ["uncertainty"]

_SHOWN = 0.15
"""Share of the brightest voxel above which a smoothed image shows something."""


def uncertainty(
    sets: tuple[str, ...] = ("hippocampus", "brain", "cardiac", "abdomen"), pairs: int = 2, json_file: str | None = None
) -> None:
    """Rank correlation of the map with the length of the true error, of known warps, and with distances of borders.

    The moving image is warped by a smooth field (a motion of three voxels of the finest axis, another of one that is
    half as wide), its contrast bent, its brightness changed smoothly, and noise of 2 or 6 % of its range added to both.
    On real pairs the error at a voxel on the border of a label is the distance of the same label's border in the
    warped moving image.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        json_file: write one line per registration here, as it goes.
    """
    print("| set | error | pairs | rank correlation | where the image shows something | mean error by fifths, mm |")
    print("|" + "---|" * 6)
    for name in sets:
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed, case in enumerate(islice(SETS[name](), pairs)):
            for noise in (0.02, 0.06):
                rows.setdefault(f"known, noise {noise:g}", []).append(_known(case, seed, noise))
            rows.setdefault("borders", []).append(_borders(case))
            for kind, found in rows.items():
                add_row(json_file, {"set": name, "error": kind, "seed": seed, **found[-1]})
        for kind, found in rows.items():
            rank, shown = (fmean(row[key] for row in found) for key in ("rank", "shown"))
            fifths = [f"{fmean(row['errors'][k] for row in found):.2f}" for k in range(5)]
            means = [f"{fmean(row['means'][k] for row in found):.2f}" for k in range(5)]
            cells = [name, kind, f"{len(found)}", f"{rank:.2f}", f"{shown:.2f}"]
            print(f"| {' | '.join(cells)} | {' '.join(fifths)} (the map's: {' '.join(means)}) |")


def _known(case: Case, seed: int, noise: float) -> dict[str, Any]:
    fixed, moving, truth = _warped(case, seed, noise)
    ddf = monai_lm.refine(fixed, moving, spacing=case.spacing).ddf
    found = map_of(fixed, moving, ddf, spacing=case.spacing)
    error = lengths((ddf - truth) * _along(_edges(case), truth))
    shown = gaussian_smooth(fixed, 1.0) > _SHOWN
    return _compared(found[0, 0].flatten(), error.flatten(), shown.flatten())


def _borders(case: Case) -> dict[str, Any]:
    ddf = monai_lm.refine(case.fixed, case.moving, spacing=case.spacing).ddf
    found = map_of(case.fixed, case.moving, ddf, spacing=case.spacing)[0, 0].numpy()
    fixed = case.labels[0][0, 0].numpy()
    moved = warp(case.labels[1], ddf, mode="nearest")[0, 0].numpy()
    values, errors = [], []
    for label in sorted(set(np.unique(fixed)) & set(np.unique(moved)) - {0.0}):
        away = distance_transform_edt(~_border(moved == label), sampling=_edges(case))
        border = _border(fixed == label)
        values.append(found[border])
        errors.append(away[border])
    value, error = (torch.from_numpy(np.concatenate(parts)) for parts in (values, errors))
    return _compared(value, error, torch.ones_like(value, dtype=torch.bool))


def _border(region: np.ndarray) -> np.ndarray:
    return region & ~binary_erosion(region, border_value=1)


def _compared(value: Tensor, error: Tensor, shown: Tensor) -> dict[str, Any]:
    """Rank correlations, and mean error and value of the fifths of what is shown, by value."""
    rank, inside = (float(spearmanr(value[at], error[at])[0]) for at in (slice(None), shown))
    order = value[shown].argsort()
    fifths = order[: len(order) // 5 * 5].view(5, -1)
    means = [[float(x[shown][fifth].mean()) for fifth in fifths] for x in (error, value)]
    return {"rank": rank, "shown": inside, "errors": means[0], "means": means[1]}


def _warped(case: Case, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving image, and the field ``(1, n, *S)`` in voxels that leads from one to the other."""
    generator = torch.Generator().manual_seed(seed)
    moving, edges = case.moving, _edges(case)
    moving = (moving - moving.min()) / (moving.max() - moving.min())
    extent = min(s * e for s, e in zip(moving.shape[2:], edges, strict=True))

    def smooth(channels: int, share: float) -> Tensor:
        noise = torch.randn(1, channels, *moving.shape[2:], generator=generator)
        values = gaussian_smooth(noise, [share * extent / e for e in edges])
        return values / values.std()

    motion = 1.8 * smooth(len(edges), 1 / 8) + 0.7 * smooth(len(edges), 1 / 16)
    truth = repair(min(edges) * motion / _along(edges, motion))
    bright = torch.exp(0.15 * smooth(1, 1 / 5))
    fixed, moving = (
        image + noise * torch.randn(image.shape, generator=generator)
        for image in (warp(moving, truth).clamp(min=0) ** 1.2 * bright, moving)
    )
    return fixed, moving, truth


def _edges(case: Case) -> tuple[float, ...]:
    return case.spacing or (1.0,) * (case.fixed.dim() - 2)


def _along(edges: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(edges).view(1, -1, *[1] * len(edges))
