"""Inverting fields: for every voxel of another grid, the point that the field leads there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from monai_lm import kernels
from monai_lm.fields.algebra import lengths
from monai_lm.fields.finite import check_finite
from monai_lm.fields.sampling import sample_points
from monai_lm.kernels.devices import widest_float

__all__ = ["invert"]

_AT_A_TIME = 2**18
"""Voxels that are inverted together on a CPU: what they need stays in its cache."""

_TOGETHER = 24
"""Iterations of all voxels of a field together, before those that are left are taken one by one."""

_NEARLY_ALL = 0.995
"""Part of the voxels that is enough of them."""

_CONVERGED = 1e-4
"""Residual in voxels that is small enough, where numbers are not rounded more than that."""


def invert(
    ddf: Tensor, size: Sequence[int] | None = None, iterations: int = 100, grid: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Invert a field: ``x + ddf(x) = y`` is solved for ``x``, for every voxel ``y`` of the grid of the inverse.

    It starts from the inverse of the affine map ``M`` that is nearest to the field (least squares), so that a field may
    contain one, and goes on with ``x ← x - a M⁻¹ e``, ``e = x + ddf(x) - y``. The local relaxation ``a`` starts at 1
    and is halved where the residual grew. Where the grids are the same and ``M`` is near the identity, all voxels go
    ``x ← x - M⁻¹ e`` together first, up to 24 times, which is fast and leaves few. Voxels that have not converged after
    half of the iterations take Newton's steps, with the field's own derivative in the place of ``M``.

    Args:
        ddf: ``(B, n, *S)`` in voxels; it maps the fixed grid into the moving grid. Beyond its border it is continued by
            its border value, so that every voxel has a point that is led there.
        size: voxel counts of the moving grid, on which the inverse lives; default: the grid of ``ddf``.
        iterations: most iterations of a voxel; its iteration ends earlier when the residual is below ``1e-4`` voxel, or
            below what rounding leaves where that is more.
        grid: ``(4, 4)`` from voxels of the inverse to the voxels that ``ddf`` leads to, where they are others, such as
            :func:`monai_lm.fields.space.fixed_to_moving` of the two; default: they are the same.

    Returns:
        The inverse ``(B, n, *size)`` in voxels, and its residual ``|e|`` in voxels ``(B, *size)``: how far the composed
        map is from the identity. It stays large where the field folds, and beyond the border of a field that mirrors.

    Raises:
        ValueError: a field with NaN or infinite values.

    Source:
        Chen et al., "A simple fixed-point approach to invert a deformation field", Medical Physics 2008.
    """
    check_finite("ddf", ddf)
    size = tuple(ddf.shape[2:] if size is None else size)
    n = len(size)
    rows = [*range(n), 3]
    wide = widest_float(ddf.device)
    onto = None
    if grid is not None:
        onto = torch.from_numpy(np.asarray(grid, np.float64)[np.ix_(rows, rows)]).to(dtype=wide).to(ddf.device)
    inverse = ddf.new_zeros(ddf.shape[0], n, *size)
    residual = ddf.new_zeros(ddf.shape[0], *size)
    at_a_time = _AT_A_TIME * (64 if ddf.is_cuda else 1)
    thickness = max(1, at_a_time * size[0] // residual[0].numel())
    for pair in range(len(ddf)):
        nearest = _nearest_affine(ddf[pair])
        found, left = torch.zeros_like(residual[pair], dtype=torch.bool), iterations
        same = onto is None and size == tuple(ddf.shape[2:])
        if same and iterations > _TOGETHER and _linear_part(nearest[0]) < 0.5:
            found = _together(ddf[pair, None], nearest[0], inverse[pair, None], residual[pair])
            left -= _TOGETHER
        for first in range(0, size[0], thickness):  # voxels do not depend on one another
            slab = slice(first, first + thickness)
            voxels = (~found[slab]).nonzero()
            if not len(voxels):
                continue
            todo = (~found[slab]).flatten().nonzero()[:, 0] + first * residual[pair, 0].numel()
            voxels[:, 0] += first
            targets = voxels if onto is None else voxels.to(wide) @ onto[:n, :n].T + onto[:n, n]
            shift, missed = _inverted(ddf[pair, None], targets.to(ddf.dtype), nearest, left)
            if onto is not None:
                shift += (targets - voxels).to(ddf.dtype)
            inverse[pair].flatten(1)[:, todo] = shift.T
            residual[pair].flatten()[todo] = missed
    return inverse, residual


def _together(ddf: Tensor, back: Tensor, inverse: Tensor, residual: Tensor) -> Tensor:
    """Invert a field ``(1, n, *S)`` by ``x ← x - M⁻¹ e`` for all voxels together.

    Args:
        ddf: in voxels.
        back: ``M⁻¹``, ``(n, n)``.
        inverse: ``(1, n, *S)``, zero; gets what comes out.
        residual: ``(*S)``; gets its residual.

    Returns:
        Where that is small enough, ``(*S)`` bool.
    """
    ddf, error = ddf.contiguous(), torch.empty_like(inverse)
    goal = _goal(ddf.new_tensor(ddf.shape[2:]), ddf)
    found = torch.zeros_like(residual, dtype=torch.bool)
    for k in range(1, _TOGETHER + 1):
        kernels.sample(ddf, inverse, None, None, None, error)
        error.add_(inverse)
        if k % 6 == 0:
            residual.copy_(lengths(error)[0])
            found = residual < goal
            if k == _TOGETHER or float(found.float().mean()) > _NEARLY_ALL:
                break
        inverse[0].sub_((back @ error[0].flatten(1)).view_as(error[0]))
    return found


def _linear_part(back: Tensor) -> float:
    """How far an affine, of which this is the inverse ``(n, n)``, is from the identity, in the spectral norm."""
    linear = torch.linalg.inv(back) - torch.eye(len(back)).to(back)
    return float(torch.linalg.matrix_norm(linear.cpu().float(), 2))


def _nearest_affine(ddf: Tensor) -> tuple[Tensor, Tensor]:
    """The affine ``M x + t`` nearest to the map ``x + ddf(x)`` of a field ``(n, *S)``, as ``M⁻¹`` and ``-M⁻¹ t``."""
    n, size = len(ddf), ddf.shape[1:]
    linear, mean = torch.eye(n, dtype=torch.float64), ddf.flatten(1).mean(1).cpu().double()
    middle = linear.new_tensor([(s - 1) / 2 for s in size])
    for axis, length in enumerate(size):
        others = [1 + a for a in range(n) if a != axis]
        profile = ddf.mean(others).cpu().double()  # the axes of a grid are orthogonal: one by one they can be fitted
        position = torch.arange(length, dtype=torch.float64) - middle[axis]
        linear[:, axis] += profile @ position / position.square().sum().clamp(min=1)
    offset = middle + mean - linear @ middle
    stretch = torch.linalg.svdvals(linear)
    if float(stretch[-1]) < 0.1 * min(1.0, float(stretch[0])):  # a plane, all but: nothing to start from
        linear, offset = torch.eye(n, dtype=torch.float64), mean
    back = torch.linalg.inv(linear)
    return back.to(dtype=ddf.dtype).to(ddf.device), (-back @ offset).to(dtype=ddf.dtype).to(ddf.device)


def _inverted(ddf: Tensor, targets: Tensor, nearest: tuple[Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """The shift ``(N, n)`` from targets to the points that a field ``(1, n, *S)`` leads there, and the residual.

    Continued by its border value, a field with a large affine in it comes from beyond its border to where it comes from
    within, too. It is continued by that affine first then; what lies beyond the border goes on from there.
    """
    back, offset = nearest
    eye = torch.eye(len(back)).to(back)
    shift = targets @ (back - eye).T + offset
    linear = torch.linalg.inv(back) - eye
    if _linear_part(back) < 0.5:
        return _solved(ddf, targets, shift, back, None, iterations)
    beyond, _ = _solved(ddf, targets, shift, back, linear, iterations - iterations // 2)
    shift, norm = _solved(ddf, targets, beyond.clone(), back, None, iterations // 2)
    stuck = norm >= _goal(targets, shift)  # at the border, where a mirrored field, continued, turns back
    shift[stuck] = beyond[stuck]
    norm[stuck] = lengths(_error(ddf, targets[stuck], shift[stuck], None))
    return shift, norm


def _solved(
    ddf: Tensor, targets: Tensor, shift: Tensor, back: Tensor, beyond: Tensor | None, iterations: int
) -> tuple[Tensor, Tensor]:
    """Improve the shift of :func:`_inverted`, in place, step by step; see :func:`_error` for ``beyond``."""
    error = _error(ddf, targets, shift, beyond)
    norm = lengths(error)
    goal = _goal(targets, shift)
    for newton, count in ((False, iterations - iterations // 2), (True, iterations // 2)):
        relaxation = torch.ones_like(norm)
        for _ in range(count):
            left = ((norm >= goal) & (relaxation > 1e-3)).nonzero()[:, 0]  # few after some iterations
            if len(left) == 0:
                break
            there, now, missed = targets[left], shift[left], error[left]
            step = _newton(ddf, there, now, missed, beyond) if newton else missed @ back.T
            candidate = now - relaxation[left, None] * step
            new_error = _error(ddf, there, candidate, beyond)
            new_norm = lengths(new_error)
            better = new_norm < norm[left]
            kept = left[better]
            shift[kept], error[kept], norm[kept] = candidate[better], new_error[better], new_norm[better]
            relaxation[left] = torch.where(better, (relaxation[left] * 1.5).clamp(max=1.0), relaxation[left] * 0.5)
    return shift, norm


def _goal(targets: Tensor, shift: Tensor) -> float:
    """The residual that ends the iteration of a voxel: what is rounded does not get nearer."""
    farthest = max(float(targets.abs().max()), float(shift.abs().max()))
    return max(_CONVERGED, 4 * torch.finfo(shift.dtype).eps * farthest)


def _error(ddf: Tensor, targets: Tensor, shift: Tensor, beyond: Tensor | None) -> Tensor:
    """How far the points ``targets + shift`` ``(N, n)`` are led astray; ``beyond`` the border a field may be linear."""
    points = targets + shift
    error = shift + sample_points(ddf, points[None])[0]
    if beyond is not None:
        ends = torch.tensor(ddf.shape[2:]).to(points) - 1
        error += (points - torch.minimum(points.clamp(min=0), ends)) @ beyond.T
    return error


def _newton(ddf: Tensor, targets: Tensor, shift: Tensor, error: Tensor, beyond: Tensor | None) -> Tensor:
    """The step that takes away an error ``(N, n)`` if the field ``(1, n, *S)`` goes on as it does about the points."""
    eye = torch.eye(shift.shape[1]).to(shift)
    columns = []
    for axis in eye:  # a quarter of a voxel to either side: across the edges of cells
        ahead, behind = (_error(ddf, targets, shift + side * axis, beyond) for side in (0.25, -0.25))
        columns.append((ahead - behind) / 0.5)
    jacobian = torch.stack(columns, 2)
    transposed = jacobian.transpose(1, 2)
    damped = transposed @ jacobian + 1e-6 * eye  # where it folds, it is singular
    step: Tensor = torch.linalg.solve(damped, transposed @ error[:, :, None])[:, :, 0]
    return step
