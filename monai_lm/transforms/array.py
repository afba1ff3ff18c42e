"""Array transforms of what a field leads, and of fields: channel-first tensors without a batch, as MONAI's."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, to_affine_nd
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_lm.fields import fold_count, invert, jacobian_determinant, sample_points, warp
from monai_lm.fields.inverses import invert_between
from monai_lm.fields.space import fixed_to_moving, from_space, to_voxel, to_world
from monai_lm.fields.topology import LOG_FLOOR
from monai_lm.kernels.devices import widest_float
from monai_lm.solver.checks import check_finite
from monai_lm.transforms.places import (
    check_item,
    check_same_axes,
    leads_into,
    same_directions,
)

__all__ = ["InvertDDF", "JacobianDeterminant", "WarpImage", "WarpPoints"]


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
                is not finite; batches, or what is padded to the size of one.
        """
        check_item("img", img)
        check_item("ddf", ddf)
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
                ``meta["moving_size"]``, which :class:`LoadDDF` and :class:`RefineDDF` set, say what the moving grid
                is; without them it is the fixed one.

        Returns:
            ``(n, *M)`` displacement in voxels on the moving grid, see :func:`monai_lm.fields.invert`; its ``meta`` says
            that it leads to the fixed grid.

        Raises:
            ValueError: a field of another shape, or one that is not finite.

        Warns:
            UserWarning: a field that folds: there is no inverse where it does.
        """
        field = _field(ddf).float()[None]
        meta = ddf.meta if isinstance(ddf, MetaTensor) else {}
        affine = ddf.affine if isinstance(ddf, MetaTensor) else torch.eye(4, dtype=torch.float64)
        target = torch.as_tensor(meta.get("moving_affine", affine))
        size = meta.get("moving_size", field.shape[2:])
        there = not same_directions(affine, target, len(ddf))
        if there:  # grids that are mirrored or turned against each other make no fold
            own, other = (to_affine_nd(3, torch.as_tensor(a).cpu().numpy()) for a in (affine, target))
            field = from_space(field, np.eye(4), fixed_to_moving(own, other))
        if folds := int(fold_count(field)):
            warnings.warn(f"ddf folds in {folds} cells, where it has no inverse", stacklevel=2)
        inverse = (invert_between(field, own, other, None, size) if there else invert(field, size))[0][0]
        out = MetaTensor(inverse, affine=target.clone())
        out.meta["moving_affine"], out.meta["moving_size"] = affine.clone(), tuple(ddf.shape[1:])
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
