"""Refinement of a pair of images as a MONAI transform, array and dictionary versions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, to_affine_nd
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_lm.fields.space import Grid, check_affine
from monai_lm.guidance import Guidance, Keypoints, Labels, SoftLabels
from monai_lm.io import read_affine
from monai_lm.solver.between import Between
from monai_lm.solver.checks import check_field, check_shown, checked_mask, guides_of
from monai_lm.solver.lesion import checked_lesion, outside
from monai_lm.solver.refinement import check_keywords, refine
from monai_lm.solver.result import RefinementResult
from monai_lm.transforms.places import check_item, check_same_axes, check_target, has_affine, leads_into, same_axes

__all__ = ["RefineDDF", "RefineDDFD", "RefineDDFDict", "RefineDDFd"]


class RefineDDF(Transform):
    """Refine a predicted displacement field for the pair of images at hand, or register it from the identity.

    Images of one size whose voxel axes agree are compared voxel by voxel, as networks see them. Any others are compared
    where their affines say they are: the moving image is brought onto the fixed grid for the refinement, and the field
    that is returned leads to voxels of the moving image as it was.

    Args:
        device: where to compute; default: where the fixed image is. The result stays there.
        guide_values: labels that guide, where there are label maps, or channels of probabilities; ``None``: all that
            both have.
        guide_weight: how hard labels and points pull, relative to the images.
        world: compare in space, by the affines of both images, which must be ``MetaTensor``; false: voxel by voxel.
            Default: in space if an ``affine`` is given, or the grids differ in more than their origins.
        kwargs: keyword arguments of :func:`monai_lm.refine`. ``spacing`` defaults to that of the fixed image if it is
            a ``MetaTensor``, else to one.

    Raises:
        TypeError: keyword arguments that :func:`monai_lm.refine` does not know.
        ValueError: those that it refuses together.

    Example::

        refined = RefineDDF(iterations=(50, 25), scales=(2, 1))(fixed, moving, ddf)
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(
        self,
        device: torch.device | str | None = None,
        guide_values: Sequence[int] | None = None,
        guide_weight: float = 1.0,
        world: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_keywords("RefineDDF", kwargs)
        self.device, self.guide_values, self.guide_weight = device, guide_values, guide_weight
        self.world = world
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
        affine: NdarrayOrTensor | str | Path | None = None,
        lesion: NdarrayOrTensor | None = None,
        moving_lesion: NdarrayOrTensor | None = None,
    ) -> MetaTensor:
        """Refine.

        Args:
            fixed: ``(C, *S)`` image, 2D or 3D.
            moving: ``(C, *S)`` image on the same grid, or ``(C, *M)`` on another one, both then ``MetaTensor``.
            ddf: ``(n, *S)`` predicted displacement, from voxels of the fixed to voxels of the moving image; ``None``
                starts from the identity, or from ``affine``. Where images are compared in space,
                ``meta["moving_affine"]`` must say that it leads there, as :class:`LoadDDF` has it.
            mask: ``(1, *S)`` on the fixed grid, weights in [0, 1]: the similarity counts where it is not zero.
            moving_mask: ``(1, *M)``, the same on the moving grid; it goes with the moving image.
            labels: ``(1, *S)`` of the fixed and ``(1, *M)`` of the moving image, that guide; see
                :class:`monai_lm.guidance.Labels`. Or probabilities, ``(K, *S)`` and ``(K, *M)``, at least two channels;
                see :class:`monai_lm.guidance.SoftLabels`.
            points: ``(N, n)`` in voxels of the fixed and of the moving image, that guide; see
                :class:`monai_lm.guidance.Keypoints`.
            affine: ``(4, 4)`` in RAS millimetres, from points of the fixed to points of the moving image, or a file
                that :func:`monai_lm.io.read_affine` reads. It is part of a ``ddf`` and of the field that is returned.
            lesion: ``(1, *S)`` on the fixed grid, zero where there is none: images are not compared there, and the
                field follows from around.
            moving_lesion: ``(1, *M)``, the same on the moving grid.

        Returns:
            ``(n, *S)`` refined displacement, from voxels of the fixed to voxels of the moving image, with the affine of
            the fixed image. ``meta["moving_affine"]`` and ``meta["moving_size"]`` say, where it is known, which grid it
            leads to, for :class:`WarpImage`, :class:`InvertDDF` and :class:`SaveDDF`; ``meta["refinement"]`` holds
            the dissimilarity before and after, whether anything better than the start was found (``improved``), the
            folds of the prediction and, if there was one, whether it was used, and the seconds it took, and
            ``meta["filename_or_obj"]`` the file of the fixed image if it has one.

        Raises:
            TypeError: images to be compared in space that are not ``MetaTensor``.
            ValueError: shapes or settings that do not fit, see :func:`monai_lm.refine`; images that do not overlap;
                voxel axes that differ, where ``world`` is false; or a field that was loaded for a moving image whose
                axes are others; batches, or what is padded to the size of one.
        """
        given = {"fixed": fixed, "moving": moving, "ddf": ddf, "mask": mask, "moving_mask": moving_mask}
        given |= {"lesion": lesion, "moving_lesion": moving_lesion}
        for name, image in given.items():
            check_item(name, image)
        check_same_axes("fixed", fixed, "ddf", ddf)
        check_same_axes("fixed", fixed, "mask", mask)
        check_same_axes("moving", moving, "moving_mask", moving_mask)
        check_target(ddf, moving)
        check_same_axes("fixed", fixed, "lesion", lesion)
        check_same_axes("moving", moving, "moving_lesion", moving_lesion)
        pair: dict[str, Any] = {
            k: None if x is None else convert_to_tensor(x, track_meta=False, device=self.device)[None]
            for k, x in given.items()
        }
        between = None
        if self._in_space(fixed, moving, affine):
            if ddf is not None and not leads_into(ddf, moving):
                raise ValueError(
                    "ddf must say in its meta['moving_affine'] that it leads to voxels of moving, as one from LoadDDF "
                    "does, where the images are compared in space; or resample moving onto the grid of fixed first"
                )
            between = _between(fixed, moving, affine)
            pair = _on_fixed_grid(pair, between)
        kwargs = dict(self.kwargs)
        if isinstance(fixed, MetaTensor) and kwargs.get("spacing") is None:
            kwargs["spacing"] = fixed.pixdim.tolist()
        kwargs["guidance"] = self._guides(pair["fixed"].device, labels, points, kwargs.get("guidance"), between)
        result = refine(**pair, **kwargs)
        return _described(result, fixed, moving, between)

    def _in_space(self, fixed: Any, moving: Any, affine: Any) -> bool:
        """Whether to compare where the affines say; TypeError where these are missing."""
        known = isinstance(fixed, MetaTensor) and isinstance(moving, MetaTensor)
        placed = has_affine(fixed) and has_affine(moving)
        world = self.world
        if world is None:
            differ = known and (fixed.shape[1:] != moving.shape[1:] or (placed and not same_axes(fixed, moving)))
            world = affine is not None or differ
        if world and not known:
            kinds = " and ".join(type(image).__name__ for image in (fixed, moving))
            raise TypeError(f"fixed and moving must be MetaTensors to be compared in space, got {kinds}")
        if not world:
            if affine is not None:
                raise ValueError("affine must be None where world is false, images are then compared voxel by voxel")
            check_same_axes("fixed", fixed, "moving", moving)
        return world

    def _guides(
        self,
        device: torch.device,
        labels: Any,
        points: Any,
        given: Any,
        between: Between | None,
    ) -> list[Guidance]:
        """What guides: what the transform was made with, and the labels and points of the pair."""
        out = list(guides_of(given))
        if labels is not None:
            maps = [convert_to_tensor(x, track_meta=False, device=device)[None] for x in labels]
            if between is not None:
                _check_size("labels of the moving image", maps[1], between)
                mode = "nearest" if maps[1].shape[1] == 1 else "bilinear"
                maps[1] = between.brought(maps[1], mode=mode, padding_mode="zeros")
            kind = Labels if maps[0].shape[1] == 1 else SoftLabels
            out.append(kind(maps[0], maps[1], self.guide_weight, self.guide_values))
        if points is not None:
            pair = [convert_to_tensor(x, track_meta=False, device=device)[None] for x in points]
            if between is not None:
                pair[1] = between.points_brought(pair[1])
            out.append(Keypoints(pair[0], pair[1], self.guide_weight))
        return out


