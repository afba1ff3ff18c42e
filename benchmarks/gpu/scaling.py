"""Third part: sizes until memory ends, where the time goes, and what the guard against folds takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import monai_lm
from benchmarks.gpu.measure import Pair, per_iteration, synthetic, timed
from benchmarks.gpu.steps import Step, Values
from monai_lm.fields import fold_count, repair
from monai_lm.fields.algebra import lengths
from monai_lm.fields.topology import folded_cells

SIZE, DRY_SIZE = (160, 192, 224), (20, 24, 22)


def steps(device: torch.device, dry: bool, folder: Path) -> list[Step]:
    """What explains the tables comes first, then larger and larger images."""
    size = DRY_SIZE if dry else SIZE
    out: list[Step] = [
        ("profile, reference", partial(profiled, size, device, folder, "reference")),
        ("guard", partial(guard, size, device)),
        ("repair", partial(repaired, size, device)),
        ("whole, with repair", partial(whole_with_repair, size, device)),
    ]
    if not dry:
        out.insert(0, ("profile, native", partial(profiled, size, device, folder, "native")))
    runs = product((12, 16) if dry else (320, 384, 512), ("full", "half"))
    return out + [(f"{edge}^3, {mode}", partial(scaled, edge, mode, device)) for edge, mode in runs]


def scaled(edge: int, mode: str, device: torch.device) -> Values:
    """Milliseconds per iteration and V of a cube."""
    pair = synthetic((edge,) * 3, device)
    fixed, moving = (image.half() if mode == "half" else image for image in pair[:2])
    prediction = pair.prediction
    volume = Pair(*(pair.fixed[..., :1, :1, :1] for _ in range(4)))  # its own images would be in the way
    del pair

    def run(iterations: int) -> Any:
        return monai_lm.refine(fixed, moving, prediction, scales=(1,), iterations=iterations, tolerance=0, memory=mode)

    values = per_iteration(run, volume, device, 1, 3)
    return values | {"volumes": values["volumes"] / edge**3, "ns_per_voxel": 1e6 * values["ms"] / edge**3}


def profiled(size: Sequence[int], device: torch.device, folder: Path, kernels: str) -> Values:
    """The kernels of three iterations that take longest, in milliseconds; the trace is in the folder."""
    pair = synthetic(size, device)

    def run() -> None:
        monai_lm.refine(
            pair.fixed, pair.moving, pair.prediction, scales=(1,), iterations=3, tolerance=0, kernels=kernels
        )

    run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as trace:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    trace.export_chrome_trace(str(folder / f"trace_{kernels}.json.gz"))
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(trace.key_averages(), key=lambda row: -getattr(row, name))[:15]
    return {"ms": {row.key[:60]: [round(getattr(row, name) / 1000, 3), row.count] for row in rows}}


def guard(size: Sequence[int], device: torch.device) -> Values:
    """Milliseconds of one look for folds, of a field and of a field after a prediction."""
    pair = synthetic(size, device)
    out: Values = {}
    for name, outer in (("field", None), ("after_prediction", pair.prediction)):
        look = partial(folded_cells, 0.2 * pair.truth, 0.0, outer)
        look()
        out[f"{name}_ms"] = 1000 * min(timed(device, look)[1] for _ in range(3))
    return out


def repaired(size: Sequence[int], device: torch.device) -> Values:
    """Seconds of the repair of a prediction that folds in some hundredths of its cells, and how it moved."""
    field = _folding(size, device)
    before = int(fold_count(field))
    repair(field)
    unfolded, seconds = timed(device, repair, field)
    moved = float(lengths(unfolded - field).mean())
    after = int(fold_count(unfolded))
    return {"s": seconds, "folds_before": before, "folds_after": after, "moved_voxels": moved}


def whole_with_repair(size: Sequence[int], device: torch.device) -> Values:
    """A refinement of that prediction: seconds, and what of them is not iterations: repair, levels, the last look."""
    pair = synthetic(size, device)
    run = partial(monai_lm.refine, pair.fixed, pair.moving, _folding(size, device))
    run()
    result = run()
    spans = [
        later.seconds - sooner.seconds
        for sooner, later in zip(result.history[0], result.history[0][1:], strict=False)
        if sooner.level == later.level
    ]
    rest = result.seconds - sum(spans)
    return {"s": result.seconds, "not_iterations_s": rest, "folds_predicted": int(result.predicted_folds)}


def _folding(size: Sequence[int], device: torch.device) -> torch.Tensor:
    """The truth with ripples that turn cells over where they are steepest."""
    pair = synthetic(size, device)
    ripple = 1.6 * (pair.moving - pair.moving.mean())
    mask = (pair.truth[:, :1] > 2.5).float()
    return pair.truth + mask * ripple
