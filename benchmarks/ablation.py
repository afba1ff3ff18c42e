"""The settings of the method, one changed at a time, on validation images and on the embedded example."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import monai_lm
from benchmarks.data import brain_image, hippocampus_network, hippocampus_pairs
from benchmarks.metrics import mean_dice
from monai_lm.demo import brain_example, endpoint_error
from monai_lm.pyramid import shrink
from monai_lm.similarity import LNCC

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "acceptance descent": {"acceptance": "descent"},
    "control trust_region": {"control": "trust_region"},
    "window 3": {"window": 3},
    "damping 1 on all levels": {"damping": 1.0},
    "damping .3 at the finest": {"damping": (0.1, 0.1, 0.3, 0.3)},
    "smooth_gradient 1 on all levels": {"smooth_gradient": 1.0},
    "smooth_gradient 1.5 at the finest": {"smooth_gradient": (2.0, 2.0, 1.5, 1.5)},
    "smooth_residual .7": {"smooth_residual": 0.7},
    "smooth_residual 1": {"smooth_residual": 1.0},
    "step .25": {"step": 0.25},
    "LNCC radius 2": {"similarity": LNCC(2)},
    "LNCC epsilon 1e-2": {"similarity": LNCC(3, 1e-2)},
}


def ablation(
    weights: str = str(Path(__file__).parent / "weights" / "hippocampus_unsupervised.pt"),
    variants: tuple[str, ...] = tuple(VARIANTS),
    pairs: int = 6,
    compile: bool = False,  # noqa: A002 (as refine calls it)
    json_file: str | None = None,
) -> None:
    """Dice on hippocampus from a network and on 2 mm brains from the identity; error on the embedded example.

    Args:
        weights: of the hippocampus network.
        variants: which of the settings.
        pairs: hippocampus validation pairs.
        compile: compile the kernels.
        json_file: write one line per variant here, as it goes.
    """
    hippocampi, brains, example = _hippocampus_pairs(weights, pairs), _brain_pairs(), brain_example(3)
    before = sum(mean_dice(p["fixed_label"], p["moving_label"], p["ddf"]) for p in hippocampi) / pairs
    print(f"before: hippocampus {before:.4f}, example {endpoint_error(example, example.prediction)[0]:.3f} mm")
    print(f"{'settings':<36}{'hippocampus':>12}{'brain 2 mm':>12}{'example, mm':>13}{'s':>7}")
    for name in variants:
        settings = {"compile": compile, **VARIANTS[name]}
        started = time.perf_counter()
        hippocampus = [
            mean_dice(
                p["fixed_label"], p["moving_label"], monai_lm.refine(p["fixed"], p["moving"], p["ddf"], **settings).ddf
            )
            for p in hippocampi
        ]
        brain = [
            mean_dice(
                f_label, m_label, monai_lm.refine(f, m, scales=(4, 2, 1), iterations=(60, 30, 15), **settings).ddf
            )
            for f, m, f_label, m_label in brains
        ]
        refined = monai_lm.refine(example.fixed, example.moving, example.prediction, **settings).ddf
        row: dict[str, Any] = {
            "settings": name,
            "hippocampus": sum(hippocampus) / pairs,
            "brain": sum(brain) / len(brain),
            "example": endpoint_error(example, refined)[0],
            "seconds": time.perf_counter() - started,
        }
        print("{settings:<36}{hippocampus:12.4f}{brain:12.4f}{example:13.3f}{seconds:7.0f}".format(**row), flush=True)
        if json_file:
            with Path(json_file).open("a") as file:
                file.write(json.dumps(row) + "\n")


def _hippocampus_pairs(weights: str, pairs: int) -> list[dict[str, Tensor]]:
    dataset = hippocampus_pairs("validation", pairs, seed=1)
    network, inferer = hippocampus_network(weights)
    out = []
    for index in range(pairs):
        pair = {k: v[None] for k, v in dataset[index].items()}
        with torch.no_grad():
            pair["ddf"] = inferer.predict(torch.cat([pair["moving"], pair["fixed"]], 1), network)
        out.append(pair)
    return out


def _brain_pairs() -> list[tuple[Tensor, ...]]:
    """1000 ← 1001 and 1006 ← 1002, validation pairs, at 2 mm."""
    size = (88, 112, 88)
    pairs = []
    for subjects in (("1000", "1001"), ("1006", "1002")):
        images = [shrink(brain_image(s, "t1"), size) for s in subjects]
        labels = [F.interpolate(brain_image(s, "seg"), size=size, mode="nearest") for s in subjects]
        pairs.append((*images, *labels))
    return pairs
