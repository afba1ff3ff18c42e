"""Measures across contrasts: one image's intensities are mapped anew, and the same pair is registered again."""

from __future__ import annotations

from collections import Counter
from itertools import islice, product
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import SETS
from benchmarks.rows import Row, add_row, read_rows
from benchmarks.validation import refined
from monai_lm.kernels.devices import find_device

__all__ = ["CONTRASTS", "KNOWN", "contrasts", "recolored"]

CONTRASTS: dict[str, tuple[float, ...] | None] = {
    "same": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), "inverted": (1.0, 0.8, 0.6, 0.4, 0.2, 0.0),
    "like T2": (0.0, 1.0, 0.75, 0.5, 0.35, 0.9), "random": None,
}  # fmt: skip
"""What becomes of the intensities 0, .2, …, 1, linearly between them; ``random`` draws an order of these for each pair.
``like T2``: dark stays dark, what is a little brighter becomes the brightest, as fluid does, white gets darker than
grey, and fat bright."""

KNOWN = "known"
"""LNCC of images that are both mapped: what is left to whoever knows the map."""


def contrasts(
    sets: tuple[str, ...] = ("hippocampus", "brain", "cardiac", "abdomen"),
    pairs: int = 4,
    similarities: tuple[str, ...] = ("lncc", "mi", "mind", "mse", "mapped_lncc", "auto", KNOWN),
    kinds: tuple[str, ...] = tuple(CONTRASTS),
    side: str = "moving",
    json_file: str | None = None,
    device: str = "cpu",
) -> None:
    """Dice of every measure for every contrast of one image, and what it loses to LNCC on the pair as it was.

    Args:
        sets: of :data:`benchmarks.cases.SETS`; predictions are left aside.
        pairs: of each set, at most.
        similarities: names of measures, or :data:`KNOWN`.
        kinds: of :data:`CONTRASTS`.
        side: the image that is mapped, ``moving`` or ``fixed``.
        json_file: write one line per run here, as it goes; what stands in it is not run again.
        device: cpu, cuda, ...
    """
    if side not in ("moving", "fixed"):
        raise SystemExit(f"side must be moving or fixed, got {side!r}")
    where = find_device(device)
    done = {_key(row): row for row in read_rows(json_file)}
    names = ("same, lncc", *(f"{kind}, {measure}" for kind, measure in product(kinds, similarities)))
    for name in sets:
        shown: list[Row] = []
        for number, case in enumerate(islice(SETS[name](), pairs)):
            for column in dict.fromkeys(names):
                kind, measure = column.split(", ")
                row: Row = {"set": name, "pair": number, "side": side, "kind": kind, "similarity": measure}
                if _key(row) not in done:
                    images = {"fixed": case.fixed, "moving": case.moving}
                    for one in images if measure == KNOWN else (side,):
                        images[one] = recolored(images[one], kind, number)
                    pair = case._replace(fixed=images["fixed"].to(where), moving=images["moving"].to(where))
                    found = refined(pair, None, {"similarity": "lncc" if measure == KNOWN else measure})
                    done[_key(row)] = row | found
                    add_row(json_file, done[_key(row)])
                shown.append(done[_key(row)])
        _print(name, shown)


def recolored(image: Tensor, kind: str, seed: int = 0) -> Tensor:
    """An image with its intensities, from the .1 to the 99.9 percentile, mapped within them by :data:`CONTRASTS`."""
    low, high = np.quantile(image.numpy(), (0.001, 0.999))
    values = CONTRASTS[kind] or tuple(np.random.default_rng(seed).permutation(6) / 5)
    scaled = (image.numpy() - low) / (high - low)
    mapped = np.interp(scaled, np.linspace(0, 1, len(values)), values)
    return torch.from_numpy(low + (high - low) * mapped).to(image.dtype)


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("set", "pair", "side", "kind", "similarity"))


def _print(name: str, rows: list[Row]) -> None:
    best = {row["pair"]: row["dice_after"] for row in rows if (row["kind"], row["similarity"]) == ("same", "lncc")}
    print(
        f"| {name}, {len(best)} pairs | Dice before | after | − LNCC on the same contrast (s.e.) | SDlogJ | seconds "
        "| measure |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, measure in dict.fromkeys((row["kind"], row["similarity"]) for row in rows):
        found = [row for row in rows if (row["kind"], row["similarity"]) == (kind, measure)]
        gaps = [row["dice_after"] - best[row["pair"]] for row in found]
        error = f" ({stdev(gaps) / len(gaps) ** 0.5:.3f})" if len(gaps) > 1 else ""
        cells = [fmean(row[column] for row in found) for column in ("dice_before", "dice_after")]
        chosen = ", ".join(f"{n} {name}" for name, n in Counter(row.get("measure", measure) for row in found).items())
        rest = [fmean(row[column] for row in found) for column in ("sdlogj_after", "seconds")]
        print(
            f"| {kind}, {measure} | {cells[0]:.3f} | {cells[1]:.3f} | {fmean(gaps):+.3f}{error} "
            f"| {rest[0]:.2f} | {rest[1]:.2g} | {chosen} |"
        )
