"""Second part: milliseconds per iteration, memory, the first call, whole registrations; ours, other descents, peers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monai_lm
from benchmarks.descents import DESCENTS, keywords
from benchmarks.gpu.measure import Pair, per_iteration, synthetic, timed
from benchmarks.gpu.steps import Step, Values
from monai_lm import RefinementResult
from monai_lm.fields import fold_count
from monai_lm.fields.algebra import lengths
from monai_lm.similarity import LNCC

_ROOT = Path(__file__).parents[2]
SIZES = ((160, 192, 224), (64, 64, 64), (256, 256, 256))
DRY_SIZES = ((32, 36, 34),)

Run = Callable[[int], Any]


def steps(device: torch.device, dry: bool) -> list[Step]:
    """The size that is published most comes first, then what a user feels, then the rest."""
    first, *rest = DRY_SIZES if dry else SIZES
    out = _iterations(first, device, dry)
    calls = {name: settings for name, settings in _CALLS.items() if not dry or name == "auto"}
    out += [(f"first call, {name}", partial(first_call, settings, first, device)) for name, settings in calls.items()]
    out += [(f"whole, {name}", partial(whole, name, first, device)) for name in ("LM", "LM, predicted", *DESCENTS)]
    out += [(f"fireants, {o}, {_name(first)}", partial(fireants, o, first, device)) for o in ("adam", "levenberg")]
    out += [("equal LNCC", partial(equal_lncc, first, device))]
    for size in rest:
        out += _iterations(size, device, dry)
        out += [(f"fireants, {o}, {_name(size)}", partial(fireants, o, size, device)) for o in ("adam", "levenberg")]
    return out


_CALLS: dict[str, dict[str, Any]] = {"auto": {}, "reference": {"kernels": "reference"}}


def _name(size: Sequence[int]) -> str:
    return "x".join(str(s) for s in size)


def _iterations(size: Sequence[int], device: torch.device, dry: bool) -> list[Step]:
    methods: dict[str, Callable[[Pair, int], Any]] = {
        "LM, predicted": partial(_refined, True),
        "LM": partial(_refined, False),
        "LM, reference, predicted": partial(_refined, True, kernels="reference"),
        **{name: partial(_descended, name) for name in DESCENTS},
        "LM, half, predicted": partial(_refined, True, memory="half"),
        "LM, trust region, predicted": partial(_refined, True, control="trust_region"),
        "LM, descent, predicted": partial(_refined, True, acceptance="descent"),
        "LM, Gaussian window, predicted": partial(_refined, True, similarity=LNCC(window="gaussian")),
        "LM, mi, predicted": partial(_refined, True, similarity="mi"),
        "LM, mind, predicted": partial(_refined, True, similarity="mind"),
        "LM, symmetric, predicted": partial(_refined, True, symmetric=True),
        "LM, bending, predicted": partial(_refined, True, regularizer="bending"),
        "LM, 16 channels, mse, predicted": partial(_refined, True, similarity="mse"),
    }
    few, many = (2, 4) if dry else (5, 25)

    def measured(name: str, method: Callable[[Pair, int], Any]) -> Values:
        pair = synthetic(size, device)
        if "16 channels" in name:
            fixed, moving = (torch.cat([image.roll(k, -1) for k in range(16)], 1) for image in pair[:2])
            pair = pair._replace(fixed=fixed, moving=moving)
        return per_iteration(lambda n: method(pair, n), pair, device, few, many)

    return [(f"iteration, {name}, {_name(size)}", partial(measured, name, method)) for name, method in methods.items()]


def _refined(predicted: bool, pair: Pair, iterations: int, **settings: Any) -> RefinementResult:
    half = settings.get("memory") == "half"
    fixed, moving = (image.half() if half else image for image in pair[:2])
    prediction = pair.prediction if predicted else None
    return monai_lm.refine(fixed, moving, prediction, scales=(1,), iterations=iterations, tolerance=0, **settings)


def _descended(descent: str, pair: Pair, iterations: int) -> RefinementResult:
    return _refined(True, pair, iterations, **keywords(descent))


def first_call(settings: dict[str, Any], size: Sequence[int], device: torch.device) -> Values:
    """The first refinement of a new process with empty caches, and the second one, of the default schedule."""
    code = (
        "import json, sys, time; import torch, monai_lm; from benchmarks.gpu.measure import synthetic\n"
        "size, device, settings = json.loads(sys.argv[1]); pair = synthetic(size, torch.device(device)); out = []\n"
        "for _ in range(2):\n"
        "    started = time.perf_counter()\n"
        "    result = monai_lm.refine(pair.fixed, pair.moving, pair.prediction, **settings)\n"
        "    float(result.ddf.sum()); out.append(time.perf_counter() - started)\n"
        "print(json.dumps(out))"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MONAI_LM_CACHE": cache, "TRITON_CACHE_DIR": cache}
        task = json.dumps([list(size), str(device), settings])
        out = subprocess.run(
            [sys.executable, "-c", code, task], cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
        )
    if out.returncode != 0:
        raise RuntimeError(f"the process failed: {out.stderr[-1000:]}")
    first, second = json.loads(out.stdout.strip().splitlines()[-1])
    return {"first_s": first, "second_s": second}


def whole(name: str, size: Sequence[int], device: torch.device) -> Values:
    """A registration with the automatic schedule: seconds, final loss, distance from the truth in voxels, folds."""
    pair = synthetic(size, device)
    run = partial(_registered, name, pair)
    run()
    result, seconds = timed(device, run)
    return {"s": seconds, **_worth(result.ddf, result.final_loss, pair)}


def _registered(name: str, pair: Pair) -> RefinementResult:
    other = keywords(name) if name in DESCENTS else {}
    return monai_lm.refine(pair.fixed, pair.moving, pair.prediction if name == "LM, predicted" else None, **other)


def _worth(ddf: Tensor, loss: Tensor, pair: Pair) -> Values:
    missed = lengths(ddf - pair.truth)
    return {"loss": float(loss), "missed_voxels": float(missed.mean()), "folds": int(fold_count(ddf))}


@lru_cache
def fireants(optimizer: str, size: tuple[int, ...], device: torch.device) -> Values:
    """FireANTs from PyPI in a process of its own, with its fused operators if they are there."""
    if importlib.util.find_spec("fireants") is None:
        return {"skipped": "fireants is not installed"}
    task = json.dumps({"optimizer": optimizer, "size": list(size), "device": str(device)})
    command = [sys.executable, "-m", "benchmarks.gpu.run_fireants", task]
    out = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if out.returncode != 0:
        raise RuntimeError(f"the process failed: {out.stderr[-1000:]}")
    values: Values = json.loads(out.stdout.strip().splitlines()[-1])
    return values


def equal_lncc(size: tuple[int, ...], device: torch.device) -> Values:
    """Seconds that LM takes until its loss at the finest level is that which another ends with, over the other's."""
    pair = synthetic(size, device)
    _registered("LM", pair)
    history = _registered("LM", pair).history[0]
    values: Values = {"LM_s": history[-1].seconds, "LM_loss": min(h.loss for h in history if h.level == 1)}
    others = {name: whole(name, size, device) for name in DESCENTS}
    others |= {f"fireants {o}": fireants(o, size, device) for o in ("adam", "levenberg")}
    for name, other in others.items():
        if "loss" not in other:
            values[name] = other
            continue
        reached = next((h.seconds for h in history if h.level == 1 and h.loss <= other["loss"]), None)
        values[name] = {"s": other["s"], "loss": other["loss"], "LM_reaches_it_in_s": reached}
        if reached is not None:
            values[name]["ratio"] = other["s"] / reached
    return values
