"""Steps of a part: run one by one, each writes its line at once; what was written can be made into a table."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import add_row, read_rows

__all__ = ["Step", "Values", "now_of", "run_steps", "table", "write_row"]

Values = dict[str, Any]
Step = tuple[str, Callable[[], Values]]
"""A name, and a function that measures and returns values; one that fails is told and does not stop the others."""

BROKEN = 3
"""Exit status of a process whose device does not answer any more after a step that failed."""


def write_row(rows: Path, step: str, **values: Any) -> None:
    """Append one line."""
    add_row(rows, {"step": step, **values})


def now_of(rows: Path) -> Path:
    """The file that names the step at work, for whoever finds that the process has ended."""
    return rows.with_suffix(".now")


def run_steps(steps: list[Step], rows: Path, device: torch.device, deadline: float) -> None:
    """Run the steps that have no line yet.

    Args:
        steps: in the order of their importance.
        rows: file of lines.
        device: where they work; the process ends with :data:`BROKEN` when it does not answer after a failure.
        deadline: ``time.time()`` after which no step is begun any more.
    """
    done = {row["step"] for row in read_rows(rows)}
    for name, measure in steps:
        if name in done:
            continue
        if time.time() > deadline:
            write_row(rows, name, skipped="out of time")
            continue
        now_of(rows).write_text(name)
        started = time.time()
        try:
            values = measure()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"[:500]
            write_row(rows, name, error=told, traceback=traceback.format_exc()[-3000:], took=time.time() - started)
            _check(device)
        else:
            write_row(rows, name, **values, took=time.time() - started)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    now_of(rows).unlink(missing_ok=True)


def _check(device: torch.device) -> None:
    """End the process if the device is lost: everything after it would fail, too."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).add_(1)
    except RuntimeError:
        os._exit(BROKEN)


def table(rows: list[Values]) -> str:
    """The lines for people: a step a line, its values behind it; failures last, with their reason."""
    width = max((len(row["step"]) for row in rows), default=0) + 2
    told: list[str] = []
    failed: list[str] = []
    for row in rows:
        values = {k: v for k, v in row.items() if k not in ("step", "traceback", "took")}
        text = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        (failed if "error" in row else told).append(f"{row['step']:<{width}}{text}")
    lines = [*told, *(["", "failed:", *failed] if failed else [])]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
