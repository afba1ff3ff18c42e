"""Refinement as a registration method of monai-physio, on its own or after others in its chain."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.inverses import invert_between
from monai_lm.fields.space import Grid, check_affine, to_space
from monai_lm.guidance import Labels
from monai_lm.io.vectors import LPS
from monai_lm.kernels.devices import find_device
from monai_lm.solver.between import Between
from monai_lm.solver.refinement import check_keywords, refine

try:
    import itk
    from monai_physio import RegisterImagesBase
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{__name__} needs monai-physio, in the physio extra: pip install 'monai_lm[physio]' ({error})", name=error.name
    ) from error

__all__ = ["RegisterImagesLM"]


class RegisterImagesLM(RegisterImagesBase):  # type: ignore[misc, unused-ignore]
    """Register two images with :func:`monai_lm.refine`, as monai-physio's other methods do.

    Alone, or first in a ``RegisterImagesChain``, it takes the images as they lie in space. After another method it
    gets the moving image as that method brought it, and what it finds is put before the other's transform.

    Masks count each on its own, and label maps guide where there are both. ``preprocess`` and ``fast_mode`` change
    nothing.

    Args:
        log_level: of monai-physio's logger.
        device: ``"auto"`` takes a GPU if there is one.
        label_weight: how hard label maps pull, relative to the images; see :class:`monai_lm.guidance.Labels`.
        **settings: keyword arguments of :func:`monai_lm.refine`; default: its own, with the spacing of the fixed image.

    Raises:
        TypeError: a setting that :func:`monai_lm.refine` does not take.
        ValueError: a device that is not there.

    Example:
        >>> chain = RegisterImagesChain([RegisterImagesGreedy(), RegisterImagesLM(scales=(2, 1))])
        >>> chain.set_fixed_image(fixed)
        >>> transform = chain.register(moving)["fixed_to_moving_transform"]
    """

    def __init__(
        self, log_level: int | str = logging.INFO, device: str = "auto", label_weight: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(log_level=log_level)
        check_keywords("RegisterImagesLM", settings)
        self.device = find_device(device)
        self.label_weight = label_weight
        self.settings = settings

    def registration_method(
        self,
        moving_image: Any,
        moving_mask: Any = None,
        moving_labelmap: Any = None,
        moving_image_pre: Any = None,  # noqa: ARG002 (nothing is preprocessed)
    ) -> dict[str, Any]:
        """Register a moving image; ``register`` calls this.

        Args:
            moving_image: 3D ``itk.Image`` of one component, on any grid.
            moving_mask: binary, on the grid of the moving image.
            moving_labelmap: labels, on the grid of the moving image; they guide if the fixed image has some, too.
            moving_image_pre: not looked at.

        Returns:
            ``"fixed_to_moving_transform"`` and ``"moving_to_fixed_transform"``, displacement fields of ITK in double
            precision on the fixed and on the moving grid, the first without folds; on one grid each has the other as
            its inverse. ``"loss"``, dissimilarity per voxel.

        Raises:
            ValueError: no fixed image, an image that is not in 3D or has several components, images that do not
                overlap, or what :func:`monai_lm.refine` refuses.
        """
        if self.fixed_image is None:
            raise ValueError("fixed_image must be set before a registration, see set_fixed_image")
        fixed, here = self._read("fixed_image", self.fixed_image)
        moving, there = self._read("moving_image", moving_image)
        between = Between(here, there)
        _, onto = between.start(moving, names=("fixed_image", "moving_image"))
        mask, hides = None, None
        if self.fixed_mask is not None:
            mask = self._read("fixed_mask", self.fixed_mask)[0]
        if moving_mask is not None:
            onto, hides = between.masked(moving, self._read("moving_mask", moving_mask)[0])
        guidance = None
        if self.fixed_labelmap is not None and moving_labelmap is not None:
            labels = between.brought(self._read("moving_labelmap", moving_labelmap)[0], mode="nearest")
            guidance = Labels(self._read("fixed_labelmap", self.fixed_labelmap)[0], labels, self.label_weight)
        keywords = {"spacing": here.spacing, "guidance": guidance} | self.settings
        result = refine(fixed, onto, None, mask, moving_mask=hides, **keywords)
        back, _ = invert_between(result.ddf, here.affine, there.affine, None, there.size)
        fields = _vectors(between.whole(result.ddf), here, there), _vectors(back, there, here)
        forward, inverse = (_transform(field) for field in fields)
        if here.size == there.size and np.array_equal(here.affine, there.affine):
            forward.SetInverseDisplacementField(fields[1])
            inverse.SetInverseDisplacementField(fields[0])
        self.log_info("loss %.4f to %.4f", float(result.initial_loss), float(result.final_loss))
        return {
            "fixed_to_moving_transform": forward,
            "moving_to_fixed_transform": inverse,
            "loss": float(result.final_loss),
        }

    def _read(self, name: str, image: Any) -> tuple[Tensor, Grid]:
        """An image as ``(1, 1, *S)``, float32, and where its voxels lie."""
        n, components = image.GetImageDimension(), image.GetNumberOfComponentsPerPixel()
        if n != 3 or components != 1:
            raise ValueError(f"{name} must be in 3D with one component, got {n}D with {components}")
        array = np.ascontiguousarray(itk.array_view_from_image(image).T, dtype=np.float32)
        return torch.from_numpy(array)[None, None].to(self.device), _grid(name, image)


def _grid(name: str, image: Any) -> Grid:
    region, affine = image.GetLargestPossibleRegion(), np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.TransformIndexToPhysicalPoint(region.GetIndex())  # a part of an image need not begin at 0
    return Grid(tuple(int(s) for s in region.GetSize()), check_affine(f"affine of {name}", LPS @ affine + 0.0))


def _vectors(ddf: Tensor, grid: Grid, other: Grid) -> Any:
    """A field ``(1, 3, *S)`` into voxels of another grid as an image of ITK's, displacements in LPS mm, float64."""
    values = to_space(ddf.cpu().double(), LPS @ grid.affine, LPS @ other.affine)[0].numpy()
    image = itk.Image[itk.Vector[itk.D, 3], 3].New()
    image.SetRegions([int(s) for s in grid.size])
    lps = LPS @ grid.affine
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(list(grid.spacing))
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / np.array(grid.spacing)))
    image.Allocate()
    itk.array_view_from_image(image)[:] = values.T
    return image


def _transform(field: Any) -> Any:
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(field)
    return transform
