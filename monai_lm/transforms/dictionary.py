"""Dictionary versions of the transforms in ``array.py``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from monai_lm.transforms.array import (
    InvertDDF,
    JacobianDeterminant,
    LoadDDF,
    RefineDDF,
    SaveDDF,
    WarpImage,
    WarpPoints,
)
from monai_lm.transforms.places import has_affine

__all__ = [
    "InvertDDFD",
    "InvertDDFDict",
    "InvertDDFd",
    "JacobianDeterminantD",
    "JacobianDeterminantDict",
    "JacobianDeterminantd",
    "LoadDDFD",
    "LoadDDFDict",
    "LoadDDFd",
    "OnFixedGridD",
    "OnFixedGridDict",
    "OnFixedGridd",
    "RefineDDFD",
    "RefineDDFDict",
    "RefineDDFd",
    "SaveDDFD",
    "SaveDDFDict",
    "SaveDDFd",
    "WarpImageD",
    "WarpImageDict",
    "WarpImaged",
    "WarpPointsD",
    "WarpPointsDict",
    "WarpPointsd",
]


class RefineDDFd(MapTransform):
    """Dictionary version of :class:`RefineDDF`: replaces the predicted field by the refined one.

    Args:
        fixed_key: fixed image ``(C, *S)``.
        moving_key: moving image ``(C, *S)``.
        ddf_key: predicted displacement ``(n, *S)`` in voxels; the refined one is stored under the same key.
        allow_missing_keys: with a missing ``ddf_key`` start from the identity; with a missing image leave the data as
            it is. Otherwise a missing key raises.
        device: where to compute; default: where the fixed image is.
        mask_key: weights ``(1, *S)`` on the fixed grid, see :class:`RefineDDF`; ``None``: every voxel counts.
        moving_mask_key: weights ``(1, *S)`` on the moving grid; ``None``: every voxel counts.
        label_keys: label maps ``(1, *S)`` of the fixed and of the moving image, that guide; ``None``: none.
        point_keys: points ``(N, n)`` in voxels of the fixed and of the moving image, that guide; ``None``: none.
        kwargs: ``guide_values`` and ``guide_weight`` of :class:`RefineDDF`, and keyword arguments of
            :func:`monai_lm.refine`.
    """

    backend = RefineDDF.backend

    def __init__(
        self,
        fixed_key: str = "fixed",
        moving_key: str = "moving",
        ddf_key: str = "ddf",
        allow_missing_keys: bool = False,
        device: torch.device | str | None = None,
        mask_key: str | None = None,
        moving_mask_key: str | None = None,
        label_keys: tuple[str, str] | None = None,
        point_keys: tuple[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        masks = [key for key in (mask_key, moving_mask_key) if key is not None]
        keys = (fixed_key, moving_key, ddf_key, *masks, *(label_keys or ()), *(point_keys or ()))
        super().__init__(keys, allow_missing_keys)
        self.fixed_key, self.moving_key, self.ddf_key = fixed_key, moving_key, ddf_key
        self.mask_key, self.moving_mask_key = mask_key, moving_mask_key
        self.label_keys, self.point_keys = label_keys, point_keys
        self.refine = RefineDDF(device, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Refine ``data[ddf_key]``.

        Raises:
            KeyError: a key is missing and ``allow_missing_keys`` is false.
            ValueError: shapes or settings that do not fit, see :func:`monai_lm.refine`.
        """
        d = dict(data)
        present = set(self.key_iterator(d))
        if {self.fixed_key, self.moving_key} <= present:
            masks = [None if key is None else d.get(key) for key in (self.mask_key, self.moving_mask_key)]
            guides = [
                tuple(d[key] for key in keys) if keys is not None and set(keys) <= present else None
                for keys in (self.label_keys, self.point_keys)
            ]
            d[self.ddf_key] = self.refine(d[self.fixed_key], d[self.moving_key], d.get(self.ddf_key), *masks, *guides)
        return d


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


