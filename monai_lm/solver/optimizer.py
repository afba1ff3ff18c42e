"""The factored Levenberg-Marquardt method behind torch's optimizer interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monai_lm.fields.finite import check_number
from monai_lm.fields.smoothing import gaussian_smooth
from monai_lm.fields.topology import repair
from monai_lm.solver.acceptance import Acceptance
from monai_lm.solver.checks import check_spacing
from monai_lm.solver.damping import Damping
from monai_lm.solver.descent import expected_decrease, pull_back
from monai_lm.solver.method import Method, make_method
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.smoothing import Smoothing
from monai_lm.solver.trust import Trust, initial_trust, per_voxel

__all__ = ["FactoredLM"]


class FactoredLM(Optimizer):
    """Optimise displacement fields with factored Levenberg-Marquardt steps, for any differentiable loss.

    The update is compositional and smoothed, folds are repaired, and the state is a handful of scalars per pair. A
    parameter is a field ``(B, n, *S)`` in voxels; start it at zero, and let the closure compose a prediction with it,
    so that the elastic smoothing does not erode the prediction::

        residual = torch.zeros_like(prediction, requires_grad=True)
        optimizer = FactoredLM([residual])

        def closure():
            ddf = monai_lm.fields.compose(prediction, residual)
            return my_loss(monai_lm.fields.warp(moving, ddf), fixed)

        for _ in range(50):
            optimizer.step(closure)

    ``.grad`` holds the derivative with respect to the field as autograd leaves it; the optimizer turns it into the
    gradient for compositional updates by ``(I + ∇u)ᵀ``.

    Args:
        params: fields, or dictionaries of parameter groups.
        step: largest displacement per step, in voxels of the finest axis.
        damping: δ, the initial damping relative to the typical squared gradient.
        control: a name in :data:`~monai_lm.solver.damping.DAMPINGS`, or a :class:`~monai_lm.solver.damping.Damping`.
        acceptance: a name in :data:`~monai_lm.solver.acceptance.ACCEPTANCES`, or an
            :class:`~monai_lm.solver.acceptance.Acceptance`. Those that may reject a step evaluate the closure twice per
            step and restore the field of a pair whose step they reject.
        window: width in voxels, odd, of the window that the Hessian is averaged over.
        smooth_gradient: standard deviation in voxels of the Gaussian on the gradient.
        smooth_residual: how far the field is smoothed after every step; see :func:`monai_lm.refine`.
        spacing: voxel edge per axis; steps and ``smooth_gradient`` are then isotropic in space.
        repair_every: repair folds at every so many steps; 0 never.
        eulerian: ``.grad`` already holds the gradient for compositional updates.
        seed: of the ``"metropolis"`` acceptance.
        lr: multiplies ``step`` and, up to 1, the elastic smoothing; it is what torch's learning-rate schedulers change.

    Raises:
        ValueError: a setting out of range, or a parameter that is no ``(B, n, *S)`` field with ``n = len(S)``.
        TypeError: a setting of the wrong type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        step: float = 0.5,
        damping: float = 1.0,
        *,
        control: str | Damping = "simple",
        acceptance: str | Acceptance = "always",
        window: int = 1,
        smooth_gradient: float = 1.0,
        smooth_residual: float | Smoothing = 0.6,
        spacing: Sequence[float] | None = None,
        repair_every: int = 1,
        eulerian: bool = False,
        seed: int = 0,
        lr: float = 1.0,
    ) -> None:
        defaults = {
            "step": step,
            "damping": damping,
            "control": control,
            "acceptance": acceptance,
            "window": window,
            "smooth_gradient": smooth_gradient,
            "smooth_residual": smooth_residual,
            "spacing": spacing,
            "repair_every": repair_every,
            "eulerian": eulerian,
            "seed": seed,
            "lr": lr,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add fields with settings of their own; see :meth:`torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take one step for every field.

        Args:
            closure: evaluates the loss at the current fields and returns it: a scalar (one damping for the batch) or
                ``(B,)`` (one per pair). Gradients are cleared before; its sum is back-propagated unless the closure
                already did that.

        Returns:
            The loss before the step.

        Raises:
            TypeError: no closure, or a closure that returns no tensor.
            ValueError: a loss of another shape, or gradients that are missing.
        """
        if not callable(closure):
            raise TypeError(f"closure must be a function that returns the loss, got {type(closure).__name__}")
        loss = self._evaluate(closure)
        pending: list[tuple[Tensor, dict[str, Any], Tensor]] = []
        with torch.no_grad():
            for group in self.param_groups:
                for field in group["params"]:
                    if field.grad is not None:
                        old = self._move(field, group, loss)
                        if _method_of(group).acceptance.may_reject:
                            pending.append((field, group, old))
        if pending:
            candidate = self._evaluate(closure)
            with torch.no_grad():
                for field, group, old in pending:
                    self._settle(field, group, old, candidate)
        return loss

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Loss at the current fields, with fresh gradients in ``.grad``."""
        self.zero_grad()
        fields = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"closure must return the loss as a torch.Tensor, got {type(loss).__name__}")
            batches = {p.shape[0] for p in fields}
            if loss.dim() and (len(batches) > 1 or tuple(loss.shape) not in ((fields[0].shape[0],), (1,))):
                raise ValueError(
                    f"closure must return a scalar or ({fields[0].shape[0]},) losses, got shape {tuple(loss.shape)} "
                    f"for fields of batch sizes {sorted(batches)}"
                )
            if loss.requires_grad and all(p.grad is None for p in fields):
                loss.sum().backward()
        if all(p.grad is None for p in fields):
            raise ValueError("closure must return a loss that depends on the fields, got no gradient for any of them")
        return loss.detach()

    def _move(self, field: Tensor, group: dict[str, Any], loss: Tensor) -> Tensor:
        """Move a field by one step; returns where it was."""
        assert field.grad is not None  # the caller looked
        raw = field.grad.nan_to_num(0.0, 0.0, 0.0)
        gradient = raw if group["eulerian"] else pull_back(raw, field)
        method = _method_of(group)
        level = make_level(field.shape[2:], check_spacing(group["spacing"], field.shape[1]), 1)
        smooth = gaussian_smooth(gradient, level.in_voxels(group["smooth_gradient"]))
        trust = self._trust(field, group, smooth, level.unit, loss.reshape(-1).to(field.dtype))
        each = _of_every_pair(trust, len(field))
        step, old, moved = group["lr"] * group["step"], field.detach().clone(), torch.empty_like(smooth)
        used = smooth.clone() if method.damping.needs_promise else smooth  # a descent may overwrite it
        method.descent.advance(used, old, each, level.unit, step, None, moved)
        after = old.clone() if method.acceptance.may_reject else old
        weight = each.length if group["lr"] >= 1 else group["lr"] * each.length
        method.smoothing.relax(moved, level.unit, weight, after)
        state = self.state[field]
        state["step"] += 1
        if group["lr"] and group["repair_every"] and state["step"] % group["repair_every"] == 0:
            after = repair(after)
        if method.damping.needs_promise:
            expected = expected_decrease(gradient, method.descent.direction(smooth, each, level.unit, step))
            trust = replace(trust, expected=expected.sum(0, keepdim=True) if loss.numel() == 1 else expected)
        state.update(trust.state())
        field.copy_(after)
        return old

    def _trust(
        self, field: Tensor, group: dict[str, Any], gradient: Tensor, unit: Sequence[float], loss: Tensor
    ) -> Trust:
        """State of the damping for the coming step, judged by the loss that the last step led to."""
        state = self.state[field]
        if "damping" not in state:
            if group["smooth_residual"] != 0 and bool(field.any()):
                warnings.warn(
                    "FactoredLM smooths the whole field at every step, which erodes a field that does not start at "
                    "zero: compose the prediction with a zero field in the closure, or set smooth_residual=0",
                    stacklevel=5,
                )
            state["step"] = 0
            return initial_trust(gradient, loss, group["damping"], unit)
        trust = Trust.of(state)
        method = _method_of(group)
        return trust if method.acceptance.may_reject else method.judge(trust, loss, state["step"])[2]

    def _settle(self, field: Tensor, group: dict[str, Any], old: Tensor, loss: Tensor) -> None:
        """Judge the step that was taken, and take it back for the pairs that reject it."""
        state = self.state[field]
        trust = Trust.of(state)
        accepted, _, trust = _method_of(group).judge(trust, loss.reshape(-1).to(field.dtype), state["step"])
        state.update(trust.state())
        field.copy_(torch.where(per_voxel(accepted, field), field, old))


def _method_of(group: dict[str, Any]) -> Method:
    names = ("control", "acceptance", "smooth_residual", "window", "seed")
    return make_method("lm", *(group[name] for name in names))


def _of_every_pair(trust: Trust, pairs: int) -> Trust:
    """A state that is one for all pairs, ``(1,)``, as one of every pair, ``(B,)``."""
    return Trust.of({name: value.expand(pairs) for name, value in trust.state().items()})


def _check_group(group: dict[str, Any]) -> None:
    check_number("step", group["step"], 0, exclusive=True)
    check_number("damping", group["damping"], 0, exclusive=True)
    check_number("smooth_gradient", group["smooth_gradient"], 0)
    check_number("repair_every", group["repair_every"], 0)
    if group["repair_every"] != int(group["repair_every"]):
        raise ValueError(f"repair_every must be a whole number of steps, got {group['repair_every']}")
    check_number("lr", group["lr"], 0)
    _method_of(group)
    for field in group["params"]:
        if field.dim() not in (4, 5) or field.shape[1] != field.dim() - 2 or min(field.shape) < 1:
            raise ValueError(
                f"params must be fields (B, n, *S) with n = len(S) = 2 or 3, got shape {tuple(field.shape)}"
            )
        if min(field.shape[2:]) < 2:
            raise ValueError(f"params must have at least 2 voxels along every axis, got shape {tuple(field.shape)}")
        if field.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params must be float32 or float64 (coordinates need it), got {field.dtype}")
        check_spacing(group["spacing"], field.shape[1])
