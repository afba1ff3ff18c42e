"""The C kernels of ``cpu.c`` behind the signatures of :mod:`monai_lm.kernels.reference`."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_lm.kernels import reference
from monai_lm.kernels.build import BuildError, build

__all__ = ["available", "choose", "why_not"]

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MOST = 2**31 - 1
"""Voxels of a volume: what an index in 32 bits reaches."""

_SYMBOLS = {"elastic": "smooth"}
"""Kernels whose function in C has another name."""

_PER_THREAD = 2**13
"""Values that are worth a thread."""


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p), ("pair", c_int64), ("size", c_int64 * 3), ("channels", c_int32), ("type", c_int32)
    )  # fmt: skip


@lru_cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    try:
        try:
            return _loaded(build())
        except (OSError, AttributeError):  # what was found is broken, or for another system
            return _loaded(build(anew=True))
    except (BuildError, OSError, AttributeError) as error:
        return str(error)


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in set(__all__) - {"available", "choose", "why_not"}:  # an AttributeError if it has not all of them
        getattr(library, _SYMBOLS.get(name, name))
    return library


def why_not() -> str | None:
    """Why the kernels cannot be used here, or ``None`` where they can; the first call may compile them."""
    library = _library()
    return library if isinstance(library, str) else None


@lru_cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the kernels for CPUs cannot be compiled, so plain PyTorch is used, which takes some ten times as long and "
        f"five times the memory: {reason}",
        stacklevel=2,
    )


def available(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The kernels, if they can serve these tensors; else ``None``, with one warning where there are no kernels."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in _TYPES or not t.numel() or math.prod(t.shape[2:]) > _MOST or not _whole(t):
            return None
    library = _library()
    if isinstance(library, str):
        _warn(library)
        return None
    return library


def _whole(t: Tensor) -> bool:
    """Whether every pair is contiguous."""
    return t.is_contiguous() or t[0].is_contiguous()


def _array(t: Tensor | None) -> Any:
    """A tensor ``(B, C, *S)`` as the kernels take it."""
    if t is None:
        return None
    sizes = (c_int64 * 3)(*((1, *t.shape[2:]) if t.dim() == 4 else t.shape[2:]))
    return byref(_Array(t.data_ptr(), t.stride(0), sizes, t.shape[1], _TYPES[t.dtype]))


def _floats(values: Tensor | None) -> Tensor | None:
    """Numbers per pair or channel, in float32; whoever takes its address keeps it meanwhile."""
    return None if values is None else values.float().contiguous()


def _address(values: Tensor | None) -> c_void_p | None:
    return None if values is None else c_void_p(values.data_ptr())


@lru_cache(maxsize=256)
def _taps(sigma: tuple[float, ...]) -> tuple[Any, Any]:
    """Weights and radii of a Gaussian along three axes, the first of which is none in 2D."""
    taps = [reference.gaussian_taps(s) for s in ((0.0, *sigma) if len(sigma) == 2 else sigma)]
    rows = [(c_float * len(t))(*t) for t in taps]
    pointers = (POINTER(c_float) * 3)(*(ctypes.cast(r, POINTER(c_float)) for r in rows))
    return pointers, (c_int * 3)(*(len(t) - 1 for t in taps))


def _checked(status: int, name: str) -> None:
    if status:
        raise MemoryError(f"no memory for the intermediate results of {name}")


def _threads(volume: Tensor) -> int:
    """Threads for a kernel: waking one takes as long as some thousands of voxels."""
    return max(1, min(torch.get_num_threads(), volume.numel() // _PER_THREAD))


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that hands over to the reference of the same name where the C kernels cannot serve its arguments."""
    name = function.__name__
    plain, symbol = getattr(reference, name), _SYMBOLS.get(name, name)

    def call(*args: Any) -> Any:
        library = available(*(a for a in args if isinstance(a, Tensor) and a.dim() > 3 and a.dtype != torch.bool))
        return plain(*args) if library is None else function(getattr(library, symbol), *args)

    __all__.append(name)
    return call


