"""The unknown: the residual, the best one so far, and the one to return to."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.topology import repair_in_place
from monai_lm.solver.pyramid import Level, move_field

__all__ = ["Residual"]


class Residual:
    """A residual on the grid of a level; it starts at zero and goes from level to level.

    Args:
        pairs: batch size.
        level: its grid.
        device: where it is.
        dtype: float32 or half precision.

    Attributes:
        level: its grid.
        field: ``(B, n, *S)`` in voxels of the level, float32 or half precision.
    """

    def __init__(self, pairs: int, level: Level, device: torch.device, dtype: torch.dtype) -> None:
        self.level = level
        self.field = torch.zeros((pairs, len(level.size), *level.size), dtype=dtype, device=device)
        self._best: Tensor | None = None
        self._previous: Tensor | None = None

    def move_to(self, level: Level, dtype: torch.dtype, prediction: Tensor | None) -> None:
        """Go to the grid and precision of another level; folds that resampling and rounding make are repaired.

        Args:
            level: where to.
            dtype: float32 or half precision.
            prediction: ``(B, n, *S)`` on that level; the composed map is what must not fold.
        """
        if level == self.level and dtype == self.field.dtype:
            return
        moved = torch.zeros((*self.field.shape[:2], *level.size), dtype=dtype, device=self.field.device)
        self._previous = None
        move_field(self.field, self.level, level, moved)
        self.level, self.field = level, moved
        repair_in_place(moved, prediction)

    def note(self, better: Tensor) -> None:
        """Note the residual of pairs that are ``better`` ``(B,)`` as their best."""
        if self._best is None:
            self._best = self.field.clone()
        else:
            kernels.choose(better, self.field, self._best)

    def keep(self) -> None:
        """Keep the residual, so that :meth:`retract` can return to it."""
        self._previous = self.field.clone() if self._previous is None else self._previous.copy_(self.field)

    def retract(self, accepted: Tensor) -> bool:
        """Return the pairs that are not ``accepted`` ``(B,)`` to what was kept; whether there are such pairs."""
        if self._previous is None or bool(accepted.all()):
            return False
        kernels.choose(~accepted, self._previous, self.field)
        return True

    def settle(self, better: Tensor) -> None:
        """Return the pairs whose residual is not ``better`` ``(B,)`` to the best one noted, and give that up."""
        if self._best is not None:
            kernels.choose(~better, self._best, self.field)
            self._best = None

    def mend(self, prediction: Tensor | None) -> bool:
        """Repair folds of the map composed with the prediction; whether there were any."""
        return repair_in_place(self.field, prediction)
