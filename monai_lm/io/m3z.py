"""FreeSurfer's morphs (``.m3z``, ``.m3d``), as ``mri_ca_register`` writes them: ``recon-all``'s ``talairach.m3z``.

Big-endian: a header, 36 bytes for each node of a grid on the atlas, and tags without lengths; after what ``GCAMwrite``
in FreeSurfer's ``utils/gcamorph.cpp`` writes.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from monai_lm.fields.space import check_affine
from monai_lm.io.content import check_file, look_of
from monai_lm.io.freesurfer import GEOMETRIES, geometries, in_ras
from monai_lm.io.nifti import errors_of
from monai_lm.io.vectors import as_nearest, places, to_voxels

__all__ = ["MORPH_SUFFIXES", "read_m3z_ddf"]

MORPH_SUFFIXES = (".m3z", ".m3d")

_HEADER = struct.Struct(">f4if")  # version, size, spacing, a weight of the registration
_NODE = np.dtype([("before", ">f4", 3), ("place", ">f4", 3), ("node", ">i4", 3)])
_TAG_GEOMETRIES, _TAG_KIND, _TAG_LABELS = 10, 11, 12
_RAS, _VOXELS = 1, 2


def read_m3z_ddf(path: str | Path, moving_affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a morph of FreeSurfer's, on the grid of its nodes: of the atlas, or of every second voxel of it.

    Args:
        path: ``.m3z``, or ``.m3d``, which is not compressed, from the atlas (fixed) to the image (moving). Nodes that
            FreeSurfer marks as invalid are displaced as the nearest of the others.
        moving_affine: ``(4, 4)`` voxel-to-RAS affine of the moving grid; default: that of the nodes, the fixed one.

    Returns:
        The displacement in voxels, ``(3, *S)`` float32, and the ``(4, 4)`` affine of the grid it lives on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no morph, is cut off, does not say where the atlas or the image lies, has no valid node, is
            not finite, or an affine is singular.
    """
    check_file(path)
    with errors_of(path, "morph of FreeSurfer's"):
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if len(content) < _HEADER.size or (version := _HEADER.unpack_from(content)[0]) != 1:
            raise ValueError(look_of(path) if len(content) < _HEADER.size else f"the version {version:g}, not 1")
        _, *size, spacing, _ = _HEADER.unpack_from(content)
        tags = _HEADER.size + _NODE.itemsize * int(np.prod(size, dtype=object))
        if min(*size, spacing) < 1 or tags > len(content):
            raise ValueError(f"{size} nodes {spacing} voxels apart in {len(content)} bytes")
        nodes = np.frombuffer(content, _NODE, int(np.prod(size)), _HEADER.size).reshape(size)
        kind, source, atlas = _said(content, tags, nodes.size)
    if atlas is None:
        raise ValueError(f"{path} must say where its atlas lies, the grid of its nodes, got none")
    affine = check_affine(f"affine of the atlas in {path}", atlas @ np.diag([*[float(spacing)] * 3, 1.0]))
    led = np.moveaxis(nodes["place"], -1, 0).astype(np.float64)
    if not np.isfinite(led).all():
        raise ValueError(f"{path} must be finite, got {int((~np.isfinite(led)).sum())} NaN or infinite values")
    vectors = (led if kind == _RAS else in_ras(path, led, source)) - places(affine, size)
    invalid = ((nodes["before"] == 0) & (nodes["place"] == 0)).all(axis=-1)
    if invalid.all():
        raise ValueError(f"{path} must have valid nodes, got none")
    return to_voxels(path, as_nearest(vectors, invalid), affine, moving_affine, np.eye(4)), affine


def _said(content: bytes, at: int, nodes: int) -> tuple[int, np.ndarray | None, np.ndarray | None]:
    """What the places of the nodes are, and the affines of source and atlas; ValueError for what is cut off."""
    kind = _VOXELS
    source: np.ndarray | None = None
    atlas: np.ndarray | None = None
    lengths = {_TAG_GEOMETRIES: GEOMETRIES, _TAG_KIND: 4, _TAG_LABELS: 4 * nodes}
    while at + 4 <= len(content):
        tag, at = struct.unpack_from(">i", content, at)[0], at + 4
        if tag not in lengths:
            break
        if at + lengths[tag] > len(content):
            raise ValueError(f"the tag {tag} of {lengths[tag]} bytes, {len(content) - at} bytes before the end")
        if tag == _TAG_GEOMETRIES:
            source, atlas = geometries(content, at)
        elif tag == _TAG_KIND:
            (kind,) = struct.unpack_from(">i", content, at)
        at += lengths[tag]
    if kind not in (_RAS, _VOXELS):
        raise ValueError(f"{kind} as what its places are, not {_RAS} or {_VOXELS}")
    return kind, source, atlas
