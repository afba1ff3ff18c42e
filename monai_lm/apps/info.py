"""What a file is taken for: the work behind ``monai-lm info FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_lm.fields import fold_count
from monai_lm.fields.space import spacing_of
from monai_lm.io import guess_format, read_affine, read_ddf, read_points
from monai_lm.io.content import check_file, look_of
from monai_lm.io.formats import is_of_two_grids, says
from monai_lm.io.freesurfer import MGH_SUFFIXES, is_warp
from monai_lm.io.itk_hdf5 import is_hdf5
from monai_lm.io.itk_transform import TRANSFORM_SUFFIXES, applied_parts
from monai_lm.io.m3z import MORPH_SUFFIXES
from monai_lm.io.pictures import PICTURE_SUFFIXES
from monai_lm.io.points import POINT_SUFFIXES
from monai_lm.io.simpleitk import IMAGE_SUFFIXES
from monai_lm.io.volumes import load_volume, says_edges

__all__ = ["describe_file"]

_DIRECTION = "from points of the fixed image, on whose grid it lies, to points of the moving image"
_MOST_LABELS = 20
_AFFINES = (".mat", ".lta")
_IMAGES = (".nii", ".gz", ".hdr", ".img", *MGH_SUFFIXES, *IMAGE_SUFFIXES)
_OTHER_FIELDS = (".npz", ".head", ".brik", *MORPH_SUFFIXES)


def describe_file(path: str | Path, file_format: str = "auto") -> dict[str, Any]:
    """What a file holds, as far as its reader tells: a field, an affine, points, an image or a label map.

    Args:
        path: the file.
        file_format: of a field that does not say it.

    Returns:
        Names and values for people, ``kind`` first. Of fields: format, what their numbers are, direction, grid, folds,
        the largest displacement.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, or broken.
    """
    path = Path(path)
    check_file(path)
    suffix = path.suffix.lower()
    if file_format != "auto":
        return _field(path, file_format)
    if path.name.lower().endswith(POINT_SUFFIXES) and not _is_transform(path):
        return _points(path)
    if suffix in _AFFINES:
        return _affine(path)
    if suffix in PICTURE_SUFFIXES:
        return _volume(path)
    if suffix in TRANSFORM_SUFFIXES:
        return _transform(path)
    if suffix not in _IMAGES + _OTHER_FIELDS:
        ends = sorted({*_IMAGES, *PICTURE_SUFFIXES, *_OTHER_FIELDS, *TRANSFORM_SUFFIXES, *POINT_SUFFIXES, *_AFFINES})
        raise ValueError(
            f"{path} must be a field, an affine, points, an image or a label map, got {look_of(path)}; what is read "
            f"ends in {' '.join(ends)}"
        )
    try:
        found = guess_format(path)
    except ValueError as not_a_field:
        return _volume(path, not_a_field)
    if found == "freesurfer" and not is_warp(path):
        return _volume(path)
    if found in ("metaimage", "nrrd") and load_volume(path, finite=False)[0].ndim == 3:
        return _volume(path)
    return _field(path, found)


def _is_transform(path: Path) -> bool:
    """Whether a text file that may hold points, too, begins as ITK's transforms do, or has four numbers in a row."""
    if path.suffix.lower() != ".txt":
        return False
    text = path.read_text("utf-8", "replace")
    row = next((line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")), [])
    return text.startswith("#Insight Transform File") or not row or (len(row) == 4 and not row[-1][0].isalpha())


def _transform(path: Path) -> dict[str, Any]:
    """A file of ITK's transforms, linear or not, or four rows of four numbers."""
    if not is_hdf5(path) and not path.read_bytes().startswith(b"#Insight Transform File"):
        return _affine(path)
    parts, linear = applied_parts(path)
    beside = {"parts": ", then ".join(parts)}
    if linear:
        return _affine(path) | beside
    if parts[0] == "DisplacementFieldTransform":
        return _field(path, "itk_transform") | beside
    note = "it does not say on which grid it lies; it is read on that of a fixed image"
    return {"kind": "field", "format": "itk_transform", "values": says("itk_transform"), **beside, "note": note}


def _affine(path: Path) -> dict[str, Any]:
    matrix = read_affine(path)
    rows = {f"row {i + 1}": "  ".join(f"{v:10.5f}" for v in row) for i, row in enumerate(matrix)}
    return {
        "kind": "affine", "values": "RAS mm, as it is read",
        "direction": "from points of the fixed to points of the moving image",
        **rows, "determinant": float(np.linalg.det(matrix[:3, :3])),
    }  # fmt: skip


def _points(path: Path) -> dict[str, Any]:
    points = read_points(path)
    ends = {name: _numbers(end) for name, end in (("lowest", points.min(0)), ("highest", points.max(0)))}
    return {"kind": "points", "values": "RAS mm, as they are read", "count": len(points), **ends}


def _field(path: Path, file_format: str) -> dict[str, Any]:
    ddf, affine = read_ddf(path, file_format)
    field = torch.from_numpy(np.ascontiguousarray(ddf))[None].float()
    out = {"kind": "field", "format": file_format, "values": says(file_format), "direction": _DIRECTION}
    out |= _grid(ddf.shape[1:], affine) | {"components": len(ddf), "folds": int(fold_count(field))}
    if is_of_two_grids(file_format):
        out["note"] = (
            "folds and length are right if the moving image lies on the same grid: the file does not say where"
        )
    if affine is None:
        return out | {"largest (voxels)": float(field[0].norm(dim=0).max())}
    matrix = torch.from_numpy(affine[:3, : len(ddf)]).float()
    return out | {"largest (mm)": float((matrix @ field[0].flatten(1)).norm(dim=0).max())}


def _volume(path: Path, not_a_field: ValueError | None = None) -> dict[str, Any]:
    """An image, a label map, a series; vectors that do not say what they are, with what their reader says of it."""
    data, affine = load_volume(path, finite=False)
    finite = data[np.isfinite(data)]
    if not finite.size:
        raise ValueError(f"{path} must hold finite numbers, got none")
    is_series = data.ndim == 4 and data.shape[3] > 1
    whole = len(finite) == data.size and bool((data == data.round()).all()) and float(data.min()) >= 0
    labels = np.unique(data) if whole and not is_series else np.empty(0)
    is_label = 1 < len(labels) <= max(_MOST_LABELS, data.size // 1000)
    out: dict[str, Any] = {"kind": "label map" if is_label else "series" if is_series else "image"}
    if not_finite := data.size - len(finite):
        out["not finite"] = f"{not_finite} voxels, NaN or infinite: a mask of zeros must hide them"
    elif finite.min() == finite.max():
        out["note"] = "one value everywhere: there is nothing to register"
    if "must say what its vectors are" in str(not_a_field):
        out = {"kind": "vectors", "note": str(not_a_field)}
    out |= _grid(data.shape, affine)
    if not says_edges(path):
        out["spacing (mm)"] += ", assumed: the file does not say it"
    out |= {"range": _numbers([finite.min(), finite.max()])}
    if is_label and "note" not in out:
        more = f" and {len(labels) - _MOST_LABELS} more" if len(labels) > _MOST_LABELS else ""
        out["labels"] = " ".join(f"{v:g}" for v in labels[:_MOST_LABELS]) + more
    return out


def _grid(size: tuple[int, ...], affine: np.ndarray | None) -> dict[str, Any]:
    out = {"size": " ".join(map(str, size))}
    if affine is None:
        return out
    n = min(len(size), 3)
    toward = nib.aff2axcodes(affine)
    straight = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).max(axis=0).min() > 1 - 1e-6
    return out | {
        "spacing (mm)": _numbers(spacing_of(affine, n)),
        "orientation": "".join(map(str, toward[:n])) + ("" if straight else ", oblique"),
        "origin (RAS mm)": _numbers(affine[:3, 3]),
    }


def _numbers(values: Any) -> str:
    return " ".join(f"{v:.6g}" for v in values)
