"""Acceptance rules: which steps are kept.

To add one, derive from :class:`Acceptance` and give it a name in :data:`ACCEPTANCES`;
``tests/solver/test_acceptance.py`` holds every rule there to the same laws.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from monai_lm.solver.trust import Outcome

__all__ = ["ACCEPTANCES", "Acceptance", "Always", "Descent", "Metropolis", "chance"]


class Acceptance:
    """A rule for keeping steps.

    Attributes:
        may_reject: whether a step may be taken back; the residual before it is kept for that.
        ends_at_best: whether the last iterate is always the best one; where not, the best one is kept.
    """

    may_reject: ClassVar[bool] = True
    ends_at_best: ClassVar[bool] = False

    def accepts(self, outcome: Outcome, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Which pairs keep the step, ``(B,)`` bool, and what to remember, ``(B,)``.

        Args:
            outcome: of the step.
            memory: what was remembered before, zero at first.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Always(Acceptance):
    """Every step is kept, and the best iterate returned."""

    may_reject: ClassVar[bool] = False

    @override
    def accepts(self, outcome: Outcome, memory: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(outcome.fell), memory


@dataclass(frozen=True)
class Descent(Acceptance):
    """Only a loss that did not rise."""

    ends_at_best: ClassVar[bool] = True

    @override
    def accepts(self, outcome: Outcome, memory: Tensor) -> tuple[Tensor, Tensor]:
        return outcome.fell, memory


@dataclass(frozen=True)
class Metropolis(Acceptance):
    """A worse loss with probability ``exp(-Δ / T)``, ``T`` the last accepted decrease, which is what it remembers."""

    seed: int = 0

    @override
    def accepts(self, outcome: Outcome, memory: Tensor) -> tuple[Tensor, Tensor]:
        temperature = memory.clamp(min=torch.finfo(memory.dtype).tiny)
        drawn = chance(self.seed, outcome.iteration)
        accepted = outcome.fell | (drawn < torch.exp(outcome.decrease / temperature))
        known = outcome.fell & (outcome.decrease < float("inf"))
        return accepted, torch.where(known, outcome.decrease, memory)


def chance(seed: int, iteration: int) -> float:
    """Uniform random number that depends on the seed and the iteration only: one sequence for every pair and batch."""
    return random.Random(f"{seed}/{iteration}").random()


ACCEPTANCES: dict[str, Callable[[int], Acceptance]] = {
    "always": lambda _: Always(), "descent": lambda _: Descent(), "metropolis": Metropolis,
}  # fmt: skip
"""The ``acceptance`` argument of :func:`monai_lm.refine`; every one is made of a seed."""
