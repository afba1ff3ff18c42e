"""Linear alignment as MONAI transforms: the moving image is told where it lies to the fixed one, no voxel changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor

from monai_lm.alignment import MODES, Alignment, align
from monai_lm.similarity import Similarity, get_similarity

__all__ = ["AlignAffine", "AlignAffineD", "AlignAffineDict", "AlignAffined"]


class AlignAffine(Transform):
    """Give the moving image the affine that puts it onto the fixed one, by :func:`monai_lm.align`.

    The images may lie on any two grids; MONAI's ``ResampleToMatch`` then brings the one onto the grid of the other.

    Args:
        mode: ``"auto"``, ``"center"``, ``"rigid"`` or ``"affine"``.
        similarity: how the images are compared, as in :func:`monai_lm.refine`.
        device: where to compute; default: where the fixed image is.

    Raises:
        ValueError: unknown mode or similarity.

    Example::

        aligned = AlignAffine("rigid")(fixed, moving)
        moving = ResampleToMatch()(aligned, fixed)
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 (MONAI's class attribute)

    def __init__(
        self,
        mode: str = "auto",
        similarity: str | Similarity | torch.nn.Module = "mi",
        device: torch.device | str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        self.mode, self.similarity, self.device = mode, get_similarity(similarity), device

    def __call__(  # type: ignore[override]
        self,
        fixed: NdarrayOrTensor,
        moving: NdarrayOrTensor,
        mask: NdarrayOrTensor | None = None,
        moving_mask: NdarrayOrTensor | None = None,
    ) -> MetaTensor:
        """Align.

        Args:
            fixed: ``(C, *S)`` image, 2D or 3D, a single slice without the axis across it; voxels count as 1 mm if it is
                no ``MetaTensor``. In 2D its affine may be 4×4 or 3×3.
            moving: ``(C, *M)`` image.
            mask: ``(1, *S)`` weights in [0, 1]: voxels of the fixed image that are compared.
            moving_mask: ``(1, *M)``, the same for the moving image.

        Returns:
            The moving image ``(C, *M)`` with its new affine; ``meta["alignment"]`` holds what was found, among it
            ``matrix``, from points of the fixed image to points of the moving image as it was.

        Raises:
            ValueError: images that cannot be used, see :func:`monai_lm.align`.
        """
        return placed(moving, self.find(fixed, moving, mask, moving_mask))

    def find(
        self,
        fixed: NdarrayOrTensor,
        moving: NdarrayOrTensor,
        mask: NdarrayOrTensor | None = None,
        moving_mask: NdarrayOrTensor | None = None,
    ) -> Alignment:
        """The alignment itself, of the arguments of a call."""
        images: list[Any] = [convert_to_tensor(x, device=self.device, track_meta=False)[None] for x in (fixed, moving)]
        masks: list[Any] = [
            None if x is None else convert_to_tensor(x, device=images[0].device, track_meta=False)[None]
            for x in (mask, moving_mask)
        ]
        return align(
            images[0],
            images[1],
            _affine_of(fixed),
            _affine_of(moving),
            self.mode,
            similarity=self.similarity,
            mask=masks[0],
            moving_mask=masks[1],
        )


class AlignAffined(MapTransform):
    """Dictionary version of :class:`AlignAffine`, for all that lies on the grid of the moving image.

    Args:
        keys: what gets the new affine: the moving image, its label map, its mask.
        fixed_key: fixed image ``(C, *S)``.
        moving_key: moving image ``(C, *M)``.
        mode: ``"auto"``, ``"center"``, ``"rigid"`` or ``"affine"``.
        similarity: how the images are compared, as in :func:`monai_lm.refine`.
        device: where to compute; default: where the fixed image is.
        mask_key: weights ``(1, *S)`` on the fixed grid; ``None``: every voxel counts.
        moving_mask_key: weights ``(1, *M)`` on the moving grid; ``None``: every voxel counts.
        allow_missing_keys: of ``keys`` and of the masks.
    """

    backend = AlignAffine.backend

    def __init__(
        self,
        keys: KeysCollection = "moving",
        fixed_key: str = "fixed",
        moving_key: str = "moving",
        mode: str = "auto",
        similarity: str | Similarity | torch.nn.Module = "mi",
        device: torch.device | str | None = None,
        mask_key: str | None = None,
        moving_mask_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fixed_key, self.moving_key = fixed_key, moving_key
        self.mask_keys = mask_key, moving_mask_key
        self.align = AlignAffine(mode, similarity, device)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace ``data[key]`` for each of the keys.

        Raises:
            KeyError: a key is missing and ``allow_missing_keys`` is false.
            ValueError: images that cannot be used, see :func:`monai_lm.align`.
        """
        d = dict(data)
        masks: Sequence[Any] = [
            None if key is None or (self.allow_missing_keys and key not in d) else d[key] for key in self.mask_keys
        ]
        found = self.align.find(d[self.fixed_key], d[self.moving_key], *masks)
        for key in self.key_iterator(d):
            d[key] = placed(d[key], found)
        return d


def placed(moving: NdarrayOrTensor, found: Alignment) -> MetaTensor:
    """An image ``(C, *M)`` of the moving side with the affine that puts it onto the fixed image."""
    image: Any = convert_to_tensor(moving, track_meta=True)
    out: MetaTensor = image.clone()
    out.affine = torch.from_numpy(np.linalg.solve(found.matrix, _affine_of(moving))).to(image.affine)
    out.meta["alignment"] = found.values()
    return out


def _affine_of(image: Any) -> np.ndarray:
    """Voxel-to-RAS ``(4, 4)``; of an image in 2D, whose own may be 3×3, with the third axis as it is."""
    out = np.eye(4)
    if isinstance(image, MetaTensor):
        own = image.affine.cpu().double().numpy()
        n = len(own) - 1
        out[:n, :n], out[:n, 3] = own[:n, :n], own[:n, n]
    return out


AlignAffineD = AlignAffineDict = AlignAffined
