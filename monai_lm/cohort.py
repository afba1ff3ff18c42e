"""Many pairs from a list: the work behind ``monai-lm cohort``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from monai_lm.fileio.files import write_table
from monai_lm.files import refine_pair
from monai_lm.pairs import PATHS, Entry, named, raise_all, read_list

__all__ = ["refine_cohort"]

_COLUMNS = [*(path for path in PATHS if path not in ("image", "label")), "name"]
_BOTH = [("fixed_label", "moving_label"), ("fixed_points", "moving_points")]


def refine_cohort(
    pairs: str | Path | Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    overwrite: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Refine every pair of a list as :func:`monai_lm.files.refine_pair` does, each into a folder of its own.

    A pair whose folder has its ``metrics.json``, which is written last, is complete and left alone: a cohort that was
    interrupted goes on where it stopped. A pair that fails does not stop the others.

    Args:
        pairs: a ``.csv`` or ``.json`` file, or dictionaries, with ``fixed``, ``moving`` and, where there are any,
            ``fixed_label``, ``moving_label``, ``fixed_points``, ``moving_points``, ``fixed_mask``, ``ddf``, ``affine``
            and ``name``. Relative paths start from the folder of the file.
        output_dir: gets a folder per pair, named ``name`` or ``<fixed>__<moving>``, and ``metrics.csv``, a row per
            complete pair of the list.
        overwrite: do complete pairs again.
        progress: show a progress bar.
        kwargs: ``file_format``, ``device``, ``report``, ``settings``, ``bundle`` and ``ddf_format`` of
            :func:`monai_lm.files.refine_pair`.

    Returns:
        The rows of the table, and by name why a pair failed.

    Raises:
        ValueError: a list that cannot be used: unknown columns, files that are missing, names that are none. Everything
            that is wrong with it is reported at once, before the work starts.
    """
    source = pairs if isinstance(pairs, str | Path) else list(pairs)
    entries = named(entry for part in read_list(source).values() for entry in part)
    if not entries:
        raise ValueError(f"pairs must have at least one pair, got none in {pairs!s}")
    _check(entries)
    folder = Path(output_dir)
    failed: dict[str, str] = {}
    rows = []
    for entry in tqdm(entries, desc="cohort", unit="pair", disable=not progress):
        name = entry["name"]
        done = folder / name / "metrics.json"
        if overwrite or not done.is_file():
            given = {key: entry.get(key) for key in ("fixed", "moving", "ddf", "affine")}
            labels, points = ((entry[a], entry[b]) if a in entry else None for a, b in _BOTH)
            further = {"labels": labels, "points": points, "mask": entry.get("fixed_mask")}
            try:  # what an interrupted run left of a pair is replaced
                refine_pair(**given, output_dir=done.parent, **further, overwrite=True, **kwargs)
            except (OSError, ValueError, torch.OutOfMemoryError) as error:
                failed[name] = str(error)
                continue
        rows.append({"name": name} | json.loads(done.read_text()))
    if rows:
        write_table(folder / "metrics.csv", rows)
    return rows, failed


def _check(entries: Sequence[Entry]) -> None:
    problems = []
    for entry in entries:
        name = entry["name"]
        if not name or Path(name).name != name or name.startswith("."):
            problems.append(f"{name!r}: the name of a pair must do as the name of a folder")
        if unknown := sorted(set(entry) - set(_COLUMNS)):
            problems.append(f"{name}: unknown columns {unknown}, known are {_COLUMNS}")
        problems += [f"{name}: {a} and {b} must be given together" for a, b in _BOTH if (a in entry) != (b in entry)]
        problems += [
            f"{name}: no file {entry[key]}" for key in PATHS if key in entry and not Path(entry[key]).is_file()
        ]
    raise_all(problems, "pairs")
