"""Landmarks in files: lines of coordinates, and Slicer's markups."""

from __future__ import annotations

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
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark before the first number
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    signs, columns = np.ones(3), slice(None)
    if path.suffix.lower() == ".fcsv":
        system = next((line.split("=")[1].strip() for line in lines if line.startswith("# CoordinateSystem")), "")
        if system not in ("LPS", "RAS", "0", "1"):
            raise ValueError(f"{path} must say its CoordinateSystem, LPS or RAS, got {system!r}")
        signs = np.array([-1.0, -1.0, 1.0]) if system in ("LPS", "1") else signs
        columns = slice(1, 4)
    rows = [line.split(",")[columns] for line in lines if not line.startswith("#")]
    if rows and not any(_numeric(value) for value in rows[0]):  # a header
        del rows[0]
    try:
        values = [[float(v) for v in row] for row in rows]
        points = np.array(values, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} must hold points, numbers separated by commas: {error}") from error
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not np.isfinite(points).all():
        raise ValueError(f"{path} must hold points of 2 or 3 finite coordinates, got shape {points.shape}")
    return points * signs[: points.shape[1]]


def _numeric(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
