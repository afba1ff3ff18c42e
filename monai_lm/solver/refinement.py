"""Refine a predicted field for one pair of images: levels, iterations, stopping, history."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from tqdm.auto import tqdm

from monai_lm import kernels as kernels_
from monai_lm.fields.algebra import lengths
from monai_lm.fields.finite import check_number
from monai_lm.fields.topology import fold_count, repair, repair_in_place
from monai_lm.guidance import Guidance
from monai_lm.kernels.devices import Stopwatch
from monai_lm.similarity.lookup import name_of
from monai_lm.solver.acceptance import Acceptance
from monai_lm.solver.checks import (
    check_field,
    check_guidance,
    check_images,
    check_spacing,
    check_together,
    guides_of,
    plain,
    plain_images,
)
from monai_lm.solver.choice import beginnings, begun, decided
from monai_lm.solver.damping import DAMPINGS, Damping
from monai_lm.solver.descent import Descent
from monai_lm.solver.engine import Engine
from monai_lm.solver.halves import compared
from monai_lm.solver.images import Masks, constant_pairs, normal, refined_images, weighted
from monai_lm.solver.lesion import Lesion, checked_lesion, outside
from monai_lm.solver.memory import MODES, automatic_mode
from monai_lm.solver.method import make_method
from monai_lm.solver.prediction import believed
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.regularizer import Regularizer, make_regularizer
from monai_lm.solver.rehearsal import rehearse
from monai_lm.solver.result import Iteration, Record, RefinementResult
from monai_lm.solver.run import Problem, Settings, descend, engine_of
from monai_lm.solver.schedule import (
    DAMPING,
    SMOOTH_GRADIENT,
    Measure,
    Stage,
    check_schedule,
    make_schedule,
)
from monai_lm.solver.smoothing import Elastic, Smoothing
from monai_lm.solver.symmetric import SymmetricEngine, both_ways, reconciled

__all__ = ["check_keywords", "defaults", "refine"]

_GOAL = 0.5
"""What determinants of a folded prediction are brought above: what is rough in it folds again with the residual, and
its level starts too well to be left. What has no such cells is left alone. On eight predictions of a third-party
network for brains (validation) .2 and .5 end .0043 and .0030 (s.e. .002) below the Dice that is found from the
identity; .7 takes .03 from the start."""

_LESS = 0.5**0.5
"""How much of the elastic smoothing is left where a field and its inverse give way to each other, which smooths, too:
two brains of the validation set, with 1 and this, have a Dice of .591 and .595 at SDlogJ of .138 and .159; one
direction alone .604 and .172."""
_OF_PAIR = ("moving_mask", "lesion", "moving_lesion")
"""Keyword arguments that are no settings: they belong to a pair."""


def refine(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    moving_mask: Tensor | None = None,
    lesion: Tensor | None = None,
    moving_lesion: Tensor | None = None,
    similarity: Measure | Sequence[Measure] = "lncc",
    scales: str | Sequence[float] = "auto",
    iterations: str | int | Sequence[int] = "auto",
    step: float = 0.5,
    damping: float | Sequence[float] = DAMPING,
    descent: str | Descent = "lm",
    control: str | Damping = "simple",
    acceptance: str | Acceptance = "always",
    window: int = 1,
    smooth_gradient: float | Sequence[float] = SMOOTH_GRADIENT,
    smooth_residual: str | float | Smoothing = "auto",
    regularizer: str | Regularizer | None = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
    symmetric: bool = False,
    spacing: Sequence[float] | None = None,
    seconds: float | None = None,
    tolerance: float = 0.005,
    seed: int = 0,
    kernels: str = "auto",
    memory: str = "auto",
    progress: bool = False,
    callback: Callable[[int, int, Iteration], Any] | None = None,
) -> RefinementResult:
    """Optimise a field until the warped moving image matches the fixed one, without ever folding space.

    The field is kept as ``(id + u0) ∘ (id + r)`` with ``u0`` the prediction; the residual ``r`` starts at zero, takes
    the factored Levenberg-Marquardt steps and is the only thing that is smoothed, so a prediction does not erode.
    Without a prediction this is a registration from the identity. Every pair of a batch has its own damping,
    acceptance and stop: its result is the one it would have alone.

    Args:
        fixed: ``(B, C, *S)``, 2D or 3D; integers and half precision are converted to float32, with an offset taken
            off first that is large against the range. Few intensities far beyond all others count as the largest, or
            smallest, of those.
        moving: ``(B, C, *S)`` on the same grid.
        ddf: predicted displacement ``(B, n, *S)`` in voxels on the fixed grid, ``warped(x) = moving(x + ddf(x))``, or
            ``None``. Folds in it are repaired first. What is folded in most cells, or makes the images less alike than
            no field does, is not used, with a warning that names likely reasons.
        mask: weights ``(B, 1, *S)`` in [0, 1], or zeros and one other value, on the fixed grid: the similarity counts
            where it is not zero, and one voxel beyond, towards the outside. For the measures of this package. Elsewhere
            the field continues smoothly. What is in its holes, or more than three voxels outside, is not seen, and may
            be NaN. Of ones it is left out.
        moving_mask: the same on the grid of the moving image, where a lesion is that the fixed image has not, for one.
            A voxel ``x`` counts with ``mask(x) · moving_mask(x + ddf(x))``, and the loss is the mean over what counts.
        lesion: ``(B, 1, *S)`` on the fixed grid, zero where there is none: a tumour, that nothing shall be fitted to.
            There images are not compared, as under zeros of ``mask``, and the field, prediction included, follows from
            around as smoothly as can be: it is the harmonic extension, affine where that is affine around.
        moving_lesion: the same on the grid of the moving image, wherever the field leads there. Not with ``symmetric``.
        similarity: ``"lncc"``, ``"mapped_lncc"``, ``"mi"``, ``"mind"``, ``"mse"``, ``"ncc"``, a measure, or any loss
            module called as ``(warped, fixed)``. ``"auto"`` is the first or the second of them, see
            :class:`~monai_lm.similarity.auto.Auto`. Or a sequence of them, coarse to fine: the last one for the finest
            level, the one before for the next, the first one for all that are coarser. Of more measures than levels
            the first ones are left out with automatic ``scales``, and refused with others. Losses of the result, and
            whether a prediction is used, are by the last one; those of the history by that of their level.
        scales: reduction per level, coarse to fine, e.g. ``(4, 2, 1)``; ``"auto"`` looks at the image size and at
            whether there is a prediction.
        iterations: most iterations per level; ``"auto"`` is 100-100-50-25 for scales 8-4-2-1.
        step: largest displacement per iteration, in voxels of the level's finest axis.
        damping: δ, the initial damping relative to the typical squared gradient. A sequence gives it per level, coarse
            to fine, here and below. Of more values than levels the first ones are left out with automatic ``scales``,
            and refused with others, but for those of the default.
        descent: ``"lm"``; ``"stateless"``, gradient descent that keeps nothing and wants ``control="constant"`` and a
            ``step`` of 1; or a :class:`~monai_lm.solver.descent.Descent`.
        control: rule for the damping: ``"simple"``, ``"trust_region"`` or ``"constant"``, or a
            :class:`~monai_lm.solver.damping.Damping`.
        acceptance: ``"always"`` (the best iterate is returned), ``"descent"`` or ``"metropolis"``, or an
            :class:`~monai_lm.solver.acceptance.Acceptance`.
        window: width in voxels, odd, of the window that the Hessian is averaged over; 1 is the factored method.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the level's finest axis.
        smooth_residual: how far the residual is smoothed after every step, as an elastic solid comes to rest, in
            voxels of the finest axis: the field gets smoother, and fits less. Or a
            :class:`~monai_lm.solver.smoothing.Smoothing`; see :class:`~monai_lm.solver.smoothing.Elastic`. ``"auto"``
            is 0.6, and more, or the field as it began, where two halves of the fixed image do not agree on less, see
            :mod:`monai_lm.solver.halves`: what is there is noise, or does not correspond. With ``symmetric`` or
            ``guidance``, which may know where images do not, for measures that cannot weigh voxels, and where
            ``seconds`` leave no time to ask, it is 0.6.
        regularizer: what is minimised of the residual beside the dissimilarity, both per voxel: ``"diffusion"``,
            ``"bending"`` or ``"sliding"``, in millimetres where there is a ``spacing``, or a
            :class:`~monai_lm.solver.regularizer.Regularizer`, which has a weight. Losses are then the sum of both. Not
            with ``control="trust_region"``.
        guidance: what guides beside the images, :class:`~monai_lm.guidance.Labels`,
            :class:`~monai_lm.guidance.Keypoints`, or several. Losses are then the dissimilarity per voxel plus
            the guidance's, times its weight. Not with ``control="trust_region"``.
        symmetric: refine the field together with its inverse, so that the order of the images does not matter:
            exchanged, with the inverse of a prediction, they give the inverse, which is in the result. Losses are means
            of both directions. A little more than twice the time and memory; not with ``guidance``.
        spacing: voxel edge per axis, in millimetres; steps and ``smooth_gradient`` are then isotropic in space.
        seconds: time budget, looked at between iterations and while a prediction is repaired; the result so far is
            returned when it is spent. Making sure that the result has no folds comes on top.
        tolerance: a pair stops when ten iterations bring less than this fraction of its gain on the level; 0 never.
        seed: of the ``"metropolis"`` acceptance.
        kernels: ``"native"`` are written for the device: for CPUs in C, compiled in some seconds when the first one is
            needed and then kept in the user's cache; for CUDA in Triton. ``"reference"`` are plain PyTorch, for any
            device, slow and with many intermediate results. ``"auto"``: native ones where there are some.
        memory: ``"full"`` or ``"half"``, which keeps images and residual in half precision (pass half precision
            images, or copies are made). ``"auto"`` is ``"half"`` on a GPU without room for ``"full"``; when a GPU runs
            out of memory, it is tried with a warning.
        progress: show a progress bar.
        callback: called as ``callback(pair, number, iteration)`` with every entry of the result's ``history`` when it
            becomes known, after every ten iterations and at the end of a level; a GPU is waited for then. What it
            raises ends the refinement. A leaner try, see ``memory``, starts again at 0.

    Returns:
        The refined field and how it came about; see :class:`monai_lm.RefinementResult`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or shapes, grids or devices that do not fit; the message names it.
        torch.OutOfMemoryError: a GPU with too little memory for the leanest mode.

    Warns:
        UserWarning: a constant image, or a similarity that is not finite at the prediction; the pair keeps its field.
            An image so far from zero that its type has few values for it.
            A prediction that is not used.
            A GPU that ran out of memory, before the leaner try.
    """
    started = time.perf_counter()
    _check_values(memory, kernels, seed, step, tolerance, symmetric, seconds, callback)
    images = fixed, moving
    fixed, moving = plain_images(fixed, moving, memory == "half")
    check_images(fixed, moving)
    if kernels == "native" and (reason := kernels_.missing(fixed.device)) is not None:
        raise ValueError(f"kernels must not be 'native' on {fixed.device}: {reason}")
    size, n = fixed.shape[2:], fixed.dim() - 2
    if ddf is not None:
        ddf = plain("ddf", ddf)
        check_field("ddf", ddf, fixed.shape[0], size, fixed.device)
    edges = check_spacing(spacing, n)
    stages = make_schedule(scales, iterations, damping, smooth_gradient, similarity, size, edges, ddf is not None)
    smoothing, adaptive = _smoothing(smooth_residual, symmetric)
    method = make_method(descent, control, acceptance, smoothing, window, int(seed))
    if symmetric and isinstance(method.smoothing, Elastic):
        method = replace(method, smoothing=Elastic(_LESS * method.smoothing.sigma))
    deadline = float("inf") if seconds is None else started + seconds
    guides = check_guidance(guidance, fixed)
    lesions = (
        checked_lesion(lesion, fixed, "lesion", "fixed"),
        checked_lesion(moving_lesion, moving, "moving_lesion", "moving"),
    )
    promised, holed = method.damping.needs_promise, lesions != (None, None)
    check_together(symmetric, promised, bool(guides), holed, regularizer is not None)
    masks = outside(mask, lesions[0], "mask"), outside(moving_mask, lesions[1], "moving_mask")
    measures, masks = weighted([s.similarity for s in stages], (fixed, moving), masks, symmetric)
    stages = [replace(stage, similarity=measure) for stage, measure in zip(stages, measures, strict=True)]
    if memory == "auto":
        memory = automatic_mode(fixed, symmetric, regularizer is not None)
    settings = Settings(
        method=method, step=step, tolerance=tolerance, memory=memory, deadline=deadline, symmetric=symmetric,
        regularizer=make_regularizer(regularizer), adaptive=adaptive and not guides,
    )  # fmt: skip
    finest = replace(stages[-1], level=make_level(size, edges, 1))
    constant = constant_pairs((fixed, moving), masks, [image.dtype for image in images])
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(fixed.device.type, enabled=False),
        kernels_.using(kernels),
        tqdm(total=sum(stage.iterations for stage in stages), desc="refine", unit="it", disable=not progress) as bar,
    ):

        def run(how: Settings) -> RefinementResult:
            bar.reset()
            record = Record(fixed.shape[0], Stopwatch(fixed.device, started), callback)
            problem = Problem(fixed, moving, ddf, edges, guides, lesions)
            if kernels != "reference":
                rehearse(problem, any(m is not None for m in masks), stages, how)
            return _coarse_to_fine(problem, masks, stages, finest, how, record, bar, constant)

        return _as_memory_allows(run, settings, fixed)


def defaults() -> dict[str, Any]:
    """The settings of :func:`refine`, all its arguments that are not of a pair, and what they are unless given."""
    keywords = [p for p in inspect.signature(refine).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: p.default for p in keywords if p.name not in _OF_PAIR}


def check_keywords(owner: str, settings: Mapping[str, Any], guided: bool = False, lesions: bool = False) -> None:
    """Settings of :func:`refine` that its callers keep until they call it.

    Args:
        owner: who keeps them.
        settings: keyword arguments.
        guided: whether something guides that is not in the settings.
        lesions: whether there are lesions.

    Raises:
        TypeError: a name that :func:`refine` does not know, or that belongs to a pair, or a value of the wrong type.
        ValueError: what :func:`refine` refuses together, or whatever the images are.
    """
    usual = defaults()
    if unknown := sorted(set(settings) - set(usual)):
        raise TypeError(f"{owner} takes the keyword arguments {list(usual)} of monai_lm.refine, got {unknown}")
    how = usual | dict(settings)
    control = DAMPINGS.get(how["control"]) if isinstance(how["control"], str) else how["control"]
    promised = isinstance(control, Damping) and control.needs_promise
    guided, regularized = guided or bool(guides_of(how["guidance"])), how["regularizer"] is not None
    how["smooth_residual"], _ = _smoothing(how["smooth_residual"], how["symmetric"])
    check_together(how["symmetric"] is True, promised, guided, lesions, regularized)
    check_schedule(how)
    for check in (make_method, _check_values):
        check(**{name: how[name] for name in inspect.signature(check).parameters})
    make_regularizer(how["regularizer"])


def _smoothing(given: str | float | Smoothing, symmetric: bool) -> tuple[float | Smoothing, bool]:
    """What the residual is smoothed by, usually, and whether more is to be looked for."""
    if isinstance(given, str) and given != "auto":
        raise ValueError(f"smooth_residual must be 'auto', a number or a Smoothing, got {given!r}")
    return (Elastic(), not symmetric) if isinstance(given, str) else (given, False)


def _check_values(
    memory: Any, kernels: Any, seed: Any, step: Any, tolerance: Any, symmetric: Any, seconds: Any, callback: Any
) -> None:
    """What can be said of these arguments of :func:`refine` without images."""
    if memory not in ("auto", *MODES):
        raise ValueError(f"memory must be 'auto' or one of {MODES}, got {memory!r}")
    if kernels not in kernels_.CHOICES:
        raise ValueError(f"kernels must be one of {kernels_.CHOICES}, got {kernels!r}")
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    check_number("step", step, 0, exclusive=True)
    check_number("tolerance", tolerance, 0)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    if seconds is not None:
        check_number("seconds", seconds, 0, exclusive=True)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be None or a function, got {type(callback).__name__}")


def _as_memory_allows(
    run: Callable[[Settings], RefinementResult], settings: Settings, images: Tensor
) -> RefinementResult:
    """Run in the memory mode of the settings, or in the next leaner one that a GPU has room for."""
    while True:
        try:
            return run(settings)
        except torch.OutOfMemoryError as error:
            mode, leaner = settings.memory, MODES[MODES.index(settings.memory) + 1 :]
            if not leaner:
                raise torch.OutOfMemoryError(
                    f"{images.device} has too little memory for images {tuple(images.shape)} with memory={mode!r}, "
                    "the leanest mode"
                ) from error
            warnings.warn(f"memory={mode!r} ran out of memory, trying {leaner[0]!r}: {error}", stacklevel=3)
        settings = replace(settings, memory=leaner[0])


def _coarse_to_fine(
    problem: Problem,
    masks: Masks,
    stages: list[Stage],
    finest: Stage,
    settings: Settings,
    record: Record,
    bar: tqdm,
    constant: Tensor,
) -> RefinementResult:
    """Run the stages, and end on the finest one, which has the grid of the images.

    Pairs that are ``constant``, ``(B,)``, keep their prediction.
    """
    ddf = None if problem.prediction is None else normal(problem.prediction)
    idle = torch.cat([constant, constant]) if settings.symmetric else constant
    fixed, moving = refined_images(problem, masks, settings, [stage.similarity for stage in stages])
    repaired = used = None
    if ddf is not None:
        edges = [1 / unit for unit in finest.level.unit]
        start, used = believed(ddf, fixed[: len(ddf)], moving[: len(ddf)], finest.similarity, finest.level, edges)
        if problem.lesions != (None, None):
            start = start.clone()
            Lesion(problem.lesions, None, finest.level.unit).settle(start)
        repaired = repair(start, goal=_GOAL, deadline=settings.deadline)
        del start
    problem = replace(problem, fixed=fixed, moving=moving, prediction=repaired)
    if settings.symmetric and repaired is not None:
        problem = replace(problem, prediction=both_ways(repaired))
    stages, begins = decided(problem, stages, finest, settings, idle, record)
    asked = settings.adaptive or len(begins) > 1
    halves = compared(problem, stages, finest, settings, idle, record) if asked else None
    if halves is not None and halves.smoothing is not settings.method.smoothing:
        settings = replace(settings, method=replace(settings.method, smoothing=halves.smoothing))
        if begins:  # a field that is held would keep what they led to
            begins = beginnings(problem, stages, finest, settings, idle, record)
    way = torch.zeros_like(idle, dtype=torch.long) if halves is None else halves.way
    left, residual = begun(stages, begins, way, record)
    finest = replace(finest, similarity=stages[-1].similarity)
    bar.update(sum(stage.iterations for stage in stages) - sum(stage.iterations for stage in left))
    engine: Engine | None = None
    for stage in left:
        engine = None  # all that the level before keeps, its residual aside
        engine = engine_of(stage, finest, problem, residual, settings)
        residual, loss = engine.residual, descend(engine, stage, settings, record, bar, idle)
    if stages[-1].level.factor != finest.level.factor:
        engine = None
        engine = engine_of(finest, finest, problem, residual, settings)
        loss = engine.loss(engine.residual.field)
    assert engine is not None  # for mypy: there is a stage
    result = _finish(engine, loss, (ddf, repaired, used), constant, record, name_of(finest.similarity))
    if halves is None or not settings.adaptive:
        return result
    return replace(result, apart=halves.apart, held=halves.held)


def _finish(
    engine: Engine,
    loss: Tensor,
    predictions: tuple[Tensor | None, Tensor | None, Tensor | None],
    constant: Tensor,
    record: Record,
    similarity: str,
) -> RefinementResult:
    """Compose the result; a pair whose dissimilarity did not fall keeps the (repaired) prediction.

    Args:
        engine: at the end of the finest level.
        loss: there.
        predictions: ``(B, n, *S)`` as it came, and as it was used; and which were used, ``(B,)``.
        constant: pairs that keep their prediction, ``(B,)``.
        record: of the iterations.
        similarity: name of what was minimised.
    """
    initial, pairs = engine.loss(None), len(constant)
    initial, loss = initial[:pairs], loss[:pairs]
    if not bool(torch.isfinite(initial).all()):
        numbers = (~torch.isfinite(initial)).nonzero().flatten().tolist()
        warnings.warn(
            f"similarity is not finite at the prediction of pairs {numbers}, which keep it; do the images overlap, "
            "where their masks leave them?",
            stacklevel=6,
        )
    better = (loss <= initial) & torch.isfinite(initial) & ~constant
    rounded = engine.residual.field.dtype == torch.half
    ddf = engine.displacement(better.repeat(len(engine.moving) // pairs))
    if rounded:  # what was rounded may fold
        repair_in_place(ddf)
    folds, shift = torch.zeros_like(constant, dtype=torch.long), torch.zeros_like(initial)
    predicted, repaired, used = predictions
    backward = None
    if isinstance(engine, SymmetricEngine):
        ddf, backward = reconciled(ddf, engine.prediction, better)
    if predicted is not None and repaired is not None and repaired is not predicted:
        folds = fold_count(predicted)
        shift = lengths(repaired - predicted).flatten(1).mean(1)
        shift = torch.where(used, shift, 0.0) if used is not None else shift
    return RefinementResult(
        ddf=ddf,
        history=record.history(),
        initial_loss=initial / engine.voxels,
        final_loss=torch.where(better, loss, initial) / engine.voxels,
        predicted_folds=folds,
        repair_shift=shift,
        seconds=record.elapsed(),
        prediction_used=used,
        backward=backward,
        similarity=similarity,
    )
