"""Landmarks in files: lines of coordinates, and Slicer's markups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["read_points"]


def read_points(path: str | Path) -> np.ndarray:
    """Landmarks ``(N, n)`` in RAS millimetres, float64.

    ``.csv``: a line per point, after a header or not, in RAS millimetres. ``.fcsv``: Slicer's, in the coordinate system
    that it says (LPS or RAS).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold points.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    signs, columns = np.ones(3), slice(None)
    if path.suffix == ".fcsv":
        system = next((line.split("=")[1].strip() for line in lines if line.startswith("# CoordinateSystem")), "")
        if system not in ("LPS", "RAS", "0", "1"):
            raise ValueError(f"{path} must say its CoordinateSystem, LPS or RAS, got {system!r}")
        signs = np.array([-1.0, -1.0, 1.0]) if system in ("LPS", "1") else signs
        lines, columns = [line for line in lines if not line.startswith("#")], slice(1, 4)
    rows = [line.split(",")[columns] for line in lines]
    try:
        values = [[float(v) for v in row] for row in (rows if not rows or _numeric(rows[0]) else rows[1:])]
        points = np.array(values, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} must hold points, numbers separated by commas: {error}") from error
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not np.isfinite(points).all():
        raise ValueError(f"{path} must hold points of 2 or 3 finite coordinates, got shape {points.shape}")
    return points * signs[: points.shape[1]]


def _numeric(row: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(value)) for value in row)
    except ValueError:
        return False
