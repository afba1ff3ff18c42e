"""Linear alignment of two images as they were acquired, coarse to fine, by Levenberg–Marquardt.

Every voxel gives a slope, the derivative of the measure times the gradient of the warped image, as in
:func:`monai_lm.refine`; here it is chained to the 3 to 12 parameters of the map. Their matrix is the sum of the slopes'
squares, which is right but for a factor: that one is learned from the loss along each step, which is kept only if the
loss falls. Parameters are float64, on the host; images stay on their device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_lm.alignment.result import Alignment
from monai_lm.alignment.view import Look, View, levels_of
from monai_lm.fields.space import Grid, check_affine, out_of_plane
from monai_lm.similarity import Similarity, get_similarity
from monai_lm.similarity.outliers import without_outliers
from monai_lm.similarity.weighted import Weighted, shown, with_moving_weight, with_weight
from monai_lm.solver.checks import check_shown, checked_mask, plain

__all__ = ["MODES", "align"]

MODES = ("auto", "center", "rigid", "affine")
"""What may be asked for."""

_START = 30.0  # degrees, of the rotations to start from beside none
_KEPT = 3  # starts that go on
_BRIEF, _ITERATIONS = 6, 40
_TOLERANCE = 0.005  # of the level's voxel: shorter steps end it
_WORTH = 0.005  # part of the dissimilarity that a map of more parameters must take away, in the mode auto
_APART = 0.25  # of the finest level's voxel, that it must lead away from those of fewer, in the mode auto
_JUDGED = 2**17  # voxels of the level that an affine map is judged on, at most
_PER_PARAMETER = 50  # voxels that must count for each of its parameters
_TOGETHER = 0.15
"""How far apart two halves of the fixed image may lead what it shows, as a part of its reach. Validation: .13 at most
on hippocampi, brains, hearts and abdomens, .18 at least on ultrasound and MR of prostates, where starts are better."""

_TELLS = 0.4
"""Part of the dissimilarity that a rigid map may leave to be taken without asking halves; of such prostates .63 is left
or more (an affine map can leave .28 of what is wrong)."""


def align(
    fixed: Tensor,
    moving: Tensor,
    fixed_affine: Any,
    moving_affine: Any,
    mode: str = "auto",
    *,
    similarity: str | Similarity | nn.Module = "mi",
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
) -> Alignment:
    """Find where the moving image lies to the fixed one: by a shift, a rigid or an affine map in physical space.

    The grids may differ in size, spacing, orientation and field of view. It starts from where the headers put the
    images, from their middles on each other, and from what they show on each other, each turned by 30 degrees about
    every axis and not, and follows the best.

    Args:
        fixed: ``(1, C, *S)`` image, 2D or 3D.
        moving: ``(1, C, *M)`` image, on the same device.
        fixed_affine: ``(4, 4)`` voxel-to-RAS affine of the fixed image; in 2D ``(3, 3)`` will do.
        moving_affine: that of the moving image.
        mode: ``"center"`` shifts only, the middle of the images or of what they show onto each other; ``"rigid"``
            turns, too; ``"affine"`` has all linear maps; what makes the images no more alike is not taken, nor an
            affine map unless one that is fitted to one half of the voxels makes the other half more alike, too, and
            50 voxels or more count for each of its parameters. Neither is taken where two halves of the fixed image
            find rigid maps that lie apart, unless the rigid one takes most of the dissimilarity: the images stay where
            their headers put them.
            ``"auto"``: the simplest that reaches the best but for half a percent, or but for a quarter of a voxel.
        similarity: as in :func:`monai_lm.refine`.
        mask: ``(1, 1, *S)``, weights in [0, 1]: voxels of the fixed image that are compared.
        moving_mask: ``(1, 1, *M)``, the same for the moving image.

    Returns:
        The map from points of the fixed to points of the moving image, and what it is worth. It is the ``initial`` of
        :mod:`monai_lm.fields.space`, whose ``resample_moving`` brings the moving image onto the fixed grid.

    Raises:
        TypeError: images that are no tensors, or a similarity that is none.
        ValueError: an unknown mode, images, masks or affines that cannot be used or do not fit each other.
    """
    started = time.perf_counter()
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    measure = get_similarity(similarity).unaligned
    images, weights = _checked(fixed, moving, mask, moving_mask)
    grids: Any = tuple(
        Grid(tuple(image.shape[2:]), check_affine(name, affine, image.dim() == 4))
        for image, name, affine in zip(
            images, ("fixed_affine", "moving_affine"), (fixed_affine, moving_affine), strict=True
        )
    )
    if images[0].dim() == 4 and any(out_of_plane(grid.affine) for grid in grids):
        raise ValueError(
            "fixed_affine and moving_affine must lie in a plane of x and y for images in 2D, got\n"
            f"{grids[0].affine}\nand\n{grids[1].affine}"
        )
    if measure.weighable:  # so that what lies outside the moving image does not count, and halves can be told apart
        ones = [torch.ones_like(image[:, :1]) for image in images]
        weights = ones[0] if weights[0] is None else weights[0], ones[1] if weights[1] is None else weights[1]
    if weights != (None, None):
        measure = Weighted(measure, weights[0] is not None, weights[1] is not None)
    images = (
        images[0] if weights[0] is None else with_weight(images[0], weights[0]),
        images[1] if weights[1] is None else with_moving_weight(images[1], weights[1]),
    )
    with torch.no_grad(), torch.autocast(images[0].device.type, enabled=False):
        return _found(images, grids, measure, mode, started)


def _checked(
    fixed: Tensor, moving: Tensor, mask: Tensor | None, moving_mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Both images, and both masks, in float32."""
    f, m = plain("fixed", fixed), plain("moving", moving)
    for name, image in (("fixed", f), ("moving", m)):
        if image.dim() not in (4, 5) or image.shape[0] != 1 or image.shape[1] < 1 or min(image.shape[2:]) < 2:
            raise ValueError(
                f"{name} must be one image (1, C, *S) in 2D or 3D with at least 2 voxels along every axis, a single "
                f"slice without the axis across it, got shape {tuple(image.shape)}"
            )
    if f.dim() != m.dim() or f.shape[1] != m.shape[1] or f.device != m.device:
        raise ValueError(
            "fixed and moving must have as many axes and channels, on one device, got shapes "
            f"{tuple(f.shape)} on {f.device} and {tuple(m.shape)} on {m.device}"
        )
    given = {"mask": mask, "moving_mask": moving_mask}
    weights: list[Tensor | None] = []
    seen = []
    for (name, own), of, image in zip(given.items(), ("fixed", "moving"), (f, m), strict=True):
        weight = None if own is None else checked_mask(own, image, name, of)
        check_shown(of, image, weight)
        weights.append(weight)
        seen.append(image if weight is None else _seen(image, weight))
    f, m = without_outliers(*seen)
    return (f, m), (weights[0], weights[1])


