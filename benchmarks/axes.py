"""How far a field moves when axes are exchanged or mirrored, beside what rounding alone does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.cases import SETS, Case
from monai_lm import refine
from monai_lm.fields.algebra import lengths

__all__ = ["axes"]

Turn = Callable[[Tensor], Tensor]


def axes(
    sets: tuple[str, ...] = ("hippocampus", "brain", "cardiac"),
    pairs: int = 2,
    similarities: tuple[str, ...] = ("lncc", "ncc", "mi"),
    iterations: int | str = "auto",
    noise: float = 1e-6,
) -> None:
    """Register pairs as they are, on exchanged and on mirrored axes, and with rounding's noise; from the identity.

    Mirrored, a position is rounded otherwise, by some 1e-6 voxels, and an intensity there changes by as much of what it
    differs from the next; sums in another order change by 1e-7.

    Args:
        sets: of :data:`benchmarks.cases.SETS`.
        pairs: of each set, at most.
        similarities: names of measures.
        iterations: of ``monai_lm.refine``.
        noise: every intensity of the fixed image is multiplied by one plus or minus it.
    """
    print("mean distance between two fields, voxels: means over pairs (largest)")
    print("| set | similarity | exchanged axes | mirrored axis | noise |\n|---|---|---|---|---|")
    for name in sets:
        for similarity in similarities:
            rows = [_moved(case, similarity, iterations, noise) for case in islice(SETS[name](), pairs)]
            cells = " | ".join(f"{fmean(c):.4f} ({max(c):.4f})" for c in zip(*rows, strict=True))
            print(f"| {name} | {similarity} | {cells} |", flush=True)


def _moved(case: Case, similarity: str, iterations: int | str, noise: float) -> tuple[float, float, float]:
    n = case.fixed.dim() - 2
    order, edges = [*range(1, n), 0], case.spacing or (1.0,) * n
    back = [order.index(axis) for axis in range(n)]

    def found(turn: Turn, spacing: tuple[float, ...], fixed: Tensor = case.fixed) -> Tensor:
        images = (turn(image).contiguous() for image in (fixed, case.moving))
        return refine(*images, spacing=spacing, similarity=similarity, iterations=iterations).ddf

    def permuted(image: Tensor, to: list[int]) -> Tensor:
        return image.permute(0, 1, *[2 + axis for axis in to])

    field = found(lambda image: image, edges)
    exchanged = permuted(found(lambda image: permuted(image, order), tuple(edges[axis] for axis in order)), back)
    mirrored = found(lambda image: image.flip(2), edges).flip(2)
    mirrored[:, 0] *= -1
    signs = torch.randn(case.fixed.shape, generator=torch.Generator().manual_seed(0)).sign()
    rounded = found(lambda image: image, edges, case.fixed * (1 + noise * signs))
    others = exchanged[:, back], mirrored, rounded
    first, second, third = (float(lengths(other - field).mean()) for other in others)
    return first, second, third
