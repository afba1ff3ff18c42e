"""Windows of a volume, along its first axis or its first two: what a kernel gets to see, and where it comes out right.

A kernel that looks ``halo`` voxels around itself is right everywhere in a window but near the window's ends, unless
they are the volume's: there it treats the end as it would in the whole volume. So kernels need not know about windows.
All windows of a volume have one shape, for compilers.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Span",
    "Window",
    "assembled",
    "give_back_freed_memory",
    "keep_freed_memory",
    "narrowed",
    "overwrite",
    "sparing_memory",
    "tiles",
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
class Span:
    """Indices ``start … start + length`` of an axis, of which ``first … last`` come out right."""

    start: int
    length: int
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """A span of each of the first axes of a volume; whole along the others."""

    spans: tuple[Span, ...]

    def of(self, volume: Tensor) -> Tensor:
        """View of the window of a volume ``(B, C, *S)``."""
        for dim, span in enumerate(self.spans, start=2):
            volume = volume.narrow(dim, span.start, span.length)
        return volume

    def right(self, volume: Tensor) -> Tensor:
        """View of the part of a volume ``(B, C, *S)`` that comes out right."""
        for dim, span in enumerate(self.spans, start=2):
            volume = volume.narrow(dim, span.first, span.last - span.first)
        return volume

    def cut(self, out: Tensor, dim: int = 2) -> Tensor:
        """View of the right part of what a kernel returned for the window; ``dim``: of the first axis."""
        for axis, span in enumerate(self.spans, start=dim):
            out = out.narrow(axis, span.first - span.start, span.last - span.first)
        return out

    def inner(self) -> Window:
        """The window of the right part alone."""
        return Window(tuple(Span(s.first, s.last - s.first, s.first, s.last) for s in self.spans))

    def origin(self, like: Tensor) -> tuple[Tensor, ...]:
        """Index of the window's first voxel along each of its axes, as tensors, so that a compiled kernel serves all.

        They are filled on the device: copying a number there would make the host wait.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        return tuple(torch.full((), float(span.start), dtype=wide, device=like.device) for span in self.spans)


def windows(volume: Tensor, channels: int, halo: int, bytes_at_a_time: float | None = None) -> list[Window]:
    """Cut a volume into slabs along its first axis, for kernels that shall be fast.

    Args:
        volume: ``(B, C, *S)``; its shape and device matter.
        channels: of the kernel's largest intermediate result.
        halo: how far a kernel looks around itself; a slab is no thinner than six, most of it for something.
        bytes_at_a_time: size of that intermediate result, in float32; by default what suits the device.

    Returns:
        Windows of one shape whose right parts tile the volume in order.
    """
    size, plane = volume.shape[2], volume[0, 0, 0].numel() * volume.shape[0]
    limit = _BYTES.get(volume.device.type, _BYTES["cuda"]) if bytes_at_a_time is None else bytes_at_a_time
    return [Window((span,)) for span in _spans(size, max(int(limit / (4 * channels * plane)), 6 * halo, 4), halo)]


def tiles(volume: Tensor, halo: int, share: float, least: int = 2**19) -> list[Window]:
    """Cut a volume along its first two axes, for kernels whose intermediate results shall be small.

    Args:
        volume: ``(B, C, *S)``; its shape matters.
        halo: how far a kernel looks around itself. A tile is no thinner than three along the first axis and five along
            the second one.
        share: of a volume's voxels that a tile has, or
        least: as many voxels, whichever is more.

    Returns:
        Windows of one shape whose right parts tile the volume, strip after strip.
    """
    rows, columns = volume.shape[2:4]
    area = max(least / volume[0, 0, 0, 0].numel() / volume.shape[0], share * rows * columns)
    height = min(max(round((0.6 * area) ** 0.5), 3 * halo, 4), rows)  # what is done with a strip waits for the next
    width = max(round(area / height), 5 * halo, 4)
    return [Window(spans) for spans in product(_spans(rows, height, halo), _spans(columns, width, halo))]


def _spans(size: int, length: int, halo: int) -> list[Span]:
    """Spans of one length whose right parts tile an axis."""
    if length >= size:
        return [Span(0, size, 0, size)]
    cut, first = [], 0
    while first < size:
        start = min(max(first - halo, 0), size - length)
        last = size if start + length == size else start + length - halo
        cut.append(Span(start, length, first, last))
        first = last
    return cut


def narrowed(tensors: Any, window: Window) -> Any:
    """A window of every volume in nested tuples."""
    if isinstance(tensors, tuple):
        return tuple(narrowed(t, window) for t in tensors)
    return window.of(tensors)


def assembled(rows: int, cut: list[Window], kernel: Callable[[Window], Any]) -> Any:
    """Whole volumes, in nested tuples, of what a kernel returns for each slab: ``(B, C, rows, …)`` in such tuples."""
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

    A window is written when all that may look at it are through: in the next strip (windows with the same rows), those
    up to the column after its own.

    Args:
        volume: ``(B, C, *S)``, written in place.
        cut: windows at least three times as long along every axis that is cut as the halo is wide.
        kernel: returns ``(B, C, rows, …)`` for a window.
    """
    waiting: deque[tuple[Window, Tensor]] = deque()
    for _, windows_of_strip in groupby(cut, key=lambda window: window.spans[0]):
        strip = list(windows_of_strip)
        before = len(waiting)
        for column, window in enumerate(strip):
            out = kernel(window)
            right = window.cut(out).to(volume.dtype)
            if 2 * right.numel() < out.numel():  # mostly halo: a copy, so that the rest is not kept
                right = right.clone()
            waiting.append((window, right))
            del out, right
            while before and (column == len(strip) - 1 or before >= len(strip) - column + 1):
                before -= 1
                _write(volume, waiting.popleft())
    while waiting:
        _write(volume, waiting.popleft())


def _write(volume: Tensor, part: tuple[Window, Tensor]) -> None:
    window, values = part
    window.right(volume).copy_(values)
