"""Guidance by labels and keypoints: what guides, what does not, and what the images alone would have made of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import monai_lm
from benchmarks.cases import SETS, Case
from benchmarks.rows import Row, add_row, read_rows
from monai_lm.fields import fold_count, gaussian_smooth, sample_points, warp
from monai_lm.fields.metrics import label_overlap, sd_log_jacobian, target_registration_error
from monai_lm.guidance import Guidance, Keypoints, Labels

__all__ = ["KINDS", "guidance"]

KINDS = ("labels", "warp", "centroids")
"""Every second label of both images; 60 points in the labels of an image that a known field warps, with noise as strong
as the image on it; or the centroids of labels, where there are twenty: of both kinds of points every second one."""


def guidance(
    sets: tuple[str, ...] = ("hippocampus", "brain", "cardiac", "abdomen"),
    pairs: int = 3,
    kinds: tuple[str, ...] = KINDS,
    weights: tuple[float, ...] = (1.0,),
    json_file: str | None = None,
    device: str = "cpu",
) -> None:
    """Dice of labels, and TRE in millimetres of points, that guide and that are held out, with and without guidance.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        kinds: of :data:`KINDS`.
        weights: of the guidance.
        json_file: write one line per run here, as it goes; what stands in it is not run again.
        device: where it runs; the same for all that is in ``json_file``.
    """
    done = {_key(row): row for row in read_rows(json_file)}
    for name in sets:
        shown: list[Row] = []
        for number, case in enumerate(islice(SETS[name](), pairs)):
            for kind, weight in product(kinds, (0.0, *weights)):
                row: Row = {"set": name, "pair": number, "kind": kind, "weight": weight}
                if _key(row) not in done:
                    for measured in _measured(_on(case, device), kind, weight):
                        done[_key(row)] = row | measured
                        add_row(json_file, done[_key(row)])
                shown += [done[_key(row)]] if _key(row) in done else []
        _print(name, shown)


def _on(case: Case, device: str) -> Case:
    """The case with all its tensors on a device."""

    def moved(tensors: tuple[Tensor | None, ...]) -> list[Any]:
        return [None if x is None else x.to(device) for x in tensors]

    fixed, moving, ddf = moved((case.fixed, case.moving, case.ddf))
    return case._replace(fixed=fixed, moving=moving, ddf=ddf, labels=tuple(moved(case.labels)))


def _measured(case: Case, kind: str, weight: float) -> Iterator[Row]:
    """What comes out of a case, if it has what the kind needs."""
    if kind == "labels":
        yield _of_labels(case, weight)
    elif (found := _warped(case) if kind == "warp" else _centroids(case)) is not None:
        yield _of_points(*found, weight)


def _of_labels(case: Case, weight: float) -> Row:
    fixed, moving = case.labels
    values = _common(case)
    guides = Labels(fixed, moving, weight, values[::2]) if weight else None
    row, ddf = _refined(case, guides)
    dice, _ = label_overlap(warp(moving.float(), ddf, mode="nearest")[0, 0], fixed[0, 0].float())
    held = [dice[v] for v in values[1::2]]
    return {"guided": fmean(dice[v] for v in values[::2]), "held": fmean(held) if held else float("nan"), **row}


def _of_points(case: Case, fixed: Tensor, moving: Tensor, weight: float) -> Row:
    guides = Keypoints(fixed[:, ::2], moving[:, ::2], weight) if weight else None
    row, ddf = _refined(case, guides)
    spacing = torch.tensor([case.spacing or (1.0,) * (ddf.dim() - 2)], device=ddf.device)
    missed = target_registration_error(ddf, fixed, moving, spacing)[0]
    return {"guided": float(missed[::2].mean()), "held": float(missed[1::2].mean()), **row}


def _refined(case: Case, guides: Guidance | None) -> tuple[Row, Tensor]:
    result = monai_lm.refine(case.fixed, case.moving, case.ddf, spacing=case.spacing, guidance=guides)
    ddf = result.ddf
    return {
        "folds": int(fold_count(ddf).sum()),
        "sdlogj": float(sd_log_jacobian(ddf).mean()),
        "seconds": result.seconds,
    }, ddf


def _common(case: Case) -> list[int]:
    """Labels of both images."""
    fixed, moving = ({int(v) for v in labels.unique()} for labels in case.labels)
    return sorted((fixed & moving) - {0})


def _warped(case: Case) -> tuple[Case, Tensor, Tensor]:
    """The moving image and what a smooth field makes of it, with noise; points in the fixed labels, and theirs."""
    size = case.fixed.shape[2:]
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    device = case.fixed.device  # noise is that of the CPU on any
    ddf = gaussian_smooth(torch.randn(1, len(size), *size, generator=noise[0]), min(size) / 6).to(device)
    ddf = ddf * (min(size) / 5 / ddf.abs().max())
    inside = (case.labels[0][0, 0] > 0).nonzero().float()
    points = inside[torch.randperm(len(inside), generator=noise[1])[:60].to(device)][None]
    fixed = warp(case.moving, ddf)
    fixed = fixed + case.moving.std() * torch.randn(fixed.shape, generator=noise[2]).to(device)
    return case._replace(fixed=fixed, ddf=None), points, points + sample_points(ddf, points)


def _centroids(case: Case) -> tuple[Case, Tensor, Tensor] | None:
    values = [v for v in _common(case) if all(int((labels == v).sum()) > 30 for labels in case.labels)]
    if len(values) < 20:
        return None
    fixed, moving = (
        torch.stack([(labels[0, 0] == v).nonzero().float().mean(0) for v in values])[None] for labels in case.labels
    )
    return case, fixed, moving


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("set", "pair", "kind", "weight"))


def _print(name: str, rows: list[Row]) -> None:
    columns = ("guided", "held", "folds", "sdlogj", "seconds")
    print(f"| {name} | weight | pairs | " + " | ".join(columns) + " |\n|---|---|---|" + "---|" * len(columns))
    for kind, weight in dict.fromkeys((row["kind"], row["weight"]) for row in rows):
        found = [row for row in rows if (row["kind"], row["weight"]) == (kind, weight)]
        means = [f"{fmean(row[c] for row in found):.3f}" for c in columns]
        what = "Dice" if kind == "labels" else "TRE"
        print(f"| {kind}, {what} | {weight:g} | {len(found)} | " + " | ".join(means) + " |")
