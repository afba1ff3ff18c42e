"""A field and its inverse that are refined together, so that the order of the images does not matter.

Every pair is there twice, the second time with its images exchanged: the first field leads from the fixed to the moving
image, the second one back. Each takes steps of its own, and between them both give way until they are each other's
inverse. What a pair comes to does not depend on its place in the batch, so images that change places change no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm import kernels
from monai_lm.fields.inversion import invert
from monai_lm.fields.topology import repair_in_place
from monai_lm.solver.engine import Engine

__all__ = ["SymmetricEngine", "both_ways", "reconciled", "swapped"]

_ROUNDS = 4
"""Of giving way, at the end: what is left is what interpolation leaves."""


def swapped(both: Tensor) -> Tensor:
    """The second half of a batch ``(2 B, …)``, then the first."""
    return both.roll(len(both) // 2, 0)


def both_ways(ddf: Tensor) -> Tensor:
    """A field ``(B, n, *S)`` without folds, and after it its inverse, without folds, ``(2 B, n, *S)``."""
    both = torch.cat([ddf, invert(ddf)[0]])
    repair_in_place(both)
    return both


def reconciled(both: Tensor, prediction: Tensor | None, moved: Tensor) -> tuple[Tensor, Tensor]:
    """A field and its inverse, of what comes near to that; without folds.

    Args:
        both: ``(2 B, n, *S)``, fields and their inverses; overwritten.
        prediction: ``(2 B, n, *S)`` as :func:`both_ways` has it, or ``None``, the identity.
        moved: pairs that shall not keep that, ``(B,)`` bool.

    Returns:
        ``(B, n, *S)`` each.
    """
    missed = torch.empty_like(both)
    for _ in range(_ROUNDS):
        kernels.compose(swapped(both), both, missed)
        both.sub_(missed, alpha=0.5)
    repair_in_place(both)
    for pair in (~moved.repeat(2)).nonzero().flatten().tolist():
        both[pair] = 0.0 if prediction is None else prediction[pair]
    ddf, inverse = both.chunk(2)
    return ddf, inverse


class SymmetricEngine(Engine):
    """An engine of ``2 B`` pairs, the second half with exchanged images, whose fields are each other's inverses.

    A pair's loss, in both its places, is the mean of the two.
    """

    @override
    def over_places(self, values: Tensor) -> Tensor:
        """The mean of both places of a pair: of its loss, and of what a step promises."""
        return (values + swapped(values)) / 2

    @override
    def mend(self) -> bool:
        """Let the two fields give way to each other, and repair folds; true, for the loss is another one then.

        Where first the one, then the other miss the identity by ``e``, the one goes back by ``e / 2``, and so does the
        other, and to first order nothing is left: it is the mean of a field and the other's inverse, without an
        inversion. Of a prediction's derivative nothing is asked: the next time takes what is left.
        """
        whole, field = self.residual.field, self.residual.field
        if self.prediction is not None:
            whole = torch.empty_like(field, dtype=torch.promote_types(field.dtype, torch.float32))
            kernels.compose(self.prediction, field, whole)
        missed = torch.empty_like(field)
        kernels.compose(swapped(whole), whole, missed)
        field.sub_(missed, alpha=0.5)
        super().mend()
        return True
