"""The schedule of a refinement: which levels, how many iterations, and what changes from level to level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any, TypeAlias

from torch import nn

from monai_lm.fields.finite import check_number
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.solver.pyramid import SHORTEST, Level, make_level

__all__ = [
    "DAMPING", "SMOOTH_GRADIENT", "Measure", "Stage", "automatic_scales", "check_schedule", "make_schedule",
]  # fmt: skip

Measure: TypeAlias = str | Similarity | nn.Module
"""What :func:`monai_lm.similarity.get_similarity` takes."""

DAMPING, SMOOTH_GRADIENT = (0.1, 0.1, 0.3, 1.0), (2.0, 2.0, 2.0, 1.0)
"""Defaults for four levels, coarse to fine; for any fewer the fine end of them."""

_COARSEST = 16  # voxels; automatic levels below half resolution shrink no axis to fewer


@dataclass(frozen=True)
class Stage:
    """One level of a schedule.

    Attributes:
        level: its grid.
        iterations: the most there.
        damping: δ, the initial damping relative to the typical squared gradient.
        smooth_gradient: standard deviation of the Gaussian on the gradient, in voxels of the level's finest axis.
        similarity: what is minimised there.
    """

    level: Level
    iterations: int
    damping: float
    smooth_gradient: float
    similarity: Similarity


def make_schedule(
    scales: str | Sequence[float],
    iterations: str | int | Sequence[int],
    damping: float | Sequence[float],
    smooth_gradient: float | Sequence[float],
    similarity: Measure | Sequence[Measure],
    size: Sequence[int],
    spacing: Sequence[float],
    predicted: bool,
) -> list[Stage]:
    """The stages, coarse to fine, of arguments of :func:`monai_lm.refine`.

    Args:
        scales: as for ``refine``.
        iterations: as for ``refine``.
        damping: as for ``refine``.
        smooth_gradient: as for ``refine``.
        similarity: as for ``refine``.
        size: voxels per axis of the images.
        spacing: voxel edge per axis.
        predicted: whether there is a prediction.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range, fewer values than levels, or more values or measures than levels that were
            given.
    """
    levels = _levels(scales, size, spacing, predicted)
    given, cut = [level.scale for level in levels], isinstance(scales, str)
    counts = _iterations(iterations, given)
    dampings = _per_level("damping", damping, given, cut or _is(damping, DAMPING), exclusive=True)
    sigmas = _per_level("smooth_gradient", smooth_gradient, given, cut or _is(smooth_gradient, SMOOTH_GRADIENT))
    measures = _measures(similarity, given, cut)
    return [Stage(*values) for values in zip(levels, counts, dampings, sigmas, measures, strict=True)]


def check_schedule(how: Mapping[str, Any]) -> None:
    """Raise what :func:`make_schedule` raises of these arguments of :func:`monai_lm.refine` for images of any size."""
    given, iterations = _scales(how["scales"]), how["iterations"]
    counted = isinstance(iterations, Sized) and not isinstance(iterations, str)
    scales = given or [1.0] * (len(iterations) if counted else 1)
    _iterations(iterations, scales)
    _measures(how["similarity"], scales, cut=given is None)
    for name, usual in (("damping", DAMPING), ("smooth_gradient", SMOOTH_GRADIENT)):
        _per_level(name, how[name], given or [1.0], given is None or _is(how[name], usual), name == "damping")


def automatic_scales(size: Sequence[int], spacing: Sequence[float], predicted: bool) -> tuple[int, ...]:
    """Scales for images of this size: as coarse as the images allow, from a prediction two levels at most."""
    scales = []
    for scale in (2, 1) if predicted else (8, 4, 2, 1):
        level = make_level(size, spacing, scale)
        shrunk = [new for new, old in zip(level.size, size, strict=True) if new < old]
        if scale == 1 or (shrunk and min(shrunk) >= (_COARSEST if scale > 2 else SHORTEST)):
            scales.append(scale)
    return tuple(scales)


def _measures(similarity: Measure | Sequence[Measure], scales: list[float], cut: bool) -> list[Similarity]:
    """The measure of every level: the first of a shorter sequence for all coarser, the fine end of one that is cut."""
    levels = len(scales)
    if isinstance(similarity, str | Similarity | nn.Module) or not isinstance(similarity, Sequence):
        return [get_similarity(similarity)] * levels
    measures = [get_similarity(measure) for measure in similarity]
    if not measures:
        raise ValueError(f"similarity must be a measure or a sequence of at least one, got {similarity!r}")
    if len(measures) > levels and not cut:
        raise ValueError(
            f"similarity must have at most one measure per level, {levels} for scales {scales}, got {len(measures)}"
        )
    return [*[measures[0]] * (levels - len(measures)), *measures][-levels:]


def _levels(
    scales: str | Sequence[float], size: Sequence[int], spacing: Sequence[float], predicted: bool
) -> list[Level]:
    given = _scales(scales)
    values = automatic_scales(size, spacing, predicted) if given is None else given
    return [make_level(size, spacing, value) for value in values]


def _scales(scales: str | Sequence[float]) -> list[float] | None:
    """The scales that are given; ``None``: they follow from the images."""
    if isinstance(scales, str):
        if scales != "auto":
            raise ValueError(f"scales must be 'auto' or a sequence of numbers, got {scales!r}")
        return None
    try:
        values = [*scales]
    except TypeError as error:
        raise TypeError(f"scales must be 'auto' or a sequence of numbers, got {type(scales).__name__}") from error
    for value in values:
        check_number("scales", value, 1)
    if not values or any(a <= b for a, b in pairwise(values)):
        raise ValueError(f"scales must be strictly decreasing and not empty, got {tuple(values)}")
    return values


def _iterations(iterations: str | int | Sequence[int], scales: list[float]) -> list[int]:
    if isinstance(iterations, str):
        if iterations != "auto":
            raise ValueError(f"iterations must be 'auto', a number or a sequence, got {iterations!r}")
        return [100 if scale >= 4 else 50 if scale >= 2 else 25 for scale in scales]
    if isinstance(iterations, bool):
        raise TypeError(f"iterations must be 'auto', a whole number or a sequence of them, got {iterations!r}")
    try:
        counts = [index(i) for i in ([iterations] * len(scales) if isinstance(iterations, int) else iterations)]
    except TypeError as error:
        expected = "'auto', a whole number or a sequence of them"
        raise TypeError(f"iterations must be {expected}, got {iterations!r}") from error
    if len(counts) != len(scales):
        raise ValueError(
            f"iterations must have one number per level, {len(scales)} for scales {scales}, got {len(counts)}"
        )
    for count in counts:
        check_number("iterations", count, 0)
    return counts


def _is(value: float | Sequence[float], default: tuple[float, ...]) -> bool:
    """Whether a setting has the values of a default, perhaps as another kind of sequence."""
    return isinstance(value, Iterable) and tuple(value) == default


def _per_level(
    name: str, value: float | Sequence[float], scales: list[float], cut: bool, exclusive: bool = False
) -> list[float]:
    """Spread a setting over the levels, coarse to fine; of a longer sequence, if it may be cut, the fine end is used.

    Raises:
        ValueError: a value below zero, or of zero where that is ``exclusive``, fewer values than levels, or more.
    """
    levels = len(scales)
    if isinstance(value, str) or not isinstance(value, Iterable):
        check_number(name, value, 0, exclusive)
        return [float(value)] * levels
    values = list(value)
    for v in values:
        check_number(name, v, 0, exclusive)
    if len(values) < levels:
        raise ValueError(f"{name} must be one number or at least one per level ({levels}), got {len(values)}")
    if len(values) > levels and not cut:
        raise ValueError(
            f"{name} must be one number or one per level, {levels} for scales {scales}, got {len(values)}; leave "
            f"out the first {len(values) - levels}, of coarser levels"
        )
    return [float(v) for v in values[len(values) - levels :]]
