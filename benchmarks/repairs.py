"""What keeping fields free of folds costs: seconds for the worst of fields, and what of the gain it takes back."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

import monai_lm
from benchmarks.cases import SETS
from monai_lm.fields import gaussian_smooth
from monai_lm.fields.topology import fold_count, folded_cells, repair

__all__ = ["repairs"]


def repairs(
    sets: tuple[str, ...] = ("predictions", "abdomen", "hippocampus", "brain", "cardiac"), pairs: int = 2
) -> None:
    """Time the repair of hopeless fields, in iterations of the same pair; and compare losses before and after it.

    Args:
        sets: of :data:`benchmarks.cases.SETS`, for the losses; the hopeless fields have the grid of ``predictions``.
        pairs: of each set, at most.
    """
    case = next(SETS["predictions"]())
    assert case.ddf is not None  # for mypy: the set is one of predictions
    ddf = case.ddf
    result = monai_lm.refine(case.fixed, case.moving, ddf, scales=(1,), iterations=10, tolerance=0)
    steps = [row.seconds for row in result.history[0]]
    iteration = (steps[-1] - steps[0]) / 10
    print(f"an iteration of {tuple(ddf.shape[2:])}: {iteration:.3g} s\n")
    print("| field | folded cells | seconds | iterations | folds after | used by refine |\n|---|---|---|---|---|---|")
    for name, make in _FIELDS.items():
        field = make(ddf)
        started = time.perf_counter()
        repaired = repair(field, goal=0.5)
        seconds = time.perf_counter() - started
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            used = not monai_lm.refine(case.fixed, case.moving, field, scales=(2,), iterations=0).unused
        cells = [f"{float(folded_cells(field).float().mean()):.1%}", f"{seconds:.2g}", f"{seconds / iteration:.2g}"]
        cells += [f"{int(fold_count(repaired))}", "yes" if used else "no"]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\n| set | pairs | loss at the start | lowest | returned | of the gain given back |\n|---|---|---|---|---|---|"
    )
    for name in sets:
        rows = []
        for case in islice(SETS[name](), pairs):
            result = monai_lm.refine(case.fixed, case.moving, case.ddf, spacing=case.spacing)
            finest = min(row.level for row in result.history[0])
            lowest = min(row.loss for row in result.history[0] if row.level == finest)
            rows.append((float(result.initial_loss), lowest, float(result.final_loss)))
        start, lowest, end = map(fmean, zip(*rows, strict=True))
        share = max((end - low) / (begin - low) for begin, low, end in rows)
        print(f"| {name} | {len(rows)} | {start:.4f} | {lowest:.4f} | {end:.4f} | {share:.1%} at most |")


def _white(size: float) -> Callable[[Tensor], Tensor]:
    return lambda ddf: size * torch.randn(ddf.shape, generator=torch.Generator().manual_seed(0))


def _smooth(ddf: Tensor) -> Tensor:
    field = gaussian_smooth(_white(1)(ddf), [8.0] * 3)
    return 50 * field / field.std()


def _mirrored(ddf: Tensor) -> Tensor:
    out = torch.zeros_like(ddf)
    count = ddf.shape[2]
    out[:, 0] = (count - 1 - 2 * torch.arange(count)).view(-1, 1, 1)
    return out


_FIELDS: dict[str, Callable[[Tensor], Tensor]] = {
    "a network's": lambda ddf: ddf, "twice that": lambda ddf: 2 * ddf,
    "that and noise of 1 voxel": lambda ddf: ddf + _white(1)(ddf),
    "noise of 5 voxels": _white(5), "noise of 50 voxels": _white(50), "smooth, of 50 voxels": _smooth,
    "mirrored": _mirrored,
}  # fmt: skip
