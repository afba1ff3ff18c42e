"""FireANTs on images in memory: a process of its own, ``python -m benchmarks.gpu.run_fireants TASK``, prints JSON.

Its only need of SimpleITK is to hold images; 52 MB of wheel do not travel everywhere, so a stand-in holds them where
there is none.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from typing import Any

import torch

from benchmarks.gpu.measure import per_iteration, synthetic, timed
from monai_lm.similarity import LNCC

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "Adam", "optimizer_lr": 0.5},
    "levenberg": {
        "optimizer": "levenberg", "optimizer_lr": 0.75, "reduction": "sum", "optimizer_params": {"lambda_init": 30.0},
    },
}  # fmt: skip
"""As in ``workers/run_fireants.py``."""


class _Held:
    """What FireANTs asks of an image: values and an identity geometry."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def GetNumberOfComponentsPerPixel(self) -> int:  # noqa: N802 (SimpleITK's names)
        return 1

    def GetDimension(self) -> int:  # noqa: N802
        return 3

    def GetSpacing(self) -> tuple[float, ...]:  # noqa: N802
        return (1.0, 1.0, 1.0)

    def GetOrigin(self) -> tuple[float, ...]:  # noqa: N802
        return (0.0, 0.0, 0.0)

    def GetDirection(self) -> tuple[float, ...]:  # noqa: N802
        return (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    def GetSize(self) -> tuple[int, ...]:  # noqa: N802
        return tuple(self.values.shape[::-1])


def _holder() -> Any:
    """A function from an array to an image that FireANTs takes."""
    if importlib.util.find_spec("SimpleITK") is not None:
        return importlib.import_module("SimpleITK").GetImageFromArray
    stand_in = types.ModuleType("SimpleITK")
    inner = types.SimpleNamespace(Image=_Held)
    vars(stand_in).update(Image=_Held, SimpleITK=inner, GetArrayFromImage=lambda image: image.values)
    sys.modules["SimpleITK"] = stand_in
    return _Held


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per iteration at the finest level, peak in V, and a whole registration with its final LNCC."""
    hold, device = _holder(), torch.device(task["device"])
    from fireants.io import BatchedImages, Image
    from fireants.registration.greedy import GreedyRegistration

    pair = synthetic(task["size"], device)
    fixed, moving = (BatchedImages([Image(hold(image[0, 0].cpu().numpy()), device=str(device))]) for image in pair[:2])
    common = {"cc_kernel_size": 5, "smooth_warp_sigma": 0.5, "smooth_grad_sigma": 1.0, "tolerance": 0}

    def registered(scales: list[int], iterations: list[int]) -> Any:
        registration = GreedyRegistration(
            scales=scales, iterations=iterations, fixed_images=fixed, moving_images=moving, max_tolerance_iters=10**6,
            progress_bar=False, **common, **SETTINGS[task["optimizer"]],
        )  # fmt: skip
        registration.optimize()
        return registration

    few, many = (1, 3) if device.type == "cpu" else (5, 25)
    values = per_iteration(lambda n: registered([1], [n]), pair, device, few, many)
    counts = [2, 2, 2] if device.type == "cpu" else [100, 50, 25]
    whole, seconds = timed(device, registered, [4, 2, 1], counts)
    with torch.no_grad():
        warped = whole.evaluate(fixed, moving).to(device)
        loss = float(LNCC()(warped, pair.fixed)) / pair.fixed.numel()
    fused = importlib.util.find_spec("fireants_fused_ops") is not None
    return {**values, "s": seconds, "loss": loss, "fused_operators": fused}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
