"""Fields from files and to files, array and dictionary versions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor

from monai_lm.io import READABLE, file_suffix, read_ddf, write_ddf
from monai_lm.transforms.places import has_affine, same_affine

__all__ = [
    "LoadDDF",
    "LoadDDFD",
    "LoadDDFDict",
    "LoadDDFd",
    "SaveDDF",
    "SaveDDFD",
    "SaveDDFDict",
    "SaveDDFd",
]


class LoadDDF(Transform):
    """Read a displacement field from a file: ITK's, ANTs' or Slicer's, FSL's, NiftyReg's, in voxels, or Learn2Reg's.

    Args:
        file_format: ``"itk"``, ``"itk_transform"``, ``"metaimage"``, ``"nrrd"``, ``"fsl"``, ``"voxel"``,
            ``"learn2reg"``, ``"niftyreg"``, ``"freesurfer"``, ``"m3z"``, ``"afni"``, or ``"ras"``, ``"lps"`` and
            ``"positions"`` for millimetres, see :func:`monai_lm.io.read_millimetre_ddf`; ``"auto"``: what the file
            says, see :func:`monai_lm.io.guess_format`.
        relative: for FSL's files: displacements, or positions; default: guessed from the values.
    """

    backend = [TransformBackends.NUMPY]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(self, file_format: str = "auto", relative: bool | None = None) -> None:
        if file_format not in ("auto", *READABLE):
            raise ValueError(f"file_format must be 'auto' or one of {READABLE}, got {file_format!r}")
        self.file_format = file_format
        self.relative = relative

    def __call__(
        self, filename: str | Path, fixed: NdarrayOrTensor | None = None, moving: NdarrayOrTensor | None = None
    ) -> MetaTensor:
        """Read.

        Args:
            filename: the file.
            fixed: ``(C, *S)`` fixed image. Learn2Reg's files need it to know their size and affine; of others it checks
                that they live on its grid.
            moving: ``(C, *M)`` moving image, a ``MetaTensor``; default: its grid is the field's. Files in millimetres
                lead to points in space, and its affine makes voxels of them.

        Returns:
            ``(n, *S)`` displacement in voxels, from voxels of the fixed to those of the moving grid, with the affine of
            the fixed grid. ``meta`` has ``filename_or_obj`` and, if ``moving`` is given, ``moving_affine`` and
            ``moving_size``: :class:`WarpImage` then takes that image whatever its grid.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: ``moving`` is not a ``MetaTensor``.
            ValueError: a file of another format or a broken one, or a field that is not on the grid of ``fixed``.
        """
        target: dict[str, Any] = {}
        if moving is not None:
            if not isinstance(moving, MetaTensor):
                raise TypeError(f"moving must be a MetaTensor with an affine, got {type(moving).__name__}")
            target = {"moving_affine": moving.affine.cpu().numpy(), "moving_size": tuple(moving.shape[1:])}
        size = None if fixed is None else tuple(fixed.shape[1:])
        array, affine = read_ddf(filename, self.file_format, size=size, relative=self.relative, **target)
        if size is not None and array.shape[1:] != size:
            raise ValueError(f"{filename} must be on the grid of fixed, {size}, got a field of {array.shape[1:]}")
        if affine is None:
            affine = fixed.affine.cpu().numpy() if isinstance(fixed, MetaTensor) else np.eye(4)
        elif isinstance(fixed, MetaTensor) and has_affine(fixed) and not same_affine(fixed.affine, affine):
            raise ValueError(
                f"{filename} must be on the grid of fixed, with the affine\n{fixed.affine.tolist()}\ngot\n"
                f"{affine.tolist()}"
            )
        out = MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine.copy()))
        out.meta["filename_or_obj"] = str(filename)
        if moving is not None:
            out.meta["moving_affine"] = torch.from_numpy(target["moving_affine"].copy())
            out.meta["moving_size"] = target["moving_size"]
        return out


class SaveDDF(Transform):
    """Write a field, by default as a NIfTI displacement field in ITK's convention (LPS millimetres).

    Args:
        output_dir: folder, made if missing.
        output_postfix: the file is ``<name>_<postfix>.nii.gz``, for Learn2Reg ``.npz``.
        file_format: ``"itk"`` (also ANTs, SimpleITK, Slicer), ``"itk_transform"``, ``"metaimage"``, ``"nrrd"``,
            ``"fsl"`` (relative), ``"voxel"``, ``"learn2reg"`` (full resolution) or ``"freesurfer"``.
    """

    backend = [TransformBackends.NUMPY]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(self, output_dir: str | Path = ".", output_postfix: str = "ddf", file_format: str = "itk") -> None:
        self.output_dir = Path(output_dir)
        self.output_postfix = output_postfix
        self.file_format = file_format
        self.suffix = file_suffix(file_format)
        self.written: set[Path] = set()

    def __call__(self, ddf: NdarrayOrTensor, name: str = "pair") -> NdarrayOrTensor:
        """Write ``ddf`` ``(n, *S)`` in voxels, with its affine (identity if it has none); returns it unchanged.

        ``meta["moving_affine"]``, which :class:`RefineDDF` and :class:`LoadDDF` set, is the affine of the moving image
        if that is another, ``meta["moving_size"]`` its voxel counts. A file that is there is replaced; with a warning,
        if this transform wrote it: two pairs of one fixed image need names of their own.
        """
        affine, moving_affine, moving_size = np.eye(4), None, None
        if isinstance(ddf, MetaTensor):
            affine = ddf.affine.cpu().numpy()
            moving_size = ddf.meta.get("moving_size")
            if (moving := ddf.meta.get("moving_affine")) is not None:
                moving_affine = torch.as_tensor(moving).cpu().numpy()
        if Path(name).name != name:
            raise ValueError(f"name must do as part of a file's name, got {name!r}")
        path = self.output_dir / f"{name}_{self.output_postfix}{self.suffix}"
        if path in self.written:
            warnings.warn(f"{path} is replaced: this transform wrote a field of that name before", stacklevel=2)
        self.written.add(path)
        tensor = convert_to_tensor(ddf, track_meta=False).detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        write_ddf(path, array, affine, self.file_format, moving_affine=moving_affine, moving_size=moving_size)
        return ddf


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
        name_key: the files' name: a string, or a ``MetaTensor`` whose file name is used. Default: the field itself;
            where that carries no file name, ``pair``, ``pair_1``, ``pair_2``, … in the order of the calls, or of the
            calls of all workers of a data loader.
        affine_key: image on the fixed grid whose affine the field gets if it has none of its own.
        allow_missing_keys: do not raise for missing ``keys``.
        file_format: ``"itk"``, ``"itk_transform"``, ``"metaimage"``, ``"nrrd"``, ``"fsl"``, ``"voxel"``,
            ``"learn2reg"`` or ``"freesurfer"``.
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
        self.calls = 0

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write every field; the data is returned unchanged."""
        d = dict(data)
        worker = torch.utils.data.get_worker_info()
        number = self.calls if worker is None else self.calls * worker.num_workers + worker.id
        self.calls += 1
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
            save(ddf, self._name(d, key) or f"pair_{number}".removesuffix("_0"))
        return d

    def _name(self, data: Mapping[Hashable, Any], key: Hashable) -> str:
        """What a sample is called; empty where nothing tells."""
        value = data[key if self.name_key is None else self.name_key]
        if isinstance(value, MetaTensor):
            value = Path(str(value.meta.get("filename_or_obj", ""))).name
            return re.sub(r"(\.(nii|mha|nrrd|npy|npz))?(\.gz)?$", "", value)
        return "" if self.name_key is None else str(value)


LoadDDFD = LoadDDFDict = LoadDDFd
SaveDDFD = SaveDDFDict = SaveDDFd
