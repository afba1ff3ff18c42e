"""The settings of the method, one changed at a time, on validation images and on large known warps of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monai_lm
from benchmarks.data import brain_image, hippocampus_network, hippocampus_pairs
from benchmarks.metrics import mean_dice
from benchmarks.rows import add_row
from monai_lm.apps.demo import brain_example, endpoint_error
from monai_lm.fields import gaussian_smooth, integrate, warp
from monai_lm.fields.algebra import lengths
from monai_lm.kernels.devices import find_device
from monai_lm.similarity import LNCC
from monai_lm.solver.pyramid import make_level, shrink

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "acceptance descent": {"acceptance": "descent"},
    "acceptance metropolis": {"acceptance": "metropolis"},
    "control trust_region": {"control": "trust_region"},
    "window 3": {"window": 3},
    "damping .01 on all levels": {"damping": 0.01},
    "damping .1 on all levels": {"damping": 0.1},
    "damping 1 on all levels": {"damping": 1.0},
    "damping .3 at the finest": {"damping": (0.1, 0.1, 0.3, 0.3)},
    "smooth_gradient 1 on all levels": {"smooth_gradient": 1.0},
    "smooth_gradient 2 on all levels": {"smooth_gradient": 2.0},
    "smooth_gradient 1.5 at the finest": {"smooth_gradient": (2.0, 2.0, 2.0, 1.5)},
    "smooth_gradient 1.25 at the finest": {"smooth_gradient": (2.0, 2.0, 2.0, 1.25)},
    "smooth_gradient 1.5 at scale 2": {"smooth_gradient": (2.0, 2.0, 1.5, 1.0)},
    "smooth_residual .3": {"smooth_residual": 0.3},
    "smooth_residual .7": {"smooth_residual": 0.7},
    "smooth_residual 1": {"smooth_residual": 1.0},
    "step .25": {"step": 0.25},
    "step 1": {"step": 1.0},
    "LNCC radius 1": {"similarity": LNCC(1)},
    "LNCC radius 3": {"similarity": LNCC(3)},
    "LNCC radius 3, smooth_gradient 1.5 at scale 2": {
        "similarity": LNCC(3),
        "smooth_gradient": (2.0, 2.0, 1.5, 1.0),
    },
    "LNCC radius 4": {"similarity": LNCC(4)},
    "LNCC Gaussian, radius 2": {"similarity": LNCC(2, window="gaussian")},
    "LNCC Gaussian, radius 3": {"similarity": LNCC(3, window="gaussian")},
    "LNCC epsilon 1e-2": {"similarity": LNCC(2, 1e-2)},
    "NCC": {"similarity": "ncc"},
    "tolerance .001": {"tolerance": 0.001},
}


@dataclass(frozen=True)
class Warped:
    """An image, the same one warped with another contrast and noise, and the warp, in voxels of the fixed grid."""

    fixed: Tensor
    moving: Tensor
    truth: Tensor

    def error(self, ddf: Tensor | None = None) -> float:
        """Mean distance to the truth where the fixed image is not dark, in voxels."""
        distance = self.truth if ddf is None else ddf - self.truth
        inside = warp(self.moving, self.truth) > 0.1
        return float(lengths(distance)[:, None][inside].mean())


def ablation(
    weights: str = str(Path(__file__).parent / "weights" / "hippocampus_unsupervised.pt"),
    variants: tuple[str, ...] = tuple(VARIANTS),
    pairs: int = 6,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Every setting on every data set, with the automatic schedule; the table is in ``docs/results.md``.

    Columns: Dice on hippocampus from a network and on 2 mm brains from the identity; error in mm on the demo's example;
    error in voxels on brains at 2 mm and hippocampi under known warps of 15 and 10 voxels, with another contrast and
    noise, from the identity and from a prediction that has .6 of the motion and an error of its own.

    Args:
        weights: of the hippocampus network.
        variants: which of the settings.
        pairs: hippocampus validation pairs.
        device: where to refine: cpu, cuda, ...
        json_file: write one line per variant here, as it goes.
    """
    columns = _columns(weights, pairs, find_device(device))
    print(f"{'settings':<46}" + "".join(f"{name:>20}" for name in columns) + f"{'s':>7}")
    print(f"{'before':<46}" + "".join(f"{measure(None):20.4f}" for measure in columns.values()), flush=True)
    for name in variants:
        started = time.perf_counter()
        row = {column: measure(VARIANTS[name]) for column, measure in columns.items()}
        seconds = time.perf_counter() - started
        print(f"{name:<46}" + "".join(f"{value:20.4f}" for value in row.values()) + f"{seconds:7.0f}", flush=True)
        add_row(json_file, {"settings": name, **row, "seconds": seconds})


