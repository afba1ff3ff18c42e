"""Where results go: looked at before the work, gone again when it fails, JSON that everybody can read."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai_lm.io import file_suffix
from monai_lm.io.formats import file_suffixes

__all__ = [
    "as_json",
    "check_field_output",
    "check_not_inputs",
    "check_outputs",
    "figure_class",
    "made",
    "pair_outputs",
    "report_possible",
]


def figure_class() -> Any:
    """Matplotlib's ``Figure``; an ImportError that names the extra where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, in the report extra: pip install 'monai_lm[report]'") from error
    return Figure


def pair_outputs(
    file_format: str,
    labels: bool,
    report: bool,
    jacobian: bool = False,
    aligned: bool = False,
    uncertainty: bool = False,
) -> list[str]:
    """Names of the files that a refined pair consists of, ``metrics.json`` first; it is written last."""
    suffix = file_suffix(file_format)
    names = ["metrics.json", "warped.nii.gz", f"ddf{suffix}", f"inverse{suffix}"]
    further = ["warped_label.nii.gz"] * labels + ["jacobian.nii.gz"] * jacobian + ["affine.txt"] * aligned
    further += ["uncertainty.nii.gz"] * uncertainty
    return names + further + ["report.html", "report.png"] * report


def check_outputs(folder: Path, names: Sequence[str], overwrite: bool, argument: str = "output_dir") -> None:
    """Find out before the work whether files can be written.

    Args:
        folder: where to; need not be there yet.
        names: of the files.
        overwrite: whether they may be there.
        argument: what the folder comes from, for messages.

    Raises:
        FileExistsError: a name is taken and must not be replaced.
        PermissionError: the folder, or the one to make it in, cannot be written to.
        ValueError: what should be a folder is a file, or the other way round.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{argument} must be a folder, got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{argument} cannot be written to", str(there))
    taken = [folder / name for name in names if (folder / name).exists()]
    if folders := [path for path in taken if path.is_dir()]:
        raise ValueError(f"outputs must be files, got the folder {folders[0]}")
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(map(str, taken))} exists; --overwrite replaces it")


def check_field_output(output: Path, file_format: str, overwrite: bool) -> None:
    """As :func:`check_outputs`, for one file of a field, whose suffix must be that of its format."""
    suffixes = file_suffixes(file_format)
    if not output.name.endswith(suffixes):
        raise ValueError(f"output must end in {' or '.join(suffixes)} for {file_format} fields, got {output.name!r}")
    check_outputs(output.parent, [output.name], overwrite, "the output's folder")


def check_not_inputs(folder: Path, names: Sequence[str], inputs: Iterable[Path], argument: str = "output_dir") -> None:
    """ValueError, of the argument that the files to write come from, if one of them is one that is read."""
    read = {path.resolve() for path in inputs}
    if both := [folder / name for name in names if (folder / name).resolve() in read]:
        raise ValueError(f"{argument} must not be where the inputs are, {both[0]} would be replaced")


def report_possible() -> bool:
    """Whether a report can be written; warns if not."""
    try:
        figure_class()
    except ImportError as error:
        warnings.warn(f"no report is written: {error}", stacklevel=3)
        return False
    return True


@contextmanager
def made(folder: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """A folder that is there, and gone again if it was not and the work fails; of the names those that were not."""
    added = [folder / name for name in names if not (folder / name).exists()]
    new = next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in added:
            path.unlink(missing_ok=True)
        while new is not None and folder != new.parent and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
        raise


def as_json(values: Mapping[str, Any]) -> str:
    """JSON, which knows no NaN: null in its place."""
    return json.dumps(_finite(values), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
