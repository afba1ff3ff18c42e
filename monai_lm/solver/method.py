"""The method, made of small parts that say what they need: descent, damping, acceptance, smoothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields.finite import check_number
from monai_lm.solver.acceptance import ACCEPTANCES, Acceptance, Always
from monai_lm.solver.damping import DAMPINGS, Damping, Simple
from monai_lm.solver.descent import DESCENTS, LM, Descent
from monai_lm.solver.smoothing import Elastic, Smoothing
from monai_lm.solver.trust import DAMPING_RANGE, Outcome, Trust

__all__ = ["Method", "make_method"]

_STIFFEST = 100.0
"""Largest ``smooth_residual``: Gaussians that are wider than images take minutes and leave nothing."""

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """How a residual is refined. What an engine keeps follows from what the parts say.

    Attributes:
        descent: makes steps of gradients.
        damping: changes λ by what a step led to.
        acceptance: keeps a step, or takes it back.
        smoothing: regularises the residual after a step.
    """

    descent: Descent = field(default_factory=LM)
    damping: Damping = field(default_factory=Simple)
    acceptance: Acceptance = field(default_factory=Always)
    smoothing: Smoothing = field(default_factory=Elastic)

    def judge(self, trust: Trust, loss: Tensor, iteration: int) -> tuple[Tensor, Tensor, Trust]:
        """Compare the loss after a step with the one before; accept or reject, and adapt the damping.

        Args:
            trust: state from before the step.
            loss: ``(B,)`` loss after the step; NaN or inf counts as a rise.
            iteration: counts from 1.

        Returns:
            Which pairs accept ``(B,)`` bool, the gain ratios ``(B,)`` (NaN where the damping does not ask for what a
            step promises), and the new state.
        """
        outcome = Outcome(loss, trust.loss, trust.expected, iteration)
        damping = trust.damping * self.damping.factor(outcome).to(trust.damping.dtype)
        damping = damping.clamp(trust.reference / DAMPING_RANGE, trust.reference * DAMPING_RANGE)
        accepted, memory = self.acceptance.accepts(outcome, trust.memory)
        kept = torch.where(accepted & outcome.finite, loss, trust.loss)
        gain = outcome.gain if self.damping.needs_promise else trust.expected
        return accepted, gain, replace(trust, damping=damping, loss=kept, memory=memory)


def make_method(
    descent: str | Descent,
    control: str | Damping,
    acceptance: str | Acceptance,
    smooth_residual: str | float | Smoothing,
    window: int,
    seed: int,
) -> Method:
    """The method of arguments of :func:`monai_lm.refine`: names, or the objects they stand for.

    Raises:
        TypeError: ``smooth_residual`` is neither a number nor a :class:`Smoothing`.
        ValueError: an unknown name, anything else in its place, or a number out of range.
    """
    if isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of voxels, got {window!r}")
    if isinstance(smooth_residual, str):
        raise TypeError(f"smooth_residual must be a number or a Smoothing, got {smooth_residual!r}")
    if not isinstance(smooth_residual, Smoothing):
        check_number("smooth_residual", smooth_residual, 0)
        if smooth_residual > _STIFFEST:
            raise ValueError(f"smooth_residual must be at most {_STIFFEST:g} voxels, got {smooth_residual}")
        smooth_residual = Elastic(smooth_residual)
    return Method(
        _named("descent", descent, Descent, {name: make(window) for name, make in DESCENTS.items()}),
        _named("control", control, Damping, DAMPINGS),
        _named("acceptance", acceptance, Acceptance, {name: make(seed) for name, make in ACCEPTANCES.items()}),
        smooth_residual,
    )


def _named(argument: str, value: Any, kind: type[T], known: Mapping[str, T]) -> T:
    if isinstance(value, kind):
        return value
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument} must be one of {tuple(known)} or a {kind.__name__}, got {value!r}")
    return known[value]