def _between(fixed: Any, moving: Any, affine: Any) -> Between:
    grids = [Grid(tuple(image.shape[1:]), check_affine("affine", to_affine_nd(3, image.affine.cpu().numpy())))
             for image in (fixed, moving)]  # fmt: skip
    if isinstance(affine, str | Path):
        affine = read_affine(affine, fixed.dim() - 1)
    return Between(grids[0], grids[1], None if affine is None else check_affine("affine", affine))


def _check_size(name: str, tensor: Tensor, between: Between) -> None:
    if tuple(tensor.shape[2:]) != between.moving.size:
        raise ValueError(
            f"{name} must be on the grid of moving, {between.moving.size}, got shape {tuple(tensor.shape[1:])}"
        )


def _on_fixed_grid(pair: Mapping[str, Any], between: Between) -> dict[str, Any]:
    """A pair whose moving image lies on another grid, as the refinement takes it."""
    out = dict(pair)
    moving, ddf, moving_mask = pair["moving"].float(), pair["ddf"], pair["moving_mask"]
    lesion = checked_lesion(pair["moving_lesion"], moving, "moving_lesion", "moving")
    if lesion is not None:
        moving_mask = outside(moving_mask, lesion, "moving_mask")
        out["moving_lesion"] = between.brought(lesion, mode="nearest", padding_mode="zeros")
    if moving_mask is not None:
        moving_mask = checked_mask(moving_mask, moving, "moving_mask", "moving")
        check_shown("moving", moving, moving_mask)
    if ddf is not None:
        check_field("ddf", ddf, len(moving), between.fixed.size, moving.device)
        ddf = ddf.float()
    out["ddf"], out["moving"] = between.start(moving, ddf)
    if moving_mask is not None:
        out["moving"], out["moving_mask"] = between.masked(moving, moving_mask, lesion)
    return out