def _columns(weights: str, pairs: int, device: torch.device) -> dict[str, Callable[[dict[str, Any] | None], float]]:
    """What each column measures with these settings, or with ``None`` before refinement."""
    hippocampi, brains, example = _hippocampus_pairs(weights, pairs), _brain_pairs(), brain_example(3)
    large_brain = [large_warp(half_size(brain_image(s, "t1")), 15, 12, seed) for seed, s in enumerate(("1002", "1007"))]
    large_hippocampus = [large_warp(p[1], 10, 8, seed) for seed, p in enumerate(hippocampi[:3])]

    def refined(fixed: Tensor, moving: Tensor, ddf: Tensor | None, settings: dict[str, Any]) -> Tensor:
        start = None if ddf is None else ddf.to(device)
        return monai_lm.refine(fixed.to(device), moving.to(device), start, **settings).ddf.cpu()

    def dice(cases: list[tuple[Tensor, ...]], settings: dict[str, Any] | None) -> float:
        values = []
        for fixed, moving, fixed_label, moving_label, *start in cases:
            ddf = start[0] if start else None
            if settings is not None:
                ddf = refined(fixed, moving, ddf, settings)
            values.append(mean_dice(fixed_label, moving_label, ddf))
        return sum(values) / len(values)

    def known(cases: list[Warped], predicted: bool, settings: dict[str, Any] | None) -> float:
        values = []
        for case in cases:
            ddf = _imperfect(case) if predicted else None
            if settings is not None:
                ddf = refined(case.fixed, case.moving, ddf, settings)
            values.append(case.error(ddf))
        return sum(values) / len(values)

    def demo(settings: dict[str, Any] | None) -> float:
        ddf = example.prediction
        if settings is not None:
            ddf = refined(example.fixed, example.moving, ddf, settings)
        return endpoint_error(example, ddf)[0]

    return {
        "hippocampus": lambda settings: dice(hippocampi, settings),
        "brain": lambda settings: dice(brains, settings),
        "example": demo,
        "large brain": lambda settings: known(large_brain, False, settings),
        "large brain, pred.": lambda settings: known(large_brain, True, settings),
        "large hippo.": lambda settings: known(large_hippocampus, False, settings),
        "large hippo., pred.": lambda settings: known(large_hippocampus, True, settings),
    }


def large_warp(image: Tensor, peak: float, length: float, seed: int) -> Warped:
    """Warp an image by a random diffeomorphism, and give the result another contrast and noise.

    Args:
        image: ``(1, 1, *S)`` in any range.
        peak: largest speed of the velocity behind the warp, in voxels.
        length: standard deviation of what smooths it, in voxels.
        seed: of velocity and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    moving = (image - image.min()) / (image.max() - image.min())
    truth = _motion(moving, peak, length, generator)
    fixed = warp(moving, truth).clamp(min=0) ** 1.6
    return Warped(fixed + 0.03 * torch.randn(fixed.shape, generator=generator), moving, truth)


def _motion(image: Tensor, peak: float, length: float, generator: torch.Generator) -> Tensor:
    """Integral of smooth noise; smoothing keeps the values at the border, so it is cut out of a larger grid."""
    margin = 3 * int(length)
    noise = torch.randn(1, image.dim() - 2, *(n + 2 * margin for n in image.shape[2:]), generator=generator)
    velocity = gaussian_smooth(noise, length)
    for axis, voxels in enumerate(image.shape[2:], start=2):
        velocity = velocity.narrow(axis, margin, voxels)
    return integrate(velocity * peak / lengths(velocity).max())


def _imperfect(case: Warped) -> Tensor:
    """Most of the motion, and an error of its own with a peak of 3 voxels."""
    return 0.6 * case.truth + _motion(case.moving, 3.0, 5.0, torch.Generator().manual_seed(9))


def _hippocampus_pairs(weights: str, pairs: int) -> list[tuple[Tensor, ...]]:
    network, inferer = hippocampus_network(weights)
    out: list[tuple[Tensor, ...]] = []
    for subjects in hippocampus_pairs("validation", pairs, seed=1):
        pair = {k: v[None] for k, v in subjects.items()}
        with torch.no_grad():
            ddf = inferer.predict(torch.cat([pair["moving"], pair["fixed"]], 1), network)
        out.append((pair["fixed"], pair["moving"], pair["fixed_label"], pair["moving_label"], ddf))
    return out


def _brain_pairs() -> list[tuple[Tensor, ...]]:
    """1000 ← 1001 and 1006 ← 1002, validation pairs, at 2 mm."""
    pairs: list[tuple[Tensor, ...]] = []
    for subjects in (("1000", "1001"), ("1006", "1002")):
        images = [half_size(brain_image(s, "t1")) for s in subjects]
        labels = [brain_image(s, "seg")[:, :, ::2, ::2, ::2] for s in subjects]
        pairs.append((*images, *labels))
    return pairs


def half_size(image: Tensor) -> Tensor:
    return shrink(image, make_level(image.shape[2:], (1.0, 1.0, 1.0), 2))
