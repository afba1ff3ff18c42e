"""Many pairs from a list: the work behind ``monai-lm cohort``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from monai_lm.alignment import MODES
from monai_lm.apps.pairs import check_together, refine_pair
from monai_lm.io import file_suffix
from monai_lm.io.datalist import PATHS, Entry, named, raise_all, read_list
from monai_lm.io.formats import check_format
from monai_lm.io.nifti import write_table
from monai_lm.io.outputs import check_outputs, pair_outputs, report_possible
from monai_lm.io.provenance import pair_recipe
from monai_lm.kernels.devices import find_device
from monai_lm.solver.refinement import check_keywords

__all__ = ["refine_cohort"]

_TABLE = "metrics.csv"
_COLUMNS = [*(path for path in PATHS if path not in ("image", "label")), "name"]
_BOTH = [
    ("fixed_label", "moving_label"), ("fixed_points", "moving_points"), ("fixed_soft_labels", "moving_soft_labels"),
]  # fmt: skip


def refine_cohort(
    pairs: str | Path | Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    overwrite: bool = False,
    progress: bool = False,
    affine: str | None = None,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Refine every pair of a list as :func:`monai_lm.apps.pairs.refine_pair` does, each into a folder of its own.

    A pair whose folder has all its files, ``metrics.json`` the last of them, is complete and left alone if it was made
    of the same files with the same settings: a cohort that was interrupted goes on where it stopped. What another pair,
    changed files or other settings left in a folder is never taken for the pair's, nor replaced without being asked. A
    pair that fails does not stop the others.

    Args:
        pairs: a ``.csv`` or ``.json`` file, or dictionaries, with ``fixed``, ``moving`` and, where there are any,
            ``fixed_label``, ``moving_label``, ``fixed_points``, ``moving_points``, ``fixed_mask``, ``moving_mask``,
            ``fixed_lesion``, ``moving_lesion``, ``fixed_soft_labels``, ``moving_soft_labels``, ``ddf``, ``affine`` and
            ``name``. Relative paths start from the folder of the file.
        output_dir: gets a folder per pair, named ``name`` or ``<fixed>__<moving>``, and ``metrics.csv``, a row per
            complete pair of the list.
        overwrite: do all pairs again.
        progress: show a progress bar.
        affine: ``"auto"``, ``"center"``, ``"rigid"`` or ``"affine"``: how the pairs are aligned first that name no
            ``affine``, see :func:`monai_lm.align`.
        kwargs: ``file_format``, ``device``, ``report``, ``jacobian``, ``uncertainty``, ``settings``, ``bundle``,
            ``ddf_format``, ``guide`` and ``command`` of :func:`monai_lm.apps.pairs.refine_pair`.

    Returns:
        The rows of the table, and by name why a pair failed.

    Raises:
        ValueError: a list that cannot be used: files that are missing, names that are none or given
            twice, folders that hold the results of something else. Everything that is wrong with it is reported at
            once, before the work starts. Or an unknown format, or an output folder that is a file.
        TypeError: unknown settings.

    Warns:
        UserWarning: columns that are not known, and ignored.
    """
    source = pairs if isinstance(pairs, str | Path) else list(pairs)
    entries = named(entry for part in read_list(source, argument="pairs").values() for entry in part)
    if not entries:
        raise ValueError(f"pairs must have at least one pair, got none in {pairs!s}")
    entries = _known(entries)
    _check(entries)
    if affine is not None:
        if affine not in MODES:
            raise ValueError(f"affine must be one of {list(MODES)} or None for a cohort, got {affine!r}")
        entries = [{"affine": affine} | entry for entry in entries]
    _check_settings(entries, kwargs)
    folder = Path(output_dir)
    check_outputs(folder, [_TABLE], overwrite=True)
    file_suffix(kwargs.get("file_format", "itk"))
    kwargs["report"] = kwargs.get("report", True) and report_possible()
    done = set() if overwrite else _complete(entries, folder, kwargs)
    failed: dict[str, str] = {}
    rows = []
    for entry in tqdm(entries, desc="cohort", unit="pair", disable=not progress):
        name = entry["name"]
        if name not in done:
            try:  # what an interrupted run left of a pair is replaced
                refine_pair(**_files_of(entry), output_dir=folder / name, overwrite=True, **kwargs)
            except (OSError, RuntimeError, ValueError) as error:
                failed[name] = str(error)
                continue
        metrics = json.loads((folder / name / "metrics.json").read_text())
        rows.append(_row(entry, metrics))
    if rows:
        write_table(folder / _TABLE, rows)
    return rows, failed


