"""Lists of subjects and of pairs: read, split by subject, and checked before anything is trained on them."""

from __future__ import annotations

import csv
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

__all__ = ["PARTS", "PATHS", "check_files", "draw_pairs", "named", "raise_all", "read_list", "share", "split_subjects"]

PARTS = ("train", "validation", "test", "predict")
SYNONYMS = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}
FILES = ("image", "label", "fixed", "moving", "fixed_label", "moving_label", "fixed_points", "moving_points")
PATHS = (
    *FILES,
    "fixed_mask",
    "moving_mask",
    "fixed_lesion",
    "moving_lesion",
    "fixed_soft_labels",
    "moving_soft_labels",
    "ddf",
    "affine",
)

Entry = dict[str, Any]


def read_list(source: Any, root: str | Path | None = None, argument: str = "data") -> dict[str, list[Entry]]:
    """Read entries, each a subject (``image``, ``label``) or a pair (``fixed``, ``moving``, …), by part.

    Args:
        source: a folder with ``images`` and ``labels`` (or ``imagesTr`` and ``labelsTr``), a JSON or CSV file, the
            columns of which are separated by commas, semicolons or tabs, as its first line says, a list of
            dictionaries, or a MONAI datalist: a dictionary of such lists, whose names are the parts. In a plain list
            and in a CSV the column ``part`` says where an entry belongs; without it, it is ``""``.
        root: what relative paths start from; default: the folder of the file, or the working directory.
        argument: what the source is called in errors.

    Returns:
        Part to entries, with absolute paths.

    Raises:
        ValueError: not one of these, or an entry that is neither a subject nor a pair.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        root = path.parent if root is None else root
        if path.is_dir():
            source = _folder(path, argument)
        elif not path.is_file():
            raise ValueError(
                f"{argument} must be a folder, a file, a list or a dictionary of lists, got {str(path)!r}, missing"
            )
        elif path.suffix == ".json":
            source = read_json(argument, path)
        elif path.suffix in (".csv", ".tsv"):
            try:
                text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a mark before the first name
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} must be text in UTF-8, got {error}") from error
            source = _rows(path, text)
        else:
            raise ValueError(f"{argument} must be a .csv, .tsv or .json file, got {path.name!r}")
    if isinstance(source, Mapping):
        lists = {k: v for k, v in source.items() if SYNONYMS.get(k, k) in PARTS}
        if not lists:
            raise ValueError(f"{argument} must have at least one of the parts {PARTS}, got {sorted(map(str, source))}")
        source = [{**_entry(entry), "part": part} for part, entries in lists.items() for entry in entries]
    out: dict[str, list[Entry]] = {}
    for number, entry in enumerate(source):
        if not isinstance(entry, Mapping) or not _is_entry(entry):
            raise ValueError(f"entry {number} of {argument} must have an image, or fixed and moving, got {entry!r}")
        whole = {k: str(Path(root or ".", v).absolute()) if k in PATHS else v for k, v in entry.items()}
        part = str(whole.pop("part", ""))
        out.setdefault(SYNONYMS.get(part, part), []).append(whole)
    if unknown := sorted(set(out) - {"", *PARTS}):
        raise ValueError(f"{argument} must name parts among {PARTS}, got {unknown}")
    return out


def _is_entry(keys: Iterable[str]) -> bool:
    """Whether they are those of a subject or of a pair."""
    return {"image"} <= set(keys) or {"fixed", "moving"} <= set(keys)


def _rows(path: Path, text: str) -> list[Entry]:
    """The rows of a table, without what is empty; ValueError for names or values that do not make columns."""
    header = text.replace("\r", "\n").lstrip("\n").partition("\n")[0]
    separator = max(",;\t", key=header.count)
    lines = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        numbered = [(lines.line_num, [value.strip() for value in line]) for line in lines if line]
    except csv.Error as error:
        raise ValueError(f"{path} must be a table, got in line {lines.line_num}: {error}") from error
    columns = numbered[0][1] if numbered else []
    if not _is_entry(columns):
        raise ValueError(f"{path} must name columns in its first line, image or fixed and moving, got {columns}")
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise ValueError(f"{path} must name every column once, got {twice} more than once")
    rows = numbered[1:]
    if crowded := [number for number, row in rows if any(row[len(columns) :])]:
        raise ValueError(f"{path} must have as many values as columns in every line, got more in lines {crowded[:5]}")
    return [{name: value for name, value in zip(columns, row, strict=False) if name and value} for _, row in rows]


def read_json(argument: str, path: str | Path) -> Any:
    """What a JSON file holds; ValueError that names the argument and the file if it is none."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{argument} must be a JSON file, got {path}: {error}") from error


