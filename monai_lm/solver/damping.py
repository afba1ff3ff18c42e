"""Damping rules: how λ, one scalar per pair, follows what a step led to.

To add one, derive from :class:`Damping` and give it a name in :data:`DAMPINGS`; ``tests/solver/test_damping.py`` holds
every rule there to the same laws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.solver.trust import Outcome

__all__ = ["DAMPINGS", "Constant", "Damping", "Simple", "TrustRegion"]


class Damping:
    """A rule for the damping.

    Attributes:
        needs_promise: whether it asks for ``outcome.expected``, which takes memory and time to compute.
    """

    needs_promise: ClassVar[bool] = False

    def factor(self, outcome: Outcome) -> Tensor:
        """What λ is multiplied with, ``(B,)``, above 0; λ stays within a millionth and a million times λ₀."""
        raise NotImplementedError


@dataclass(frozen=True)
class Simple(Damping):
    """λ rises where the loss rose and falls where it fell, by the published factors.

    Source: Jena, Chaudhari, Gee, arXiv 2603.19371.
    """

    rise: float = 1.5
    fall: float = 0.975

    @override
    def factor(self, outcome: Outcome) -> Tensor:
        return torch.where(outcome.fell, self.fall, self.rise)


@dataclass(frozen=True)
class TrustRegion(Damping):
    """By the gain ratio ρ: λ rises below ``low``, falls above ``high``; the minimum along a parabola has 1/2."""

    rise: float = 1.5
    low: float = 0.1
    high: float = 0.5
    needs_promise: ClassVar[bool] = True

    @override
    def factor(self, outcome: Outcome) -> Tensor:
        gain = outcome.gain
        factor = torch.where(gain > self.high, 1 / self.rise, torch.where(gain >= self.low, 1.0, self.rise))
        return torch.where(outcome.fell, factor, self.rise)  # also where the step had promised a rise


@dataclass(frozen=True)
class Constant(Damping):
    """λ stays as it is: for descents that have no use for it."""

    @override
    def factor(self, outcome: Outcome) -> Tensor:
        return torch.ones_like(outcome.loss)


DAMPINGS: dict[str, Damping] = {"simple": Simple(), "trust_region": TrustRegion(), "constant": Constant()}
"""The ``control`` argument of :func:`monai_lm.refine`."""