def _files_of(entry: Entry) -> dict[str, Any]:
    """The arguments of ``refine_pair`` that are files."""
    given = {key: entry.get(key) for key in ("fixed", "moving", "ddf", "affine", "moving_mask", "moving_lesion")}
    given |= {"mask": entry.get("fixed_mask"), "lesion": entry.get("fixed_lesion")}
    labels, points, soft = ((entry[a], entry[b]) if a in entry else None for a, b in _BOTH)
    return {**given, "labels": labels, "points": points, "soft_labels": soft}


def _complete(entries: Sequence[Entry], folder: Path, kwargs: Mapping[str, Any]) -> set[str]:
    """Names of the pairs that are there already; ValueError for folders that hold something else."""
    kept = ("settings", "bundle", "file_format", "ddf_format", "guide", "ddf_before_affine")
    how = {key: kwargs[key] for key in kept if key in kwargs}
    file_format = kwargs.get("file_format", "itk")
    done, problems = set(), []
    for entry in entries:
        name = entry["name"]
        file = folder / name / "metrics.json"
        if not file.is_file():
            continue
        try:
            record = json.loads(file.read_text()).get("provenance")
        except (AttributeError, ValueError):
            record = None
        if changes := pair_recipe(**_files_of(entry), **how).changes(record):
            problems.append(
                f"{name}: {file.parent} holds another result: {'; '.join(changes)}. Give the pair another name, or the "
                "cohort another output_dir, or replace the results there (--overwrite)"
            )
        else:
            asked = [kwargs.get(name, False) for name in ("jacobian", "uncertainty")]
            further = kwargs["report"], asked[0], entry.get("affine") in MODES, asked[1]
            if all((file.parent / n).is_file() for n in pair_outputs(file_format, "fixed_label" in entry, *further)):
                done.add(name)
    raise_all(problems, "pairs")
    return done


def _row(entry: Entry, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: whose it is, the metrics, the verdict, and the names of its remarks."""
    plain = {k: v for k, v in metrics.items() if not isinstance(v, Mapping) and k != "headline"}
    named_by = {key: entry[key] for key in ("name", "fixed", "moving")}
    return named_by | plain | {"remarks": " ".join(metrics.get("remarks", {}))}


def _known(entries: Sequence[Entry]) -> list[Entry]:
    """Entries without the columns that mean nothing here, with a warning: one of them may be a misspelt name."""
    if unknown := sorted({key for entry in entries for key in entry} - set(_COLUMNS)):
        warnings.warn(f"columns {unknown} of pairs are ignored, known are {_COLUMNS}", stacklevel=3)
    return [{key: value for key, value in entry.items() if key in _COLUMNS} for entry in entries]


def _check_settings(entries: Sequence[Entry], kwargs: Mapping[str, Any]) -> None:
    """What no pair can be refined with, or not these; ValueError for all of them at once."""
    check_keywords("settings", kwargs.get("settings") or {})
    find_device(kwargs.get("device", "auto"))
    check_format("ddf_format", kwargs.get("ddf_format", "auto"))
    refused: dict[str, list[str]] = {}
    for entry in entries:
        given = _files_of(entry) | dict(kwargs)
        try:
            check_together(**{name: given[name] for name in signature(check_together).parameters if name in given})
        except ValueError as error:
            refused.setdefault(str(error), []).append(entry["name"])
    more = {reason: [f"{len(names) - 5} more"] * (len(names) > 5) for reason, names in refused.items()}
    raise_all([f"{', '.join(names[:5] + more[reason])}: {reason}" for reason, names in refused.items()], "pairs")


def _check(entries: Sequence[Entry]) -> None:
    problems = []
    for entry in entries:
        name = entry["name"]
        if not name or Path(name).name != name or name.startswith(".") or name == _TABLE:
            problems.append(f"{name!r}: the name of a pair must do as the name of a folder beside {_TABLE}")
        problems += [f"{name}: {a} and {b} must be given together" for a, b in _BOTH if (a in entry) != (b in entry)]
        problems += [
            f"{name}: no file {entry[key]}" for key in PATHS if key in entry and not Path(entry[key]).is_file()
        ]
    raise_all(problems, "pairs")
