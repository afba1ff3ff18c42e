"""Devices: one by its name, the widest numbers it has, and the time when its work was done."""

from __future__ import annotations

import time

import torch

__all__ = ["Stopwatch", "find_device", "widest_float"]


def find_device(name: str) -> torch.device:
    """A device by its name, ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"auto"`` is a GPU if any.

    Raises:
        ValueError: a name that is none, or a device that this machine, or this build of torch, does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        reason = "" if "device string" in reason else f": {reason}"  # it is no name of a device
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        there += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"device must be auto or one that torch has here, {', '.join(['cpu', *there])}, got {name!r}{reason}"
        ) from error
    return device


def widest_float(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Apple's GPUs end at float32."""
    return torch.float32 if device.type == "mps" else torch.float64


class Stopwatch:
    """Notes when the work that was given to a device so far is done, without waiting for it.

    CUDA (ROCm too) tells the time itself; on other devices it is the time when the work was given.

    Args:
        device: where the work is done.
        started: ``time.perf_counter()`` that the seconds count from.
    """

    def __init__(self, device: torch.device, started: float) -> None:
        self._device, self._started = device, started
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def again(self) -> Stopwatch:
        """One that has noted nothing, and counts from the same start."""
        return Stopwatch(self._device, self._started)

    def lap(self) -> None:
        """Note the moment when all work given so far is done."""
        if self._device.type == "cuda":
            self._events.append(self._event())
        else:
            self._times.append(self.elapsed())

    def elapsed(self) -> float:
        """Seconds since the start, as the host's clock says."""
        return time.perf_counter() - self._started

    def seconds(self) -> list[float]:
        """Seconds of every lap since the start; waits until the device has done its work."""
        if self._device.type != "cuda":
            return self._times
        last = self._event()
        last.synchronize()
        now = self.elapsed()
        return [now - event.elapsed_time(last) / 1000 for event in self._events]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
