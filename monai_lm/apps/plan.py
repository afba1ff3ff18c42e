"""What a refinement of files would do, and what it does, iteration by iteration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai_lm.alignment import Alignment
from monai_lm.apps.guides import said_of
from monai_lm.io.images import Pair
from monai_lm.io.provenance import describe
from monai_lm.solver.refinement import defaults
from monai_lm.solver.result import Iteration
from monai_lm.solver.schedule import make_schedule

__all__ = ["live_log", "plan_of"]


def plan_of(
    pair: Pair,
    predicted: bool,
    settings: Mapping[str, Any],
    bundle: str | Path | None,
    folder: Path,
    names: Sequence[str],
    device: str,
    aligned: Alignment | None = None,
    guide: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What would be done with a pair that was read and checked.

    Returns:
        ``fixed`` and ``moving`` (size and spacing), ``start``, ``levels`` (sizes and most iterations; a bundle's are
        its own), ``settings`` and ``guide`` where they are not the defaults, ``alignment`` where one was looked for,
        ``device``, ``output_dir`` and ``outputs``, as text.

    Raises:
        ValueError: settings that do not fit the pair.
    """
    images = {"fixed": pair.fixed, "moving": pair.moving}
    start = f"bundle {bundle}" if bundle is not None else "the predicted field" if predicted else "the identity"
    if bundle is not None:
        levels = "as the bundle says"
    else:
        how = defaults() | dict(settings)
        scales, iterations, damping, smooth, similarity = (
            how[name] for name in ("scales", "iterations", "damping", "smooth_gradient", "similarity")
        )
        size, spacing = pair.fixed.grid.size, how["spacing"]
        stages = make_schedule(scales, iterations, damping, smooth, similarity, size, spacing, predicted)
        levels = ", ".join(f"{_by(stage.level.size)} up to {stage.iterations} iterations" for stage in stages)
    return {
        **{
            name: f"{_by(image.grid.size)} voxels of {_by(image.grid.spacing)} mm"
            + ", assumed" * (not image.is_measured)
            for name, image in images.items()
        },
        "start": start if pair.initial is None else f"{start}, after an affine",
        "levels": levels,
        **_departures(pair, settings, guide),
        **({} if aligned is None else {"alignment": f"{aligned.mode}. {aligned}"}),
        "device": device,
        "output_dir": str(folder),
        "outputs": ", ".join(names),
    }


def _departures(pair: Pair, settings: Mapping[str, Any], guide: Mapping[str, Any] | None) -> dict[str, str]:
    """What is set otherwise than by default, as text."""
    usual = defaults() | {"spacing": pair.fixed.grid.spacing, "progress": settings.get("progress")}
    other = {name: describe(value) for name, value in settings.items() if value != usual[name]}
    given = {"settings": other, "guide": describe(said_of(pair, guide))}
    return {
        key: ", ".join(
            f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
        )
        for key, values in given.items()
        if values
    }


def _by(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


@contextmanager
def live_log(path: str | Path | None) -> Iterator[Callable[[int, int, Iteration], None] | None]:
    """A ``callback`` for :func:`monai_lm.refine` that writes a line of JSON per iteration; ``None`` without a path.

    A line has ``iteration``, its number, and the attributes of an :class:`~monai_lm.solver.result.Iteration`; null for
    what was not computed. What was written stays whatever happens.
    """
    if path is None:
        yield None
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", buffering=1) as file:

        def write(_: int, number: int, iteration: Iteration) -> None:
            """Write the line of an iteration; null for what was not computed."""
            row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in iteration._asdict().items()}
            file.write(json.dumps({"iteration": number} | row) + "\n")

        yield write
