"""Array transforms: channel-first tensors without a batch dimension, as MONAI's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_lm.fields import fold_count, invert, jacobian_determinant, sample_points, warp
from monai_lm.fields.space import to_voxel, to_world
from monai_lm.fields.topology import LOG_FLOOR
from monai_lm.guidance import Guidance, Keypoints, Labels
from monai_lm.io import READABLE, file_suffix, read_ddf, write_ddf
from monai_lm.kernels.devices import widest_float
from monai_lm.solver.checks import check_finite
from monai_lm.solver.refinement import check_keywords, refine
from monai_lm.transforms.places import (
    check_same_axes,
    check_target,
    has_affine,
    leads_into,
    same_affine,
    same_axes,
    same_directions,
)

__all__ = ["InvertDDF", "JacobianDeterminant", "LoadDDF", "RefineDDF", "SaveDDF", "WarpImage", "WarpPoints"]


class RefineDDF(Transform):
    """Refine a predicted displacement field for the pair of images at hand.

    Args:
        device: where to compute; default: where the fixed image is. The result stays there.
        guide_values: labels that guide, where there are label maps; ``None``: all that both have.
        guide_weight: how hard labels and points pull, relative to the images.
        kwargs: keyword arguments of :func:`monai_lm.refine`. ``spacing`` defaults to that of the fixed image if it is
            a ``MetaTensor``, else to one.

    Example::

        refined = RefineDDF(iterations=(50, 25), scales=(2, 1))(fixed, moving, ddf)
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(
        self,
        device: torch.device | str | None = None,
        guide_values: Sequence[int] | None = None,
        guide_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_keywords("RefineDDF", kwargs)
        self.device, self.guide_values, self.guide_weight = device, guide_values, guide_weight
        self.kwargs = kwargs

    def __call__(  # type: ignore[override]
        self,
        fixed: NdarrayOrTensor,
        moving: NdarrayOrTensor,
        ddf: NdarrayOrTensor | None = None,
        mask: NdarrayOrTensor | None = None,
        moving_mask: NdarrayOrTensor | None = None,
        labels: tuple[NdarrayOrTensor, NdarrayOrTensor] | None = None,
        points: tuple[NdarrayOrTensor, NdarrayOrTensor] | None = None,
    ) -> MetaTensor:
        """Refine.

        Args:
            fixed: ``(C, *S)`` image, 2D or 3D.
            moving: ``(C, *S)`` image on the same grid.
            ddf: ``(n, *S)`` predicted displacement in voxels; ``None`` starts from the identity.
            mask: ``(1, *S)`` on the fixed grid, weights in [0, 1]: the similarity counts where it is not zero.
            moving_mask: ``(1, *S)``, the same on the moving grid; it goes with the moving image.
            labels: ``(1, *S)`` of the fixed and of the moving image, that guide; see :class:`monai_lm.guidance.Labels`.
            points: ``(N, n)`` in voxels of the fixed and of the moving image, that guide; see
                :class:`monai_lm.guidance.Keypoints`.

        Returns:
            ``(n, *S)`` refined displacement in voxels with the affine of the fixed image; ``meta["refinement"]`` holds
            the dissimilarity before and after, the folds of the prediction and whether it was used, and the seconds it
            took, and ``meta["filename_or_obj"]`` the file of the fixed image if it has one.

        Raises:
            ValueError: shapes or settings that do not fit, see :func:`monai_lm.refine`, or images whose axes differ in
                direction or spacing: they must be resampled onto one grid first; or a field that was loaded for a
                moving image whose axes are others.
        """
        check_same_axes("fixed", fixed, "moving", moving)
        check_same_axes("fixed", fixed, "ddf", ddf)
        check_same_axes("fixed", fixed, "mask", mask)
        check_same_axes("moving", moving, "moving_mask", moving_mask)
        check_target(ddf, moving)
        given = {"fixed": fixed, "moving": moving, "ddf": ddf, "mask": mask, "moving_mask": moving_mask}
        pair: dict[str, Any] = {
            k: None if x is None else convert_to_tensor(x, device=self.device)[None] for k, x in given.items()
        }
        kwargs = dict(self.kwargs)
        if isinstance(fixed, MetaTensor) and kwargs.get("spacing") is None:
            kwargs["spacing"] = fixed.pixdim.tolist()
        kwargs["guidance"] = self._guides(pair["fixed"].device, labels, points, kwargs.get("guidance"))
        result = refine(**pair, **kwargs)
        out = MetaTensor(result.ddf[0], affine=fixed.affine.clone() if isinstance(fixed, MetaTensor) else None)
        if isinstance(fixed, MetaTensor) and "filename_or_obj" in fixed.meta:
            out.meta["filename_or_obj"] = fixed.meta["filename_or_obj"]
        if isinstance(fixed, MetaTensor) and isinstance(moving, MetaTensor) and same_axes(fixed, moving):
            out.meta["moving_affine"] = moving.affine.clone()
        out.meta["refinement"] = {
            "initial_loss": float(result.initial_loss[0]),
            "final_loss": float(result.final_loss[0]),
            "predicted_folds": int(result.predicted_folds[0]),
            "prediction_used": None if result.prediction_used is None else not result.unused,
            "seconds": result.seconds,
        }
        return out

    def _guides(
        self, device: torch.device, labels: Any, points: Any, given: Guidance | Sequence[Guidance] | None
    ) -> list[Guidance]:
        """What guides: what the transform was made with, and the labels and points of the pair."""
        out = [] if given is None else [given] if isinstance(given, Guidance) else list(given)
        if labels is not None:
            maps = [convert_to_tensor(x, track_meta=False, device=device)[None] for x in labels]
            out.append(Labels(maps[0], maps[1], self.guide_weight, self.guide_values))
        if points is not None:
            pair = [convert_to_tensor(x, track_meta=False, device=device)[None] for x in points]
            out.append(Keypoints(pair[0], pair[1], self.guide_weight))
        return out


class WarpImage(Transform):
    """Warp a moving image or label map onto the fixed grid with a displacement field.

    Args:
        mode: ``"bilinear"``, or ``"nearest"`` for labels.
        padding_mode: ``"border"`` or ``"zeros"``.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(self, mode: str = "bilinear", padding_mode: str = "border") -> None:
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}")
        if padding_mode not in ("border", "zeros"):
            raise ValueError(f"padding_mode must be 'border' or 'zeros', got {padding_mode!r}")
        self.mode = mode
        self.padding_mode = padding_mode

    def __call__(self, img: NdarrayOrTensor, ddf: NdarrayOrTensor) -> Tensor:  # type: ignore[override]
        """Warp.

        Args:
            img: ``(C, *M)`` moving image.
            ddf: ``(n, *S)`` displacement in voxels on the fixed grid.

        Returns:
            ``(C, *S)``, a ``MetaTensor`` with the affine of the field if that has one; ``"nearest"`` keeps the dtype of
            the image, ``"bilinear"`` returns float32.

        Raises:
            ValueError: image and field differ in the number, the direction or the spacing of their axes and
                ``ddf.meta["moving_affine"]`` does not say that the field leads into this image's voxels, or the field
                is not finite.
        """
        if not leads_into(ddf, img):
            check_same_axes("ddf", ddf, "img", img)
        field = convert_to_tensor(ddf, track_meta=False)
        image = convert_to_tensor(img, track_meta=False, device=field.device)
        dtype = image.dtype if self.mode == "nearest" else torch.float32
        if field.dim() != image.dim() or field.shape[0] != field.dim() - 1:
            raise ValueError(
                f"ddf must be (n, *S) for an image (C, *M), got shapes {tuple(field.shape)} and {tuple(image.shape)}"
            )
        check_finite("ddf", field)
        out = warp(image[None].to(dtype), field[None].float(), self.mode, self.padding_mode)[0].to(dtype)
        if isinstance(ddf, MetaTensor):
            meta = {k: v for k, v in img.meta.items() if k != "affine"} if isinstance(img, MetaTensor) else None
            return MetaTensor(out, affine=ddf.affine.clone(), meta=meta)
        return out


class WarpPoints(Transform):
    """Lead points of the fixed image to where they are in the moving image, with a displacement field.

    A field leads from fixed to moving points; for the other way round invert it first, :class:`InvertDDF`.

    Args:
        world: points are in RAS millimetres, and the field must be a ``MetaTensor``; default: in voxels.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(self, world: bool = False) -> None:
        self.world = world

    def __call__(self, points: NdarrayOrTensor, ddf: NdarrayOrTensor) -> Tensor:  # type: ignore[override]
        """Lead points.

        Args:
            points: ``(N, n)`` or, as MONAI has it, ``(C, N, n)``; NaN points give NaN.
            ddf: ``(n, *S)`` displacement in voxels on the fixed grid.

        Returns:
            Points of the moving image, in the shape of ``points``, float64 where the device has it.

        Raises:
            TypeError: a field that is not a ``MetaTensor``, for ``world``.
            ValueError: shapes that do not fit, or a field that is not finite.
        """
        field = _field(ddf)
        field = field.to(widest_float(field.device))
        points = np.asarray(points) if isinstance(points, list | tuple) else points
        given = convert_to_tensor(points, track_meta=False, dtype=field.dtype, device=field.device)
        if given.dim() not in (2, 3) or given.shape[-1] != len(field):
            raise ValueError(
                f"points must be (N, {len(field)}) or (C, N, {len(field)}) for this field, got {tuple(given.shape)}"
            )
        if not self.world:
            return given + sample_points(field[None], given.reshape(1, -1, len(field))).reshape(given.shape)
        if not isinstance(ddf, MetaTensor):
            raise TypeError(f"ddf must be a MetaTensor with an affine for points in space, got {type(ddf).__name__}")
        voxels = to_voxel(given, ddf.affine)
        moved = voxels + sample_points(field[None], voxels.reshape(1, -1, len(field))).reshape(given.shape)
        return to_world(moved, ddf.meta.get("moving_affine", ddf.affine))


class InvertDDF(Transform):
    """Invert a displacement field: from the moving to the fixed image, on the moving grid."""

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __call__(self, ddf: NdarrayOrTensor) -> MetaTensor:
        """Invert.

        Args:
            ddf: ``(n, *S)`` displacement in voxels on the fixed grid. ``meta["moving_affine"]`` and
                ``meta["moving_size"]``, which :class:`LoadDDF` sets (:class:`RefineDDF` the former, since its images
                have one size), say what the moving grid is; without them it is the fixed one.

        Returns:
            ``(n, *M)`` displacement in voxels on the moving grid, see :func:`monai_lm.fields.invert`; its ``meta`` says
            that it leads to the fixed grid.

        Raises:
            ValueError: a field of another shape, one that is not finite, or one between grids whose axes differ in
                direction or spacing (``monai-lm invert`` inverts the files of those).

        Warns:
            UserWarning: a field that folds: there is no inverse where it does.
        """
        field = _field(ddf).float()
        if folds := int(fold_count(field[None])):
            warnings.warn(f"ddf folds in {folds} cells, where it has no inverse", stacklevel=2)
        meta = ddf.meta if isinstance(ddf, MetaTensor) else {}
        affine = ddf.affine if isinstance(ddf, MetaTensor) else torch.eye(4, dtype=torch.float64)
        target = torch.as_tensor(meta.get("moving_affine", affine))
        if not same_directions(affine, target, len(field)):
            raise ValueError(
                "ddf must lead to a grid with voxel axes of the same direction and spacing, got affines\n"
                f"{affine.tolist()}\nand\n{target.tolist()}"
            )
        inverse = invert(field[None], meta.get("moving_size"))[0][0]
        out = MetaTensor(inverse, affine=target.clone())
        out.meta["moving_affine"], out.meta["moving_size"] = affine.clone(), tuple(field.shape[1:])
        if "filename_or_obj" in meta:
            out.meta["filename_or_obj"] = meta["filename_or_obj"]
        return out


class JacobianDeterminant(Transform):
    """Jacobian determinant of the map that a displacement field stands for: how many times larger volumes become.

    Args:
        log: its natural logarithm; determinants below 1e-3, negative ones included, count as 1e-3, as they do for
            :func:`monai_lm.fields.metrics.sd_log_jacobian`.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(self, log: bool = False) -> None:
        self.log = log

    def __call__(self, ddf: NdarrayOrTensor) -> Tensor:
        """Differentiate.

        Args:
            ddf: ``(n, *S)`` displacement in voxels on the fixed grid. With ``meta["moving_affine"]`` it leads to
                the voxels of another grid; how large these are does not count, the determinant is that in space.

        Returns:
            ``(1, *S)`` float32, dimensionless, see :func:`monai_lm.fields.jacobian_determinant`; a ``MetaTensor`` with
            the affine and the file name of the field if that is one.

        Raises:
            ValueError: a field of another shape, or one that is not finite.
        """
        determinant = jacobian_determinant(_field(ddf)[None].float())
        if isinstance(ddf, MetaTensor) and (moving := ddf.meta.get("moving_affine")) is not None:
            fixed, target = (torch.as_tensor(affine).cpu().double() for affine in (ddf.affine, moving))
            determinant = determinant / float(torch.linalg.solve(target, fixed)[: len(ddf), : len(ddf)].det())
        out = determinant.clamp(min=LOG_FLOOR).log() if self.log else determinant
        if not isinstance(ddf, MetaTensor):
            return out
        meta = {k: v for k, v in ddf.meta.items() if k == "filename_or_obj"}
        return MetaTensor(out, affine=ddf.affine.clone(), meta=meta)


def _field(ddf: NdarrayOrTensor) -> Tensor:
    """A field without its metadata; ValueError if it is none."""
    field: Tensor = convert_to_tensor(ddf, track_meta=False)
    if field.dim() not in (3, 4) or len(field) != field.dim() - 1 or min(field.shape) < 2:
        raise ValueError(
            "ddf must be (n, *S) with n = len(S) = 2 or 3 and at least 2 voxels along every axis, got shape "
            f"{tuple(field.shape)}"
        )
    check_finite("ddf", field)
    return field


class LoadDDF(Transform):
    """Read a displacement field from a file: ITK's, ANTs' or Slicer's, FSL's, NiftyReg's, in voxels, or Learn2Reg's.

    Args:
        file_format: ``"itk"``, ``"itk_transform"``, ``"metaimage"``, ``"nrrd"``, ``"fsl"``, ``"voxel"``,
            ``"learn2reg"``, ``"niftyreg"``, ``"afni"``, or ``"ras"``, ``"lps"`` and ``"positions"`` for millimetres,
            see :func:`monai_lm.io.read_millimetre_ddf`; ``"auto"``: what the file says, see
            :func:`monai_lm.io.guess_format`.
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
            ``"fsl"`` (relative), ``"voxel"`` or ``"learn2reg"`` (full resolution).
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
