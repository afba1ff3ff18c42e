"""Hippocampus: a network, the network refined by Adam, the network refined by LM, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.data import BUNDLE, hippocampus_network, hippocampus_pairs
from benchmarks.descents import keywords
from benchmarks.gpu.measure import timed
from benchmarks.metrics import mean_dice, paired_bootstrap
from benchmarks.rows import add_row
from monai_lm import RegistrationInferer
from monai_lm.fields import fold_count
from monai_lm.fields.algebra import lengths
from monai_lm.fields.metrics import compare_labels, sd_log_jacobian
from monai_lm.kernels.devices import find_device


def hippocampus(
    weights: str = str(BUNDLE / "models" / "model.pt"),
    part: str = "test",
    pairs: int = 50,
    adam_steps: tuple[float, ...] = (0.1, 0.2, 0.4),
    identity: bool = True,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Dice, 95 % Hausdorff distance, SDlogJ, similarity and folds of 50 seeded random pairs.

    Args:
        weights: state dictionary of the bundle's network, or of the one that a ``.json`` beside it defines.
        part: of the split: ``test`` to report, ``validation`` to tune.
        pairs: how many.
        adam_steps: step sizes of Adam; on the test part give the one that won on the validation part.
        identity: also LM without the network's field.
        device: cpu, cuda, ...
        json_file: write one line per pair here, as it goes.
    """
    dataset = hippocampus_pairs(part, pairs, seed=0)
    chosen = find_device(device)
    network, inferer = hippocampus_network(weights, chosen)
    methods = _methods(inferer, adam_steps, identity)
    rows: list[dict[str, Any]] = []
    for index in range(pairs):
        pair = {k: v[None].to(chosen) for k, v in dataset[index].items()}
        with torch.no_grad():
            images = torch.cat([pair["moving"], pair["fixed"]], 1)
            ddf, seconds = timed(chosen, inferer.predict, images, network)
        row: dict[str, Any] = {"start": {"dice": mean_dice(pair["fixed_label"], pair["moving_label"])}}
        row["network"] = _measure(pair, ddf, ddf, seconds)
        for name, method in methods.items():
            refined, seconds = timed(chosen, method, pair["fixed"], pair["moving"], ddf)
            row[name] = _measure(pair, refined, ddf, seconds)
        rows.append(row)
        add_row(json_file, row)
    print(f"hippocampus, {part}, {pairs} pairs, weights {Path(weights).name}, torch {torch.__version__}")
    _print(rows)


def _methods(
    inferer: RegistrationInferer, adam_steps: tuple[float, ...], identity: bool
) -> dict[str, Callable[..., Tensor]]:
    """Adam and LM as the inferer refines, and LM on the images alone where the inferer matches features, too."""
    settings = {**(inferer.refine or {})}

    def lm(fixed: Tensor, moving: Tensor, ddf: Tensor | None) -> Tensor:
        return monai_lm.refine(inferer.channels(fixed), inferer.channels(moving), ddf, **settings).ddf

    def adam(step: float) -> Callable[..., Tensor]:
        def run(fixed: Tensor, moving: Tensor, ddf: Tensor) -> Tensor:
            channels = inferer.channels(fixed), inferer.channels(moving)
            similarity = settings.get("similarity", "lncc")
            return monai_lm.refine(*channels, ddf, similarity=similarity, **keywords("adam", step)).ddf

        return run

    methods: dict[str, Callable[..., Tensor]] = {f"network + Adam {s:g}": adam(s) for s in adam_steps}
    methods["network + LM"] = lm
    if inferer.features is not None:
        methods["network + LM, images only"] = lambda f, m, ddf: monai_lm.refine(f, m, ddf).ddf
    if identity:
        methods["identity + LM"] = lambda fixed, moving, _: lm(fixed, moving, None)
    return methods


def _measure(pair: dict[str, Tensor], ddf: Tensor, predicted: Tensor, seconds: float) -> dict[str, float]:
    similarity = monai_lm.similarity.LNCC()
    warped = monai_lm.fields.warp(pair["moving_label"], ddf, mode="nearest")
    return {
        "dice": mean_dice(pair["fixed_label"], pair["moving_label"], ddf),
        "hd95": float(compare_labels(warped, pair["fixed_label"], [(1.0, 1.0, 1.0)])["hd95_mm"]),
        "sdlogj": float(sd_log_jacobian(ddf)),
        "loss": float(similarity(monai_lm.fields.warp(pair["moving"], ddf), pair["fixed"])) / pair["fixed"].numel(),
        "folds": int(fold_count(ddf)),
        "change": float(lengths(ddf - predicted).mean()),
        "seconds": seconds,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'method':<26}{'Dice':>8}{'HD95, mm':>10}{'SDlogJ':>8}{'loss':>9}{'folds, all pairs':>18}"
        f"{'mean |du|':>11}{'s':>7}"
    )
    for name in rows[0]:
        averages = {k: float(np.mean([row[name][k] for row in rows])) for k in rows[0][name]}
        folds = sum(row[name].get("folds", 0) for row in rows)
        rest = (
            ""
            if name == "start"
            else f"{averages['hd95']:10.3f}{averages['sdlogj']:8.3f}{averages['loss']:9.4f}{folds:18d}"
            f"{averages['change']:11.3f}{averages['seconds']:7.2f}"
        )
        print(f"{name:<26}{averages['dice']:8.4f}{rest}")
    if "network + LM" not in rows[0]:
        return
    print("difference in Dice, network + LM minus …: mean [95 % bootstrap interval]")
    for name in rows[0]:
        if name != "network + LM":
            mean, low, high = paired_bootstrap([row["network + LM"]["dice"] - row[name]["dice"] for row in rows])
            print(f"  {name:<26}{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    better = np.mean([row["network + LM"]["loss"] < row["network"]["loss"] for row in rows])
    worse = np.mean([row["network + LM"]["dice"] < row["network"]["dice"] - 0.01 for row in rows])
    print(f"pairs whose similarity improved over the network: {better:.0%}; Dice lower by more than .01: {worse:.0%}")
