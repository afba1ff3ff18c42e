"""The kernels on GPUs (CUDA and ROCm), written in Triton, behind the signatures of :mod:`monai_lm.kernels.reference`.

Importing this needs triton. ``V`` is one float32 volume; moved is what has to be read and written once: in 3D, float32,
one channel, no weight. A sum of partial results is a launch of PyTorch, of next to nothing.

=================  ========================================================  ==========================================
kernel             launches                                                  V moved
=================  ========================================================  ==========================================
``sample``         1                                                         5; 8 through a second field
``compose``        1                                                         9
``smooth``         1 an axis                                                 2 a channel and axis, 1 a channel kept
``elastic``        2; 3, and a few in PyTorch, for a radius above 6          13: 4 to 1 V that is kept, a divergence
``gradient``       2                                                         11: 5 to 3 V that are kept, 6 to smooth it
``step``           1, and a sum                                              11; 9 without what is expected
``lncc``           2, and a sum; a radius above 4: 9 and a sum               11: 5 to 3 V that are kept, 6 from them
``mse``            1, and a sum                                              3
``ncc``            2, and two sums                                           5
``mi``             2, a sum, and some 40 in PyTorch on tables of bins        5; up to ½ for ¼ V of parts that is kept
``choose``         1                                                         6; nothing for pairs that are not chosen
``unfolded``       1, and a sum; one more through a second field             3, 12 with 3 V kept; ¼ for the cells
``mend``           21, and ``unfolded``                                      54, with 3 V kept
``gradient_sums``  1, and some sums                                          3
``image_sums``     1, and some sums                                          1
=================  ========================================================  ==========================================

A program of a launch works on a tile of a plane. Filters march with it along the first axis; results that wait for
planes ahead stay in registers. Neighbours along the other axes are read again, from the nearest cache, and a thread has
several rows below each other, which share what is summed along the last axis.

Sizes are arguments at run time, so one compilation serves all shapes. Places within a volume have 32 bits (larger
volumes go to the reference), those of channels and pairs 64. A program writes its part of a sum to a place of its own,
and the parts are added in one order: results are the same each time. Nothing waits for the device.

What the kernels cannot serve, float64 above all, and mutual information of more than 64 bins, goes to the reference.
"""

# mypy: disallow-untyped-defs = False
# (Triton evaluates the annotations of kernels, and knows only its own types.)

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from monai_lm.kernels import reference

__all__ = [
    "choose",
    "compose",
    "elastic",
    "gradient",
    "gradient_sums",
    "image_sums",
    "lncc",
    "mend",
    "mi",
    "mse",
    "ncc",
    "sample",
    "smooth",
    "step",
    "unfolded",
]

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 2**31 - 2**21
"""Voxels of a volume: what an index in 32 bits reaches, less what a block may stand out over the end."""
_WIDEST_FILTER = 3
_WIDEST_WINDOW = 4
"""Radii that are compiled into a kernel; each is another compilation, and takes registers."""
_TILE = {"by": 1, "bz": 128}
_MARCH = {"groups": 2, "bz": 32}
"""On an H200, 160×192×224, tiles of 8×32 take sampling and composition 2 to 2.5 times as long, and marches of 4×32 with
four warps smoothing 1.5 to 2 times. Unrolled windows of LNCC save a fifth, and compile five times as long."""
_BLOCK = 512
_MOST_BINS = 64
"""A program has a whole joint histogram in registers."""
_HIP = torch.version.hip is not None
_PROGRAMS = 1024
"""About how many programs a launch that marches should have at least, to keep all of a GPU busy."""


def _kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with one compilation for all sizes and places in memory."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


# --- parts of kernels. Axes are x, y, z, the last one contiguous; 2D has nx = 1, its fields have no component along x


@triton.jit
def _nothing():
    """A tuple to add to; without a type for mypy."""
    return ()


