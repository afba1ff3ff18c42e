"""The contract of every kernel, and one implementation of it in plain PyTorch: any device, any floating point type.

Common to all of them: tensors are contiguous and on one device; images are ``(B, C, *S)``, fields ``(B, n, *S)`` in
voxels, 2D or 3D, every axis at least 2 voxels long; pairs of a batch do not see each other. Arithmetic is done in the
wide type of the arguments, float32 for half precision, and rounded where it is written. What is ``out`` is written, and
nothing else. Images and fields are continued by their edge values. A displacement that is NaN leads nowhere: it counts
as leading to the first voxel of its axis, so that no implementation reads outside, and the displacement that comes out
is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import product

import torch
from torch import Tensor

from monai_lm.kernels.devices import widest_float

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


# --- sampling


def sample(
    image: Tensor, ddf: Tensor | None, outer: Tensor | None, shift: Tensor | None, factor: Tensor | None, out: Tensor
) -> None:
    """Warp an image and shift and scale its intensities, ``out(x) = (image(φ(x)) - shift) · factor``, linearly.

    Args:
        image: ``(B, C, *M)``.
        ddf: ``(B, n, *S)``, ``φ = id + ddf``; ``None`` is zero.
        outer: ``(B, n, *P)``, applied after it, ``φ = (id + outer) ∘ (id + ddf)``; ``None`` is zero.
        shift: ``(B, C)``, ``None`` is zero.
        factor: ``(B, C)``, ``None`` is one.
        out: ``(B, C, *S)``.
    """
    dtype = _wide(image, out, *(t for t in (ddf, outer) if t is not None))
    field = out.new_zeros(out.shape[0], out.dim() - 2, *out.shape[2:], dtype=dtype) if ddf is None else ddf.to(dtype)
    if outer is not None:
        field = composed(outer, field)
    values = interpolate(image.to(dtype), positions(field))
    values = values if shift is None else values - over_voxels(shift, values)
    out.copy_(values if factor is None else values * over_voxels(factor, values))


def compose(outer: Tensor, inner: Tensor, out: Tensor) -> None:
    """Compose two fields, ``out(x) = inner(x) + outer(x + inner(x))``.

    Args:
        outer: ``(B, n, *M)``.
        inner: ``(B, n, *S)``.
        out: ``(B, n, *S)``; may be ``inner`` itself.
    """
    out.copy_(composed(outer, inner.to(_wide(outer, inner, out))))


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """:func:`compose`, returned and differentiable."""
    return inner + interpolate(outer.to(inner.dtype), positions(inner))


def positions(ddf: Tensor) -> list[Tensor]:
    """Where a field leads the voxels of its grid: ``n`` tensors ``(B, *S)``."""
    n = ddf.dim() - 2
    out = []
    for axis, size in enumerate(ddf.shape[2:]):
        voxels = torch.arange(size, device=ddf.device, dtype=ddf.dtype)
        out.append(ddf[:, axis] + voxels.view([1] + [-1 if a == axis else 1 for a in range(n)]))
    return out


def interpolate(image: Tensor, position: Sequence[Tensor]) -> Tensor:
    """Linear interpolation of an image continued by its edge values; differentiable, exact on voxels.

    Args:
        image: ``(B, C, *M)``, ``n`` axes.
        position: ``n`` tensors ``(B, …)``, voxels along every axis.

    Returns:
        ``(B, C, …)``.
    """
    sizes = image.shape[2:]
    flat = image.flatten(2)
    clamped = [p.nan_to_num(0.0).clamp(0, s - 1) for p, s in zip(position, sizes, strict=True)]
    lower = [p.detach().floor().clamp(max=s - 2) for p, s in zip(clamped, sizes, strict=True)]
    weight = [p - low for p, low in zip(clamped, lower, strict=True)]
    base, strides = flat_index(lower, sizes)
    out: Tensor | None = None
    for corner in product((0, 1), repeat=len(sizes)):
        index = base + sum(c * s for c, s in zip(corner, strides, strict=True))
        w = reduce(torch.mul, [wa if c else 1 - wa for c, wa in zip(corner, weight, strict=True)])
        term = take(flat, index) * w.unsqueeze(1)
        out = term if out is None else out + term
    assert out is not None  # for mypy
    return out


def flat_index(lower: Sequence[Tensor], sizes: torch.Size) -> tuple[Tensor, list[int]]:
    """Flat index of integer-valued positions in an array of ``sizes``, and the stride of each axis."""
    strides = [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]
    index = lower[-1].long()
    for position, stride in zip(lower[:-1], strides[:-1], strict=True):
        index = index + position.long() * stride
    return index, strides


def take(flat: Tensor, index: Tensor) -> Tensor:
    """Gather ``flat`` ``(B, C, N)`` at ``index`` ``(B, …)`` (or a batch-broadcast of it) for every channel."""
    batch, channels = flat.shape[:2]
    index = index.expand(batch, *index.shape[1:])
    picked = flat.gather(2, index.flatten(1).unsqueeze(1).expand(batch, channels, -1))
    return picked.reshape(batch, channels, *index.shape[1:])


# --- filters


@lru_cache
def gaussian_taps(sigma: float) -> tuple[float, ...]:
    """One-sided weights ``(w0, w1, …, wr)`` of a normalised sampled Gaussian, cut at three standard deviations.

    Args:
        sigma: standard deviation in voxels, ``>= 0``.

    Returns:
        ``r + 1`` weights with ``w0 + 2 * sum(w1…wr) == 1``; ``(1.0,)`` for ``sigma == 0``.
    """
    radius = math.ceil(3 * sigma) if sigma > 0 else 0
    taps = [math.exp(-0.5 * (k / sigma) ** 2) if k else 1.0 for k in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    return tuple(t / total for t in taps)


def smooth(x: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    """Gaussian filter of every channel, ``out = G x``, separable with the weights of :func:`gaussian_taps`.

    Args:
        x: ``(B, C, *S)``.
        sigma: standard deviation in voxels, one per axis.
        out: ``(B, C, *S)``, other memory than ``x``.
    """
    out.copy_(smoothed(x.to(_wide(x, out)), sigma))


def smoothed(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """:func:`smooth`, returned and differentiable."""
    for axis, s in enumerate(sigma):
        taps = gaussian_taps(s)
        if len(taps) > 1:
            dim, radius = axis + 2, len(taps) - 1
            ends = (x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1))
            reps = [radius if d == dim else 1 for d in range(x.dim())]
            x = _filtered(torch.cat([ends[0].repeat(reps), x, ends[1].repeat(reps)], dim), taps, dim)
    return x


def box_sum(x: Tensor, radius: int) -> Tensor:
    """Sum over cubic windows ``2 radius + 1`` wide, zero outside; separable, its own adjoint.

    Args:
        x: ``(B, C, *S)``.
        radius: half width in voxels.
    """
    return window_sum(x, (1.0,) * (radius + 1))


def window_taps(radius: int, sigma: float) -> tuple[float, ...]:
    """One-sided weights ``(1, w1, …, w_radius)`` of a window: those of a Gaussian, or ones for a ``sigma`` of 0."""
    return tuple(math.exp(-0.5 * (k / sigma) ** 2) if sigma else 1.0 for k in range(radius + 1))


def window_sum(x: Tensor, taps: Sequence[float]) -> Tensor:
    """Weighted sum over windows, zero outside; separable, its own adjoint.

    Args:
        x: ``(B, C, *S)``.
        taps: one-sided weights along every axis.
    """
    radius = len(taps) - 1
    for dim in range(2, x.dim()):
        zeros = torch.zeros_like(x.narrow(dim, 0, 1)).repeat([radius if d == dim else 1 for d in range(x.dim())])
        x = _filtered(torch.cat([zeros, x, zeros], dim), taps, dim)
    return x


def _filtered(padded: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Symmetric filter along one dimension that is padded by its radius on both sides."""
    radius = len(taps) - 1
    size = padded.shape[dim] - 2 * radius
    out = padded.narrow(dim, radius, size) * taps[0]
    for k, tap in enumerate(taps[1:], start=1):
        out = out + (padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)) * tap
    return out