class LoadDDFd(MapTransform):
    """Dictionary version of :class:`LoadDDF`: replaces file names by the fields in them.

    Args:
        keys: file names of displacement fields.
        fixed_key: fixed image ``(C, *S)``, loaded; Learn2Reg's files need it, of others it checks the grid.
        moving_key: moving image ``(C, *M)``, loaded, if its grid is another than the field's.
        file_format: see :class:`LoadDDF`.
        relative: for FSL's files: displacements, or positions; default: guessed from the values.
        allow_missing_keys: do not raise for missing ``keys``.
    """

    backend = LoadDDF.backend

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: str | None = None,
        moving_key: str | None = None,
        file_format: str = "auto",
        relative: bool | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fixed_key, self.moving_key = fixed_key, moving_key
        self.load = LoadDDF(file_format, relative)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read every field."""
        d = dict(data)
        for key in self.key_iterator(d):
            images = [None if image is None else d[image] for image in (self.fixed_key, self.moving_key)]
            d[key] = self.load(d[key], *images)
        return d


class SaveDDFd(MapTransform):
    """Dictionary version of :class:`SaveDDF`.

    Args:
        keys: displacement fields ``(n, *S)`` in voxels.
        output_dir: folder, made if missing.
        output_postfix: the file is ``<name>_<postfix>.nii.gz`` (``.npz`` for Learn2Reg); one per key, default: the key.
        name_key: the files' name: a string, or a ``MetaTensor`` whose file name is used. Default: the field itself, and
            ``"pair"`` where that carries no file name.
        affine_key: image on the fixed grid whose affine the field gets if it has none of its own.
        allow_missing_keys: do not raise for missing ``keys``.
        file_format: ``"itk"``, ``"itk_transform"``, ``"metaimage"``, ``"nrrd"``, ``"fsl"``, ``"voxel"`` or
            ``"learn2reg"``.
    """

    backend = SaveDDF.backend

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path = ".",
        output_postfix: str | Sequence[str] | None = None,
        name_key: str | None = None,
        affine_key: str | None = None,
        allow_missing_keys: bool = False,
        file_format: str = "itk",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        given = self.keys if output_postfix is None else output_postfix
        postfixes = [given] if isinstance(given, str) else [str(postfix) for postfix in given]
        if len(postfixes) != len(self.keys) or len(set(postfixes)) < len(postfixes):
            raise ValueError(f"output_postfix must be one per key of {self.keys}, all different, got {postfixes}")
        self.saves = [SaveDDF(output_dir, postfix, file_format) for postfix in postfixes]
        self.name_key = name_key
        self.affine_key = affine_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write every field; the data is returned unchanged."""
        d = dict(data)
        for key, save in self.key_iterator(d, self.saves):
            ddf = d[key]
            if self.affine_key is not None and not has_affine(ddf):
                image = d[self.affine_key]
                if not isinstance(image, MetaTensor):
                    raise TypeError(
                        f"{self.affine_key} must be a MetaTensor with an affine, got {type(image).__name__}"
                    )
                meta = {k: v for k, v in ddf.meta.items() if k != "affine"} if isinstance(ddf, MetaTensor) else None
                ddf = MetaTensor(ddf, affine=image.affine, meta=meta)
            save(ddf, self._name(d, key))
        return d

    def _name(self, data: Mapping[Hashable, Any], key: Hashable) -> str:
        value = data[key if self.name_key is None else self.name_key]
        if isinstance(value, MetaTensor):
            value = Path(str(value.meta.get("filename_or_obj", self.name_key or "pair"))).name
            value = re.sub(r"(\.(nii|mha|nrrd|npy|npz))?(\.gz)?$", "", value)
        elif self.name_key is None:
            return "pair"
        return str(value)


LoadDDFD = LoadDDFDict = LoadDDFd


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


RefineDDFD = RefineDDFDict = RefineDDFd
WarpImageD = WarpImageDict = WarpImaged
WarpPointsD = WarpPointsDict = WarpPointsd
InvertDDFD = InvertDDFDict = InvertDDFd
JacobianDeterminantD = JacobianDeterminantDict = JacobianDeterminantd
SaveDDFD = SaveDDFDict = SaveDDFd
OnFixedGridD = OnFixedGridDict = OnFixedGridd
