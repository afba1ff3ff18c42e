"""The defaults on every validation set: quality, roughness, folds, time, and what looking for folds takes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import monai_lm
from benchmarks.cases import SETS, Case
from benchmarks.metrics import mean_dice
from monai_lm import kernels
from monai_lm.fields import fold_count
from monai_lm.metrics import sd_log_jacobian


def validation(
    sets: tuple[str, ...] = tuple(SETS),
    pairs: int = 5,
    identity: bool = False,
    settings: dict[str, Any] | None = None,
    json_file: str | None = None,
    against: str | None = None,
) -> None:
    """Refine pairs of the validation sets; one line per pair and the means of every set.

    Seconds are CPU seconds of all threads, and of them the share that looking for folds and repairing them takes.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        identity: leave predictions aside.
        settings: keyword arguments of ``monai_lm.refine``; default: none.
        json_file: write one line per pair here, as it goes; pairs that stand in it are not run again.
        against: the ``json_file`` of another run; paired differences to it are printed, with standard errors.
    """
    done: dict[tuple[str, int], dict[str, Any]] = _read(json_file)
    for name in sets:
        for number, case in enumerate(islice(SETS[name](), pairs)):
            if (name, number) not in done:
                row = {"set": name, "pair": number, **_measured(case, None if identity else case.ddf, settings or {})}
                done[name, number] = row
                if json_file:
                    with Path(json_file).open("a") as file:
                        file.write(json.dumps(row) + "\n")
                print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    _print([row for row in done.values() if row["set"] in sets and row["pair"] < pairs], _read(against))


def _measured(case: Case, start: Any, settings: dict[str, Any]) -> dict[str, Any]:
    spent = [0.0]

    def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.process_time()
            try:
                return run(*args)
            finally:
                spent[0] += time.process_time() - started

        return call

    with ExitStack() as stack:
        for name in ("unfolded", "mend"):
            stack.enter_context(mock.patch.object(kernels, name, clocked(getattr(kernels, name))))
        started = time.process_time()
        result = monai_lm.refine(case.fixed, case.moving, start, spacing=case.spacing, **settings)
        seconds = time.process_time() - started
    before = mean_dice(*case.labels, start)
    return {
        "before": before,
        "dice": mean_dice(*case.labels, result.ddf),
        "sdlogj": float(sd_log_jacobian(result.ddf)),
        "folds": int(fold_count(result.ddf)),
        "loss": float(result.final_loss),
        "seconds": seconds,
        "guard": spent[0] / seconds,
    }


def _read(path: str | None) -> dict[tuple[str, int], dict[str, Any]]:
    if path is None or not Path(path).is_file():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {(row["set"], row["pair"]): row for row in rows}


def _print(rows: list[dict[str, Any]], others: dict[tuple[str, int], dict[str, Any]]) -> None:
    columns = ("before", "dice", "sdlogj", "folds", "loss", "seconds", "guard")
    print("| set | pairs | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["set"] for row in rows):
        found = [row for row in rows if row["set"] == name]
        print(f"| {name} | {len(found)} | " + " | ".join(f"{fmean(r[c] for r in found):.4g}" for c in columns) + " |")
        both = [(row, others[name, row["pair"]]) for row in found if (name, row["pair"]) in others]
        for column in ("dice", "sdlogj", "loss", "seconds") if both else ():
            gaps = [row[column] - other[column] for row, other in both]
            error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            print(f"    {column}: {fmean(gaps):+.4g} (standard error {error:.2g}) against the other run")