@_kernel
def sample(
    run: Any,
    image: Tensor,
    ddf: Tensor | None,
    outer: Tensor | None,
    shift: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    shift, factor = _floats(shift), _floats(factor)
    given = _array(image), _array(ddf), _array(outer), _address(shift), _address(factor)
    _checked(run(*given, _array(out), c_int64(len(out)), out.dim() - 2, _threads(out)), "sample")


@_kernel
def compose(run: Any, outer: Tensor, inner: Tensor, out: Tensor) -> None:
    where = c_int64(len(out)), out.dim() - 2, _threads(out)
    _checked(run(_array(outer), _array(inner), _array(out), *where), "compose")


def _smoothed(
    run: Any, x: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor | None, out: Tensor
) -> None:
    """One function in C is both filters: without a weight, the smooth values themselves."""
    taps, radii = _taps(tuple(sigma))
    weight, push = _floats(weight), (c_float * len(bulk))(*bulk) if any(bulk) else None
    where = _array(out), c_int64(len(x)), _threads(x)
    _checked(run(_array(x), taps, radii, push, _address(weight), *where), "smooth")


@_kernel
def smooth(run: Any, x: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    _smoothed(run, x, sigma, (), None, out)


@_kernel
def elastic(
    run: Any, moved: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor, out: Tensor
) -> None:
    _smoothed(run, moved, sigma, bulk, weight, out)


def _compared(
    run: Any,
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    settings: tuple[Any, ...],
    out: Tensor,
) -> Tensor:
    """Call one of the similarities, which differ in their settings only."""
    shift, factor, loss = _floats(shift), _floats(factor), torch.empty(len(out), dtype=torch.float64)
    images = _array(warped), _array(fixed), _address(shift), _address(factor), _array(weight)
    _checked(run(*images, *settings, _array(out), _address(loss), c_int64(len(out)), _threads(out)), run.__name__)
    return loss.float()


@_kernel
def lncc(
    run: Any,
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    radius: int,
    sigma: float,
    epsilon: float,
    out: Tensor,
) -> Tensor:
    taps = (c_float * (radius + 1))(*reference.window_taps(radius, sigma)) if sigma else None
    return _compared(run, warped, fixed, shift, factor, weight, (radius, taps, c_float(epsilon)), out)


@_kernel
def mse(
    run: Any,
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
) -> Tensor:
    return _compared(run, warped, fixed, shift, factor, weight, (), out)


@_kernel
def ncc(
    run: Any,
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    out: Tensor,
) -> Tensor:
    return _compared(run, warped, fixed, shift, factor, weight, (c_double(epsilon),), out)


@_kernel
def mi(
    run: Any,
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    bins: int,
    out: Tensor,
) -> Tensor:
    return _compared(run, warped, fixed, shift, factor, weight, (bins,), out)


@_kernel
def gradient(run: Any, warped: Tensor, derivative: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    taps, radii = _taps(tuple(sigma))
    start, end = out.data_ptr(), out.data_ptr() + out.element_size() * out.stride(0) * len(out)
    shared = start <= warped.data_ptr() < end or start <= derivative.data_ptr() < end
    status = run(
        _array(warped), _array(derivative), taps, radii, _array(out), int(shared), c_int64(len(out)), _threads(out)
    )
    _checked(status, "gradient")


@_kernel
def step(
    run: Any,
    smooth: Tensor,
    residual: Tensor,
    unit: Sequence[float],
    radius: Tensor,
    damping: Tensor,
    warped: Tensor | None,
    derivative: Tensor | None,
    out: Tensor,
) -> Tensor:
    radius, damping = radius.float().contiguous(), damping.float().contiguous()
    expected = torch.full((len(out),), math.nan, dtype=torch.float64)
    n, pairs = out.dim() - 2, c_int64(len(out))
    fields = _array(smooth), _array(residual), (c_float * n)(*unit), _address(radius), _address(damping)
    images = _array(warped), _array(derivative)
    _checked(run(*fields, *images, _array(out), _address(expected), pairs, n, _threads(out)), "step")
    return expected.float()


def choose(chosen: Tensor, source: Tensor, out: Tensor) -> None:
    """A copy is what PyTorch has: no more than the chosen pairs are touched."""
    for pair in chosen.nonzero().flatten().tolist():
        out[pair].copy_(source[pair])


@_kernel
def image_sums(run: Any, image: Tensor) -> Tensor:
    out = torch.empty(*image.shape[:2], 5, dtype=torch.float64)
    _checked(run(_array(image), _address(out), c_int64(len(image)), _threads(image)), "image_sums")
    return out


@_kernel
def gradient_sums(run: Any, gradient: Tensor, unit: Sequence[float]) -> Tensor:
    out, n = torch.empty(len(gradient), 3, dtype=torch.float64), gradient.dim() - 2
    where = _address(out), c_int64(len(gradient)), n, _threads(gradient)
    _checked(run(_array(gradient), (c_float * n)(*unit), *where), "gradient_sums")
    return out


@_kernel
def unfolded(run: Any, ddf: Tensor, outer: Tensor | None, margin: float, out: Tensor | None) -> Tensor:
    count, n = torch.empty(len(ddf), dtype=torch.int64), ddf.dim() - 2
    where = _address(count), c_int64(len(ddf)), n, _threads(ddf)
    _checked(run(_array(ddf), _array(outer), c_float(margin), _address(out), *where), "unfolded")
    return count


@_kernel
def mend(run: Any, ddf: Tensor, outer: Tensor | None, folded: Tensor, sigma: float, margin: float) -> Tensor:
    out, n = torch.empty(len(ddf), 2, dtype=torch.int64), ddf.dim() - 2
    taps, radii = _taps((float(sigma),) * n)
    cells = _array(ddf), _array(outer), _address(folded), taps, radii, max(1, round(sigma)), c_float(margin)
    _checked(run(*cells, _address(out), c_int64(len(ddf)), n, _threads(ddf)), "mend")
    return out
