"""The kernels of a refinement on a GPU, compiled side by side before it asks for them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.similarity import Similarity
from monai_lm.similarity.base import KernelSimilarity
from monai_lm.similarity.weighted import Weighted
from monai_lm.solver.choice import ways
from monai_lm.solver.method import Method
from monai_lm.solver.run import Problem, Settings
from monai_lm.solver.schedule import Stage
from monai_lm.solver.trust import initial_trust

__all__ = ["PRECISIONS", "Rehearsal", "rehearsal_of", "rehearse"]

_SIDE = 4
"""Voxels per axis of what is rehearsed with: a compilation serves all sizes."""
_TOGETHER = 16
"""Compilations at a time; most of each runs outside of Python."""


PRECISIONS = ((torch.float32, torch.float32), (torch.half, torch.half), (torch.half, torch.float32))
"""Of images and residual: before they are halved, and on every level, or the first ones, of ``memory="half"``."""


@dataclass(frozen=True)
class Rehearsal:
    """What decides which kernels a refinement launches.

    Attributes:
        device: where.
        dimensions: 2 or 3.
        images: precision of the images.
        kept: precision of the residual.
        predicted: whether there is a prediction.
        weighed: whether voxels have weights.
        units: see :class:`monai_lm.solver.pyramid.Level`, of every level.
        sigmas: standard deviations of the Gaussians on the gradient, in voxels.
        named: settings of similarities and method, which tell whether two rehearsals are the same.
        similarities: those of kernels, without weights.
        method: how steps are made and judged.
    """

    device: torch.device
    dimensions: int
    images: torch.dtype
    kept: torch.dtype
    predicted: bool
    weighed: bool
    units: frozenset[tuple[float, ...]]
    sigmas: frozenset[tuple[float, ...]]
    named: str
    similarities: Sequence[Similarity] = field(compare=False)
    method: Method = field(compare=False)

    def parts(self) -> Iterator[Callable[[], object]]:
        """Calls of a kernel or two each, on next to nothing; those that compile longest come first."""
        image, residual = self._image, self._residual
        outer = self._field(torch.float32)
        for measure in self.similarities:
            weight = image(self.images) if self.weighed else None
            given = measure.ranged_reference(image(self.images), self._range, weight)
            yield partial(measure.evaluate_into, image(self.kept), given, image(self.kept))
        for through in (outer, None) if self.predicted else (None,):
            yield partial(self._sample, residual(), through)
        yield partial(self._sample, None, outer if self.predicted else None)
        for precision in {self.kept, torch.float32}:
            for cells in (self._cells, None):
                yield partial(kernels.unfolded, self._field(precision), None, 0.0, cells)
        unit = next(iter(self.units))
        trust = initial_trust(residual(), torch.ones(1, device=self.device), 1.0, unit)
        pair = (image(self.kept), image(self.kept)) if self.method.damping.needs_promise else None
        advance = self.method.descent.start().advance
        yield partial(advance, residual(), residual(), trust, unit, 0.5, pair, residual())
        for unit in self.units:
            yield partial(self.method.smoothing.relax, residual(), unit, trust.length, residual())
        for sigma in self.sigmas:
            yield partial(kernels.gradient, image(self.kept), image(self.kept), sigma, residual())
        if self.predicted:
            yield partial(kernels.sample, image(self.images), residual(), None, None, None, image(self.images))
            yield partial(kernels.compose, outer, residual(), self._field(torch.float32))
        yield partial(kernels.image_sums, image(self.images))
        yield partial(kernels.choose, trust.active, residual(), residual())
        yield partial(kernels.smooth, image(self.images), [1.0] * self.dimensions, image(self.images))

    def _sample(self, residual: Tensor | None, prediction: Tensor | None) -> None:
        kernels.sample(self._image(self.images), residual, prediction, *self._range, self._image(self.kept))

    def _image(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, 1, *[_SIDE] * self.dimensions, dtype=dtype, device=self.device)

    def _field(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, self.dimensions, *[_SIDE] * self.dimensions, dtype=dtype, device=self.device)

    def _residual(self) -> Tensor:
        return self._field(self.kept)

    @property
    def _cells(self) -> Tensor:
        return torch.zeros(1, *[_SIDE + 1] * self.dimensions, dtype=torch.bool, device=self.device)

    @property
    def _range(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 1, device=self.device), torch.ones(1, 1, device=self.device)


def rehearse(problem: Problem, weighed: bool, stages: Sequence[Stage], settings: Settings) -> None:
    """Have the kernels that a refinement will launch compiled in threads, once in a process.

    On an H200 with 16 cores a first call took 3.7 s instead of 11. What is not foreseen here is compiled when it is
    called; on a CPU there is nothing to do.

    Args:
        problem: what is refined.
        weighed: whether one of the images has a mask.
        stages: its levels.
        settings: how it is refined.
    """
    device = problem.fixed.device
    if device.type != "cuda" or kernels.missing(device) is not None:
        return
    for precisions in PRECISIONS if settings.memory == "half" else PRECISIONS[:1]:
        _perform(rehearsal_of(problem, weighed, stages, settings, precisions))
        if (settings.adaptive or len(ways(stages)) > 1) and not weighed:  # halves of an image are told by weights
            _perform(rehearsal_of(problem, True, stages, settings, precisions))


def rehearsal_of(
    problem: Problem,
    weighed: bool,
    stages: Sequence[Stage],
    settings: Settings,
    precisions: tuple[torch.dtype, torch.dtype],
) -> Rehearsal:
    """What to rehearse for precisions of images and residual; see :func:`rehearse`."""
    plain = [s.measure if isinstance(s, Weighted) else s for s in (stage.similarity for stage in stages)]
    measures = {f"{type(s).__name__} {vars(s)}": s for s in plain if isinstance(s, KernelSimilarity)}
    return Rehearsal(
        device=problem.fixed.device,
        dimensions=problem.fixed.dim() - 2,
        images=precisions[0],
        kept=precisions[1],
        predicted=problem.prediction is not None,
        weighed=weighed,
        units=frozenset(stage.level.unit for stage in stages),
        sigmas=frozenset(stage.level.in_voxels(stage.smooth_gradient) for stage in stages),
        named=f"{sorted(measures)} {settings.method}",
        similarities=tuple(measures.values()),
        method=settings.method,
    )


@cache
def _perform(rehearsal: Rehearsal) -> None:
    with ThreadPoolExecutor(_TOGETHER) as pool:
        for part in [pool.submit(part) for part in rehearsal.parts()]:
            part.result()
