"""Where an iteration's time goes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.data import brain_image
from benchmarks.gpu.measure import timed
from benchmarks.peers import machine
from monai_lm import kernels
from monai_lm.fields.topology import fold_count
from monai_lm.kernels.devices import find_device
from monai_lm.similarity import LNCC
from monai_lm.solver.engine import Engine
from monai_lm.solver.method import Method
from monai_lm.solver.pyramid import make_level
from monai_lm.solver.residual import Residual
from monai_lm.solver.trust import initial_trust

MOVED = {"sample": 5, "lncc": 3, "gradient": 5, "step": 9, "elastic": 6, "the best iterate": 6}
"""V that each has to read and write at least, from the identity."""


def profile(iterations: int = 10, device: str = "cpu") -> None:
    """Seconds of every kernel per full-resolution iteration of a 1 mm brain (1000 ← 1001), median of iterations.

    Args:
        iterations: how many are timed, after two that warm up.
        device: cpu, cuda, ...; on a GPU every kernel is waited for.
    """
    chosen = find_device(device)
    fixed, moving = (brain_image(subject, "t1").to(chosen) for subject in ("1000", "1001"))
    level = make_level(fixed.shape[2:], (1.0, 1.0, 1.0), 1)
    residual = Residual(1, level, chosen, torch.float32)
    seconds: dict[str, float] = defaultdict(float)
    rows: list[dict[str, float]] = []

    def clocked(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out, spent = timed(chosen, run, *args)
            seconds[name] += spent
            return out

        return call

    with torch.no_grad():
        engine = Engine(fixed, moving, None, residual, LNCC(), Method(), 1.0, 0.5)
        loss = engine.evaluate()
        trust = initial_trust(engine.gradient, loss, 1.0)
        better = torch.ones(1, dtype=torch.bool, device=chosen)
        patches = {name: clocked(name, getattr(kernels, name)) for name in MOVED if hasattr(kernels, name)}
        with ExitStack() as stack:
            for name, run in patches.items():
                stack.enter_context(mock.patch.object(kernels, name, run))
            stack.enter_context(mock.patch.object(residual, "note", clocked("the best iterate", residual.note)))
            for iteration in range(iterations + 2):
                seconds.clear()
                whole = timed(chosen, engine.advance, trust, better)[1] + timed(chosen, engine.evaluate)[1]
                if iteration >= 2:
                    rows.append(dict(seconds) | {"rest": whole - sum(seconds.values()), "all": whole})
        guard = timed(chosen, fold_count, residual.field)[1]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    volume = 4 * fixed.numel()
    print(f"profile: {machine(torch.get_num_threads())}; 176x224x176, {iterations} iterations")
    for name, spent in sorted(medians.items(), key=lambda item: item[1]):
        rate = f"{MOVED[name]:4d} V {MOVED[name] * volume / spent / 1e9:7.1f} GB/s" if name in MOVED else ""
        print(f"{name:<26}{1000 * spent:9.1f} ms{100 * spent / medians['all']:7.1f} %{rate}")
    share = guard / 25 / medians["all"]
    print(f"{'look for folds':<26}{1000 * guard:9.1f} ms{100 * share:7.1f} % of an iteration, once in 25")