def _seen(image: Tensor, weight: Tensor) -> Tensor:
    """An image as :func:`monai_lm.refine` sees it, with three voxels beside the mask; no darker, no brighter there."""
    counts = (weight > 0) & torch.isfinite(image).all(1, keepdim=True)
    counted = image[0][:, counts[0, 0]]
    ends = (end.view(1, -1, *[1] * (image.dim() - 2)) for end in (counted.amin(1), counted.amax(1)))
    return shown(image, weight).clamp(*ends)


def _found(
    images: tuple[Tensor, Tensor], grids: tuple[Grid, Grid], measure: Similarity, mode: str, started: float
) -> Alignment:
    levels = levels_of(grids[0])
    coarse = View(*images, grids, measure, levels[0])
    middles, radius = _middles(coarse, measure)
    frame = (middles[0], radius)
    shifts = _shifts(grids, middles)
    maps = {"none": np.eye(4), "center": min(shifts[1:], key=lambda shift: coarse.look(shift).loss)}
    last = judge = coarse
    if mode != "center":
        turned = _best_start(coarse, shifts, frame)
        maps["rigid"] = turned.matrix
        if mode != "rigid":
            maps["affine"] = _descend(turned, frame, rigid=False).matrix
        for level in levels[1:]:
            last = View(*images, grids, measure, level)
            judge = last if np.prod(level.size) <= _JUDGED else judge
            best = _descend(last.look(maps["rigid"]), frame, rigid=True)
            maps["rigid"] = best.matrix
            if mode != "rigid":
                maps["affine"] = _further(last.look(maps["affine"]), best, frame).matrix
    losses = {kind: last.look(matrix).loss for kind, matrix in maps.items()}
    kind = _chosen(losses, mode)
    if kind == "affine" and not _is_founded(last, judge, maps["rigid"], frame):
        kind = _chosen({name: loss for name, loss in losses.items() if name != "affine"}, mode)
    if mode == "auto":
        far = {name: _distance(matrix - maps[kind], frame) for name, matrix in maps.items()}
        kind = next(k for k in maps if k == kind or (np.isfinite(losses[k]) and far[k] < _APART * last.edge))
    apart, unturned = None, min(losses["none"], losses["center"])
    if kind in ("rigid", "affine") and not losses["rigid"] <= _TELLS * unturned < np.inf:
        apart = _apart(coarse, shifts, frame)
    if apart is not None and apart > _TOGETHER * radius:
        kind = "none" if np.isfinite(losses["none"]) else "center"
    return Alignment(maps[kind], kind, mode, losses, middles[0], time.perf_counter() - started, apart)


