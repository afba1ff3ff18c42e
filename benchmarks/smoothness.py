"""Whether two halves of an image know how smooth a field must be."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

import monai_lm
from benchmarks.nonsense import Trial, trial
from benchmarks.rows import Row, add_row, read_rows
from benchmarks.verdict import cases_of
from monai_lm.fields import fold_count, warp
from monai_lm.fields.metrics import compare_labels, sd_log_jacobian
from monai_lm.kernels.devices import find_device

KINDS: tuple[str, ...] = (
    "real, lncc", "like T2, auto", "random, auto", "known 3 .06, lncc", "known 0 .15, lncc", "ultrasound, lncc",
    "ultrasound, auto", "stained, lncc", "stained, auto",
)  # fmt: skip


def smoothness(
    sets: tuple[str, ...] = ("hippocampus", "cardiac", "brain", "abdomen"),
    pairs: int = 4,
    half: str = "B",
    kinds: tuple[str, ...] = KINDS,
    smooth: tuple[float, ...] = (0.6, 2.4),
    planes: bool = False,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Refine pairs of the validation sets with given smoothness and with ``smooth_residual="auto"``.

    Of pairs with a known field the mean error in voxels inside the object, of others Dice; SDlogJ and folds of all.

    Args:
        sets: of :data:`benchmarks.halves.HALVES`.
        pairs: how many pairs of the half, of each set.
        half: of the subjects: settings were chosen on A, B is to report.
        kinds: of :data:`benchmarks.nonsense.KINDS`.
        smooth: values of ``smooth_residual`` to compare with.
        planes: take the middle plane of every volume along its last axis.
        device: cpu, cuda, ...
        json_file: write one line per pair and value here, as it goes; what stands in it is not run again.
    """
    done = {_key(row): row for row in read_rows(json_file)}
    chosen, shown = find_device(device), []
    for name in sets:
        some = (case for which, case in cases_of(name, planes) if which == half)
        for number, case in enumerate(islice(some, pairs)):
            for kind in kinds:
                made = trial(case, kind, number, name)
                values: tuple[float | str, ...] = (*smooth, "auto") if made is not None else ()
                for value in values:
                    row: Row = {"set": f"{name} 2D" if planes else name, "pair": number, "kind": kind, "value": value}
                    if _key(row) not in done:
                        assert made is not None
                        done[_key(row)] = row | _measured(made, value, chosen)
                        add_row(json_file, done[_key(row)])
                    shown.append(done[_key(row)])
    _print(shown, (*smooth, "auto"))


def _measured(made: Trial, value: float | str, device: torch.device) -> Row:
    """Dice, or the error of a known field, before and after."""
    case = made.case
    fixed, moving = case.fixed.to(device), case.moving.to(device)
    settings: dict[str, Any] = {"spacing": case.spacing, "similarity": made.similarity, "smooth_residual": value}
    result = monai_lm.refine(fixed, moving, **settings)
    ddf = result.ddf.cpu()
    out: Row = {"seconds": result.seconds, "sdlogj": float(sd_log_jacobian(ddf)), "folds": int(fold_count(ddf))}
    for when, field in (("before", torch.zeros_like(ddf)), ("after", ddf)):
        out[when] = _quality(made, field)
    return out


def _quality(made: Trial, ddf: Tensor) -> float:
    case = made.case
    if made.truth is None:
        return float(compare_labels(warp(case.labels[1], ddf, mode="nearest"), case.labels[0])["dice"])
    inside = (case.fixed > case.fixed.mean()).to(ddf)
    away = (ddf - made.truth).square().sum(1, keepdim=True).sqrt()
    return float((away * inside).sum() / inside.sum())


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("set", "pair", "kind", "value"))


def _print(rows: list[Row], values: tuple[float | str, ...]) -> None:
    print(f"| set, moving image | before | {' | '.join(f'{value} | SDlogJ' for value in values)} | time |")
    print("|" + "---|" * (3 + 2 * len(values)))

    def mean(some: list[Row], name: str) -> float:
        return sum(row[name] for row in some) / len(some)

    for name in dict.fromkeys(row["set"] for row in rows):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            of = {v: [r for r in rows if (r["set"], r["kind"], r["value"]) == (name, kind, v)] for v in values}
            if not of["auto"]:
                continue
            cells = [f"{mean(some, 'after'):.3f} | {mean(some, 'sdlogj'):.2f}" for some in of.values()]
            ratio = mean(of["auto"], "seconds") / mean(of[values[0]], "seconds")
            unit = ", error in voxels" if kind.startswith("known") else ", Dice"
            print(f"| {name}, {kind}{unit} | {mean(of['auto'], 'before'):.3f} | {' | '.join(cells)} | {ratio:.1f} |")
    print(f"{sum(row['folds'] for row in rows)} folds")
