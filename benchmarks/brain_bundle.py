"""The brain bundle on pairs of brains, against LM from the identity."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monai_lm
from benchmarks.data import BRAIN_BUNDLE, data_root
from benchmarks.gpu.measure import timed
from benchmarks.metrics import mean_dice
from benchmarks.rows import add_row
from monai_lm.apps.bundle import RegistrationBundle
from monai_lm.fields import fold_count
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.kernels.devices import find_device

FULL: dict[str, Any] = {"scales": (4, 2, 1), "iterations": (100, 50, 25)}


def brain_bundle(
    part: str = "test",
    pairs: int = 6,
    invented: int = 0,
    schedules: dict[str, dict[str, Any]] | None = None,
    device: str = "cpu",
    json_file: str | None = None,
) -> None:
    """Dice of 138 structures at 1 mm, folds, SDlogJ and seconds: network, network + LM, LM from the identity.

    The first pair is registered twice, and only the second time counts: what is done once per process is done before.

    Args:
        part: of the bundle's split by subject: ``test`` to report, ``validation`` to tune.
        pairs: how many of the ordered pairs of the part.
        invented: how many contrasts to invent from the moving image's label map for every pair, all different; 0 takes
            the images as they are.
        schedules: what to refine with, by name, keyword arguments of :func:`monai_lm.refine` over the bundle's own.
        device: cpu, cuda, ...
        json_file: write one line per pair and method here, as it goes.
    """
    bundle = RegistrationBundle(BRAIN_BUNDLE, find_device(device))
    schedules = {"network + LM": {}} if schedules is None else schedules
    subjects = json.loads((BRAIN_BUNDLE / "configs" / "split.json").read_text())[part]
    chosen = list(permutations(subjects, 2))[:pairs] * (invented or 1)
    print(f"brain bundle, {part}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"match: {bundle.inferer.match}; refine: {bundle.inferer.refine}; {schedules}", flush=True)
    rows: list[dict[str, Any]] = []
    for number, (fixed, moving) in enumerate([chosen[0], *chosen]):
        found = _registered(bundle, fixed, moving, schedules, number if invented else None)
        if number == 0:
            continue
        for row in found:
            rows.append({"fixed": fixed, "moving": moving, **row})
            print(
                f"{fixed} <- {moving}  {row['method']:<28}{row['dice']:7.4f}{row['folds']:7d} folds"
                f"{row['sdlogj']:7.3f} SDlogJ{row['seconds']:8.2f} s",
                flush=True,
            )
            add_row(json_file, rows[-1])
    print("means; seconds against LM from the identity")
    means = {
        method: [float(np.mean([r[k] for r in rows if r["method"] == method])) for k in ("dice", "seconds")]
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    whole = means["LM from the identity"][1]
    for method, (dice, seconds) in means.items():
        print(f"{method:<28}{dice:7.4f}{seconds:8.2f} s{seconds / whole:7.2f}")


def _registered(
    bundle: RegistrationBundle, fixed: str, moving: str, schedules: dict[str, dict[str, Any]], contrast: int | None
) -> list[dict[str, Any]]:
    """A row per method. Reading files does not count; the network's time is in that of what refines its field."""
    subjects = {"fixed": fixed, "moving": moving}
    files = {role: str(data_root("brain") / f"{s}_t1.nii.gz") for role, s in subjects.items()}
    files |= {f"{role}_label": str(data_root("brain") / f"{s}_seg.nii.gz") for role, s in subjects.items()}
    data = bundle.preprocessing(files)
    images = torch.as_tensor(data["image"])[None].contiguous().to(bundle.device)
    first, second = (torch.as_tensor(data[f"{role}_label"])[None].to(bundle.device) for role in subjects)
    if contrast is not None:
        invented = _invented(images[:, :1].cpu(), second.cpu(), contrast).to(bundle.device)
        images = torch.cat([invented, images[:, 1:]], 1)
    inferer = bundle.inferer

    @torch.no_grad()
    def predict() -> Tensor:
        return inferer.predict(images, bundle.network)

    def refined(settings: dict[str, Any]) -> Callable[[], Tensor]:
        return lambda: inferer.refined(images, predict(), **settings).ddf

    def on_the_images() -> Tensor:
        settings = {**(inferer.refine or {}), "similarity": "lncc"}
        return monai_lm.refine(images[:, 1:], images[:, :1], predict(), **settings).ddf

    methods: dict[str, Callable[[], Tensor]] = {
        "LM from the identity": lambda: monai_lm.refine(images[:, 1:], images[:, :1], **FULL).ddf,
        "network": predict,
        "LM on the images alone": on_the_images,
        **{name: refined(settings) for name, settings in schedules.items()},
    }
    rows = [{"method": "affine", "dice": mean_dice(first, second), "folds": 0, "sdlogj": 0.0, "seconds": 0.0}]
    for name, method in methods.items():
        ddf, seconds = timed(bundle.device, method)
        row = {"method": name, "dice": mean_dice(first, second, ddf), "folds": int(fold_count(ddf))}
        rows.append({**row, "sdlogj": float(sd_log_jacobian(ddf)), "seconds": seconds})
    return rows


def _invented(image: Tensor, label: Tensor, seed: int) -> Tensor:
    """What the bundle's own script makes of an image and its label map."""
    sys.path.insert(0, str(BRAIN_BUNDLE))
    try:
        data = importlib.import_module("scripts.data")
    finally:
        sys.path.remove(str(BRAIN_BUNDLE))
    invented: Tensor = data.invented_contrast(image, data.to_classes(label), seed)
    return invented
