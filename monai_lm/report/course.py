"""Whether a refinement was done when it ended: levels that were still gaining when their iterations ran out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from monai_lm.solver.result import Iteration

__all__ = ["COARSE", "FINE", "Cut", "cut_short"]

COARSE, FINE = 0.05, 0.2
"""A level was cut short if its last iterations, ten or a quarter of all, brought more than this part of what it gained:
a coarse one, which finds large motion, and the last one, which goes on fitting details for long."""

_LAST, _WORTH = 10, 0.01
_FEW = 4
"""Of fewer iterations nobody expects an end."""


class Cut(NamedTuple):
    """A level that was cut short.

    Attributes:
        scale: reduction of the level against the finest grid.
        iterations: how many it had.
        share: part of what the level gained that its last iterations brought.
    """

    scale: float
    iterations: int
    share: float


def cut_short(history: Sequence[Iteration]) -> list[Cut]:
    """Levels, coarse to fine, whose loss was still falling markedly at their end; see :data:`COARSE`.

    A level counts if it took more than a hundredth of the loss away.

    Args:
        history: of one pair.
    """
    levels = [
        (scale, [entry.loss for entry in some]) for scale, some in groupby(history, key=lambda entry: entry.level)
    ]
    found = []
    for number, (scale, losses) in enumerate(levels):
        best = list(accumulate(losses, min))
        iterations = len(losses) - 1
        late = best[-1 - min(_LAST, iterations // 4)] - best[-1]
        gained, bound = best[0] - best[-1], FINE if number == len(levels) - 1 else COARSE
        if iterations >= _FEW and gained > _WORTH * abs(best[0]) and late > bound * gained:
            found.append(Cut(scale, iterations, late / gained))
    return found
