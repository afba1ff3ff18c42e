"""Where an iteration's time goes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import brain_image
from benchmarks.gpu.measure import timed
from benchmarks.peers import machine
from monai_lm.devices import find_device
from monai_lm.engine import Engine
from monai_lm.fields.topology import folded_cells
from monai_lm.levenberg import initial_trust_of
from monai_lm.pyramid import make_level
from monai_lm.similarity import LNCC


class _Timed(Engine):
    """The engine, with a clock around every kernel."""

    def __init__(self, *args: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        super().__init__(*args)

    def _run(self, kernel: Any, *args: Any) -> Any:
        return self._clocked(super()._run, kernel, *args)

    def _run_pieces(self, kernel: Any, *args: Any) -> Any:
        if getattr(self, "_inside", False):
            return super()._run_pieces(kernel, *args)
        return self._clocked(super()._run_pieces, kernel, *args)

    def _clocked(self, run: Any, kernel: Any, *args: Any) -> Any:
        if getattr(self, "_inside", False):
            return run(kernel, *args)
        self._inside = True
        try:
            out, seconds = timed(self.residual.device, run, kernel, *args)
        finally:
            self._inside = False
        self.seconds[getattr(kernel, "__name__", str(kernel)).lstrip("_")] += seconds
        return out


def profile(iterations: int = 10, compile: bool = True, device: str = "cpu") -> None:  # noqa: A002 (as refine calls it)
    """Seconds of every kernel per full-resolution iteration of a 1 mm brain (1000 ← 1001), median of iterations.

    Args:
        iterations: how many are timed, after two that compile or load the kernels.
        compile: compile the kernels.
        device: cpu, cuda, ...; on a GPU every kernel is waited for.
    """
    chosen = find_device(device)
    fixed, moving = (brain_image(subject, "t1").to(chosen) for subject in ("1000", "1001"))
    level = make_level(fixed.shape[2:], (1.0, 1.0, 1.0), 1)
    residual = torch.zeros(1, 3, *fixed.shape[2:], device=chosen)
    engine = _Timed(level, fixed, moving, None, residual, LNCC(), 1.0, 0.5, 0.5, 1, False, compile)
    loss: Tensor = engine.evaluate()
    trust = initial_trust_of(engine.gradients, loss, 1.0)
    rows: list[dict[str, float]] = []
    for iteration in range(iterations + 2):
        engine.seconds.clear()
        better = torch.ones(1, dtype=torch.bool, device=chosen)
        whole = timed(chosen, engine.advance, trust, better, False)[1] + timed(chosen, engine.evaluate)[1]
        if iteration >= 2:
            rows.append(
                dict(engine.seconds) | {"rest (copies, windows)": whole - sum(engine.seconds.values()), "all": whole}
            )
    guard = timed(chosen, folded_cells, engine.residual)[1]
    medians = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
    print(f"profile: {machine(torch.get_num_threads())}; 176x224x176, {iterations} iterations")
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:<26}{1000 * seconds:9.1f} ms{100 * seconds / medians['all']:7.1f} %")
    share = guard / 25 / medians["all"]
    print(f"{'fold check, once a level':<26}{1000 * guard:9.1f} ms{100 * share:7.1f} % of an iteration, 25 a level")