@triton.jit
def _tile(nx, ny, nz, by: tl.constexpr, bz: tl.constexpr):
    """Pair, voxels of the tile of this program, which of them exist, and their places in a volume."""
    tiles_z = tl.cdiv(nz, bz)
    tiles_y = tl.cdiv(ny, by)
    rest = tl.program_id(0)
    z = (rest % tiles_z) * bz + tl.arange(0, bz)[None, :]
    rest = rest // tiles_z
    y = (rest % tiles_y) * by + tl.arange(0, by)[:, None]
    rest = rest // tiles_y
    x = rest % nx
    return (rest // nx).to(tl.int64), x, y, z, (y < ny) & (z < nz), (x * ny + y) * nz + z


@triton.jit
def _column(nx, ny, nz, chunk, rows: tl.constexpr, groups: tl.constexpr, bz: tl.constexpr):
    """For kernels that march: volume, first and last plane but one, first rows of the threads, and voxels along z."""
    tiles_z = tl.cdiv(nz, bz)
    tiles_y = tl.cdiv(ny, rows * groups)
    chunks = tl.cdiv(nx, chunk)
    rest = tl.program_id(0)
    z = (rest % tiles_z) * bz + tl.arange(0, bz)[None, :]
    rest = rest // tiles_z
    y = ((rest % tiles_y) * groups + tl.arange(0, groups)[:, None]) * rows
    rest = rest // tiles_y
    start = (rest % chunks) * chunk
    return (rest // chunks).to(tl.int64), start, tl.minimum(start + chunk, nx), y, z


@triton.jit
def _within(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _cell(position, size):
    """Lower neighbour of a position and the weight of the upper one; NaN leads to the first voxel."""
    position = tl.minimum(tl.where(position > 0.0, position, 0.0), (size - 1).to(tl.float32))
    lower = tl.minimum(tl.floor(position), (size - 2).to(tl.float32))
    return lower.to(tl.int32), position - lower


@triton.jit
def _corner(px, py, pz, nx, ny, nz, ndim: tl.constexpr):
    """Place of the first corner of the cells that positions lie in, and the weights of the upper neighbours."""
    iy, wy = _cell(py, ny)
    iz, wz = _cell(pz, nz)
    at = iy * nz + iz
    wx = wy
    if ndim == 3:
        ix, wx = _cell(px, nx)
        at += ix * (ny * nz)
    return at, wx, wy, wz


@triton.jit
def _along(image, wz, mask):
    lower = tl.load(image, mask, 0.0).to(tl.float32)
    upper = tl.load(image + 1, mask, 0.0).to(tl.float32)
    return lower * (1.0 - wz) + upper * wz


@triton.jit
def _between(image, at, wx, wy, wz, ny, nz, mask, ndim: tl.constexpr):
    """Linear interpolation of one channel."""
    p = image + at
    value = _along(p, wz, mask) * (1.0 - wy) + _along(p + nz, wz, mask) * wy
    if ndim == 3:
        p += ny * nz
        upper = _along(p, wz, mask) * (1.0 - wy) + _along(p + nz, wz, mask) * wy
        value = value * (1.0 - wx) + upper * wx
    return value


@triton.jit
def _vector(field, size, at, mask, ndim: tl.constexpr):
    last = field + (ndim - 1) * size
    uy = tl.load(last - size + at, mask, 0.0).to(tl.float32)
    uz = tl.load(last + at, mask, 0.0).to(tl.float32)
    ux = tl.zeros_like(uz)
    if ndim == 3:
        ux = tl.load(field + at, mask, 0.0).to(tl.float32)
    return ux, uy, uz


@triton.jit
def _store_vector(field, size, at, ux, uy, uz, mask, ndim: tl.constexpr):
    last = field + (ndim - 1) * size
    if ndim == 3:
        tl.store(field + at, ux, mask)
    tl.store(last - size + at, uy, mask)
    tl.store(last + at, uz, mask)


@triton.jit
def _through(field, mx, my, mz, x, y, z, ux, uy, uz, mask, ndim: tl.constexpr):
    """Displacements that lead on through another field: ``u + field(x + u)``."""
    at, wx, wy, wz = _corner(x + ux, y + uy, z + uz, mx, my, mz, ndim)
    size = (mx * my * mz).to(tl.int64)
    last = field + (ndim - 1) * size
    vx = ux
    if ndim == 3:
        vx = ux + _between(field, at, wx, wy, wz, my, mz, mask, ndim)
    vy = uy + _between(last - size, at, wx, wy, wz, my, mz, mask, ndim)
    vz = uz + _between(last, at, wx, wy, wz, my, mz, mask, ndim)
    return vx, vy, vz


@triton.jit
def _ranged(value, shift, factor, q):
    """``(value - shift) · factor`` of channel ``q`` of all pairs."""
    if shift is not None:
        value -= tl.load(shift + q)
    if factor is not None:
        value *= tl.load(factor + q)
    return value


@triton.jit
def _range(shift, factor, q):
    """Shift and factor of channel ``q`` of all pairs, for kernels that need them again and again."""
    first = 0.0
    times = 1.0
    if shift is not None:
        first = tl.load(shift + q)
    if factor is not None:
        times = tl.load(factor + q)
    return first, times


@triton.jit
def _difference(image, at, i, size, stride, mask):
    """Central difference along an axis, one-sided at its ends."""
    low = tl.maximum(i - 1, 0)
    high = tl.minimum(i + 1, size - 1)
    upper = tl.load(image + at + (high - i) * stride, mask, 0.0).to(tl.float32)
    lower = tl.load(image + at + (low - i) * stride, mask, 0.0).to(tl.float32)
    return (upper - lower) * tl.where(high - low == 2, 0.5, 1.0)


@triton.jit
def _eulerian(warped, derivative, channels, x, y, z, nx, ny, nz, at, mask, ndim: tl.constexpr):
    """``Σ_c D_c ∇I_c`` of one pair."""
    size = (nx * ny * nz).to(tl.int64)
    gy = tl.zeros(at.shape, tl.float32)
    gz = tl.zeros_like(gy)
    gx = tl.zeros_like(gy)
    for _ in range(channels):
        d = tl.load(derivative + at, mask, 0.0).to(tl.float32)
        if ndim == 3:
            gx += d * _difference(warped, at, x, nx, ny * nz, mask)
        gy += d * _difference(warped, at, y, ny, nz, mask)
        gz += d * _difference(warped, at, z, nz, 1, mask)
        warped += size
        derivative += size
    return gx, gy, gz


@triton.jit
def _chosen(numbers, k):
    """Number ``k`` of a tuple."""
    out = numbers[0]
    for n in tl.static_range(1, len(numbers)):
        out = tl.where(k == n, numbers[n], out)
    return out


@triton.jit
def _on_axis(x, y, z, nx, ny, nz, axis):
    """Position, size and stride along an axis that is known at run time."""
    i = tl.where(axis == 0, x, tl.where(axis == 1, y, z))
    size = tl.where(axis == 0, nx, tl.where(axis == 1, ny, nz))
    return i, size, tl.where(axis == 0, ny * nz, tl.where(axis == 1, nz, 1))


@triton.jit
def _zeros(count: tl.constexpr, groups: tl.constexpr, bz: tl.constexpr):
    out = _nothing()
    for _ in tl.static_range(count):
        out += (tl.zeros([groups, bz], tl.float32),)
    return out


@triton.jit
def _add_line(sums, line, k, taps, rows: tl.constexpr, radius: tl.constexpr):
    """Add line ``k`` to the sums of those rows whose windows it is in; row ``j`` is at line ``j + radius``.

    Without taps all lines of a window count alike. NaN reaches no further than the window.
    """
    out = _nothing()
    for j in tl.static_range(rows):
        inside = (k >= j) & (k <= j + 2 * radius)
        if taps is not None:
            tap = _chosen(taps, tl.abs(k - (j + radius)))
        for n in tl.static_range(len(line)):
            value = line[n]
            if taps is not None:
                value *= tap
            out += (sums[j * len(line) + n] + tl.where(inside, value, 0.0),)
    return out


@triton.jit
def _add_plane(sums, new, taps, count: tl.constexpr, radius: tl.constexpr):
    """Add a plane to the sums of the windows that it is in, the window that ends with it first.

    If planes waited instead, to be added when they are all there, LLVM would crash for some radii (Triton 3.9, when it
    vectorises 4 or 8 values that a loop hands on).
    """
    out = _nothing()
    for k in tl.static_range(2 * radius):
        for n in tl.static_range(count):
            value = new[n]
            if taps is not None:
                value *= taps[radius - k if k < radius else k - radius]
            out += (sums[k * count + n] + value,)
    for n in tl.static_range(count):
        value = new[n]
        if taps is not None:
            value *= taps[radius]
        out += (value,)
    return out


@triton.jit
def _voxels_of_window(i, size, radius):
    """How many voxels of a window around ``i`` lie inside."""
    return (tl.minimum(i + radius, size - 1) - tl.maximum(i - radius, 0) + 1).to(tl.float32)


@triton.jit
def _weight_of_window(i, size, radius, sigma, gaussian: tl.constexpr):
    """What the voxels of a window around ``i`` weigh that lie inside."""
    if gaussian:
        total = 0.0 * i.to(tl.float32)
        for k in range(-radius, radius + 1):
            t = k / sigma
            total += tl.where((i + k >= 0) & (i + k < size), tl.exp(-0.5 * t * t), 0.0)
    else:
        total = _voxels_of_window(i, size, radius)
    return total


@triton.jit
def _inside(i, size, taps, radius: tl.constexpr):
    """The same by taps; without any, every voxel weighs one."""
    if taps is None:
        total = _voxels_of_window(i, size, radius)
    else:
        total = taps[0] + 0.0 * i.to(tl.float32)
        for k in tl.static_range(1, radius + 1):
            total += tl.where(i >= k, taps[k], 0.0) + tl.where(i + k < size, taps[k], 0.0)
    return total


@triton.jit
def _correlation(si, sj, sii, sjj, sij, inverse, epsilon):
    """Loss, ``a``, ``b`` and ``c`` of :func:`lncc` from the sums over windows; NaN stays NaN."""
    mi = si * inverse
    mj = sj * inverse
    vi = sii * inverse - mi * mi
    vj = sjj * inverse - mj * mj
    vi = tl.where(vi < 0.0, 0.0, vi) + epsilon
    vj = tl.where(vj < 0.0, 0.0, vj) + epsilon
    covariance = sij * inverse - mi * mj
    ratio = covariance / (vi * vj)
    a = 2.0 * ratio * inverse
    b = a * covariance / vi
    return 1.0 - covariance * ratio, a, b, a * mj - b * mi


@triton.jit
def _inverse(total):
    """Inverse of a weight's window sums, zero where nothing in the window counts."""
    return tl.where(total > 1e-6, 1.0 / tl.maximum(total, 1e-6), 0.0)


# --- kernels: sampling


@_kernel
def _sample(
    image, image_pair: tl.int64, channels, mx, my, mz, ddf, ddf_pair: tl.int64, outer, outer_pair: tl.int64, ox, oy, oz,
    shift, factor, out, out_pair: tl.int64, nx, ny, nz, ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    ux = tl.zeros([by, bz], tl.float32)
    uy = tl.zeros([by, bz], tl.float32)
    uz = tl.zeros([by, bz], tl.float32)
    if ddf is not None:
        ux, uy, uz = _vector(ddf + pair * ddf_pair, size, at, mask, ndim)
    if outer is not None:
        ux, uy, uz = _through(outer + pair * outer_pair, ox, oy, oz, x, y, z, ux, uy, uz, mask, ndim)
    there, wx, wy, wz = _corner(x + ux, y + uy, z + uz, mx, my, mz, ndim)
    image += pair * image_pair
    out += pair * out_pair
    for c in range(channels):
        value = _between(image, there, wx, wy, wz, my, mz, mask, ndim)
        tl.store(out + at, _ranged(value, shift, factor, pair * channels + c), mask)
        image += (mx * my * mz).to(tl.int64)
        out += size


@_kernel
def _compose(
    outer, outer_pair: tl.int64, ox, oy, oz, inner, inner_pair: tl.int64, out, out_pair: tl.int64, nx, ny, nz,
    ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    ux, uy, uz = _vector(inner + pair * inner_pair, size, at, mask, ndim)
    ux, uy, uz = _through(outer + pair * outer_pair, ox, oy, oz, x, y, z, ux, uy, uz, mask, ndim)
    _store_vector(out + pair * out_pair, size, at, ux, uy, uz, mask, ndim)


# --- kernels: filters


@_kernel
def _smooth(
    image, image_pair: tl.int64, channels, bulk, divergence, weight, out, out_pair: tl.int64, nx, ny, nz, chunk, taps_x,
    taps_y, taps_z, rx: tl.constexpr, ry: tl.constexpr, rz: tl.constexpr, rows: tl.constexpr, groups: tl.constexpr,
    bz: tl.constexpr
):  # fmt: skip
    q, start, stop, y, z = _column(nx, ny, nz, chunk, rows, groups, bz)
    size = (nx * ny * nz).to(tl.int64)
    pair = q // channels
    channel = q % channels
    image += pair * image_pair + channel * size
    out += pair * out_pair + channel * size
    if divergence is not None:
        divergence += pair * size
        axis = channel + (3 - len(bulk))
        kappa = _chosen(bulk, channel)
    first = start - rx
    alpha = 1.0
    if weight is not None:
        alpha = tl.load(weight + pair)
        stop = tl.where(alpha >= 0.0, stop, first - rx)  # no plane at all of a pair that stays
    planes = _zeros(2 * rx * rows, groups, bz)
    x = first - rx
    for ahead in range(first, stop + rx):
        plane = image + _within(ahead, nx) * (ny * nz)
        new = _zeros(rows, groups, bz)
        for k in range(rows + 2 * ry):
            line = plane + _within(y + (k - ry), ny) * nz
            value = tl.load(line + _within(z, nz)).to(tl.float32) * taps_z[0]
            for dz in tl.static_range(1, rz + 1):
                low = tl.load(line + _within(z - dz, nz)).to(tl.float32)
                value += (low + tl.load(line + _within(z + dz, nz)).to(tl.float32)) * taps_z[dz]
            new = _add_line(new, (value,), k, taps_y, rows, ry)
        planes = _add_plane(planes, new, taps_x, rows, rx)
        window = planes[:rows]
        planes = planes[rows:]
        rows_end = tl.where(x >= start, ny, 0)  # none as long as sums are not whole
        for j in tl.static_range(rows):
            mask = (y + j < rows_end) & (z < nz)
            value = window[j]
            at = (x * ny + y + j) * nz + z
            if weight is not None:
                old = tl.load(image + at, mask, 0.0).to(tl.float32)
                value = old + alpha * (value - old)
            if divergence is not None:
                i, count, stride = _on_axis(x, y + j, z, nx, ny, nz, axis)
                value += alpha * kappa * _difference(divergence, at, i, count, stride, mask)
            tl.store(out + at, value, mask)
        x += 1


@_kernel
def _divergence(
    field, field_pair: tl.int64, out, nx, ny, nz, ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    last = field + pair * field_pair + (ndim - 1) * size
    value = _difference(last, at, z, nz, 1, mask) + _difference(last - size, at, y, ny, nz, mask)
    if ndim == 3:
        value += _difference(field + pair * field_pair, at, x, nx, ny * nz, mask)
    tl.store(out + pair * size + at, value, mask)


@_kernel
def _filter_axis(
    image, image_pair: tl.int64, channels, out, out_pair: tl.int64, nx, ny, nz, axis, radius, sigma, norm,
    gaussian: tl.constexpr, window: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    """One axis of a Gaussian filter, or of the sums over windows (zero outside), of any radius."""
    q, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    image += (q // channels) * image_pair + (q % channels) * size
    out += (q // channels) * out_pair + (q % channels) * size
    i, count, stride = _on_axis(x, y, z, nx, ny, nz, axis)
    total = tl.zeros([by, bz], tl.float32)
    for k in range(-radius, radius + 1):
        there = _within(i + k, count)
        value = tl.load(image + at + (there - i) * stride, mask, 0.0).to(tl.float32)
        if window:
            value = tl.where(there == i + k, value, 0.0)
        if gaussian:
            t = k / sigma
            value *= tl.exp(-0.5 * t * t) * norm
        total += value
    tl.store(out + at, total, mask)


# --- kernels: similarity


@_kernel
def _lncc(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, abc,
    losses, channels, nx, ny, nz, chunk, epsilon, taps, rx: tl.constexpr, r: tl.constexpr, rows: tl.constexpr,
    groups: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    sums: tl.constexpr = 5 if weight is None else 6
    q, start, stop, y, z = _column(nx, ny, nz, chunk, rows, groups, bz)
    size = (nx * ny * nz).to(tl.int64)
    pair = q // channels
    channel = q % channels
    warped += pair * warped_pair + channel * size
    fixed += pair * fixed_pair + channel * size
    if weight is not None:
        weight += pair * weight_pair
    abc += 3 * q * size
    first, times = _range(shift, factor, q)
    zero = tl.zeros([groups, bz], tl.float32)
    loss = zero
    planes = _zeros(2 * rx * rows * sums, groups, bz)
    x = start - 2 * rx
    for ahead in range(start - rx, stop + rx):
        inside = (ahead >= 0) & (ahead < nx)
        plane = ahead * (ny * nz)
        new = _zeros(rows * sums, groups, bz)
        for k in range(rows + 2 * r):
            row = y + (k - r)
            line = plane + row * nz
            in_row = inside & (row >= 0) & (row < ny)
            si, sj, sii, sjj, sij, sw = zero, zero, zero, zero, zero, zero
            for dz in tl.static_range(2 * r + 1):
                there = z + (dz - r)
                mask = in_row & (there >= 0) & (there < nz)
                i = tl.load(warped + line + there, mask, 0.0).to(tl.float32)
                j = tl.load(fixed + line + there, mask, 0.0).to(tl.float32)
                j = tl.where(mask, (j - first) * times, 0.0)
                wi, wj = i, j
                if weight is not None:
                    w = tl.load(weight + line + there, mask, 0.0).to(tl.float32)
                    if taps is not None:
                        w *= taps[r - dz if dz < r else dz - r]
                    wi, wj = i * w, j * w
                    sw += w
                elif taps is not None:
                    wi, wj = i * taps[r - dz if dz < r else dz - r], j * taps[r - dz if dz < r else dz - r]
                si += wi
                sj += wj
                sii += wi * i
                sjj += wj * j
                sij += wi * j
            if weight is None:
                new = _add_line(new, (si, sj, sii, sjj, sij), k, taps, rows, r)
            else:
                new = _add_line(new, (si, sj, sii, sjj, sij, sw), k, taps, rows, r)
        planes = _add_plane(planes, new, taps, rows * sums, rx)
        window = planes[: rows * sums]
        planes = planes[rows * sums :]
        rows_end = tl.where(x >= start, ny, 0)  # none as long as sums are not whole
        for j in tl.static_range(rows):
            mask = (y + j < rows_end) & (z < nz)
            at = (x * ny + y + j) * nz + z
            if weight is None:
                inverse = 1.0 / (_inside(x, nx, taps, rx) * _inside(y + j, ny, taps, r) * _inside(z, nz, taps, r))
            else:
                inverse = _inverse(window[j * sums + 5])
            here, a, b, c = _correlation(
                window[j * sums],
                window[j * sums + 1],
                window[j * sums + 2],
                window[j * sums + 3],
                window[j * sums + 4],
                inverse,
                epsilon,
            )
            if weight is not None:
                w = tl.load(weight + at, mask, 0.0).to(tl.float32)
                here, a, b, c = here * w, a * w, b * w, c * w
            loss += tl.where(mask, here, 0.0)
            tl.store(abc + at, a, mask)
            tl.store(abc + size + at, b, mask)
            tl.store(abc + 2 * size + at, c, mask)
        x += 1
    tl.store(losses + tl.program_id(0), tl.sum(loss) / channels)


@triton.jit
def _derived(warped, fixed, shift, factor, weight, q, at, mask, sa, sb, sc):
    """Derivative of :func:`lncc` from the window sums of ``a``, ``b`` and ``c``."""
    i = tl.load(warped + at, mask, 0.0).to(tl.float32)
    j = _ranged(tl.load(fixed + at, mask, 0.0).to(tl.float32), shift, factor, q)
    value = i * sb - j * sa + sc
    if weight is not None:
        value *= tl.load(weight + at, mask, 0.0).to(tl.float32)
    return value


@_kernel
def _lncc_derivative(
    abc, warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, out,
    out_pair: tl.int64, channels, nx, ny, nz, chunk, taps, rx: tl.constexpr, r: tl.constexpr, rows: tl.constexpr,
    groups: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    q, start, stop, y, z = _column(nx, ny, nz, chunk, rows, groups, bz)
    size = (nx * ny * nz).to(tl.int64)
    pair = q // channels
    channel = q % channels
    warped += pair * warped_pair + channel * size
    fixed += pair * fixed_pair + channel * size
    out += pair * out_pair + channel * size
    if weight is not None:
        weight += pair * weight_pair
    abc += 3 * q * size
    zero = tl.zeros([groups, bz], tl.float32)
    planes = _zeros(2 * rx * rows * 3, groups, bz)
    x = start - 2 * rx
    for ahead in range(start - rx, stop + rx):
        inside = (ahead >= 0) & (ahead < nx)
        plane = ahead * (ny * nz)
        new = _zeros(rows * 3, groups, bz)
        for k in range(rows + 2 * r):
            row = y + (k - r)
            line = plane + row * nz
            in_row = inside & (row >= 0) & (row < ny)
            sa, sb, sc = zero, zero, zero
            for dz in tl.static_range(2 * r + 1):
                there = z + (dz - r)
                mask = in_row & (there >= 0) & (there < nz)
                a = tl.load(abc + line + there, mask, 0.0)
                b = tl.load(abc + size + line + there, mask, 0.0)
                c = tl.load(abc + 2 * size + line + there, mask, 0.0)
                if taps is not None:
                    tap = taps[r - dz if dz < r else dz - r]
                    a, b, c = a * tap, b * tap, c * tap
                sa += a
                sb += b
                sc += c
            new = _add_line(new, (sa, sb, sc), k, taps, rows, r)
        planes = _add_plane(planes, new, taps, rows * 3, rx)
        window = planes[: rows * 3]
        planes = planes[rows * 3 :]
        rows_end = tl.where(x >= start, ny, 0)  # none as long as sums are not whole
        for j in tl.static_range(rows):
            mask = (y + j < rows_end) & (z < nz)
            at = (x * ny + y + j) * nz + z
            value = _derived(
                warped,
                fixed,
                shift,
                factor,
                weight,
                q,
                at,
                mask,
                window[j * 3],
                window[j * 3 + 1],
                window[j * 3 + 2],
            )
            tl.store(out + at, value / channels, mask)
        x += 1


@_kernel
def _products(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, out,
    channels, size, block: tl.constexpr
):  # fmt: skip
    """For windows of any radius: what is summed over them, each in a volume."""
    sums: tl.constexpr = 5 if weight is None else 6
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    i = tl.load(warped + pair * warped_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = tl.load(fixed + pair * fixed_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = _ranged(j, shift, factor, q)
    wi, wj = i, j
    out += sums * q * size
    if weight is not None:
        w = tl.load(weight + pair * weight_pair + at, mask, 0.0).to(tl.float32)
        wi, wj = i * w, j * w
        tl.store(out + 5 * size.to(tl.int64) + at, w, mask)
    size = size.to(tl.int64)
    tl.store(out + at, wi, mask)
    tl.store(out + size + at, wj, mask)
    tl.store(out + 2 * size + at, wi * i, mask)
    tl.store(out + 3 * size + at, wj * j, mask)
    tl.store(out + 4 * size + at, wi * j, mask)


@_kernel
def _correlate(
    sums, weight, weight_pair: tl.int64, abc, losses, channels, nx, ny, nz, rx, r, sigma, epsilon,
    gaussian: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    """For windows of any radius: ``a``, ``b`` and ``c`` from sums over them."""
    q, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    count: tl.constexpr = 5 if weight is None else 6
    sums += count * q * size + at
    if weight is None:
        inverse = 1.0 / (
            _weight_of_window(x, nx, rx, sigma, gaussian)
            * _weight_of_window(y, ny, r, sigma, gaussian)
            * _weight_of_window(z, nz, r, sigma, gaussian)
        )
    else:
        inverse = _inverse(tl.load(sums + 5 * size, mask, 0.0))
    loss, a, b, c = _correlation(
        tl.load(sums, mask, 0.0),
        tl.load(sums + size, mask, 0.0),
        tl.load(sums + 2 * size, mask, 0.0),
        tl.load(sums + 3 * size, mask, 0.0),
        tl.load(sums + 4 * size, mask, 0.0),
        inverse,
        epsilon,
    )
    if weight is not None:
        w = tl.load(weight + (q // channels) * weight_pair + at, mask, 0.0).to(tl.float32)
        loss, a, b, c = loss * w, a * w, b * w, c * w
    abc += 3 * q * size + at
    tl.store(abc, a, mask)
    tl.store(abc + size, b, mask)
    tl.store(abc + 2 * size, c, mask)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0)) / channels)


@_kernel
def _derive(
    abc, warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, out,
    out_pair: tl.int64, channels, size, block: tl.constexpr
):  # fmt: skip
    """For windows of any radius: the derivative from window sums of ``a``, ``b`` and ``c``."""
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    if weight is not None:
        weight += pair * weight_pair
    abc += 3 * q * size + at
    sa = tl.load(abc, mask, 0.0)
    sb = tl.load(abc + size, mask, 0.0)
    sc = tl.load(abc + 2 * size.to(tl.int64), mask, 0.0)
    warped += pair * warped_pair + channel * size
    fixed += pair * fixed_pair + channel * size
    value = _derived(warped, fixed, shift, factor, weight, q, at, mask, sa, sb, sc)
    tl.store(out + pair * out_pair + channel * size + at, value / channels, mask)


@_kernel
def _mse(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, out,
    out_pair: tl.int64, losses, channels, size, block: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    i = tl.load(warped + pair * warped_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = tl.load(fixed + pair * fixed_pair + channel * size + at, mask, 0.0).to(tl.float32)
    difference = tl.where(mask, i - _ranged(j, shift, factor, q), 0.0)
    weighted = difference
    if weight is not None:
        weighted *= tl.load(weight + pair * weight_pair + at, mask, 0.0).to(tl.float32)
    tl.store(out + pair * out_pair + channel * size + at, 2.0 * weighted / channels, mask)
    tl.store(losses + tl.program_id(0), tl.sum(weighted * difference) / channels)


@_kernel
def _moments(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, sums,
    channels, size, block: tl.constexpr
):  # fmt: skip
    """Weighted sums of 1, I, J, I², J² and I J, in float64, in which the variances keep their digits."""
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    i = tl.load(warped + pair * warped_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = tl.load(fixed + pair * fixed_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = tl.where(mask, _ranged(j, shift, factor, q), 0.0).to(tl.float64)
    i = i.to(tl.float64)
    if weight is not None:
        w = tl.load(weight + pair * weight_pair + at, mask, 0.0).to(tl.float64)
    else:
        w = mask.to(tl.float64)
    wi, wj = w * i, w * j
    sums += 6 * q * blocks + tl.program_id(0) % blocks
    tl.store(sums, tl.sum(w))
    tl.store(sums + blocks, tl.sum(wi))
    tl.store(sums + 2 * blocks, tl.sum(wj))
    tl.store(sums + 3 * blocks, tl.sum(wi * i))
    tl.store(sums + 4 * blocks, tl.sum(wj * j))
    tl.store(sums + 5 * blocks, tl.sum(wi * j))


@_kernel
def _ncc(
    sums, warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, out,
    out_pair: tl.int64, losses, channels, size, epsilon, block: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    sums += 6 * q
    total = tl.load(sums)
    mi = tl.load(sums + 1) / total
    mj = tl.load(sums + 2) / total
    vi = tl.load(sums + 3) / total - mi * mi
    vj = tl.load(sums + 4) / total - mj * mj
    covariance = tl.load(sums + 5) / total - mi * mj
    vi = tl.where(vi < 0.0, 0.0, vi) + epsilon
    vj = tl.where(vj < 0.0, 0.0, vj) + epsilon
    ratio = covariance / (vi * vj)
    if tl.program_id(0) % blocks == 0:
        tl.store(losses + q, total * (1.0 - covariance * ratio))
    scale = (2.0 * ratio / channels).to(tl.float32)
    slope = (covariance / vi).to(tl.float32)
    i = tl.load(warped + pair * warped_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = tl.load(fixed + pair * fixed_pair + channel * size + at, mask, 0.0).to(tl.float32)
    j = _ranged(j, shift, factor, q)
    value = scale * (slope * (i - mi.to(tl.float32)) - (j - mj.to(tl.float32)))
    if weight is not None:
        value *= tl.load(weight + pair * weight_pair + at, mask, 0.0).to(tl.float32)
    tl.store(out + pair * out_pair + channel * size + at, value, mask)


@triton.jit
def _binned(warped, fixed, shift, factor, q, at, mask, bins):
    """Intensities of the warped image, and for both images first bins, and how far beyond."""
    i = tl.load(warped + at, mask, 0.0).to(tl.float32)
    j = _ranged(tl.load(fixed + at, mask, 0.0).to(tl.float32), shift, factor, q)
    column, t = _cell((bins - 4) * i + 0.5, bins - 2)
    row, s = _cell((bins - 1) * j, bins)
    return i, column, t, row, s


@_kernel
def _joint_histogram(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, parts,
    channels, size, bins, chunk, width: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Of a chunk of voxels, as a product of matrices: what they share in bins of either image."""
    chunks = tl.cdiv(size, chunk)
    q = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * chunk
    pair = q // channels
    warped += pair * warped_pair + (q % channels) * size
    fixed += pair * fixed_pair + (q % channels) * size
    if weight is not None:
        weight += pair * weight_pair
    each = tl.arange(0, width)
    sums = tl.zeros([width, width], tl.float64)
    end = tl.minimum(start + chunk, size)
    for first in range(start, end, block):
        at = first + tl.arange(0, block)
        mask = at < end
        _, column, t, row, s = _binned(warped, fixed, shift, factor, q, at, mask, bins)
        w = mask.to(tl.float32)
        if weight is not None:
            w = tl.load(weight + at, mask, 0.0).to(tl.float32)
        linear = _chosen((0.0, (w - w * s)[None, :], (w * s)[None, :]), each[:, None] - row[None, :] + 1)
        b0, b1, b2, b3 = _cubic(t[:, None])
        cubic = _chosen((0.0, b0, b1, b2, b3), each[None, :] - column[:, None] + 1)
        sums += tl.dot(linear, cubic, input_precision="ieee").to(tl.float64)
    tl.store(parts + tl.program_id(0).to(tl.int64) * (width * width) + each[:, None] * width + each[None, :], sums)


@triton.jit
def _cubic(t):
    """See :func:`monai_lm.kernels.reference._cubic`."""
    u = 1.0 - t
    return (
        u * u * u / 6.0,
        (t * t * (3.0 * t - 6.0) + 4.0) / 6.0,
        (u * u * (3.0 * u - 6.0) + 4.0) / 6.0,
        t * t * t / 6.0,
    )


@triton.jit
def _cubic_slope(t):
    u = 1.0 - t
    return -0.5 * u * u, 0.5 * t * (3.0 * t - 4.0), -0.5 * u * (3.0 * u - 4.0), 0.5 * t * t


@_kernel
def _mi(
    warped, warped_pair: tl.int64, fixed, fixed_pair: tl.int64, shift, factor, weight, weight_pair: tl.int64, slope,
    out, out_pair: tl.int64, channels, size, bins, block: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, block)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < size
    pair = q // channels
    channel = q % channels
    warped += pair * warped_pair + channel * size
    fixed += pair * fixed_pair + channel * size
    i, column, t, row, s = _binned(warped, fixed, shift, factor, q, at, mask, bins)
    slope += q * bins * bins + row * bins + column
    parts = _cubic_slope(t)
    value = tl.zeros([block], tl.float32)
    for n in tl.static_range(4):
        near = tl.load(slope + n)
        value += parts[n] * (near + s * (tl.load(slope + bins + n) - near))
    margin = 0.5 / (bins - 4).to(tl.float32)
    value = tl.where((i >= -margin) & (i <= 1.0 + margin), value, 0.0)
    if weight is not None:
        value *= tl.load(weight + pair * weight_pair + at, mask, 0.0).to(tl.float32)
    tl.store(out + pair * out_pair + channel * size + at, value, mask)


# --- kernels: one step


@_kernel
def _gradient(
    warped, warped_pair: tl.int64, derivative, derivative_pair: tl.int64, channels, out, out_pair: tl.int64, nx, ny, nz,
    ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    warped += pair * warped_pair
    derivative += pair * derivative_pair
    gx, gy, gz = _eulerian(warped, derivative, channels, x, y, z, nx, ny, nz, at, mask, ndim)
    _store_vector(out + pair * out_pair, (nx * ny * nz).to(tl.int64), at, gx, gy, gz, mask, ndim)


@triton.jit
def _finite(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@_kernel
def _step(
    smooth, smooth_pair: tl.int64, residual, residual_pair: tl.int64, unit_x, unit_y, unit_z, radius, damping, warped,
    warped_pair: tl.int64, derivative, derivative_pair: tl.int64, channels, expected, out, out_pair: tl.int64, nx, ny,
    nz, ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    gx, gy, gz = _vector(smooth + pair * smooth_pair, size, at, mask, ndim)
    s = tl.load(radius + pair)
    lam = tl.load(damping + pair)
    moves = lam > 0.0
    root = tl.sqrt_rn(tl.where(moves, lam, 1.0))
    gx = gx * unit_x / root  # λ is 1 for it: no square leaves float32
    gy = gy * unit_y / root
    gz = gz * unit_z / root
    length = tl.where(moves, -2.0 * s, 0.0) / (gx * gx + gy * gy + gz * gz + 1.0)
    vx = _finite(length * gx) * unit_x
    vy = _finite(length * gy) * unit_y
    vz = _finite(length * gz) * unit_z
    if warped is not None:
        warped += pair * warped_pair
        derivative += pair * derivative_pair
        gx, gy, gz = _eulerian(warped, derivative, channels, x, y, z, nx, ny, nz, at, mask, ndim)
        tl.store(expected + tl.program_id(0), -tl.sum(tl.where(mask, gx * vx + gy * vy + gz * vz, 0.0)))
    ux, uy, uz = _through(residual + pair * residual_pair, nx, ny, nz, x, y, z, vx, vy, vz, mask, ndim)
    _store_vector(out + pair * out_pair, size, at, ux, uy, uz, mask, ndim)


@_kernel
def _choose(chosen, source, source_pair: tl.int64, out, out_pair: tl.int64, size: tl.int64, block: tl.constexpr):
    blocks = tl.cdiv(size, block)
    pair = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = at < tl.where(tl.load(chosen + pair) != 0, size, 0)  # nothing is read of the others
    tl.store(out + pair * out_pair + at, tl.load(source + pair * source_pair + at, mask, 0.0), mask)


# --- kernels: repair


@triton.jit
def _touched(folded, x, y, z, ny, nz, mask, ndim: tl.constexpr):
    """1 where one of the cells around a voxel is folded, else 0; cell ``i`` is before voxel ``i``."""
    wide = nz + 1
    cell = folded + (x * (ny + 1) + y).to(tl.int64) * wide + z
    any_of = tl.zeros(mask.shape, tl.int32)
    for b in tl.static_range(2):
        for c in tl.static_range(2):
            any_of |= tl.load(cell + b * wide + c, mask, 0).to(tl.int32)
            if ndim == 3:
                any_of |= tl.load(cell + ((ny + 1) * wide + b * wide + c), mask, 0).to(tl.int32)
    return tl.where(any_of != 0, 1.0, 0.0)


@_kernel
def _mark(
    folded, folded_pair: tl.int64, out, nx, ny, nz, ndim: tl.constexpr, by: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    """The voxels of folded cells."""
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    value = _touched(folded + pair * folded_pair, x, y, z, ny, nz, mask, ndim)
    tl.store(out + pair * (nx * ny * nz).to(tl.int64) + at, value, mask)


@_kernel
def _weigh(
    folded, folded_pair: tl.int64, sums, out, counts, nx, ny, nz, reach_x, reach, ndim: tl.constexpr, by: tl.constexpr,
    bz: tl.constexpr
):  # fmt: skip
    """How much of a voxel is smoothed: all of it in folded cells, else the mean over a window of what is near them."""
    pair, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    volume = pair * (nx * ny * nz).to(tl.int64)
    window = _voxels_of_window(x, nx, reach_x) * _voxels_of_window(y, ny, reach) * _voxels_of_window(z, nz, reach)
    mean = tl.load(sums + volume + at, mask, 0.0) / window
    value = tl.maximum(_touched(folded + pair * folded_pair, x, y, z, ny, nz, mask, ndim), mean)
    tl.store(out + volume + at, value, mask)
    tl.store(counts + tl.program_id(0), tl.sum((mask & (value > 0.0)).to(tl.int32)))


@_kernel
def _blend(
    field, field_pair: tl.int64, channel, weight, smooth, size, block: tl.constexpr
):  # fmt: skip
    """Bring one channel nearer to what is smooth, as much as the weight says, in place."""
    blocks = tl.cdiv(size, block)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    w = tl.load(weight + pair * size + at, at < size, 0.0)
    mask = w > 0.0
    field += pair * field_pair + channel * size.to(tl.int64) + at
    value = tl.load(field, mask, 0.0).to(tl.float32)
    tl.store(field, value + w * (tl.load(smooth + pair * size + at, mask, 0.0) - value), mask)


# --- kernels: sums over a volume


@triton.jit
def _with_nan(value, values):
    """NaN in place of an extremum of values with NaN among them."""
    return tl.where(tl.max((values != values).to(tl.int32)) > 0, float("nan"), value)


@_kernel
def _image_sums(image, image_pair: tl.int64, channels, sums, nx, ny, nz, by: tl.constexpr, bz: tl.constexpr):
    q, x, y, z, mask, at = _tile(nx, ny, nz, by, bz)
    size = (nx * ny * nz).to(tl.int64)
    image += (q // channels) * image_pair + (q % channels) * size + at
    value = tl.load(image, mask, 0.0).to(tl.float32)
    wide = value.to(tl.float64)
    next_z = mask & (z + 1 < nz)
    next_y = mask & (y + 1 < ny)
    next_x = mask & (x + 1 + tl.zeros_like(z) < nx)
    dz = tl.where(next_z, tl.load(image + 1, next_z, 0.0).to(tl.float64) - wide, 0.0)
    dy = tl.where(next_y, tl.load(image + nz, next_y, 0.0).to(tl.float64) - wide, 0.0)
    dx = tl.where(next_x, tl.load(image + ny * nz, next_x, 0.0).to(tl.float64) - wide, 0.0)
    tiles = tl.num_programs(0) // (tl.num_programs(0) // (nx * tl.cdiv(ny, by) * tl.cdiv(nz, bz)))
    sums += q * 5 * tiles + tl.program_id(0) % tiles
    tl.store(sums, _with_nan(tl.min(tl.where(mask, value, float("inf"))), value))
    tl.store(sums + tiles, _with_nan(tl.max(tl.where(mask, value, float("-inf"))), value))
    tl.store(sums + 2 * tiles, tl.sum(wide))
    tl.store(sums + 3 * tiles, tl.sum(dx * dx + dy * dy + dz * dz))
    tl.store(sums + 4 * tiles, tl.sum(tl.abs(dx) + tl.abs(dy) + tl.abs(dz)))


@_kernel
def _gradient_sums(
    gradient, gradient_pair: tl.int64, sums, unit_x, unit_y, unit_z, size, ndim: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(size, block)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    gx, gy, gz = _vector(gradient + pair * gradient_pair, size.to(tl.int64), at, at < size, ndim)
    gx = gx.to(tl.float64) * unit_x
    gy = gy.to(tl.float64) * unit_y
    gz = gz.to(tl.float64) * unit_z
    squared = gx * gx + gy * gy + gz * gz
    sums += pair * 3 * blocks + tl.program_id(0) % blocks
    tl.store(sums, _with_nan(tl.max(squared), squared))
    tl.store(sums + blocks, tl.sum(squared))
    tl.store(sums + 2 * blocks, tl.sum(tl.sqrt(squared)))


# --- kernels: folds


@triton.jit
def _corners(ddf, i, y, z, nx, ny, nz, mask, ndim: tl.constexpr):
    """Displacements of the four corners of cells in a plane, ``(y, z)`` = 00, 01, 10, 11."""
    x = _within(i, nx)
    size = (nx * ny * nz).to(tl.int64)
    out = _nothing()
    for corner in tl.static_range(4):
        cy = _within(y - 1 + corner // 2, ny)
        cz = _within(z - 1 + corner % 2, nz)
        out += _vector(ddf, size, (x * ny + cy) * nz + cz, mask, ndim)
    return out


@triton.jit
def _edge(upper, lower, b: tl.constexpr, a: tl.constexpr, axis: tl.constexpr):
    """The map's difference between corner ``b`` of one plane and corner ``a`` of one plane, ``axis`` apart."""
    ex = upper[3 * b] - lower[3 * a]
    ey = upper[3 * b + 1] - lower[3 * a + 1]
    ez = upper[3 * b + 2] - lower[3 * a + 2]
    if axis == 0:
        ex += 1.0
    elif axis == 1:
        ey += 1.0
    else:
        ez += 1.0
    return ex, ey, ez


@triton.jit
def _determinant(a, b, c):
    return a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])


@triton.jit
def _add(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def _is_folded(low, high, margin):
    """Whether one of the ten determinants is not above the margin, NaN included."""
    x00, x01 = _edge(high, low, 0, 0, 0), _edge(high, low, 1, 1, 0)
    x10, x11 = _edge(high, low, 2, 2, 0), _edge(high, low, 3, 3, 0)
    y00, y01 = _edge(low, low, 2, 0, 1), _edge(low, low, 3, 1, 1)
    y10, y11 = _edge(high, high, 2, 0, 1), _edge(high, high, 3, 1, 1)
    z00, z01 = _edge(low, low, 1, 0, 2), _edge(low, low, 3, 2, 2)
    z10, z11 = _edge(high, high, 1, 0, 2), _edge(high, high, 3, 2, 2)
    # x edges by (y, z), y edges by (x, z), z edges by (x, y)
    ok = _determinant(x00, y00, z00) > margin
    ok &= _determinant(x01, y01, z00) > margin
    ok &= _determinant(x10, y00, z01) > margin
    ok &= _determinant(x11, y01, z01) > margin
    ok &= _determinant(x00, y10, z10) > margin
    ok &= _determinant(x01, y11, z10) > margin
    ok &= _determinant(x10, y10, z11) > margin
    ok &= _determinant(x11, y11, z11) > margin
    ok &= 0.5 * _determinant(_add(y00, z01), _add(x00, z10), _add(x00, y10)) > margin
    ok &= 0.5 * _determinant(_add(y11, z10), _add(x11, z01), _add(x11, y01)) > margin
    return ok == 0


@triton.jit
def _is_folded_2d(corners, margin):
    y0, y1 = _edge(corners, corners, 2, 0, 1), _edge(corners, corners, 3, 1, 1)
    z0, z1 = _edge(corners, corners, 1, 0, 2), _edge(corners, corners, 3, 2, 2)
    ok = y0[1] * z0[2] - y0[2] * z0[1] > margin
    ok &= y1[1] * z0[2] - y1[2] * z0[1] > margin
    ok &= y0[1] * z1[2] - y0[2] * z1[1] > margin
    ok &= y1[1] * z1[2] - y1[2] * z1[1] > margin
    return ok == 0


@_kernel
def _unfolded(
    ddf, ddf_pair: tl.int64, margin, out, out_pair: tl.int64, counts, nx, ny, nz, cells_x, chunk, ndim: tl.constexpr,
    groups: tl.constexpr, bz: tl.constexpr
):  # fmt: skip
    pair, start, stop, y, z = _column(cells_x, ny + 1, nz + 1, chunk, 1, groups, bz)
    mask = (y <= ny) & (z <= nz)
    ddf += pair * ddf_pair
    if out is not None:
        out += pair * out_pair
    count = tl.zeros([groups, bz], tl.int32)
    low = _corners(ddf, start - 1, y, z, nx, ny, nz, mask, ndim)
    for x in range(start, stop):
        if ndim == 3:
            high = _corners(ddf, x, y, z, nx, ny, nz, mask, ndim)
            folded = _is_folded(low, high, margin) & mask
            low = high
        else:
            folded = _is_folded_2d(low, margin) & mask
        count += folded.to(tl.int32)
        if out is not None:
            tl.store(out + (x * (ny + 1) + y).to(tl.int64) * (nz + 1) + z, folded.to(tl.uint8), mask)
    tl.store(counts + tl.program_id(0), tl.sum(count))


# --- launches


def _served(*tensors: Tensor | None) -> bool:
    """Whether the kernels can serve these images and fields."""
    return all(
        t is None
        or (
            t.dtype in _TYPES
            and t.numel() > 0
            and t.dim() in (4, 5)
            and math.prod(t.shape[2:]) <= _MOST
            and (t.is_contiguous() or t[0].is_contiguous())
        )
        for t in tensors
    )


def _sizes(t: Tensor) -> tuple[int, int, int]:
    """Sizes along x, y, z of ``(B, C, *S)``."""
    return (1, t.shape[2], t.shape[3]) if t.dim() == 4 else (t.shape[2], t.shape[3], t.shape[4])


def _units(unit: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, (1.0, *unit) if len(unit) == 2 else unit))


def _pair(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor and the stride of its pairs."""
    return t, 0 if t is None else t.stride(0)


def _field(t: Tensor | None) -> tuple[Any, ...]:
    """A field with the stride of its pairs and its sizes."""
    return (*_pair(t), *((2, 2, 2) if t is None else _sizes(t)))


def _floats(values: Tensor | None) -> Tensor | None:
    """Numbers per pair or channel, in float32."""
    return None if values is None else values.float().contiguous()


def _on(t: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _run(kernel: Any, programs: int, out: Tensor, *args: Any, num_warps: int = 4, **compiled: Any) -> None:
    with _on(out):
        kernel[(programs,)](*args, **compiled, num_warps=num_warps, enable_fp_fusion=True)


def _tiles(sizes: Sequence[int]) -> int:
    return sizes[0] * -(-sizes[1] // _TILE["by"]) * -(-sizes[2] // _TILE["bz"])


def _march(sizes: Sequence[int], volumes: int, rows: int) -> tuple[int, int]:
    """Planes that a program marches over, and programs per volume; the same for the same shape on every GPU."""
    tiles = -(-sizes[1] // (rows * _MARCH["groups"])) * -(-sizes[2] // _MARCH["bz"])
    parts = min(-(-_PROGRAMS // (tiles * volumes)), -(-sizes[0] // 4))
    chunk = -(-sizes[0] // parts)
    return chunk, tiles * -(-sizes[0] // chunk)


def _blocks(t: Tensor) -> tuple[int, int]:
    """Voxels of a volume and blocks of them."""
    size = math.prod(t.shape[2:])
    return size, -(-size // _BLOCK)


def sample(
    image: Tensor, ddf: Tensor | None, outer: Tensor | None, shift: Tensor | None, factor: Tensor | None, out: Tensor
) -> None:
    """See :func:`monai_lm.kernels.reference.sample`."""
    if not _served(image, ddf, outer, out):
        reference.sample(image, ddf, outer, shift, factor, out)
        return
    sizes = _sizes(out)
    given = *_pair(image), image.shape[1], *_sizes(image), *_pair(ddf), *_field(outer), _floats(shift), _floats(factor)
    _run(_sample, len(out) * _tiles(sizes), out, *given, *_pair(out), *sizes, ndim=out.dim() - 2, **_TILE)


def compose(outer: Tensor, inner: Tensor, out: Tensor) -> None:
    """See :func:`monai_lm.kernels.reference.compose`."""
    if not _served(outer, inner, out):
        reference.compose(outer, inner, out)
        return
    sizes = _sizes(out)
    given = *_field(outer), *_pair(inner), *_pair(out), *sizes
    _run(_compose, len(out) * _tiles(sizes), out, *given, ndim=out.dim() - 2, **_TILE)


def smooth(x: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    """See :func:`monai_lm.kernels.reference.smooth`; no iteration calls it, so one compilation serves all widths."""
    if _served(x, out):
        _filter_axes(x, sigma, out, torch.empty(out.shape, dtype=torch.float32, device=out.device))
    else:
        reference.smooth(x, sigma, out)


def elastic(moved: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor, out: Tensor) -> None:
    """See :func:`monai_lm.kernels.reference.elastic`."""
    if _served(moved, out):
        _smoothed(moved, sigma, bulk, weight, out)
    else:
        reference.elastic(moved, sigma, bulk, weight, out)


def _smoothed(x: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor | None, out: Tensor) -> None:
    taps = [reference.gaussian_taps(float(s)) for s in ((0.0, *sigma) if len(sigma) == 2 else sigma)]
    radii = [len(t) - 1 for t in taps]
    if max(radii) > _WIDEST_FILTER:
        _smoothed_widely(x, sigma, bulk, weight, out)
        return
    sizes, rows = _sizes(out), 4
    chunk, programs = _march(sizes, out.shape[0] * out.shape[1], rows)
    push: tuple[Any, ...] = (None, None)
    if any(bulk):
        push = tuple(map(float, bulk)), torch.empty(len(out), *sizes, dtype=torch.float32, device=out.device)
        _run(_divergence, len(out) * _tiles(sizes), out, *_pair(x), push[1], *sizes, ndim=out.dim() - 2, **_TILE)
    given = *_pair(x), x.shape[1], *push, _floats(weight), *_pair(out), *sizes, chunk, *taps
    programs *= out.shape[0] * out.shape[1]
    window = dict(zip(("rx", "ry", "rz"), radii, strict=True))
    _run(_smooth, programs, out, *given, **window, rows=rows, **_MARCH, num_warps=1)


def _smoothed_widely(
    x: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor | None, out: Tensor
) -> None:
    """Filters of any radius, one axis after the other."""
    last = out if weight is None else torch.empty_like(x, dtype=torch.float32)
    _filter_axes(x, sigma, last, torch.empty_like(last, dtype=torch.float32))
    if weight is not None:
        r, alpha = x.float(), reference.over_voxels(weight, x).float()
        pull = last - r + reference.bulk_push(r, bulk) if any(bulk) else last - r
        out.copy_(torch.where(alpha >= 0, r + alpha * pull, out.float()))


def _filter_axes(x: Tensor, sigma: Sequence[float], out: Tensor, spare: Tensor) -> None:
    """A Gaussian filter of any radius, one axis after the other, which end in ``out``."""
    taps = [(axis, float(s), reference.gaussian_taps(float(s))) for axis, s in enumerate(sigma, 3 - len(sigma))]
    passes = [(axis, len(t) - 1, s, t[0]) for axis, s, t in taps if len(t) > 1]
    if not passes:
        out.copy_(x)
    for k, given in enumerate(passes):
        target = out if (len(passes) - k) % 2 else spare
        _filter(x, target, *given)
        x = target


def _filter(
    x: Tensor, out: Tensor, axis: int, radius: int, sigma: float, norm: float = 1.0, window: bool = False
) -> None:
    """One axis (of three) of a Gaussian filter, or of a window sum, of every channel."""
    sizes = _sizes(out)
    given = *_pair(x), x.shape[1], *_pair(out), *sizes, axis, radius, sigma or 1.0, norm
    programs = out.shape[0] * out.shape[1] * _tiles(sizes)
    _run(_filter_axis, programs, out, *given, gaussian=sigma > 0, window=window, **_TILE)


def _window(buffers: list[Tensor], radius: int, sigma: float) -> list[Tensor]:
    """Window sums of the first of two buffers; what is first on return has them."""
    for axis in range(3 if _sizes(buffers[0])[0] > 1 else 2):
        _filter(buffers[0], buffers[1], 2 - axis, radius, sigma, window=True)
        buffers = buffers[::-1]
    return buffers


def lncc(
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
    """See :func:`monai_lm.kernels.reference.lncc`."""
    if not _served(warped, fixed, weight, out):
        return reference.lncc(warped, fixed, shift, factor, weight, radius, sigma, epsilon, out)
    if radius > _WIDEST_WINDOW:
        return _lncc_widely(warped, fixed, shift, factor, weight, radius, sigma, epsilon, out)
    sizes, channels, volumes = _sizes(out), out.shape[1], out.shape[0] * out.shape[1]
    images = *_pair(warped), *_pair(fixed), _floats(shift), _floats(factor), *_pair(weight)
    flat = sizes[0] == 1
    abc = torch.empty(volumes, 3, *sizes, dtype=torch.float32, device=out.device)
    window = {"rx": 0 if flat else radius, "r": radius}
    # the more planes and sums of them are kept, the fewer rows there are registers for
    rows = 2 if flat or radius < 4 - _HIP else 1
    march = {**window, "rows": rows, **_MARCH, "num_warps": 2}
    chunk, programs = _march(sizes, volumes, rows)
    losses = torch.empty(len(out), channels * programs, dtype=torch.float32, device=out.device)
    taps = reference.window_taps(radius, sigma) if sigma else None
    sums = *images, abc, losses, channels, *sizes, chunk, float(epsilon), taps
    _run(_lncc, volumes * programs, out, *sums, **march)
    given = abc, *images, *_pair(out), channels, *sizes, chunk, taps
    _run(_lncc_derivative, volumes * programs, out, *given, **march)
    return losses.sum(1)


def _lncc_widely(
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
    """Windows of any radius, one axis after the other; takes ten volumes a channel, twelve with a weight."""
    sizes, channels, volumes = _sizes(out), out.shape[1], out.shape[0] * out.shape[1]
    images = *_pair(warped), *_pair(fixed), _floats(shift), _floats(factor), *_pair(weight)
    size, blocks = _blocks(out)
    shape = (volumes, 5 if weight is None else 6, *sizes)
    spare = [torch.empty(shape, dtype=torch.float32, device=out.device) for _ in range(2)]

    _run(_products, volumes * blocks, out, *images, spare[0], channels, size, block=_BLOCK)
    sums, rest = _window(spare, radius, sigma)
    tiles = _tiles(sizes)
    abc = [t.flatten()[: volumes * 3 * size].view(volumes, 3, *sizes) for t in (rest, sums)]
    losses = torch.empty(len(out), channels * tiles, dtype=torch.float32, device=out.device)
    given = sums, *_pair(weight), abc[0], losses, channels, *sizes, 0 if sizes[0] == 1 else radius, radius
    _run(_correlate, volumes * tiles, out, *given, sigma or 1.0, float(epsilon), gaussian=sigma > 0, **_TILE)
    abc = _window(abc, radius, sigma)
    _run(_derive, volumes * blocks, out, abc[0], *images, *_pair(out), channels, size, block=_BLOCK)
    return losses.sum(1)


def mse(
    warped: Tensor, fixed: Tensor, shift: Tensor | None, factor: Tensor | None, weight: Tensor | None, out: Tensor
) -> Tensor:
    """See :func:`monai_lm.kernels.reference.mse`."""
    if not _served(warped, fixed, weight, out):
        return reference.mse(warped, fixed, shift, factor, weight, out)
    size, blocks = _blocks(out)
    images = *_pair(warped), *_pair(fixed), _floats(shift), _floats(factor), *_pair(weight)
    losses = torch.empty(len(out), out.shape[1] * blocks, dtype=torch.float32, device=out.device)
    _run(_mse, losses.numel(), out, *images, *_pair(out), losses, out.shape[1], size, block=_BLOCK)
    return losses.sum(1)


def ncc(
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    out: Tensor,
) -> Tensor:
    """See :func:`monai_lm.kernels.reference.ncc`."""
    if not _served(warped, fixed, weight, out):
        return reference.ncc(warped, fixed, shift, factor, weight, epsilon, out)
    (size, blocks), volumes, channels = _blocks(out), out.shape[0] * out.shape[1], out.shape[1]
    images = *_pair(warped), *_pair(fixed), _floats(shift), _floats(factor), *_pair(weight)
    parts = torch.empty(volumes, 6, blocks, dtype=torch.float64, device=out.device)
    _run(_moments, volumes * blocks, out, *images, parts, channels, size, block=_BLOCK)
    losses = torch.empty(len(out), channels, dtype=torch.float32, device=out.device)
    given = parts.sum(2), *images, *_pair(out), losses, channels, size, float(epsilon)
    _run(_ncc, volumes * blocks, out, *given, block=_BLOCK)
    return losses.mean(1)


def mi(
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    bins: int,
    out: Tensor,
) -> Tensor:
    """See :func:`monai_lm.kernels.reference.mi`."""
    if not _served(warped, fixed, weight, out) or bins > _MOST_BINS:
        return reference.mi(warped, fixed, shift, factor, weight, bins, out)
    (size, blocks), (batch, channels) = _blocks(out), out.shape[:2]
    images = *_pair(warped), *_pair(fixed), _floats(shift), _floats(factor), *_pair(weight)
    width = max(16, triton.next_power_of_2(bins))
    block = 64 if width < 64 else 32  # there are no registers for more
    chunk = max(8 * width * width, -(-size // _PROGRAMS))  # its histogram takes a quarter of its image
    parts = torch.empty(batch, channels, -(-size // chunk), width, width, dtype=torch.float64, device=out.device)
    programs = batch * channels * parts.shape[2]
    sums = *images, parts, channels, size, bins, chunk
    _run(_joint_histogram, programs, out, *sums, width=width, block=block)
    loss, slope = reference.information(parts[..., :bins, :bins].sum(2))
    given = *images, _floats(slope), *_pair(out), channels, size, bins
    _run(_mi, batch * channels * blocks, out, *given, block=_BLOCK)
    return loss.float()


def gradient(warped: Tensor, derivative: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    """See :func:`monai_lm.kernels.reference.gradient`."""
    if not _served(warped, derivative, out):
        reference.gradient(warped, derivative, sigma, out)
        return
    sizes = _sizes(out)
    sharp = torch.empty(out.shape, dtype=torch.float32, device=out.device)  # `out` may hold what is still to be read
    given = *_pair(warped), *_pair(derivative), warped.shape[1], *_pair(sharp), *sizes
    _run(_gradient, len(out) * _tiles(sizes), out, *given, ndim=out.dim() - 2, **_TILE)
    _smoothed(sharp, sigma, (), None, out)


def step(
    smooth: Tensor,
    residual: Tensor,
    unit: Sequence[float],
    radius: Tensor,
    damping: Tensor,
    warped: Tensor | None,
    derivative: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See :func:`monai_lm.kernels.reference.step`."""
    if not _served(smooth, residual, warped, derivative, out):
        return reference.step(smooth, residual, unit, radius, damping, warped, derivative, out)
    if warped is None or derivative is None:
        warped = derivative = None
    sizes, channels = _sizes(out), 0 if warped is None else warped.shape[1]
    tiles = _tiles(sizes)
    parts = torch.empty(len(out), tiles, dtype=torch.float32, device=out.device)
    control = *_units(unit), _floats(radius), _floats(damping)
    given = *_pair(smooth), *_pair(residual), *control, *_pair(warped), *_pair(derivative), channels, parts
    _run(_step, len(out) * tiles, out, *given, *_pair(out), *sizes, ndim=out.dim() - 2, **_TILE)
    return parts.new_full((len(out),), math.nan) if warped is None else parts.sum(1)


def image_sums(image: Tensor) -> Tensor:
    """See :func:`monai_lm.kernels.reference.image_sums`."""
    if not _served(image):
        return reference.image_sums(image)
    sizes = _sizes(image)
    tiles = _tiles(sizes)
    parts = torch.empty(*image.shape[:2], 5, tiles, dtype=torch.float64, device=image.device)
    programs = image.shape[0] * image.shape[1] * tiles
    _run(_image_sums, programs, image, *_pair(image), image.shape[1], parts, *sizes, **_TILE)
    extrema = parts[:, :, :1].amin(3), parts[:, :, 1:2].amax(3)
    return torch.cat([*extrema, parts[:, :, 2:].sum(3)], 2)


def gradient_sums(gradient: Tensor, unit: Sequence[float]) -> Tensor:
    """See :func:`monai_lm.kernels.reference.gradient_sums`."""
    if not _served(gradient):
        return reference.gradient_sums(gradient, unit)
    size, blocks = _blocks(gradient)
    parts = torch.empty(len(gradient), 3, blocks, dtype=torch.float64, device=gradient.device)
    given = *_pair(gradient), parts, *_units(unit), size
    _run(_gradient_sums, len(gradient) * blocks, gradient, *given, ndim=gradient.dim() - 2, block=_BLOCK)
    return torch.cat([parts[:, :1].amax(2).sqrt(), parts[:, 1:].sum(2)], 1)


def unfolded(ddf: Tensor, outer: Tensor | None, margin: float, out: Tensor | None) -> Tensor:
    """See :func:`monai_lm.kernels.reference.unfolded`."""
    if not _served(ddf, outer) or not (out is None or out[0].is_contiguous()):
        return reference.unfolded(ddf, outer, margin, out)
    if outer is not None:  # in a launch of its own: a cell has eight corners
        composed = torch.empty(ddf.shape, dtype=torch.float32, device=ddf.device)
        compose(outer, ddf, composed)
        ddf = composed
    sizes, ndim = _sizes(ddf), ddf.dim() - 2
    cells = (sizes[0] + 1 if ndim == 3 else 1, sizes[1] + 1, sizes[2] + 1)
    chunk, programs = _march(cells, len(ddf), 1)
    counts = torch.empty(len(ddf), programs, dtype=torch.int32, device=ddf.device)
    mask = _pair(None if out is None else out.view(torch.uint8))
    given = *_pair(ddf), float(margin), *mask, counts, *sizes, cells[0], chunk
    _run(_unfolded, len(ddf) * programs, ddf, *given, ndim=ndim, **_MARCH, num_warps=2)
    return counts.sum(1)


def choose(chosen: Tensor, source: Tensor, out: Tensor) -> None:
    """See :func:`monai_lm.kernels.reference.choose`."""
    if not _served(source, out):
        reference.choose(chosen, source, out)
        return
    size = out[0].numel()
    given = chosen.to(torch.uint8), *_pair(source), *_pair(out), size
    _run(_choose, len(out) * -(-size // _BLOCK), out, *given, block=_BLOCK)


def mend(ddf: Tensor, outer: Tensor | None, folded: Tensor, sigma: float, margin: float) -> Tensor:
    """See :func:`monai_lm.kernels.reference.mend`; takes three volumes."""
    if not _served(ddf, outer) or not folded[0].is_contiguous():
        return reference.mend(ddf, outer, folded, sigma, margin)
    sizes, ndim, reach = _sizes(ddf), ddf.dim() - 2, max(1, round(sigma))
    tiles, (size, blocks) = len(ddf) * _tiles(sizes), _blocks(ddf)
    spare = [ddf.new_empty(len(ddf), 1, *ddf.shape[2:], dtype=torch.float32) for _ in range(3)]
    cells = _pair(folded.view(torch.uint8))
    _run(_mark, tiles, ddf, *cells, spare[0], *sizes, ndim=ndim, **_TILE)
    near, rest = _window(spare[:2], reach, 0.0)
    sums, weight = _window([near.gt_(0.5), rest], reach, 0.0)
    counts = torch.empty(len(ddf), _tiles(sizes), dtype=torch.int32, device=ddf.device)
    flat = sizes[0] == 1
    given = *cells, sums, weight, counts, *sizes, 0 if flat else reach, reach
    _run(_weigh, tiles, ddf, *given, ndim=ndim, **_TILE)
    for channel in range(ndim):
        _filter_axes(ddf[:, channel : channel + 1], [sigma] * ndim, sums, spare[2])
        _run(_blend, len(ddf) * blocks, ddf, *_pair(ddf), channel, weight, sums, size, block=_BLOCK)
    return torch.stack([unfolded(ddf, outer, margin, folded), counts.sum(1)], 1)
