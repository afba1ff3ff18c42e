"""Whether a report's doubts are raised by fields that are wrong and not by those that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.cases import SETS, Case
from benchmarks.contrasts import recolored
from benchmarks.data import BUNDLE, hippocampus_network
from benchmarks.rows import add_row, read_rows
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.fields.metrics import compare_labels
from monai_lm.kernels.devices import find_device
from monai_lm.report import evidence
from monai_lm.report.evidence import Evidence, agreement, doubts_of, evidence_of


def verdict(
    sets: tuple[str, ...] = ("hippocampus", "bundle", "brain", "cardiac", "abdomen"),
    pairs: int = 10,
    nonsense: int = 3,
    contrasts: int = 3,
    device: str = "cpu",
    json_file: str | None = None,
    rows: str | None = None,
) -> None:
    """Register real pairs of the validation sets, other contrasts and nonsense in their place, and count doubts.

    In place of the moving image: noise, white and smoothed by 1, 2 and 4 voxels, the moving image mirrored along its
    second axis, and the moving image in the contrasts of :data:`benchmarks.contrasts.CONTRASTS`, once with the measure
    that cannot cope and once with ``mi``. A field that raised Dice and is doubted is a false alarm, a field that
    lowered it, or of nonsense, that is not doubted is a miss.

    Args:
        sets: of the shared data; of hippocampus and brain (at 2 mm) the validation subjects; ``bundle``: the hippocampi
            as their bundle predicts and refines them.
        pairs: real pairs of each set, at most.
        nonsense: how many of them also get each kind of nonsense.
        contrasts: how many of them also get each kind of contrast; not those of the bundle.
        device: where to refine: cpu, cuda, ...
        json_file: write one line per registration here, as it goes.
        rows: do not register, count what an earlier run wrote to this ``json_file``.
    """
    if rows is not None:
        if not (found := read_rows(rows)):
            raise ValueError(f"rows must be a file that json_file wrote, got {rows!r}")
        _print(found)
        return
    done: list[dict[str, Any]] = []
    chosen = find_device(device)
    for name in sets:
        for number, case in enumerate(islice(SETS["hippocampus" if name == "bundle" else name](), pairs)):
            others = _RECOLORED if number < contrasts and name != "bundle" else {}
            for kind in ("real", *(_NONSENSE if number < nonsense else ()), *others):
                done.append({"set": name, "kind": kind, **_row(name, case, kind, number, chosen)})
                add_row(json_file, done[-1])
    _print(done)


def _row(name: str, case: Case, kind: str, seed: int, device: torch.device) -> dict[str, Any]:
    fixed, moving, labels, spacing, _ = case
    similarity = "lncc"
    if kind in _NONSENSE:
        moving = _NONSENSE[kind](moving, torch.Generator().manual_seed(seed))
    if kind in _RECOLORED:
        color, similarity = _RECOLORED[kind]
        moving = recolored(moving, color, seed)
    fixed, moving, labels = fixed.to(device), moving.to(device), (labels[0].to(device), labels[1].to(device))
    if name == "bundle":
        network, inferer = hippocampus_network(BUNDLE / "models" / "model.pt", device)
        images, inferer.refine = torch.cat([moving, fixed], 1), {**(inferer.refine or {})}
        with torch.no_grad():
            result = inferer.refined(images, inferer.predict(images, network))
    else:
        result = monai_lm.refine(fixed, moving, spacing=spacing, similarity=similarity)
    measure = None if name == "bundle" else similarity
    found = evidence_of(fixed, warp(moving, result.ddf), result.ddf, None, moving, measure)
    out = {"agreement_before": agreement(fixed, moving), **vars(found), "seconds": result.seconds}
    out |= {"loss_before": float(result.initial_loss), "loss_after": float(result.final_loss)}
    if kind not in _NONSENSE:
        moved = warp(labels[1], result.ddf, mode="nearest")
        dice = [float(compare_labels(label, labels[0])["dice"]) for label in (labels[1], moved)]
        out |= {"dice_before": dice[0], "dice_after": dice[1]}
    return out


def _print(rows: list[dict[str, Any]]) -> None:
    bounds = (evidence.AGREEMENT, evidence.ROUGHNESS, evidence.EXTREMES, evidence.POLARITY)
    print("doubted: agreement < {:g}, SDlogJ > {:g}, extremes > {:g}, polarity < {:g}, or information".format(*bounds))
    print("| set | moving | pairs | worse | Dice | agreement | SDlogJ | extremes | polarity | gained | doubted |")
    print("|" + "---|" * 11)
    for name in dict.fromkeys(row["set"] for row in rows):
        for kind in ("real", *_NONSENSE, *_RECOLORED):
            found = [row for row in rows if (row["set"], row["kind"]) == (name, kind)]
            if not found:
                continue
            dice = "–"
            if kind not in _NONSENSE:
                dice = " → ".join(f"{np.mean([row[k] for row in found]):.3f}" for k in ("dice_before", "dice_after"))
            cells = [f"{_mean(found, 'agreement_before')} → {_range(found, 'agreement')}"]
            cells += [_range(found, column) for column in ("sdlogj", "extremes", "polarity", "gained")]
            worse = sum(map(_wrong, found))
            doubted = f"{sum(map(_doubted, found))}"
            print(f"| {name} | {kind} | {len(found)} | {worse} | {dice} | {' | '.join(cells)} | {doubted} |")
    for what, chosen in (
        ("pairs as they are", [row for row in rows if row["kind"] == "real"]),
        ("other contrasts, by a measure for one", [row for row in rows if row["kind"] in _RECOLORED and not _fit(row)]),
        ("other contrasts, by mi", [row for row in rows if row["kind"] in _RECOLORED and _fit(row)]),
        ("nonsense", [row for row in rows if row["kind"] in _NONSENSE]),
        ("all", rows),
    ):
        right, wrong = [[row for row in chosen if _wrong(row) is kind] for kind in (False, True)]
        missed = sum(not _doubted(row) for row in wrong)
        print(f"{what}: false alarms {sum(map(_doubted, right))} of {len(right)}, misses {missed} of {len(wrong)}")


def _fit(row: dict[str, Any]) -> bool:
    return bool(row["kind"].endswith("mi"))


def _wrong(row: dict[str, Any]) -> bool:
    return row["kind"] in _NONSENSE or row["dice_after"] < row["dice_before"]


def _doubted(row: dict[str, Any]) -> bool:
    return bool(doubts_of(Evidence(**{f.name: row[f.name] for f in fields(Evidence)})))


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.2f}"


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    known = [value for value in values if value == value]  # NaN is not itself
    return f"{min(known):.2f}–{max(known):.2f}" if known else "–"


def _noise(sigma: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    def make(moving: Tensor, generator: torch.Generator) -> Tensor:
        white = torch.randn(moving.shape, generator=generator)
        return gaussian_smooth(white, sigma) if sigma else white

    return make


_NONSENSE: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise(0), "noise 1": _noise(1), "noise 2": _noise(2), "noise 4": _noise(4),
    "mirrored": lambda moving, _: moving.flip(3),
}  # fmt: skip


_RECOLORED = {
    "inverted, mse": ("inverted", "mse"), "like T2, lncc": ("like T2", "lncc"), "random, lncc": ("random", "lncc"),
    "like T2, mi": ("like T2", "mi"), "random, mi": ("random", "mi"),
}  # fmt: skip
"""A contrast and the measure that the pair is registered by."""
