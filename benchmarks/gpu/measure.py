"""Time and memory on a device, and images to measure them with, made on it without a random number."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from monai_lm.fields import warp

__all__ = ["Pair", "peak", "per_iteration", "synthetic", "timed"]

T = TypeVar("T")


class Pair(NamedTuple):
    """Two images ``(1, 1, *S)``, the field between them, and a prediction that has most of it."""

    fixed: Tensor
    moving: Tensor
    truth: Tensor
    prediction: Tensor

    @property
    def volume(self) -> int:
        """Bytes of one image in float32, V."""
        return 4 * self.fixed[0, 0].numel()


def synthetic(size: Sequence[int], device: torch.device) -> Pair:
    """Waves of several lengths, some voxels apart."""
    moving = torch.ones(1, 1, *size, device=device)
    for number, period in enumerate((7.0, 11.0, 19.0, 31.0)):
        wave = torch.ones(1, 1, *size, device=device)
        for axis in range(len(size)):
            wave = wave * torch.sin(_along(size, axis, device) * (2 * math.pi / period) + number + axis)
        moving = moving + wave
    truth = _motion(size, 3.0, 0.0, device)
    return Pair(warp(moving, truth), moving, truth, 0.7 * truth + _motion(size, 0.5, 1.0, device))


def _motion(size: Sequence[int], amplitude: float, phase: float, device: torch.device) -> Tensor:
    """A field of one wave an axis, in voxels; without folds up to some 5 voxels at 64."""
    components = []
    for axis in range(len(size)):
        other = (axis + 1) % len(size)
        wave = torch.sin(_along(size, other, device) * (2 * math.pi / size[other]) + phase + axis)
        components.append((amplitude * wave).expand(1, 1, *size))
    return torch.cat(components, 1)


def _along(size: Sequence[int], axis: int, device: torch.device) -> Tensor:
    shape = [1] * (2 + len(size))
    shape[2 + axis] = size[axis]
    return torch.arange(size[axis], dtype=torch.float32, device=device).view(shape)


def timed(device: torch.device, function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, float]:
    """What a function returns, and the seconds from the first to the last thing that it has the device do."""
    if device.type != "cuda":
        started = time.perf_counter()
        out = function(*args, **kwargs)
        return out, time.perf_counter() - started
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record(stream)
    out = function(*args, **kwargs)
    after.record(stream)
    after.synchronize()
    return out, before.elapsed_time(after) / 1000


def peak(function: Callable[[], Any], device: torch.device) -> float:
    """Bytes at most beside what is there before, of what torch allocates; NaN where torch does not count."""
    if device.type != "cuda":
        function()
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def per_iteration(
    run: Callable[[int], Any], pair: Pair, device: torch.device, few: int = 5, many: int = 25
) -> dict[str, Any]:
    """Milliseconds per iteration, a long run less a short one, and the peak in V, after a first run for warming up.

    ``ran_out`` says that a leaner mode took the place of the one that was asked for.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = timed(device, run, few)[1]
        short, long = (min(timed(device, run, n)[1] for _ in range(2)) for n in (few, many))
        volumes = peak(lambda: run(few), device) / pair.volume
    ran_out = any("ran out of memory" in str(w.message) for w in caught)
    values = {"ms": 1000 * (long - short) / (many - few), "volumes": volumes, "first_s": first}
    return values | ({"ran_out": True} if ran_out else {})
