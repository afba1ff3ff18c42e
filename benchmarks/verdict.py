"""Whether a report's verdict doubts fields that are wrong and not those that are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

import monai_lm
from benchmarks.cases import Case
from benchmarks.halves import HALVES
from benchmarks.nonsense import KINDS, UNFIT, Trial, trial
from benchmarks.rows import Row, add_row, read_rows
from monai_lm.fields import warp
from monai_lm.fields.metrics import compare_labels
from monai_lm.kernels.devices import find_device
from monai_lm.report.case import checked_case
from monai_lm.report.findings import assess

_FAR = 0.1
"""A pair moved far off that ends with so much less Dice than the same pair where it was has not arrived."""

_SAME = {"dice": 0.005, "error": 0.01}
"""A field that changes Dice, or the error in voxels, by less has made nothing better or worse."""

_DOUBTS = (
    "agreement", "contrast", "information", "noise", "mirror", "rough", "extreme", "misaligned", "iterations",
    "similarity",
)  # fmt: skip
_TRUTHS = ("good", "bad", "same", "not arrived", "left and right")


def verdict(
    sets: tuple[str, ...] = ("hippocampus", "brain", "cardiac", "abdomen"),
    pairs: int = 10,
    tried: int = 3,
    kinds: tuple[str, ...] = tuple(KINDS),
    planes: bool = False,
    device: str = "cpu",
    json_file: str | None = None,
    rows: str | None = None,
) -> None:
    """Register real pairs of the validation sets, other contrasts and nonsense, and count what the verdict doubts.

    A field is *bad* if it lowered Dice from where it started, of pairs with a known field raised the mean error, or is
    of nonsense: noise, another organ, a mirror image. It is the *same* if it changed Dice by less than .005, or the
    error by less than .01 voxels. Pairs that were moved far off and end with .1 Dice less than where they were have
    *not arrived*. Brains whose left and right are exchanged are counted by themselves: no image tells them. All others
    are *good*. A field is doubted if the outcome is another one than "improved". Pairs are of two halves of the
    subjects, A and B: bounds were chosen on A.

    Args:
        sets: of :data:`benchmarks.halves.HALVES`.
        pairs: of each set, at most; all as they are, with LNCC and with MI.
        tried: how many of them are also tried with all ``kinds``.
        kinds: of :data:`benchmarks.nonsense.KINDS`.
        planes: take the middle plane of every volume along its last axis.
        device: where to refine: cpu, cuda, ...
        json_file: write one line per registration here, as it goes; what stands in it is not run again.
        rows: do not register, count what an earlier run wrote to this ``json_file``.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"kinds must be of {list(KINDS)}, got {unknown}")
    if rows is not None:
        if not (found := read_rows(rows)):
            raise ValueError(f"rows must be a file that json_file wrote, got {rows!r}")
        _print(found)
        return
    done = {_key(row): row for row in read_rows(json_file)}
    chosen, shown = find_device(device), []
    for name in sets:
        for number, (half, case) in enumerate(islice(cases_of(name, planes), pairs)):
            for kind in kinds if number < tried else [kind for kind in kinds if kind in ("real, lncc", "real, mi")]:
                row: Row = {"set": f"{name} 2D" if planes else name, "half": half, "pair": number, "kind": kind}
                if _key(row) not in done:
                    made = trial(case, kind, number, name)
                    if made is None:
                        continue
                    done[_key(row)] = row | _measured(made, chosen)
                    add_row(json_file, done[_key(row)])
                shown.append(done[_key(row)])
    _print(shown)


def cases_of(name: str, planes: bool) -> Iterator[tuple[str, Case]]:
    """Pairs of a set with the half that they belong to, as volumes or as middle planes."""
    for half, case in HALVES[name]():
        if not planes:
            yield half, case
            continue
        middle = case.fixed.shape[-1] // 2
        images = [image[..., middle] for image in (case.fixed, case.moving, *case.labels)]
        spacing = None if case.spacing is None else case.spacing[:2]
        yield half, Case(images[0], images[1], (images[2], images[3]), spacing)


