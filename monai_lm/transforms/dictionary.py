"""Dictionary versions of the transforms in ``array.py``, and the place of what lies on a fixed grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from monai_lm.transforms.array import (
    InvertDDF,
    JacobianDeterminant,
    WarpImage,
    WarpPoints,
)

__all__ = [
    "InvertDDFD",
    "InvertDDFDict",
    "InvertDDFd",
    "JacobianDeterminantD",
    "JacobianDeterminantDict",
    "JacobianDeterminantd",
    "OnFixedGridD",
    "OnFixedGridDict",
    "OnFixedGridd",
    "WarpImageD",
    "WarpImageDict",
    "WarpImaged",
    "WarpPointsD",
    "WarpPointsDict",
    "WarpPointsd",
]


class WarpImaged(MapTransform):
    """Dictionary version of :class:`WarpImage`.

    Args:
        keys: moving images or label maps; each is replaced by its warped version.
        ddf_key: displacement ``(n, *S)`` in voxels.
        mode: ``"bilinear"`` or ``"nearest"``, one or a sequence as long as ``keys``.
        padding_mode: ``"border"`` or ``"zeros"``.
        allow_missing_keys: do not raise for missing ``keys``.
    """

    backend = WarpImage.backend

    def __init__(
        self,
        keys: KeysCollection,
        ddf_key: str = "ddf",
        mode: str | list[str] = "bilinear",
        padding_mode: str = "border",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        modes = [mode] * len(self.keys) if isinstance(mode, str) else list(mode)
        if len(modes) != len(self.keys):
            raise ValueError(f"mode must be one name or one per key ({len(self.keys)}), got {len(modes)}")
        self.ddf_key = ddf_key
        self.warps = [WarpImage(m, padding_mode) for m in modes]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Warp every image with ``data[ddf_key]``."""
        d = dict(data)
        for key, warp_image in self.key_iterator(d, self.warps):
            d[key] = warp_image(d[key], d[self.ddf_key])
        return d


class WarpPointsd(MapTransform):
    """Dictionary version of :class:`WarpPoints`: leads points of the fixed image to the moving image.

    Args:
        keys: points ``(N, n)`` or ``(C, N, n)``.
        ddf_key: displacement ``(n, *S)`` in voxels on the fixed grid.
        world: points are in RAS millimetres; default: in voxels.
        allow_missing_keys: do not raise for missing ``keys``.
    """

    backend = WarpPoints.backend

    def __init__(
        self, keys: KeysCollection, ddf_key: str = "ddf", world: bool = False, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.ddf_key = ddf_key
        self.warp = WarpPoints(world)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Lead all points with ``data[ddf_key]``."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.warp(d[key], d[self.ddf_key])
        return d


class InvertDDFd(MapTransform):
    """Dictionary version of :class:`InvertDDF`: replaces fields by their inverses.

    Args:
        keys: displacement fields ``(n, *S)`` in voxels.
        allow_missing_keys: do not raise for missing ``keys``.
    """

    backend = InvertDDF.backend

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.invert = InvertDDF()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Invert every field."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.invert(d[key])
        return d


class JacobianDeterminantd(MapTransform):
    """Dictionary version of :class:`JacobianDeterminant`: stores the determinants of fields.

    Args:
        keys: displacement fields ``(n, *S)`` in voxels.
        output_keys: where the determinants ``(1, *S)`` are stored, one per key; ``None`` replaces the fields.
        log: the logarithm of the determinant.
        allow_missing_keys: do not raise for missing ``keys``.
    """

    backend = JacobianDeterminant.backend

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection | None = "jacobian",
        log: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = self.keys if output_keys is None else ensure_tuple(output_keys)
        if len(self.output_keys) != len(self.keys) or len(set(self.output_keys)) < len(self.keys):
            raise ValueError(f"output_keys must be one per key of {self.keys}, all different, got {self.output_keys}")
        self.determinant = JacobianDeterminant(log)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Differentiate every field."""
        d = dict(data)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[output_key] = self.determinant(d[key])
        return d


class OnFixedGridd(MapTransform):
    """Give fields and warped images the affine of the fixed image and the name of the pair, for the files of them.

    Args:
        keys: what lies on the fixed grid; missing ones are left out.
        fixed_key: the fixed image, a ``MetaTensor``.
        moving_key: the moving image, a ``MetaTensor``; a field file needs its place in space, too.
        name_key: the name of the pair.
    """

    def __init__(
        self, keys: KeysCollection, fixed_key: str = "fixed", moving_key: str = "moving", name_key: str = "name"
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.fixed_key = fixed_key
        self.moving_key = moving_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the metadata of ``keys``."""
        d = dict(data)
        for key in self.key_iterator(d):
            meta = {"filename_or_obj": f"{d[self.name_key]}.nii.gz", "moving_affine": d[self.moving_key].affine}
            d[key] = MetaTensor(d[key], affine=d[self.fixed_key].affine, meta=meta)
        return d


WarpImageD = WarpImageDict = WarpImaged
WarpPointsD = WarpPointsDict = WarpPointsd
InvertDDFD = InvertDDFDict = InvertDDFd
JacobianDeterminantD = JacobianDeterminantDict = JacobianDeterminantd
OnFixedGridD = OnFixedGridDict = OnFixedGridd