def _described(result: RefinementResult, fixed: Any, moving: Any, between: Between | None) -> MetaTensor:
    """The field with what is known of where it lies, where it leads, and how it came about."""
    meant = result.ddf if between is None else between.whole(result.ddf)
    out = MetaTensor(meant[0], affine=fixed.affine.clone() if isinstance(fixed, MetaTensor) else None)
    if isinstance(fixed, MetaTensor) and "filename_or_obj" in fixed.meta:
        out.meta["filename_or_obj"] = fixed.meta["filename_or_obj"]
    if between is not None or (
        isinstance(fixed, MetaTensor) and isinstance(moving, MetaTensor) and same_axes(fixed, moving)
    ):
        out.meta["moving_affine"] = moving.affine.clone()
    if between is not None:
        out.meta["moving_size"] = between.moving.size
    out.meta["refinement"] = {
        "initial_loss": float(result.initial_loss[0]),
        "final_loss": float(result.final_loss[0]),
        "predicted_folds": int(result.predicted_folds[0]),
        "similarity": result.similarity,
        "improved": not result.unimproved,
        "seconds": result.seconds,
    }
    if result.prediction_used is not None:  # MONAI collates no None
        out.meta["refinement"]["prediction_used"] = not result.unused
    for name, value in (("apart", result.apart), ("held", result.held)):
        if value is not None:
            out.meta["refinement"][name] = float(value[0])
    return out