def inverse_window_counts(x: Tensor, radius: int, sigma: float = 0.0) -> Tensor:
    """One over the number of voxels, or what they weigh, that each window has inside the image.

    Args:
        x: ``(B, C, *S)``; only its shape, device and dtype matter.
        radius: half width in voxels.
        sigma: of the weights, see :func:`window_taps`.

    Returns:
        ``(1, 1, *S)``; times :func:`window_sum` it gives window means.
    """
    n = x.dim() - 2
    out = x.new_ones(1)
    for axis, size in enumerate(x.shape[2:]):
        weight = window_sum(x.new_ones(1, 1, size), window_taps(radius, sigma))
        out = out / weight.view([1, 1] + [-1 if a == axis else 1 for a in range(n)])
    return out


# --- similarity: loss per pair, and its derivative with respect to the warped image


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
    """Local correlation, ``Σ_x 1 - A² / (B C)`` averaged over channels, with its derivative.

    In a window of ``2 radius + 1`` voxels, as much of it as lies in the image, ``A`` is the covariance of both images
    and ``B``, ``C`` their variances, not negative, plus ``epsilon``. With ``a = 2 A / (B C)``, ``b = a A / B``,
    ``sum`` a window's sum, in which voxels may count by a Gaussian, and ``N`` that of ones, the derivative is
    ``I sum(b/N) - J sum(a/N) + sum((a mean J - b mean I)/N)``.

    Args:
        warped: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``; what is compared is ``(fixed - shift) · factor``.
        shift: ``(B, C)``, ``None`` is zero.
        factor: ``(B, C)``, ``None`` is one.
        weight: ``(B, 1, *S)``, at least 0: voxels count so much in windows and in the sum; ``None`` is one.
        radius: half width of the window in voxels.
        sigma: standard deviation, in voxels, of the Gaussian by which its voxels count; 0: all alike.
        epsilon: added to both variances.
        out: ``(B, C, *S)``, the derivative.

    Returns:
        ``(B,)`` in the wide type.
    """
    dtype = _wide(warped, fixed, out)
    i, j = warped.to(dtype), ranged(fixed.to(dtype), shift, factor)
    w = None if weight is None else weight.to(dtype)
    taps = window_taps(radius, sigma)
    inverse = inverse_window_counts(i, radius, sigma) if w is None else _inverse(window_sum(w, taps))

    def mean(values: Tensor) -> Tensor:
        return window_sum(values if w is None else values * w, taps) * inverse

    mean_i, mean_j = mean(i), mean(j)
    var_i = (mean(i * i) - mean_i * mean_i).clamp(min=0) + epsilon
    var_j = (mean(j * j) - mean_j * mean_j).clamp(min=0) + epsilon
    covariance = mean(i * j) - mean_i * mean_j
    ratio = covariance / (var_i * var_j)
    loss, a = 1 - covariance * ratio, 2 * ratio * inverse
    if w is not None:
        loss, a = loss * w, a * w
    b = a * covariance / var_i
    derivative = i * window_sum(b, taps) - j * window_sum(a, taps) + window_sum(a * mean_j - b * mean_i, taps)
    out.copy_((derivative if w is None else derivative * w) / i.shape[1])
    return _summed(loss)


