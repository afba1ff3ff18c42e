"""A pair of images on two grids: how the one lies to the other, and fields and images seen from the fixed grid.

The refinement works on the fixed grid. The moving image is brought onto it by the affines alone; the field that is
found stays there, and leads, together with the affines, to voxels of the moving image as it was. The command line and
the transforms both work this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.space import Grid, fixed_to_moving, from_space, resample_moving, share_inside, through_affine
from monai_lm.similarity.weighted import shown, with_moving_weight

__all__ = ["Between"]


@dataclass(frozen=True, eq=False)
class Between:
    """Where the grids of a pair lie.

    Attributes:
        fixed: grid of the image that stays.
        moving: grid of the image that is warped onto it.
        initial: ``(4, 4)`` affine in RAS millimetres from fixed to moving points; ``None``: the world spaces agree.
    """

    fixed: Grid
    moving: Grid
    initial: np.ndarray | None = None

    @property
    def map(self) -> np.ndarray:
        """From voxels of the fixed to voxels of the moving grid, ``(4, 4)``, without a field."""
        return fixed_to_moving(self.fixed.affine, self.moving.affine, self.initial)

    def whole(self, ddf: Tensor) -> Tensor:
        """A field ``(B, n, *S)`` on the fixed grid and the affine after it, as one into voxels of the moving image."""
        return through_affine(ddf, self.fixed.affine, self.moving.affine, self.initial)

    def inner(self, ddf: Tensor) -> Tensor:
        """The inverse of :meth:`whole`: the field on the fixed grid before the affine."""
        return from_space(ddf, np.eye(4), self.map)

    def brought(
        self, image: Tensor, ddf: Tensor | None = None, mode: str = "bilinear", padding_mode: str = "border"
    ) -> Tensor:
        """What lies on the moving grid, ``(B, C, *M)``, sampled once through field and affine, ``(B, C, *S)``.

        Args:
            image: image or label map.
            ddf: ``(B, n, *S)`` on the fixed grid; ``None``: the affine alone, which leaves an image as it is on a grid
                that has the same voxels.
            mode: ``"bilinear"`` or ``"nearest"``.
            padding_mode: ``"border"`` or ``"zeros"``.
        """
        if ddf is None:
            if self.fixed.size == tuple(image.shape[2:]) and np.array_equal(self.map, np.eye(4)):
                return image
            ddf = self._still(image)
        return resample_moving(image, ddf, self.fixed.affine, self.moving.affine, self.initial, mode, padding_mode)

    def masked(self, moving: Tensor, mask: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The moving image ``(B, C, *M)`` as its mask ``(B, 1, *M)`` shows it, and the mask, without a field.

        What shall be ``hidden`` ``(B, 1, *M)`` in any case is not zero there.

        What the mask hides is hidden before: sampled on other voxels, it would reach those that count.
        """
        weight, there = self.brought(with_moving_weight(shown(moving, mask, hidden), mask)).tensor_split([1], dim=1)
        return there, weight

    def points_brought(self, points: Tensor) -> Tensor:
        """Points ``(B, N, n)`` in voxels of the moving grid as the affine brings them, in voxels of the fixed grid."""
        n = len(self.fixed.size)
        rows = [*range(n), 3]
        inverse = torch.from_numpy(np.linalg.inv(self.map)[np.ix_(rows, rows)])
        out = points.to(inverse) @ inverse[:n, :n].T + inverse[:n, n]
        return out.to(points.device, points.dtype if points.is_floating_point() else torch.float32)

    def start(
        self, moving: Tensor, ddf: Tensor | None = None, names: Sequence[str] = ("fixed", "moving")
    ) -> tuple[Tensor | None, Tensor]:
        """Where a refinement starts.

        Args:
            moving: ``(B, C, *M)``.
            ddf: predicted field ``(B, n, *S)`` from voxels of the fixed to voxels of the moving grid.
            names: of the two images, for the message.

        Returns:
            The predicted field on the fixed grid before the affine, and the moving image as the affine brings it.

        Raises:
            ValueError: images that overlap neither as they are brought so nor as they are predicted.
        """
        predicted = None if ddf is None else self.inner(ddf)
        fields = [self.whole(self._still(moving)), *([] if ddf is None else [ddf])]
        if all(share_inside(field, self.moving.size) == 0 for field in fields):
            raise ValueError(
                f"{names[0]} and {names[1]} must overlap, no voxel of the one lies in the other; "
                + (
                    "pass an affine"
                    if self.initial is None
                    else f"the affine must lead from points of {names[0]} to those of {names[1]}"
                )
            )
        return predicted, self.brought(moving)

    def _still(self, like: Tensor) -> Tensor:
        n = len(self.fixed.size)
        return torch.zeros(len(like), n, *self.fixed.size, device=like.device)
