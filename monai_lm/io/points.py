"""Landmarks in files: tables of coordinates, Slicer's markups, VTK's points."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monai_lm.io.content import check_file

__all__ = ["POINT_SUFFIXES", "read_points"]

_VOXELS = "voxel", "pixel", "index"
_OUT = (
    "voxels, as DIR-Lab's, which count from 1, and Learn2Reg's, become RAS millimetres by "
    "nibabel.affines.apply_affine(image.affine, voxels)"
)
_COMMAS = "numbers with a decimal comma need semicolons or tabs between them"
_STATED = "'x_ras y_ras z_ras' or 'x_lps y_lps z_lps'"

_SYSTEMS = {"RAS": (1, 1, 1), "0": (1, 1, 1), "LPS": (-1, -1, 1), "1": (-1, -1, 1)}

_WAYS = ("", "xyz", ""), ("ras", "ras", ""), ("lps", "lps", ""), ("ras", "xyz", "ras"), ("lps", "xyz", "lps")
_NAMED = [
    (f"{before}{letter}{after}", system, axis)
    for system, letters, end in _WAYS
    for axis, letter in enumerate(letters)
    for before in ("", "pos", "position", "coord", "coordinate")
    for after in (end, f"{end}mm")
]
"""Names of columns, their letters alone, and of which system, if they say it, and axis they are."""


def read_points(path: str | Path) -> np.ndarray:
    """Landmarks ``(N, n)`` in RAS millimetres, float64.

    ``.csv`` and ``.tsv``: a line per point, after a header or not, in RAS millimetres; in LPS millimetres if the header
    says so, as ``l,p,s``, ``x_lps,y_lps,z_lps`` or ANTs' ``x,y,z,t``. Columns beside the coordinates are left out: a
    header names those (``id,x,y,z``); without one, columns of words are none. Between columns are commas, semicolons or
    tabs; after semicolons and tabs numbers may have a decimal comma. ``.txt`` likewise, or with blanks between columns,
    but its header must say the system (``x_ras y_ras z_ras``): such files often hold voxels.
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


def _csv(path: Path, text: str, stated: bool = False) -> tuple[str, _Rows]:
    """Points of a table; where it must be ``stated``, only of one whose header says the coordinate system."""
    names, rows = _table(path, text)
    letters, header = [re.sub(r"[^a-z]", "", name.lower()) for name in names], ",".join(names)
    if {"i", "j"} <= set(letters) or any(word in name for name in letters for word in _VOXELS if name != "index"):
        raise ValueError(f"{path} must hold points in millimetres, got the header {header!r}, of voxels; {_OUT}")
    system, columns = _coordinates(path, letters)
    if not system and len(told := _told(text)) == 1:
        system = told.pop()
    if stated and rows and not system:
        raise ValueError(
            f"{path} must say in its first line of which system its millimetres are, as {_STATED}, got "
            f"{' '.join(names or rows[0])!r}; {_OUT}"
        )
    if not columns:
        columns = _unnamed(path, header, rows)
    elif longer := [k for k, row in enumerate(rows) if any(row[len(names) :])]:
        raise ValueError(
            f"{path} must have the columns that its header names, {header!r}, got more in the points {longer[:10]}, "
            f"from 0; {_COMMAS}"
        )
    picked = [[row[k] for k in columns if k < len(row)] for row in rows]
    if not any("." in value for row in picked for value in row):
        picked = [[value.replace(",", ".") for value in row] for row in picked]
    return "LPS" if letters[:4] == ["x", "y", "z", "t"] else system or "RAS", picked


def _told(text: str) -> set[str]:
    """The coordinate systems that a first line, if it is a comment, speaks of."""
    first = text.lstrip().partition("\n")[0]
    return {"LPS", "RAS"} & set(re.findall("[A-Z]+", first.upper())) if first.startswith("#") else set()


def _table(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    """The names of columns in the first line, a comment or not, if it has any, and what is in the columns, as text."""
    lines = [line.strip(" \r") for line in text.splitlines() if line.strip()]
    content = [line for line in lines if not line.startswith("#")]
    if not content:
        return [], []
    separator = next((mark for mark in ";\t," if mark in content[0]), None)

    def cells(some: list[str]) -> list[list[str]]:
        """What is between separators, or blanks."""
        found = csv.reader(some, delimiter=separator, skipinitialspace=True) if separator else map(str.split, some)
        return [[value.strip() for value in row] for row in found]

    try:
        rows, said = cells(content), cells([lines[0].lstrip("# ")])[0] if lines[0].startswith("#") else []
    except csv.Error as error:
        raise ValueError(f"{path} must hold points, got a broken table: {error}") from error
    if rows and not any(_numeric(value) for value in rows[0]):
        said = rows.pop(0)
    return said, rows


def _coordinates(path: Path, letters: Sequence[str]) -> tuple[str, list[int]]:
    """The system that names of columns, letters alone, say, if they do, and where the coordinates are among them."""
    found: dict[str, dict[int, int]] = {}
    for column, letter in enumerate(letters):
        for _, system, axis in (known for known in _NAMED if known[0] == letter):
            if found.setdefault(system, {}).setdefault(axis, column) != column:
                raise ValueError(f"{path} must name every coordinate once, got the columns {','.join(letters)!r}")
    whole = {system: axes for system, axes in found.items() if {0, 1} <= set(axes)}
    if len(whole) > 1:
        raise ValueError(f"{path} must be in one coordinate system, got the columns {','.join(letters)!r}")
    for system, axes in whole.items():
        return system.upper(), [axes[axis] for axis in sorted(axes)]
    return "", []


def _unnamed(path: Path, header: str, rows: _Rows) -> list[int]:
    """Where coordinates are that no name tells: all columns, two or three, that are not empty or words in every row."""
    values = [[row[k] for row in rows if k < len(row)] for k in range(max(map(len, rows), default=0))]
    columns = [k for k, column in enumerate(values) if any(map(_may_be_number, column))]
    if len(columns) > 3:
        raise ValueError(
            f"{path} must hold points of 2 or 3 coordinates, or name them in a header, as id,x,y,z, got {len(columns)} "
            f"columns{header and f' under the header {header!r}'}; {_COMMAS}"
        )
    return columns


def _fcsv(path: Path, text: str) -> tuple[str, _Rows]:  # noqa: ARG001
    said = re.search(r"^# CoordinateSystem\s*=\s*(\S+)", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return said[1] if said else "", [line.split(",")[1:4] for line in lines]


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


def _numeric(value: str) -> bool:
    try:
        float(value.replace(",", "."))
    except ValueError:
        return False
    return True


def _may_be_number(value: str) -> bool:
    """Whether a value is a number, or was meant to be one: it is not empty and no word."""
    return _numeric(value) or (bool(value) and not any(letter.isalpha() for letter in value))


_READERS: dict[str, Callable[[Path, str], tuple[str, _Rows]]] = {
    ".csv": _csv, ".tsv": _csv, ".txt": partial(_csv, stated=True), ".fcsv": _fcsv, ".mrk.json": _markups, ".vtk": _vtk,
}  # fmt: skip

POINT_SUFFIXES = tuple(_READERS)
"""How the names of files with points end; that of affines, too, may end in ``.txt``."""