def _inverse(window_sums: Tensor) -> Tensor:
    """Inverse of a weight's window sums, zero where nothing in the window counts."""
    return torch.where(window_sums > 1e-6, 1 / window_sums.clamp(min=1e-6), torch.zeros_like(window_sums))


def mse(
    warped: Tensor, fixed: Tensor, shift: Tensor | None, factor: Tensor | None, weight: Tensor | None, out: Tensor
) -> Tensor:
    """Squared differences, ``Σ_x (I - J)²`` averaged over channels, with its derivative ``2 (I - J)``.

    Args:
        warped: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``, compared as for :func:`lncc`, and so are ``shift``, ``factor`` and ``weight``.
        shift: ``(B, C)`` or ``None``.
        factor: ``(B, C)`` or ``None``.
        weight: ``(B, 1, *S)`` or ``None``.
        out: ``(B, C, *S)``, the derivative.

    Returns:
        ``(B,)`` in the wide type.
    """
    dtype = _wide(warped, fixed, out)
    difference = warped.to(dtype) - ranged(fixed.to(dtype), shift, factor)
    weighted = difference if weight is None else difference * weight.to(dtype)
    out.copy_(2 * weighted / warped.shape[1])
    return _summed(weighted * difference)


def ncc(
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    epsilon: float,
    out: Tensor,
) -> Tensor:
    """Global correlation, ``W (1 - A² / (B C))`` averaged over channels, with its derivative.

    ``A`` is the (weighted) covariance of both images, ``B`` and ``C`` their variances plus ``epsilon``, ``W`` the sum
    of the weights; the derivative is ``2 A / (B C) (A / B (I - mean I) - (J - mean J))``, times the weight.

    Args:
        warped: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``, compared as for :func:`lncc`, and so are ``shift``, ``factor`` and ``weight``.
        shift: ``(B, C)`` or ``None``.
        factor: ``(B, C)`` or ``None``.
        weight: ``(B, 1, *S)`` or ``None``.
        epsilon: added to both variances.
        out: ``(B, C, *S)``, the derivative.

    Returns:
        ``(B,)`` in the wide type.
    """
    dtype = _wide(warped, fixed, out)
    i, j = warped.to(dtype), ranged(fixed.to(dtype), shift, factor)
    w = torch.ones_like(j[:, :1]) if weight is None else weight.to(dtype)
    axes = tuple(range(2, i.dim()))
    total = w.sum(axes, keepdim=True)

    def mean(values: Tensor) -> Tensor:
        return (values * w).sum(axes, keepdim=True) / total

    i, j = i - mean(i), j - mean(j)
    covariance, variance = mean(i * j), mean(i * i) + epsilon
    ratio = covariance / (variance * (mean(j * j) + epsilon))
    out.copy_(2 * ratio * (covariance / variance * i - j) * w / i.shape[1])
    return (total * (1 - covariance * ratio)).flatten(1).mean(1)