def _chosen(losses: dict[str, float], mode: str) -> str:
    """The map that is taken, of those from the simplest to the one with most parameters."""
    best = min(losses.values())
    if not np.isfinite(best):
        return "none"
    if mode == "auto":
        return next(kind for kind, loss in losses.items() if loss <= best * (1 + _WORTH) or loss == best)
    return min(losses, key=lambda kind: (losses[kind], kind != mode))


# --- whether a map is more than noise ---------------------------------------------------------------------------------


def _further(look: Look, best: Look, frame: tuple[np.ndarray, float]) -> Look:
    """An affine descent, and where that ends no better than the best rigid map, another one from there."""
    end = _descend(look, frame, rigid=False)
    return end if end.loss < best.loss else _descend(best, frame, rigid=False)


def _distance(between: np.ndarray, frame: tuple[np.ndarray, float]) -> float:
    """Between the places to which two maps lead what the fixed image shows, root mean square in millimetres."""
    (centre, radius), n = frame, len(frame[0])
    turn, shift = between[:n, :n], between[:n, :n] @ centre + between[:n, 3]
    return float(np.sqrt((shift**2).sum() + radius**2 * (turn**2).sum() / n))


def _apart(view: View, shifts: Sequence[np.ndarray], frame: tuple[np.ndarray, float]) -> float | None:
    """Between the rigid maps that two halves of the fixed image find on their own, in mm; ``None`` if they cannot."""
    if not isinstance(view.measure, Weighted):
        return None
    one, other = (_best_start(half, shifts, frame).matrix for half in view.halves())
    return _distance(one - other, frame)


def _is_founded(finest: View, judge: View, rigid: np.ndarray, frame: tuple[np.ndarray, float]) -> bool:
    """Whether enough voxels count, and an affine map that half of them tell is better for the other half, both ways."""
    if not isinstance(judge.measure, Weighted):
        return True
    if finest.counted < _PER_PARAMETER * len(_basis(len(frame[0]), rigid=False)):
        return False
    for told, other in permutations(judge.halves()):
        found = _descend(told.look(rigid), frame, rigid=False)
        if not other.look(found.matrix).loss < other.look(rigid).loss:
            return False
    return True


# --- starts -----------------------------------------------------------------------------------------------------------


def _middles(view: View, measure: Similarity) -> tuple[list[np.ndarray], float]:
    """Middle of what either image shows, in RAS millimetres, and how far the fixed one reaches from it."""
    points = []
    weighs = (isinstance(measure, Weighted) and measure.weighs_fixed, measure.weighs_moving)
    for image, grid, own, last in zip((view.fixed, view.shown), view.grids, weighs, (True, False), strict=True):
        counts = image[0, -1 if last else 0] > 0 if own else torch.ones_like(image[0, 0], dtype=torch.bool)
        values = image[0, 0 if last else int(own)]
        shown = counts & (values > values[counts].mean())
        voxels = (shown if bool(shown.any()) else counts).nonzero().cpu().double().numpy()
        n = voxels.shape[1]
        points.append(voxels @ grid.affine[:n, :n].T + grid.affine[:n, 3])
    middles = [p.mean(0) for p in points]
    return middles, max(float(np.sqrt(((points[0] - middles[0]) ** 2).sum(1).mean())), view.edge)


