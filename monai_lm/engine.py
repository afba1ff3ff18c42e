"""What one level keeps in memory, and the passes over it: loss, gradient, step.

All passes go window by window (:mod:`monai_lm.streaming`) over the level's volumes, and every kernel is a pure function
that is the same compiled and not. In V, the size of one image in float32, :class:`Engine` keeps, beside the two images
and a prediction, which are the caller's: the residual 3, the best residual 3, the smoothed gradient 3, the warped image
and the derivative 2, and for LNCC the fixed image with its local means and variances 3. :class:`LeanEngine` keeps the
residual 3 and the best one in half precision 1.5, :class:`HalfEngine` both in half precision; both compute the rest in
every window anew. Filters and LNCC are compiled piece by piece, so that a window needs some 12 intermediate images at a
time, not all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from monai_lm import levenberg
from monai_lm.compilation import compiling, piece
from monai_lm.fields.algebra import compose
from monai_lm.fields.sampling import warp
from monai_lm.fields.smoothing import gaussian_smooth, gaussian_taps
from monai_lm.fields.topology import repair_in_place
from monai_lm.levenberg import Trust, per_voxel
from monai_lm.pyramid import Level
from monai_lm.similarity import Similarity
from monai_lm.similarity.base import Range, line_sums, normalized
from monai_lm.streaming import Window, assembled, give_back_freed_memory, narrowed, overwrite, tiles, windows

__all__ = ["Engine", "HalfEngine", "LeanEngine"]


class Engine:
    """One level at work: images, prediction, residual, and the passes over them.

    Args:
        level: its grid and units.
        fixed: ``(B, C, *S)`` on the level's grid.
        moving: ``(B, C, *S)``.
        prediction: ``(B, n, *S)`` or ``None``; read, never written.
        residual: ``(B, n, *S)`` to start from; it is overwritten.
        similarity: what to minimise.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the finest axis.
        smooth_residual: the same of the elastic smoothing.
        step: largest displacement per iteration, in voxels of the finest axis.
        window: width of the window of the Hessian.
        keep_gradient: compute the expected decrease of every step.
        fuse: compile the kernels.
    """

    best_type: torch.dtype | None = None  # as the residual
    last_bytes: float | None = None  # of the windows of :meth:`displacement`; as the device likes them

    def __init__(
        self,
        level: Level,
        fixed: Tensor,
        moving: Tensor,
        prediction: Tensor | None,
        residual: Tensor,
        similarity: Similarity,
        smooth_gradient: float,
        smooth_residual: float,
        step: float,
        window: int,
        keep_gradient: bool,
        fuse: bool,
    ) -> None:
        self.prediction, self.residual, self.similarity = prediction, residual, similarity
        self.fixed, self.moving = fixed.contiguous(), moving.contiguous()
        self.fixed_range, self.moving_range = similarity.ranges(fixed, moving)
        self.sigma = level.in_voxels(smooth_gradient)
        self.elastic = level.in_voxels(smooth_residual)
        self.unit = residual.new_tensor(level.unit, dtype=torch.promote_types(residual.dtype, torch.float32))
        self.unit = self.unit.view(1, -1, *[1] * len(level.size))
        self.step, self.window, self.keep_gradient, self.fuse = step, window, keep_gradient, fuse
        self.slope_halo = len(gaussian_taps(self.sigma[0]))  # the Gaussian's radius, and 1 of the differences
        self.elastic_halo = len(gaussian_taps(self.elastic[0])) - 1
        self.best: Tensor | None = None
        self.kept: Tensor | None = None
        self._allocate()

    def _allocate(self) -> None:
        """Buffers beside the residual, and what depends on the fixed image only."""
        self.reference = self._reference()
        wide = torch.promote_types(self.moving.dtype, torch.float32)
        self.warped = torch.empty_like(self.moving, dtype=wide)
        self.derivative = torch.empty_like(self.warped)
        self.smooth = torch.empty_like(self.residual)

    def _reference(self) -> tuple[Any, ...]:
        """What the similarity derives from the fixed image."""
        halo = self.similarity.halo
        if halo is None:
            return self.similarity.reference(normalized(self.fixed, self.fixed_range))
        cut = windows(self.fixed, 2 * self.fixed.shape[1], halo)
        range_ = self.fixed_range
        return assembled(
            self.fixed.shape[2], cut, lambda w: self.similarity.reference(normalized(w.of(self.fixed), range_))
        )

    @property
    def voxels(self) -> int:
        """Voxels of the level."""
        return self.moving[0, 0].numel()

    def evaluate(self) -> Tensor:
        """Loss ``(B,)`` at the residual; from now on :meth:`gradients` and :meth:`advance` are those of this point."""
        loss = self.loss(self.residual)
        for window in windows(self.residual, self.residual.shape[1], self.slope_halo):
            gradient = self._run(levenberg.eulerian_gradient, window.of(self.derivative), window.of(self.warped))
            window.right(self.smooth).copy_(window.cut(self._run_pieces(gaussian_smooth, gradient, self.sigma)))
        return loss

    def loss(self, residual: Tensor | None) -> Tensor:
        """Loss ``(B,)`` at a residual, ``None`` for zero; call :meth:`evaluate` before the next step."""
        for window in windows(self.residual, max(self.residual.shape[1], self.moving.shape[1]), 0):
            window.right(self.warped).copy_(window.cut(self._warp(window, residual)))
        if self.similarity.halo is None:
            given = self.warped, self.reference, self.similarity
            loss, derivative = self._run(_measure, *given) if self.similarity.closed_form else _measure(*given)
            self.derivative.copy_(derivative)
            return loss
        total = self.warped.new_zeros(self.warped.shape[0])
        for window in windows(self.warped, 2 * self.warped.shape[1], self.similarity.halo):
            reference = narrowed(self.reference, window)
            run = self._run_pieces if self.similarity.in_pieces else self._run
            lines, derivative = run(_measure_lines, window.of(self.warped), reference, self.similarity)
            window.right(self.derivative).copy_(window.cut(derivative))
            total = total + window.cut(lines, 1).sum((1, 2))
        return total

    def _run(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """A kernel, compiled as a whole if this level's are."""
        with compiling(self.fuse):
            return piece(kernel, *args)

    def _run_pieces(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """A kernel, compiled piece by piece if this level's are: fewer intermediate results live at the same time.

        On a small level that is no matter, and calling the pieces would take longer than what they do.
        """
        if self.voxels <= _SMALL:
            return self._run(kernel, *args)
        with compiling(self.fuse):
            return kernel(*args)

    def _warp(self, window: Window, residual: Tensor | None) -> Tensor:
        """Window of the moving image warped by the prediction after a residual, shifted and scaled."""
        inner = window.of(self.residual)
        inner = torch.zeros_like(inner) if residual is None else window.of(residual)
        origin = window.origin(self.unit)
        return self._run(_warped, self.moving, self.moving_range, self.prediction, inner, origin)

    def gradients(self) -> Iterator[Tensor]:
        """The smoothed gradient in the metric of the step, ``(B, n, rows, …)`` after ``(B, n, rows, …)``."""
        for window in windows(self.residual, self.residual.shape[1], 0):
            yield window.cut(window.of(self.smooth) * self.unit)

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        """Take a step; before it, note the residual of pairs that are ``better`` ``(B,)`` as their best.

        Args:
            trust: state of the damping.
            better: pairs whose residual is their best so far; ``None``: note nothing.
            keep: keep the residual so that :meth:`retract` can return to it.

        Returns:
            The first-order decrease that the step promises, ``(B,)``, NaN if not asked for.
        """
        # the moved residual takes the place of the gradient, which has served
        halo = max(self.window // 2, int(self.keep_gradient))
        cut = windows(self.residual, self.residual.shape[1], halo)
        expected = self._step_into(self.smooth, cut, trust, better, keep)
        for window in windows(self.residual, self.residual.shape[1], self.elastic_halo):
            rows = self._relaxed(window, window.of(self.smooth), trust)
            window.right(self.residual).copy_(window.cut(rows))
        return expected

    def _step_into(
        self, volume: Tensor, cut: list[Window], trust: Trust, better: Tensor | None, keep: bool, relax: bool = False
    ) -> Tensor:
        """Write the moved residual into a volume, smoothed if it shall ``relax``; returns what :meth:`advance` does."""
        expected = self.unit.new_zeros(self.residual.shape[0])

        def kernel(window: Window) -> Tensor:
            nonlocal expected
            self._note(window, better, keep)
            moved, lines = self._moved(window, trust)
            expected = expected + window.cut(lines, 1).sum((1, 2))
            return self._relaxed(window, moved, trust) if relax else moved

        overwrite(volume, cut, kernel)
        return expected if self.keep_gradient else torch.full_like(expected, float("nan"))

    def _moved(self, window: Window, trust: Trust) -> tuple[Tensor, Tensor]:
        """Window of the residual after the step, not smoothed, and the decrease that each line of it promises."""
        smooth, gradient = self._look(window)
        v, lines = self._run(_direction, smooth, gradient, trust, self.unit, self.step, self.window)
        del smooth, gradient
        return self._run(compose, self.residual, v, window.origin(self.unit)), lines

    def _relaxed(self, window: Window, moved: Tensor, trust: Trust) -> Tensor:
        return self._run_pieces(levenberg.relaxed, moved, window.of(self.residual), trust, self.elastic)

    def _look(self, window: Window) -> tuple[Tensor, Tensor | None]:
        """Window of the smoothed gradient and, if needed, of the gradient."""
        if not self.keep_gradient:
            return window.of(self.smooth), None
        gradient = self._run(levenberg.eulerian_gradient, window.of(self.derivative), window.of(self.warped))
        return window.of(self.smooth), gradient

    def _note(self, window: Window, better: Tensor | None, keep: bool) -> None:
        """Copy the window's rows to the best residual, where better, and to the kept one."""
        rows = window.right(self.residual)
        if better is not None:
            if self.best is None:
                self.best = self._room_for_best()
            best = window.right(self.best)
            best.copy_(torch.where(per_voxel(better, best), rows, best))
        if keep:
            if self.kept is None:
                self.kept = torch.empty_like(self.residual)
            window.right(self.kept).copy_(rows)

    def _room_for_best(self) -> Tensor:
        """Zeros for the best residual."""
        return torch.zeros_like(self.residual, dtype=self.best_type)

    def retract(self, accepted: Tensor) -> None:
        """Return the pairs that are not ``accepted`` ``(B,)`` to the residual that :meth:`advance` kept."""
        if self.kept is not None and not bool(accepted.all()):
            self._choose(accepted, self.kept)
            self.evaluate()

    def settle(self, better: Tensor) -> None:
        """Return the pairs whose residual is not ``better`` ``(B,)`` to the best one noted, and give that up."""
        if self.best is not None:
            self._choose(better, self.best)
            self.best = None

    def _choose(self, chosen: Tensor, other: Tensor) -> None:
        """Set the residual of pairs that are not ``chosen`` to ``other``."""
        for window in windows(self.residual, self.residual.shape[1], 0):
            rows = window.right(self.residual)
            rows.copy_(torch.where(per_voxel(chosen, rows), rows, window.right(other)))

    def mend(self) -> bool:
        """Repair folds; whether there were any."""
        return repair_in_place(self.residual, self.prediction)

    def displacement(self, better: Tensor) -> Tensor:
        """Field of ``(id + u0) ∘ (id + r)``, for pairs that are not ``better`` ``(B,)`` that of ``r = 0``; float32.

        The field takes the place of the residual, which is given up for it.
        """
        for window in windows(self.residual, self.residual.shape[1], 0, self.last_bytes):
            rows = window.right(self.residual)
            rows = torch.where(per_voxel(better, rows), rows, torch.zeros_like(rows))
            if self.prediction is not None:
                rows = compose(self.prediction, rows, window.inner().origin(rows))
            window.right(self.residual).copy_(rows)
        return self.residual


class LeanEngine(Engine):
    """The same passes with next to nothing stored: slower, and for measures that look at a neighbourhood only."""

    best_type = torch.float16
    last_bytes = 4 * 2**20  # composing eagerly takes some thirty times that

    def _allocate(self) -> None:
        if self.similarity.halo is None:
            raise ValueError(
                "memory must be 'full' for a similarity that looks at the whole image at once, got 'low' or 'half' for "
                f"{type(self.similarity).__name__}"
            )
        self.look_halo = self.similarity.halo

    def evaluate(self) -> Tensor:
        """Loss ``(B,)`` at the residual."""
        return self.loss(self.residual)

    def loss(self, residual: Tensor | None) -> Tensor:
        """Loss ``(B,)`` at a residual, ``None`` for zero."""
        total = self.unit.new_zeros(self.residual.shape[0])
        for window in tiles(self.residual, self.look_halo, _SHARE):
            lines, _ = self._measure(window, self._warp(window, residual))
            total = total + window.cut(lines, 1).sum((1, 2))
        give_back_freed_memory(self.residual.device)
        return total

    def gradients(self) -> Iterator[Tensor]:
        """The smoothed gradient in the metric of the step, ``(B, n, rows, …)`` after ``(B, n, rows, …)``."""
        for window in self._step_windows():
            yield window.cut(self._look(window)[0] * self.unit)

    def _measure(self, window: Window, warped: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per line and derivative."""
        fixed = window.of(self.fixed)
        run = self._run_pieces if self.similarity.in_pieces else self._run
        return run(_measure_anew, warped, fixed, self.fixed_range, self.similarity)

    def advance(self, trust: Trust, better: Tensor | None, keep: bool) -> Tensor:
        """Take a step; see :meth:`Engine.advance`."""
        expected = self._step_into(self.residual, self._step_windows(), trust, better, keep, relax=True)
        give_back_freed_memory(self.residual.device)
        return expected

    def _look(self, window: Window) -> tuple[Tensor, Tensor | None]:
        warped = self._warp(window, self.residual)
        gradient = self._run(levenberg.eulerian_gradient, self._measure(window, warped)[1], warped)
        del warped
        if self.keep_gradient:
            return self._run_pieces(gaussian_smooth, gradient, self.sigma), gradient
        return self._run_pieces(gaussian_smooth, gradient, self.sigma), None

    def _step_windows(self) -> list[Window]:
        reach = self.window // 2 + max(1, math.ceil(self.step))  # of the Hessian's window, and of composing the step
        halo = self.look_halo + self.slope_halo + self.elastic_halo + reach
        return tiles(self.residual, halo, _SHARE)


class HalfEngine(LeanEngine):
    """The lean engine with its residual in half precision.

    It takes ``(2, B, n, *S)``: the residual to start from, and room for the best one. Together they have the size of a
    field in float32, which takes their place in the end.
    """

    def _allocate(self) -> None:
        self.storage, self.residual = self.residual, self.residual[0]
        super()._allocate()

    def _room_for_best(self) -> Tensor:
        return self.storage[1].zero_()

    def displacement(self, better: Tensor) -> Tensor:
        """The field, see :meth:`Engine.displacement`."""
        flat = self.storage.view(-1)
        wide, count = flat.view(torch.float32), flat.numel() // 2
        for stop in range(count, 0, -_AT_A_TIME):  # from the end: what is written lies behind what is still to be read
            some = slice(max(stop - _AT_A_TIME, 0), stop)
            wide[some] = flat[some].float()
        self.residual = wide.view(self.storage.shape[1:])
        return super().displacement(better)


_SMALL = 2**18
"""Voxels of a level whose kernels are compiled as a whole."""

_AT_A_TIME = 2**20
"""Values that are converted together."""

_SHARE = 0.04
"""Part of a level that a tile of the lean engine holds: the smaller, the more of it is halo, computed for nothing."""


# --- kernels: pure functions, compiled one by one: fused into one, they would compute some things several times


def _warped(
    moving: Tensor, moving_range: Range, prediction: Tensor | None, residual: Tensor, origin: tuple[Tensor, ...]
) -> Tensor:
    """Window of the moving image, warped by the prediction after a window of the residual, shifted and scaled."""
    ddf = residual.to(origin[0].dtype)
    if prediction is not None:
        ddf = compose(prediction, ddf, origin)
    return normalized(warp(moving, ddf, origin=origin), moving_range)


def _measure(warped: Tensor, reference: tuple[Any, ...], similarity: Similarity) -> tuple[Tensor, Tensor]:
    return similarity.evaluate(warped, reference)


def _measure_lines(warped: Tensor, reference: tuple[Any, ...], similarity: Similarity) -> tuple[Tensor, Tensor]:
    return similarity.evaluate_lines(warped, reference)


def _measure_anew(warped: Tensor, fixed: Tensor, fixed_range: Range, similarity: Similarity) -> tuple[Tensor, Tensor]:
    # the reference is nobody else's, so that the measure can give it up
    return similarity.evaluate_lines(warped, similarity.reference(piece(_normalized, fixed, fixed_range)))


def _normalized(image: Tensor, range_: Range) -> Tensor:
    """A shifted and scaled image, in float32 if it is in half precision."""
    return normalized(image.to(torch.promote_types(image.dtype, torch.float32)), range_)


def _direction(
    smooth: Tensor, gradient: Tensor | None, trust: Trust, unit: Tensor, step: float, window: int
) -> tuple[Tensor, Tensor]:
    """The step ``(B, n, rows, …)`` in voxels, and the decrease that each line promises ``(B, rows, columns)``."""
    v = levenberg.direction(smooth * unit, trust, step, window) * unit
    if gradient is None:
        return v, v.new_zeros(v.shape[0], *v.shape[2:4])
    return v, -line_sums(gradient * v)