_SLAB = 2**18
"""Voxels that :func:`mi` looks at together."""

_RARE = 1e-14
"""Probabilities up to this count as zero in :func:`mi`, and information below 1e-10 as none."""

_BLUR = 0.86635
"""Entropy of the four weights of a cubic B-spline, at least: it is .8664 to .8676."""


def mi(
    warped: Tensor,
    fixed: Tensor,
    shift: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    bins: int,
    out: Tensor,
) -> Tensor:
    """Mutual information, ``W (1 - MI / M)`` averaged over channels, with its derivative.

    ``MI`` is that of a joint histogram of ``bins × bins``, ``M`` the most that it could be: the entropy of the warped
    image in it, less what the windows add. ``W`` is the sum of the weights. A voxel counts in four bins of the warped
    image ``I``, by a cubic B-spline ``β`` around ``1.5 + (bins - 4) I``, and in two of the fixed image ``J``, linearly
    around ``(bins - 1) J``. Intensities are meant to lie in [0, 1]: those of ``J`` beyond are clamped, and those of
    ``I`` half a bin later, where they have no derivative. NaN counts as the lowest.

    With ``p`` the histogram, of sum 1, ``p_i`` its marginal and ``T_ij = (log p_i - log p_ij - MI / M log p_i) / M``,
    the derivative is ``(bins - 4) Σ_ij β'_i(I) λ_j(J) T_ij``, times the weight. Where ``MI`` is zero, so is it.

    It goes through the images twice, slab by slab; what it keeps is ``(B, C, bins, bins)``.

    Args:
        warped: ``(B, C, *S)``.
        fixed: ``(B, C, *S)``, compared as for :func:`lncc`, and so are ``shift``, ``factor`` and ``weight``.
        shift: ``(B, C)`` or ``None``.
        factor: ``(B, C)`` or ``None``.
        weight: ``(B, 1, *S)`` or ``None``.
        bins: of each image, at least 5.
        out: ``(B, C, *S)``, the derivative.

    Returns:
        ``(B,)`` in the wide type.

    Source:
        Mattes et al., "PET-CT image registration in the chest using free-form deformations", IEEE Transactions on
        Medical Imaging 2003, but for the division by ``M``.
    """
    dtype, exact = _wide(warped, fixed, out), widest_float(warped.device)
    batch, channels = warped.shape[:2]
    rows = max(1, _SLAB // max(1, batch * channels * math.prod(warped.shape[3:])))
    slabs = [(first, min(rows, warped.shape[2] - first)) for first in range(0, warped.shape[2], rows)]
    table = (torch.arange(batch * channels, device=warped.device) * bins * bins).view(batch, channels, 1)

    def located(first: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """First cell of every voxel of a slab, how far in it, its weight, and where there is a derivative."""
        i = warped.narrow(2, first, count).to(dtype).flatten(2)
        j = ranged(fixed.narrow(2, first, count).to(dtype), shift, factor).flatten(2)
        w = None if weight is None else weight.narrow(2, first, count).to(dtype).flatten(2).to(exact)
        margin = 0.5 / (bins - 4)
        p = ((bins - 4) * i + 0.5).nan_to_num(0.0).clamp(0, bins - 3)
        q = ((bins - 1) * j).nan_to_num(0.0).clamp(0, bins - 1)
        cell, other = p.detach().long().clamp(max=bins - 4), q.detach().long().clamp(max=bins - 2)
        inside = (i >= -margin) & (i <= 1 + margin)
        return table + other * bins + cell, (p - cell).to(exact), (q - other).to(exact), w, inside

    joint = torch.zeros(batch * channels * bins * bins, dtype=exact, device=warped.device)
    for slab in slabs:
        cell, t, s, w, _ = located(*slab)
        for row, share in enumerate((1 - s, s)):
            share = share if w is None else share * w
            for column, part in enumerate(_cubic(t)):
                joint = joint.index_add(0, (cell + row * bins + column).flatten(), (share * part).flatten())

    loss, slope = information(joint.view(batch, channels, bins, bins))
    slope = slope.detach().flatten()
    for first, count in slabs:
        cell, t, s, w, inside = located(first, count)
        derivative = torch.zeros_like(t)
        for column, part in enumerate(_cubic_slope(t)):
            near, far = slope[cell + column], slope[cell + bins + column]
            derivative = derivative + part * (near + s * (far - near))
        derivative = torch.where(inside, derivative if w is None else derivative * w, 0.0)
        place = out.narrow(2, first, count)
        place.copy_(derivative.detach().view(place.shape))
    return loss.to(dtype)


def information(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of :func:`mi`, and what its derivative is made of.

    Args:
        joint: ``(B, C, bins, bins)``, weights that voxels have in the bins of the fixed and the warped image.

    Returns:
        Loss ``(B,)``, and ``(bins - 4) T / C``, ``(B, C, bins, bins)``.
    """
    channels, bins = joint.shape[1:3]
    total = joint.sum((2, 3))
    p = joint / total.clamp(min=torch.finfo(joint.dtype).tiny)[:, :, None, None]
    of_fixed, of_warped = p.sum(3, keepdim=True), p.sum(2, keepdim=True)
    log_warped = _log(of_warped)
    ratio = (_log(p) - log_warped).masked_fill(p <= _RARE, 0.0)
    shared = (p * (ratio - _log(of_fixed))).sum((2, 3))
    own = -(of_warped * log_warped).sum((2, 3)) - _BLUR
    inverse = (shared > 1e-10).to(own.dtype) / own
    known = shared * inverse
    slope = (ratio + known[..., None, None] * log_warped) * (inverse * ((4 - bins) / channels))[..., None, None]
    return (total * (1 - known)).mean(1), slope


def _cubic(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cubic B-spline at ``-1 - t``, ``-t``, ``1 - t`` and ``2 - t``, for ``t`` in [0, 1]."""
    u = 1 - t
    return u**3 / 6, (t * t * (3 * t - 6) + 4) / 6, (u * u * (3 * u - 6) + 4) / 6, t**3 / 6


def _cubic_slope(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of :func:`_cubic`."""
    u = 1 - t
    return -u * u / 2, t * (3 * t - 4) / 2, -u * (3 * u - 4) / 2, t * t / 2


def _log(p: Tensor) -> Tensor:
    """Logarithm of probabilities, zero of those that are none."""
    return p.masked_fill(p <= _RARE, 1.0).log()


def ranged(image: Tensor, shift: Tensor | None, factor: Tensor | None) -> Tensor:
    """``(image - shift) · factor`` with ``(B, C)`` of each; ``None`` leaves it out."""
    image = image if shift is None else image - over_voxels(shift, image)
    return image if factor is None else image * over_voxels(factor, image)


def over_voxels(values: Tensor, like: Tensor) -> Tensor:
    """``(B, C)`` or ``(B,)`` in the shape and type to go with ``(B, C, *S)``."""
    return values.to(like.dtype).reshape(*values.shape, *[1] * (like.dim() - values.dim()))


def _summed(values: Tensor) -> Tensor:
    """Sum over voxels, mean over channels, ``(B,)``."""
    return values.flatten(2).sum(2).mean(1)


# --- one step


def spatial_gradient(image: Tensor) -> list[Tensor]:
    """Central differences along every axis, one-sided at the edges: ``n`` tensors ``(B, C, *S)``, per voxel."""
    out = []
    for dim in range(2, image.dim()):
        size = image.shape[dim]
        first = image.narrow(dim, 1, 1) - image.narrow(dim, 0, 1)
        last = image.narrow(dim, size - 1, 1) - image.narrow(dim, size - 2, 1)
        inner = 0.5 * (image.narrow(dim, 2, size - 2) - image.narrow(dim, 0, size - 2))
        out.append(torch.cat([first, inner, last], dim))
    return out


def eulerian_gradient(derivative: Tensor, warped: Tensor) -> Tensor:
    """Gradient for compositional updates, ``g(x) = Σ_c dℓ/dI_c(x) ∇I_c(x)`` with ``I`` the warped image.

    Args:
        derivative: ``(B, C, *S)`` derivative of the loss with respect to the warped image.
        warped: ``(B, C, *S)``.

    Returns:
        ``(B, n, *S)``, loss per voxel of displacement.
    """
    return torch.stack([(derivative * slope).sum(1) for slope in spatial_gradient(warped)], 1)


def gradient(warped: Tensor, derivative: Tensor, sigma: Sequence[float], out: Tensor) -> None:
    """The gradient for compositional updates, smoothed: ``out = G Σ_c D_c ∇I_c``.

    Differences are central, one-sided at the edges.

    Args:
        warped: ``(B, C, *S)``.
        derivative: ``(B, C, *S)``.
        sigma: standard deviation of the Gaussian ``G`` in voxels, one per axis.
        out: ``(B, n, *S)``; with one channel and one pair, ``warped`` may be its first and ``derivative`` its second
            channel.
    """
    dtype = _wide(warped, derivative, out)
    out.copy_(smoothed(eulerian_gradient(derivative.to(dtype), warped.to(dtype)), sigma))


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
    """Factored Levenberg-Marquardt step, composed into the residual: ``out(x) = v(x) + r(x + v(x))``.

    ``v = -2 √λ s · m² g / (|m g|² + λ)`` with ``m`` the metric's unit, so ``|v / m|`` is nowhere longer than ``s``. It
    is zero in pairs whose ``λ`` is not positive, and where the gradient is not finite.

    Args:
        smooth: ``(B, n, *S)`` smoothed gradient ``g``.
        residual: ``(B, n, *S)``, ``r``.
        unit: ``m``, voxels per unit of the metric, one per axis.
        radius: ``(B,)``, ``s`` in the metric.
        damping: ``(B,)``, ``λ``.
        warped: ``(B, C, *S)`` with ``derivative`` ``(B, C, *S)``: what the decrease is expected from; or ``None``.
        derivative: see ``warped``.
        out: ``(B, n, *S)``; may be ``smooth`` itself.

    Returns:
        First-order decrease that the step promises, ``-Σ ⟨g', v⟩`` with ``g'`` not smoothed, ``(B,)``; NaN without
        ``warped``.
    """
    dtype = _wide(smooth, residual, out)
    v = in_units(lm_direction(in_units(smooth.to(dtype), unit), radius.to(dtype), damping.to(dtype)), unit)
    if warped is None or derivative is None:
        expected = torch.full_like(radius, float("nan"), dtype=dtype)
    else:
        expected = -(eulerian_gradient(derivative.to(dtype), warped.to(dtype)) * v).flatten(1).sum(1)
    out.copy_(composed(residual, v))
    return expected


def in_units(field: Tensor, unit: Sequence[float]) -> Tensor:
    """Every component of a field ``(B, n, *S)`` times its unit; no number is copied to the device."""
    return torch.stack([field[:, axis] * m for axis, m in enumerate(unit)], 1)


def lm_direction(gradient: Tensor, radius: Tensor, damping: Tensor) -> Tensor:
    """``-2 √λ s · g / (|g|² + λ)``, ``(B, n, *S)``, for ``(B,)`` of ``s`` and ``λ``; see :func:`step`."""
    s, lam = over_voxels(radius, gradient), over_voxels(damping, gradient)
    moves = lam > 0
    g = gradient / torch.where(moves, lam, torch.ones_like(lam)).sqrt()  # λ is 1 for it: no square leaves float32
    v = -2 * s * g / (g.square().sum(1, keepdim=True) + 1)
    return torch.where(moves, v, torch.zeros_like(v)).nan_to_num(0.0, 0.0, 0.0)


def elastic(moved: Tensor, sigma: Sequence[float], bulk: Sequence[float], weight: Tensor, out: Tensor) -> None:
    """Part of the way to a smooth field whose volume changes are smooth, too, ``out = r + α (G r - r + κ ∇ div r)``.

    Differences are central, one-sided at the edges. Pairs with a negative ``α`` keep what ``out`` has.

    Args:
        moved: ``(B, n, *S)``, ``r``.
        sigma: standard deviation of the Gaussian ``G`` in voxels, one per axis.
        bulk: ``κ`` along every axis, in squared voxels of it.
        weight: ``(B,)``, ``α``.
        out: ``(B, n, *S)``, other memory than ``moved``.
    """
    dtype = _wide(moved, out)
    r, alpha = moved.to(dtype), over_voxels(weight, moved).to(dtype)
    pull = smoothed(r, sigma) - r
    if any(bulk):
        pull = pull + bulk_push(r, bulk)
    out.copy_(torch.where(alpha >= 0, r + alpha * pull, out.to(dtype)))


def bulk_push(r: Tensor, bulk: Sequence[float]) -> Tensor:
    """``κ ∇ div r`` of a field ``(B, n, *S)``, ``κ`` one per axis."""
    divergence = reduce(torch.add, [spatial_gradient(r[:, a : a + 1])[a] for a in range(r.shape[1])])
    return torch.cat([k * slope for k, slope in zip(bulk, spatial_gradient(divergence), strict=True)], 1)


def choose(chosen: Tensor, source: Tensor, out: Tensor) -> None:
    """Copy the chosen pairs of a batch.

    Args:
        chosen: ``(B,)`` bool.
        source: ``(B, C, *S)``.
        out: ``(B, C, *S)`` of the same type, other memory.
    """
    torch.where(chosen.view(-1, *[1] * (out.dim() - 1)), source, out, out=out)


# --- sums over a volume


def image_sums(image: Tensor) -> Tensor:
    """What is told of an image's intensities, in the widest type: ``(B, C, 5)``.

    Minimum, maximum, sum, and of the differences ``d`` of neighbouring voxels along all axes ``Σ d²`` and ``Σ |d|``.

    Args:
        image: ``(B, C, *S)``.
    """
    exact = widest_float(image.device)
    flat = image.flatten(2)
    parts = [flat.amin(2).to(exact), flat.amax(2).to(exact), flat.sum(2, dtype=exact)]
    differences = [image.to(exact).diff(dim=dim).flatten(2) for dim in range(2, image.dim())]
    squares = torch.stack([d.square().sum(2) for d in differences]).sum(0)
    return torch.stack([*parts, squares, torch.stack([d.abs().sum(2) for d in differences]).sum(0)], 2)


def gradient_sums(gradient: Tensor, unit: Sequence[float]) -> Tensor:
    """What the damping starts from, in the widest type: largest ``|m g|``, ``Σ |m g|²`` and ``Σ |m g|``, ``(B, 3)``.

    Args:
        gradient: ``(B, n, *S)``.
        unit: ``m``, one per axis.
    """
    exact = widest_float(gradient.device)
    squared = in_units(gradient.to(exact), unit).square().sum(1).flatten(1)
    return torch.stack([squared.amax(1).sqrt(), squared.sum(1), squared.sqrt().sum(1)], 1)


# --- folds


def unfolded(ddf: Tensor, outer: Tensor | None, margin: float, out: Tensor | None) -> Tensor:
    """Look for folded cells of the map ``(id + outer) ∘ (id + ddf)``.

    Cell ``i`` along an axis lies between voxels ``i - 1`` and ``i``: there is a ring of cells around the grid. It is
    folded when one of its determinants (3D: of the eight corner and the two central tetrahedra; 2D: of the four
    corner triangles) is not above ``margin``; NaN is not.

    Args:
        ddf: ``(B, n, *S)``.
        outer: ``(B, n, *M)``; ``None`` is zero.
        margin: smallest determinant that still counts as folded.
        out: ``(B, *(S + 1))`` bool: the folded cells; or ``None``.

    Returns:
        How many there are, ``(B,)`` int64.
    """
    dtype = _wide(ddf)
    field = ddf.to(dtype)
    if outer is not None:
        field = composed(outer.to(dtype), field)
    folded = torch.zeros(ddf.shape[0], *(s + 1 for s in ddf.shape[2:]), dtype=torch.bool, device=ddf.device)
    for determinant in cell_determinants(field):
        folded |= ~(determinant > margin)
    if out is not None:
        out.copy_(folded)
    return torch.count_nonzero(folded.flatten(1), dim=1)


def mend(ddf: Tensor, outer: Tensor | None, folded: Tensor, sigma: float, margin: float) -> Tensor:
    """One round of repair, in place: smooth in and around folded cells, then look for what is folded still.

    ``ddf += w (G ddf - ddf)``; the weight ``w`` is 1 at the voxels of folded cells and goes to 0 within twice the
    reach, which is ``sigma``, rounded, at least 1: the mean, over windows that reach so far, of whether a voxel of a
    folded cell is as near.

    Args:
        ddf: ``(B, n, *S)``, overwritten.
        outer: ``(B, n, *M)``, as for :func:`unfolded`.
        folded: ``(B, *(S + 1))`` bool, as :func:`unfolded` found it; overwritten.
        sigma: standard deviation of the Gaussian ``G`` in voxels.
        margin: as for :func:`unfolded`.

    Returns:
        ``(B, 2)`` int64: folded cells that are left, and voxels that were smoothed.
    """
    dtype, reach = _wide(ddf), max(1, round(sigma))
    pool = torch.nn.functional.max_pool2d if ddf.shape[1] == 2 else torch.nn.functional.max_pool3d
    voxels = pool(folded.unsqueeze(1).to(dtype), 2, stride=1)
    near = (box_sum(voxels, reach) > 0.5).to(dtype)
    weight = torch.maximum(voxels, box_sum(near, reach) * inverse_window_counts(near, reach))
    field = ddf.to(dtype)
    change = weight * (smoothed(field, [sigma] * ddf.shape[1]) - field)
    ddf.copy_(torch.where(weight > 0, field + change, field))
    return torch.stack([unfolded(ddf, outer, margin, folded), (weight > 0).flatten(1).sum(1)], 1)


def cell_determinants(ddf: Tensor) -> list[Tensor]:
    """All determinants of every cell of a field, and of the ring around it, ``(B, *(S + 1))`` each."""
    n = ddf.shape[1]
    pads = [1, 1] * n
    padded = torch.nn.functional.pad(ddf, pads, mode="replicate")
    cells = [s - 1 for s in padded.shape[2:]]

    def at(component: Tensor, corner: tuple[int, ...]) -> Tensor:
        for axis, bit in enumerate(corner):
            if component.shape[1 + axis] != cells[axis]:
                component = component.narrow(1 + axis, bit, cells[axis])
        return component

    # edges[a][c]: component c of the map's difference along axis a, between neighbours
    edges = []
    for axis in range(n):
        difference = list(torch.diff(padded, dim=2 + axis).unbind(1))
        difference[axis] = difference[axis] + 1
        edges.append(difference)

    def edge(axis: int, corner: tuple[int, ...]) -> list[Tensor]:
        return [at(component, corner) for component in edges[axis]]

    out = [determinant([edge(axis, corner) for axis in range(n)]) for corner in product((0, 1), repeat=n)]
    for tetrahedron in _CENTRAL if n == 3 else ():
        columns = []
        for first, second in tetrahedron:
            columns.append([a + b for a, b in zip(edge(*first), edge(*second), strict=True)])
        out.append(0.5 * determinant(columns))
    return out


def determinant(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Determinant of the 2×2 or 3×3 matrix whose columns are lists of component tensors."""
    if len(columns) == 2:
        (a, b), (c, d) = columns
        return a * d - b * c
    (a0, a1, a2), (b0, b1, b2), (c0, c1, c2) = columns
    return a0 * (b1 * c2 - b2 * c1) + a1 * (b2 * c0 - b0 * c2) + a2 * (b0 * c1 - b1 * c0)


# The two central tetrahedra, {000, 011, 101, 110} and {111, 100, 010, 001}: each face diagonal from the first corner is
# the sum of two edges (axis, corner where the edge starts); the second one's overall sign is that of the first.
_CENTRAL = (
    (((1, (0, 0, 0)), (2, (0, 1, 0))), ((0, (0, 0, 0)), (2, (1, 0, 0))), ((0, (0, 0, 0)), (1, (1, 0, 0)))),
    (((1, (1, 0, 1)), (2, (1, 0, 0))), ((0, (0, 1, 1)), (2, (0, 1, 0))), ((0, (0, 1, 1)), (1, (0, 0, 1)))),
)


def _wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