def _shifts(grids: tuple[Grid, Grid], middles: Sequence[np.ndarray]) -> list[np.ndarray]:
    """None, the middles of the grids onto each other, and of what they show."""
    n, out = len(middles[0]), [np.eye(4)]
    between = [np.append((np.array(grid.size) - 1) / 2, [0] * (3 - n) + [1]) for grid in grids]
    ends = [(grid.affine @ at)[:n] for grid, at in zip(grids, between, strict=True)]
    for start, end in (ends, middles):
        shift = np.eye(4)
        shift[:n, 3] = end - start
        out.append(shift)
    return out


def _best_start(view: View, shifts: Sequence[np.ndarray], frame: tuple[np.ndarray, float]) -> Look:
    """The most alike after a rigid descent from every shift, turned and not."""
    n = len(frame[0])
    turns = [np.zeros(len(_basis(n, rigid=True)))]
    for which, sign in product(range(n * (n - 1) // 2), (1, -1)):
        turns.append(np.zeros_like(turns[0]))
        turns[-1][which] = sign * np.radians(_START) * frame[1]
    starts = [view.look(_moved(shift, turn, frame, rigid=True)) for shift, turn in product(shifts, turns)]
    tried = sorted((_descend(start, frame, True, _BRIEF) for start in starts), key=lambda look: look.loss)
    return min((_descend(start, frame, rigid=True) for start in tried[:_KEPT]), key=lambda look: look.loss)


# --- descent ----------------------------------------------------------------------------------------------------------


def _basis(n: int, rigid: bool) -> np.ndarray:
    """Directions ``(P, n, n + 1)`` of ``(K, t)``, rotations or all linear maps before shifts."""
    if not rigid:
        return np.eye(n * (n + 1)).reshape(-1, n, n + 1)
    turns = []
    for i, j in combinations(range(n), 2):
        turn = np.zeros((n, n + 1))
        turn[i, j], turn[j, i] = 1, -1
        turns.append(turn)
    return np.stack([*turns, *np.eye(n * (n + 1)).reshape(n, n + 1, n, n + 1)[:, n]])


def _moved(matrix: np.ndarray, step: np.ndarray, frame: tuple[np.ndarray, float], rigid: bool) -> np.ndarray:
    """A map after the exponential of a step ``(P,)`` in millimetres: rotations stay rotations, nothing is mirrored."""
    (centre, radius), n = frame, len(frame[0])
    whole = np.tensordot(step, _basis(n, rigid), 1)
    generator = np.zeros((4, 4))
    generator[:n, :n], generator[:n, 3] = whole[:, :n] / radius, whole[:, n]
    to_centre = np.eye(4)
    to_centre[:n, 3] = -centre
    moved = torch.linalg.matrix_exp(torch.from_numpy(generator)).numpy()
    return matrix @ np.linalg.inv(to_centre) @ moved @ to_centre


def _descend(look: Look, frame: tuple[np.ndarray, float], rigid: bool, iterations: int = _ITERATIONS) -> Look:
    """Levenberg–Marquardt from a map that has been looked at, to one that is at least as good."""
    n, edge = len(frame[0]), look.view.edge
    basis = _basis(n, rigid).reshape(-1, n * (n + 1))
    inverse_damping, fresh = 0.0, True
    for _ in range(iterations):
        if fresh:
            first, second = look.normal(*frame)
            slope, squares = basis @ first.ravel(), basis @ second @ basis.T
            if not np.isfinite(slope).all() or not slope.any():
                break
            small = 1e-4 * np.trace(squares) / len(squares)
            direction = -np.linalg.solve(squares + small * np.eye(len(squares)), slope)
        longest = 2 * edge / np.linalg.norm(direction)
        inverse_damping = min(inverse_damping or longest / 2, longest)
        step = inverse_damping * direction
        if np.linalg.norm(step) < _TOLERANCE * edge:
            break
        tried = look.view.look(_moved(look.matrix, step, frame, rigid))
        fresh = tried.loss < look.loss
        bend = tried.loss - look.loss - slope @ step  # half the curvature along the step
        best = -0.5 * (slope @ step) / bend if bend > 0 else 4.0
        inverse_damping *= np.clip(best, *((0.5, 4.0) if fresh else (0.1, 0.5)))
        if fresh:
            look = tried
    return look