class RefineDDFd(MapTransform):
    """Dictionary version of :class:`RefineDDF`: replaces the predicted field by the refined one.

    Args:
        fixed_key: fixed image ``(C, *S)``.
        moving_key: moving image ``(C, *S)``, or ``(C, *M)`` on another grid.
        ddf_key: predicted displacement ``(n, *S)``; the refined one is stored under the same key. ``None`` registers
            from the identity, or from the affine, and stores under ``"ddf"``.
        allow_missing_keys: with a missing ``ddf_key`` start from the identity; with a missing image leave the data as
            it is. Otherwise a missing key raises.
        device: where to compute; default: where the fixed image is.
        mask_key: weights ``(1, *S)`` on the fixed grid, see :class:`RefineDDF`; ``None``: every voxel counts.
        moving_mask_key: weights ``(1, *M)`` on the moving grid; ``None``: every voxel counts.
        label_keys: label maps ``(1, *S)``, or probabilities ``(K, *S)``, of the fixed and of the moving image, that
            guide; ``None``: none.
        point_keys: points ``(N, n)`` in voxels of the fixed and of the moving image, that guide; ``None``: none.
        affine_key: initial affine, see :class:`RefineDDF`; ``None``: none.
        output_key: where the refined field is stored, if not under ``ddf_key``.
        lesion_key: labels ``(1, *S)`` on the fixed grid, zero where there is no lesion, see :class:`RefineDDF`;
            ``None``: none.
        moving_lesion_key: the same on the moving grid.
        kwargs: ``guide_values``, ``guide_weight`` and ``world`` of :class:`RefineDDF`, and keyword arguments of
            :func:`monai_lm.refine`.

    Raises:
        TypeError: keyword arguments that :func:`monai_lm.refine` does not know.
        ValueError: keys and keyword arguments that it refuses together, as ``lesion_key`` and ``symmetric``.
    """

    backend = RefineDDF.backend

    def __init__(
        self,
        fixed_key: str = "fixed",
        moving_key: str = "moving",
        ddf_key: str | None = "ddf",
        allow_missing_keys: bool = False,
        device: torch.device | str | None = None,
        mask_key: str | None = None,
        moving_mask_key: str | None = None,
        label_keys: tuple[str, str] | None = None,
        point_keys: tuple[str, str] | None = None,
        affine_key: str | None = None,
        output_key: str | None = None,
        lesion_key: str | None = None,
        moving_lesion_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        single = (ddf_key, mask_key, moving_mask_key, affine_key, lesion_key, moving_lesion_key)
        keys = (fixed_key, moving_key, *(k for k in single if k is not None), *(label_keys or ()), *(point_keys or ()))
        super().__init__(keys, allow_missing_keys)
        self.fixed_key, self.moving_key, self.ddf_key = fixed_key, moving_key, ddf_key
        self.mask_key, self.moving_mask_key = mask_key, moving_mask_key
        self.label_keys, self.point_keys = label_keys, point_keys
        self.affine_key, self.lesion_key, self.moving_lesion_key = affine_key, lesion_key, moving_lesion_key
        self.output_key = output_key or ddf_key or "ddf"
        self.refine = RefineDDF(device, **kwargs)
        guided, lesions = label_keys is not None or point_keys is not None, {lesion_key, moving_lesion_key} != {None}
        check_keywords("RefineDDFd", self.refine.kwargs, guided, lesions)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Refine ``data[ddf_key]``.

        Raises:
            KeyError: a key is missing and ``allow_missing_keys`` is false.
            ValueError: shapes or settings that do not fit, see :func:`monai_lm.refine`.
        """
        d = dict(data)
        present = set(self.key_iterator(d))
        if {self.fixed_key, self.moving_key} <= present:
            ddf, mask, moving_mask, affine, *lesions = (
                None if key is None else d.get(key)
                for key in (
                    self.ddf_key, self.mask_key, self.moving_mask_key, self.affine_key, self.lesion_key,
                    self.moving_lesion_key,
                )
            )  # fmt: skip
            labels, points = (
                tuple(d[key] for key in keys) if keys is not None and set(keys) <= present else None
                for keys in (self.label_keys, self.point_keys)
            )
            images = d[self.fixed_key], d[self.moving_key]
            d[self.output_key] = self.refine(*images, ddf, mask, moving_mask, labels, points, affine, *lesions)
        return d


RefineDDFD = RefineDDFDict = RefineDDFd
