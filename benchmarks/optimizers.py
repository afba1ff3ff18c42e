"""Optimizers in one engine, judged by curves of Dice against roughness, each over its smoothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.cases import SETS
from benchmarks.descents import keywords
from benchmarks.validation import refined

STEPS = {"lm": 0.5, "stateless": 0.5, "adam": 0.2}
"""Largest step in voxels; one for all sets."""

Row = dict[str, Any]


def optimizers(
    sets: tuple[str, ...] = tuple(SETS),
    pairs: int = 6,
    descents: tuple[str, ...] = tuple(STEPS),
    smoothings: tuple[float, ...] = (0.5, 0.7, 1.0),
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
        steps: largest step in voxels by descent, in place of :data:`STEPS`.
        identity: leave predictions aside.
        json_file: write one line per run here, as it goes; what stands in it is not run again.
    """
    sizes = STEPS | (steps or {})
    rows = _read(json_file)
    shown: dict[str, Row] = {}
    for name in sets:
        for number, case in enumerate(islice(SETS[name](), pairs)):
            for descent in descents:
                for smoothing in smoothings:
                    how = {"descent": descent, "step": sizes[descent], "smoothing": smoothing, "identity": identity}
                    key = json.dumps({"set": name, "pair": number, **how})
                    if key not in rows:
                        given: Row = {"step": sizes["lm"]} if descent == "lm" else keywords(descent, sizes[descent])
                        start = None if identity else case.ddf
                        rows[key] = json.loads(key) | refined(case, start, given | {"smooth_residual": smoothing})
                        if json_file:
                            with Path(json_file).open("a") as file:
                                file.write(json.dumps(rows[key]) + "\n")
                    shown[key] = rows[key]
    for name in sets:
        _print(name, [row for row in shown.values() if row["set"] == name])


def _read(path: str | None) -> dict[str, Row]:
    if path is None or not Path(path).is_file():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    names = ("set", "pair", "descent", "step", "smoothing", "identity")
    return {json.dumps({name: row[name] for name in names}): row for row in rows}


def _print(name: str, rows: list[Row]) -> None:
    curves = {row["pair"]: [r for r in rows if r["descent"] == "lm" and r["pair"] == row["pair"]] for row in rows}
    print(
        f"| {name}, {len(curves)} pairs | Dice | SDlogJ | seconds | LM − it (s.e.) at its smoothing | at its SDlogJ |"
    )
    print("|---|---|---|---|---|---|")
    for descent, smoothing in dict.fromkeys((row["descent"], row["smoothing"]) for row in rows):
        found = [row for row in rows if (row["descent"], row["smoothing"]) == (descent, smoothing)]
        means = [f"{fmean(row[c] for row in found):.4g}" for c in ("dice_after", "sdlogj_after", "seconds")]
        if descent != "lm":
            same = ((r, row) for row in found for r in curves[row["pair"]] if r["smoothing"] == smoothing)
            means.append(_gap(r["dice_after"] - row["dice_after"] for r, row in same))
            means.append(_gap(ahead(curves[row["pair"]], row) for row in found))
        print(f"| {descent}, {smoothing:g} | " + " | ".join([*means, "", ""][:5]) + " |")


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