def _entry(entry: Any) -> Entry:
    return {"image": entry} if isinstance(entry, str) else dict(entry)


def _folder(path: Path, argument: str) -> list[Entry]:
    suffix = "" if (path / "images").is_dir() else "Tr"
    images = sorted((path / f"images{suffix}").glob("[!.]*.nii*"))
    if not images:
        raise ValueError(f"{argument} must be a folder with NIfTI files in images/ or imagesTr/, got {str(path)!r}")
    entries = []
    for image in images:
        label = path / f"labels{suffix}" / image.name
        entries.append({"image": str(image.absolute())} | ({"label": str(label.absolute())} if label.is_file() else {}))
    return entries


def subject_of(entry: Entry) -> str:
    """Who is in the image: ``subject`` where it is given, else the name of the file."""
    return str(entry.get("subject", _stem(entry["image"])))


def _stem(path: str) -> str:
    name = Path(path).name
    return name.removesuffix(".gz").removesuffix(".nii")


def split_subjects(
    entries: Sequence[Entry], split: str | Path | Mapping[str, Iterable[str]] | Sequence[float], seed: int
) -> dict[str, list[Entry]]:
    """Divide subjects over parts; all images of a subject are in one.

    Args:
        entries: subjects.
        split: a JSON file or a dictionary that gives the subjects of every part (others are left out), or the
            fractions of train, validation and test, of which a seeded draw is made.
        seed: of the draw.

    Raises:
        ValueError: a subject in two parts, a subject that is not there, or fractions that do not sum to 1.
    """
    subjects = sorted({subject_of(entry) for entry in entries})
    listed = read_json("split", split) if isinstance(split, str | Path) else split
    if isinstance(listed, Mapping):
        parts = {SYNONYMS.get(part, part): [str(name) for name in names] for part, names in listed.items()}
    else:
        fractions = [float(f) for f in listed]
        if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"split must be fractions of train, validation and test that sum to 1, got {fractions}")
        shuffled = random.Random(seed).sample(subjects, len(subjects))
        first = round(fractions[0] * len(subjects))
        second = first + round(fractions[1] * len(subjects))
        parts = {"train": shuffled[:first], "validation": shuffled[first:second], "test": shuffled[second:]}
    owner: dict[str, str] = {}
    problems = []
    for part, names in parts.items():
        for name in names:
            if name not in subjects:
                problems.append(f"{name}: in part {part}, but there is no image of that subject")
            elif owner.setdefault(name, part) != part:
                problems.append(f"{name}: in two parts, {owner[name]} and {part}")
    raise_all(problems, "split")
    return {part: [e for e in entries if owner.get(subject_of(e)) == part] for part in parts}


def draw_pairs(entries: Sequence[Entry], pairing: str, count: int | None, seed: int) -> list[tuple[int, int]]:
    """Ordered pairs of different images, as indices of ``entries``.

    Args:
        entries: subjects of one part.
        pairing: ``"random"``, images of different subjects; ``"all"`` of those pairs, in order; ``"intra"``, images of
            the same subject.
        count: how many of them, drawn; ``None`` takes every one.
        seed: of the draw.

    Raises:
        ValueError: unknown ``pairing``, or no such pair.
    """
    if pairing not in ("random", "all", "intra"):
        raise ValueError(f"pairing must be 'random', 'all' or 'intra', got {pairing!r}")
    names = [subject_of(entry) for entry in entries]
    pairs = [(f, m) for f, m in permutations(range(len(names)), 2) if (names[f] == names[m]) == (pairing == "intra")]
    if not pairs:
        raise ValueError(f"data must have a pair of images for pairing {pairing!r}, got subjects {names}")
    return pairs if count is None or count >= len(pairs) else random.Random(seed).sample(pairs, count)


