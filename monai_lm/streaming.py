"""Windows along the first axis of a volume: what a kernel gets to see, and which of its rows are right.

A kernel that looks ``halo`` rows around itself is right everywhere in a window but near the window's ends, unless they
are the volume's: there it treats the end as it would in the whole volume. So kernels need not know about windows.
All windows of a volume have one shape, for compilers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Window",
    "assembled",
    "give_back_freed_memory",
    "keep_freed_memory",
    "narrowed",
    "overwrite",
    "sparing_memory",
    "windows",
]

_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Size of a kernel's largest intermediate result: on a CPU it shall stay in the cache. Whole volumes, too large for
glibc to keep when they are freed, took half of an iteration for getting memory from the system."""


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of mallopt's parameters in malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next allocation instead of giving them back to the system.

    It starts out giving back every block above 128 KiB and raises that limit, up to the same 32 MiB, to the size of the
    largest block that was freed; the process may hold on to twice its size.
    """
    if device.type == "cpu":
        _mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        _mallopt(_TRIM_THRESHOLD, 64 * 2**20)


@contextmanager
def sparing_memory(device: torch.device) -> Iterator[None]:
    """Have glibc give every block above 1 MiB back to the system when it is freed, until the context ends.

    Blocks that it keeps come in many sizes and leave gaps: that doubled the peak of the lean modes.
    """
    if device.type != "cpu":
        yield
        return
    _mallopt(_MMAP_THRESHOLD, 2**20)
    _mallopt(_TRIM_THRESHOLD, 2 * 2**20)
    try:
        yield
    finally:
        keep_freed_memory(device)


def _mallopt(parameter: int, value: int) -> None:
    if (mallopt := _libc("mallopt")) is not None:
        mallopt(parameter, value)


def give_back_freed_memory(device: torch.device) -> None:
    """Have glibc give back to the system what is freed; other allocators do without being told, or cannot be."""
    if device.type == "cpu" and (trim := _libc("malloc_trim")) is not None:
        trim(0)


@lru_cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library, where that has it: on Linux, musl has none of glibc's."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


@dataclass(frozen=True)
class Window:
    """Rows ``start … start + rows`` of a volume, of which ``first … last`` come out right."""

    start: int
    rows: int
    first: int
    last: int

    def of(self, volume: Tensor) -> Tensor:
        """View of the window's rows of a volume ``(B, C, *S)``."""
        return volume.narrow(2, self.start, self.rows)

    def right(self, volume: Tensor) -> Tensor:
        """View of the rows of a volume ``(B, C, *S)`` that come out right."""
        return volume.narrow(2, self.first, self.last - self.first)

    def cut(self, out: Tensor, dim: int = 2) -> Tensor:
        """View of the right rows of what a kernel returned for the window."""
        return out.narrow(dim, self.first - self.start, self.last - self.first)

    def first_row(self, like: Tensor) -> Tensor:
        """The window's first row as a tensor, so that compiled kernels serve every window.

        It is filled on the device: copying a number there would make the host wait.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        return torch.full((), float(self.start), dtype=wide, device=like.device)


def windows(
    volume: Tensor, channels: int, halo: int, bytes_at_a_time: float | None = None, least: int = 6
) -> list[Window]:
    """Cut the rows of a volume into windows for a kernel.

    Args:
        volume: ``(B, C, *S)``; its shape and device matter.
        channels: of the kernel's largest intermediate result.
        halo: how many rows a kernel looks around itself.
        bytes_at_a_time: size of that intermediate result, in float32; by default what suits the device.
        least: a window is no shorter than this many halos, at least 3: the halo's rows are computed for nothing.

    Returns:
        Windows of equal length whose right rows tile the volume from the first row to the last.
    """
    size, plane = volume.shape[2], volume[0, 0, 0].numel() * volume.shape[0]
    limit = _BYTES.get(volume.device.type, _BYTES["cuda"]) if bytes_at_a_time is None else bytes_at_a_time
    rows = max(int(limit / (4 * channels * plane)), least * halo, 4)
    if rows >= size:
        return [Window(0, size, 0, size)]
    cut, first = [], 0
    while first < size:
        start = min(max(first - halo, 0), size - rows)
        last = size if start + rows == size else start + rows - halo
        cut.append(Window(start, rows, first, last))
        first = last
    return cut


def narrowed(tensors: Any, window: Window) -> Any:
    """A window of every volume in nested tuples."""
    if isinstance(tensors, tuple):
        return tuple(narrowed(t, window) for t in tensors)
    return window.of(tensors)


def assembled(rows: int, cut: list[Window], kernel: Callable[[Window], Any]) -> Any:
    """Whole volumes, in nested tuples, of what a kernel returns for each window: ``(B, C, rows, …)`` in such tuples."""
    whole: Any = None
    for window in cut:
        part = kernel(window)
        whole = _enlarged(part, rows) if whole is None else whole
        _fill(whole, part, window)
    return whole


def _enlarged(part: Any, rows: int) -> Any:
    if isinstance(part, tuple):
        return tuple(_enlarged(p, rows) for p in part)
    return part.new_empty(*part.shape[:2], rows, *part.shape[3:])


def _fill(whole: Any, part: Any, window: Window) -> None:
    if isinstance(part, tuple):
        for w, p in zip(whole, part, strict=True):
            _fill(w, p, window)
    else:
        window.right(whole).copy_(window.cut(part))


def overwrite(volume: Tensor, cut: list[Window], kernel: Callable[[Window], Tensor]) -> None:
    """Replace a volume by what a kernel makes of it, window by window.

    A window's rows are written when the kernel is through with the next window, so that it still finds the old rows
    within its halo.

    Args:
        volume: ``(B, C, *S)``, written in place.
        cut: windows at least twice as long as the halo is wide.
        kernel: returns ``(B, C, rows, …)`` for a window.
    """
    pending: Iterator[tuple[Window, Tensor]] = iter(())
    for window in cut:
        out = kernel(window)
        for written, rows in pending:
            written.right(volume).copy_(rows)
        right = window.cut(out)
        # mostly halo: a copy, so that the rest is not kept while the next window is worked on
        pending = iter([(window, right.clone() if 2 * right.shape[2] < out.shape[2] else right)])
        del out, right
    for written, rows in pending:
        written.right(volume).copy_(rows)