def _measured(made: Trial, device: torch.device) -> Row:
    """Register a trial, and what the verdict says of it, which sees neither labels nor the true field."""
    case = made.case
    fixed, moving = case.fixed.to(device), case.moving.to(device)
    start = torch.zeros(1, fixed.dim() - 2, *fixed.shape[2:]) if made.start is None else made.start
    prediction = None if made.start is None else start.to(device)
    settings = {"similarity": made.similarity}
    result = monai_lm.refine(fixed, moving, prediction, spacing=case.spacing, similarity=made.similarity)
    affine = np.diag([*(case.spacing or (1.0,) * (fixed.dim() - 2)), *[1.0] * (6 - fixed.dim())])
    found = assess(checked_case(fixed, moving, result, prediction, affine=affine, settings=settings))
    ddf = result.ddf.cpu()
    out: Row = {"nonsense": made.nonsense, "verdict": found.state, "outcome": found.outcome}
    out |= {"remarks": list(found.remarks), "seconds": result.seconds, **dataclasses.asdict(found.evidence)}
    out |= {"loss_before": float(result.initial_loss), "loss_after": float(result.final_loss)}
    halves = {"apart": result.apart, "held": result.held}
    out |= {name: float("nan") if value is None else float(value) for name, value in halves.items()}
    inside = (case.fixed > case.fixed.mean()).to(ddf)
    for when, field in (("before", start), ("after", ddf)):
        moved = warp(case.labels[1], field, mode="nearest")
        out[f"dice_{when}"] = float(compare_labels(moved, case.labels[0])["dice"])
        if made.truth is not None:
            away = (field - made.truth).square().sum(1, keepdim=True).sqrt()
            out[f"error_{when}"] = float((away * inside).sum() / inside.sum())
    return out


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("set", "pair", "kind"))


def _truth(row: Row, reached: dict[tuple[Any, ...], float]) -> str:
    """One of :data:`_TRUTHS`."""
    if row["set"].startswith("brain") and row["kind"].startswith("mirrored 0"):
        return "left and right"
    if row["nonsense"]:
        return "bad"
    where = reached.get((row["set"], row["pair"]))
    if row["kind"].startswith("shifted") and where is not None and row["dice_after"] < where - _FAR:
        return "not arrived"
    name, sign = ("error", -1) if "error_after" in row else ("dice", 1)
    gained = sign * (row[f"{name}_after"] - row[f"{name}_before"])
    return "same" if abs(gained) < _SAME[name] else "good" if gained > 0 else "bad"


def _print(rows: list[Row]) -> None:
    reached = {(row["set"], row["pair"]): row["dice_after"] for row in rows if row["kind"] == "real, lncc"}
    told = [(row, _truth(row, reached)) for row in rows]
    print(f"| moving image, measure | {' | doubted | '.join(_TRUTHS)} | doubted |")
    print("|" + "---|" * (1 + 2 * len(_TRUTHS)))
    every = list(dict.fromkeys(row["kind"] for row in rows))
    suited = [kind for kind in every if kind not in UNFIT]
    for title, kinds, halves in (
        *((kind, [kind], "AB") for kind in every),
        *((f"all, half {half}", every, half) for half in "AB"),
        *((f"measures that suit, half {half}", suited, half) for half in "AB"),
    ):
        some = [(row, truth) for row, truth in told if row["kind"] in kinds and row["half"] in halves]
        cells = []
        for which in _TRUTHS:
            of = [row for row, truth in some if truth == which]
            cells += [f"{len(of)}", f"{sum(map(_doubted, of))}" if of else ""]
        print(f"| {title} | {' | '.join(cells)} |")
    shown = _TRUTHS[:4]
    print(f"| remark | {' | '.join(f'of {truth}' for truth in shown)} |")
    print("|" + "---|" * (1 + len(shown)))
    for remark in _DOUBTS:
        counts = [sum(remark in row["remarks"] for row, truth in told if truth == which) for which in shown]
        print(f"| {remark} | {' | '.join(map(str, counts))} |")


def _doubted(row: Row) -> bool:
    return bool(row["outcome"] != "improved")