def named(pairs: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """Give every pair without a ``name`` one of its own, ``<fixed>__<moving>``; namesakes are numbered from 2 on.

    Raises:
        ValueError: a pair without ``fixed`` or ``moving``, or names that are given twice.
    """
    entries = [dict(pair) for pair in pairs]
    for index, pair in enumerate(entries):
        if missing := {"fixed", "moving"} - set(pair):
            raise ValueError(f"pair {index} must have the keys fixed and moving, {sorted(missing)} missing: {pair}")
    given = [str(pair["name"]) for pair in entries if pair.get("name")]
    twice = [name for name, count in Counter(given).items() if count > 1]
    raise_all([f"{name!r}: the name of {given.count(name)} pairs" for name in twice], "pairs")
    taken = set(given)
    for pair in entries:
        if pair.get("name"):
            pair["name"] = str(pair["name"])
            continue
        stem = f"{_stem(pair['fixed'])}__{_stem(pair['moving'])}"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        pair["name"] = name
    return entries


def share(pairs: Sequence[Entry], rank: int, processes: int) -> list[Entry]:
    """The pairs of one of several processes that evaluate together.

    Raises:
        ValueError: fewer pairs than processes: one without pairs would leave the others waiting for its metrics.
    """
    if len(pairs) < processes:
        raise ValueError(f"there must be a pair for each of the {processes} processes, got {len(pairs)} pairs")
    return list(pairs[rank::processes])


def check_files(pairs: Sequence[Entry], values: Iterable[int] | None, same_grid: bool) -> None:
    """Look at every file of the pairs and report everything that is wrong with them at once.

    Args:
        pairs: with paths.
        values: what label maps may hold besides 0; ``None`` does not look.
        same_grid: whether the two images of a pair must have one shape.

    Raises:
        ValueError: one line per file and reason.
    """
    problems: list[str] = []
    headers: dict[str, _Header | None] = {}
    allowed = None if values is None else {0, *values}
    for pair in pairs:
        for key in FILES:
            if key in pair and pair[key] not in headers:
                headers[pair[key]] = _read_header(pair[key], key, allowed, problems)
    for pair in pairs:
        fixed, moving = (headers[pair[key]] for key in ("fixed", "moving"))
        if fixed is not None and moving is not None:
            problems += [f"{pair['moving']}: {reason}" for reason in _differences(fixed, moving, same_grid)]
        for role in ("fixed", "moving"):
            image, label = headers[pair[role]], headers.get(pair.get(f"{role}_label", ""))
            if image is None or label is None:
                continue
            if image.shape[:3] != label.shape[:3]:
                problems.append(f"{pair[f'{role}_label']}: shape {label.shape}, but its image has {image.shape}")
            elif label.codes != image.codes:
                problems.append(f"{pair[f'{role}_label']}: orientation {label.codes}, but its image has {image.codes}")
    raise_all(list(dict.fromkeys(problems)), "data")


class _Header(NamedTuple):
    """What pairs are compared by; there are far more pairs than files."""

    shape: tuple[int, ...]
    codes: str
    zooms: tuple[float, ...]


def _read_header(path: str, key: str, allowed: set[int] | None, problems: list[str]) -> _Header | None:
    if not Path(path).is_file():
        problems.append(f"{path}: no such file")
        return None
    if key.endswith("points"):
        return None
    try:
        image: Any = nib.load(path)
        shape = tuple(s for i, s in enumerate(image.shape) if i < 3 or s > 1)
        if len(shape) not in (2, 3):
            problems.append(f"{path}: must be one 2D or 3D volume, got shape {image.shape}")
            return None
        if key.endswith("label") and allowed is not None:
            found = np.unique(np.asanyarray(image.dataobj))
            if unknown := [float(v) for v in found if float(v) not in allowed]:
                problems.append(f"{path}: label values must be among {sorted(allowed)}, got {unknown[:10]}")
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return None
    zooms = tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
    return _Header(image.shape, "".join(nib.aff2axcodes(image.affine)), zooms)


def _differences(fixed: _Header, moving: _Header, same_grid: bool) -> Iterable[str]:
    if fixed.codes != moving.codes:
        yield f"orientation {moving.codes}, but its fixed image has {fixed.codes}"
    both = zip(fixed.zooms, moving.zooms, strict=False)
    if len(fixed.zooms) != len(moving.zooms) or not all(abs(a - b) <= 1e-3 * b for a, b in both):
        here, there = ([round(zoom, 4) for zoom in header.zooms] for header in (moving, fixed))
        yield f"spacing {here} mm, but its fixed image has {there}"
    if same_grid and fixed.shape[:3] != moving.shape[:3]:
        yield f"shape {moving.shape}, but its fixed image has {fixed.shape}; give a common grid"


def raise_all(problems: Sequence[str], argument: str) -> None:
    """ValueError with a line per problem, if there are any."""
    if problems:
        raise ValueError(f"{argument} has {len(problems)} problem(s):\n" + "\n".join(f"  {line}" for line in problems))
