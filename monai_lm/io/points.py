"""Landmarks in files: lines of coordinates, Slicer's markups, VTK's points."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.content import check_file

__all__ = ["POINT_SUFFIXES", "read_points"]

_SYSTEMS = {"RAS": (1, 1, 1), "0": (1, 1, 1), "LPS": (-1, -1, 1), "1": (-1, -1, 1)}


def read_points(path: str | Path) -> np.ndarray:
    """Landmarks ``(N, n)`` in RAS millimetres, float64.

    ``.csv``: a line per point, after a header or not, in RAS millimetres; in LPS millimetres if the header says so, as
    ``l,p,s``, ``x_lps,y_lps,z_lps`` or ANTs' ``x,y,z,t`` (further columns are left out).
    Slicer's ``.fcsv`` and ``.mrk.json``, in the coordinate system that they say (LPS or RAS). Legacy ``.vtk`` in ASCII,
    whose second line says ``SPACE=LPS`` or ``SPACE=RAS``, as Slicer writes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold points.
    """
    path = Path(path)
    check_file(path)
    reader = next((reader for suffix, reader in _READERS.items() if path.name.lower().endswith(suffix)), _csv)
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a mark before the first number
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, not binary: {error}") from error
    system, rows = reader(path, text)
    if system not in _SYSTEMS:
        raise ValueError(f"{path} must say its coordinate system, LPS or RAS, got {system!r}")
    try:
        points = np.array([[float(v) for v in row] for row in rows], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold points, numbers in rows of one length: {error}") from error
    if not len(points):
        raise ValueError(f"{path} must hold points, got none")
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"{path} must hold points of 2 or 3 coordinates, got shape {points.shape}")
    if bad := np.flatnonzero(~np.isfinite(points).all(1)).tolist():
        raise ValueError(
            f"{path} must hold finite points, got NaN or infinite coordinates in points {bad[:10]}, from 0"
        )
    return points * np.array(_SYSTEMS[system], dtype=np.float64)[: points.shape[1]]


_Rows = Sequence[Sequence[Any]]


def _csv(path: Path, text: str) -> tuple[str, _Rows]:
    header = [re.sub(r"[^a-z]", "", word.lower()) for word in text.lstrip().split("\n", 1)[0].split(",")]
    if header[:4] == ["x", "y", "z", "t"]:  # ANTs'
        return "LPS", _fields(text, slice(3))
    if header[:2] == ["i", "j"] or any(word in name for name in header for word in ("voxel", "pixel", "index")):
        raise ValueError(f"{path} must hold points in millimetres, got the header {','.join(header)!r}, of voxels")
    in_lps = header[:2] == ["l", "p"] or all(name.endswith("lps") for name in header[:2])
    return "LPS" if in_lps else "RAS", _fields(text, slice(None))


def _fcsv(path: Path, text: str) -> tuple[str, _Rows]:  # noqa: ARG001
    said = re.search(r"^# CoordinateSystem\s*=\s*(\S+)", text, re.MULTILINE)
    return said[1] if said else "", _fields(text, slice(1, 4))


def _markups(path: Path, text: str) -> tuple[str, _Rows]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be Slicer's markups in JSON, got no JSON: {error}") from error
    try:
        markup = content["markups"][0]
        points = markup["controlPoints"]
        system, rows = str(markup["coordinateSystem"]), [point["position"] for point in points]
        absent = [k for k, point in enumerate(points) if point.get("positionStatus", "defined") != "defined"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        got = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} must be Slicer's markups, a list 'markups' with 'coordinateSystem' and 'controlPoints', each with "
            f"its 'position', got JSON of {got} ({type(error).__name__}: {error})"
        ) from error
    if absent:
        raise ValueError(f"{path} must hold points that are placed, got points {absent[:10]}, from 0, that are not")
    return system, rows


def _vtk(path: Path, text: str) -> tuple[str, _Rows]:
    lines = text.splitlines()
    found = re.search(r"^POINTS\s+(\d+)\s+\w+\s*$", text, re.MULTILINE | re.IGNORECASE)
    if len(lines) < 4 or lines[2].strip().upper() != "ASCII" or found is None:
        raise ValueError(f"{path} must be a legacy VTK file in ASCII with POINTS, got {lines[:3]}")
    count, values = int(found[1]), text[found.end() :].split()
    said = re.search(r"SPACE=(\w+)", lines[1])
    return said[1] if said else "", [values[3 * i : 3 * i + 3] for i in range(count)]


def _fields(text: str, columns: slice) -> _Rows:
    """What lies between commas, without comments and without a header."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [line.split(",")[columns] for line in lines if not line.startswith("#")]
    return rows[1:] if rows and not any(_numeric(value) for value in rows[0]) else rows


def _numeric(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path, str], tuple[str, _Rows]]] = {
    ".csv": _csv, ".fcsv": _fcsv, ".mrk.json": _markups, ".vtk": _vtk,
}  # fmt: skip

POINT_SUFFIXES = tuple(_READERS)
"""How the names of files with points end."""
