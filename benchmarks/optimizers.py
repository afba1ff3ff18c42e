"""Optimizers in one engine, judged by curves of Dice against roughness, each over its smoothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, product
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.cases import SETS
from benchmarks.descents import DESCENTS, STEPS, keywords
from benchmarks.rows import Row, add_row, read_rows
from benchmarks.validation import refined


def optimizers(
    sets: tuple[str, ...] = tuple(SETS),
    pairs: int = 6,
    descents: tuple[str, ...] = ("lm", *DESCENTS),
    smoothings: tuple[float, ...] = (0.4, 0.6, 0.8),
    steps: dict[str, float] | None = None,
    identity: bool = False,
    json_file: str | None = None,
) -> None:
    """Dice, SDlogJ and seconds of every optimizer with every ``smooth_residual``; and LM's Dice at their roughness.

    ``at its SDlogJ`` is LM's Dice less the row's where LM is as rough, pair by pair, along LM's curve; pairs whose
    roughness LM's curve does not reach are left out and counted.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        descents: ``lm`` and those of :data:`benchmarks.descents.DESCENTS`.
        smoothings: values of ``smooth_residual``.
        steps: largest step in voxels by descent, in place of :data:`benchmarks.descents.STEPS`.
        identity: leave predictions aside.
        json_file: write one line per run here, as it goes; what stands in it is not run again.
    """
    sizes = {"lm": 0.5} | STEPS | (steps or {})
    if unknown := [descent for descent in descents if descent not in sizes or descent not in ("lm", *DESCENTS)]:
        raise ValueError(f"descents must be of {['lm', *DESCENTS]} and have a step in {sizes}, got {unknown}")
    rows = {_key(row): row for row in read_rows(json_file)}
    shown: list[Row] = []
    for name in sets:
        for number, case in enumerate(islice(SETS[name](), pairs)):
            for descent, smoothing in product(descents, smoothings):
                row: Row = {"set": name, "pair": number, "descent": descent, "step": sizes[descent]}
                row |= {"smoothing": smoothing, "identity": identity}
                if _key(row) not in rows:
                    given: Row = {} if descent == "lm" else keywords(descent, sizes[descent])
                    settings = given | {"step": sizes[descent], "smooth_residual": smoothing}
                    rows[_key(row)] = row | refined(case, None if identity else case.ddf, settings)
                    add_row(json_file, rows[_key(row)])
                shown.append(rows[_key(row)])
    for name in sets:
        _print(name, [row for row in shown if row["set"] == name])


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("set", "pair", "descent", "step", "smoothing", "identity"))


def _print(name: str, rows: list[Row]) -> None:
    curves = {row["pair"]: [r for r in rows if r["descent"] == "lm" and r["pair"] == row["pair"]] for row in rows}
    print(
        f"| {name}, {len(curves)} pairs | Dice | SDlogJ | seconds | LM − it (s.e.) at its smoothing | at its SDlogJ |"
    )
    print("|---|---|---|---|---|---|")
    for descent, smoothing in dict.fromkeys((row["descent"], row["smoothing"]) for row in rows):
        found = [row for row in rows if (row["descent"], row["smoothing"]) == (descent, smoothing)]
        means = [f"{fmean(row[c] for row in found):.4g}" for c in ("dice_after", "sdlogj_after", "seconds")]
        gaps = ["", ""]
        if descent != "lm":
            same = ((r, row) for row in found for r in curves[row["pair"]] if r["smoothing"] == smoothing)
            gaps = [_gap(r["dice_after"] - row["dice_after"] for r, row in same)]
            gaps.append(_gap(ahead(curves[row["pair"]], row) for row in found))
        print(f"| {descent}, {smoothing:g} | " + " | ".join(means + gaps) + " |")


def ahead(curve: list[Row], row: Row) -> float:
    """Dice along a curve where it is as rough as the row, less the row's; NaN where the curve does not reach it."""
    points = sorted((r["sdlogj_after"], r["dice_after"]) for r in curve)
    if not points:
        return float("nan")
    rough, dice = zip(*points, strict=True)
    here = np.interp(row["sdlogj_after"], rough, dice, left=np.nan, right=np.nan)
    return float(here) - float(row["dice_after"])


def _gap(values: Iterable[float]) -> str:
    every = list(values)
    known = [value for value in every if value == value]  # NaN is not itself
    if not known:
        return "–"
    error = f" ({stdev(known) / len(known) ** 0.5:.4f})" if len(known) > 1 else ""
    return f"{fmean(known):+.4f}{error}" + (f", {len(known)} of {len(every)}" if len(known) < len(every) else "")
