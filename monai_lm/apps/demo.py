"""The embedded example: a real brain, a known deformation, an imperfect prediction of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import fold_count, gaussian_smooth, integrate, warp
from monai_lm.fields.algebra import lengths
from monai_lm.io.nifti import replacing
from monai_lm.io.outputs import check_outputs, figure_class
from monai_lm.solver.refinement import refine
from monai_lm.solver.result import RefinementResult

__all__ = ["Example", "brain_example", "endpoint_error", "run_demo"]


@dataclass(frozen=True)
class Example:
    """A pair with a known answer.

    Attributes:
        fixed: ``(1, 1, *S)``: the moving image warped by ``truth``, with another contrast, a bias field and noise.
        moving: ``(1, 1, *S)`` in [0, 1].
        truth: ``(1, n, *S)`` displacement in voxels.
        prediction: ``(1, n, *S)``: a network's answer, nearly right.
        mask: ``(1, *S)`` bool, where the fixed image shows tissue.
        spacing: voxel edge in millimetres.
    """

    fixed: Tensor
    moving: Tensor
    truth: Tensor
    prediction: Tensor
    mask: Tensor
    spacing: float


def brain_example(resolution: int = 2, seed: int = 0) -> Example:
    """Deform the MNI152 T1 template, which nilearn ships, by a random diffeomorphism and pretend to predict it.

    Args:
        resolution: voxel edge in millimetres, 1 to 4.
        seed: of the deformation, the noise and the error of the prediction.

    Raises:
        ImportError: nilearn is not installed.
        ValueError: the resolution is out of range.
    """
    if not 1 <= resolution <= 4:
        raise ValueError(f"resolution must be between 1 and 4 mm, got {resolution}")
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError as error:
        raise ImportError("the demo needs the demo extra: pip install 'monai_lm[demo]'") from error
    image = np.asarray(load_mni152_template(resolution=resolution).get_fdata(), dtype=np.float32)
    moving = torch.from_numpy(image / image.max())[None, None]
    generator = torch.Generator().manual_seed(seed)

    def velocity(millimetres: float, length: float) -> Tensor:
        """Random smooth velocity whose vectors have this mean size, varying over this length."""
        noise = torch.randn(1, 3, *moving.shape[2:], generator=generator)
        smooth = gaussian_smooth(noise, length / resolution)
        return smooth * (millimetres / resolution) / lengths(smooth).mean()

    shape = velocity(4.0, 16.0)
    truth = integrate(shape + velocity(1.2, 9.0))
    prediction = integrate(0.8 * shape + velocity(1.0, 10.0))
    bias = (
        1 + 0.3 * gaussian_smooth(torch.randn(moving.shape, generator=generator), 20.0 / resolution) * 100 / resolution
    )
    warped = warp(moving, truth)
    contrast = warped.clamp(min=0) ** 1.8 * bias.clamp(0.7, 1.3)
    fixed = contrast + 0.03 * torch.randn(moving.shape, generator=generator)
    return Example(fixed, moving, truth, prediction, (warped > 0.1)[:, 0], float(resolution))


def endpoint_error(example: Example, ddf: Tensor) -> tuple[float, float]:
    """Mean and 95th percentile of the distance to the truth inside the brain, in millimetres."""
    error = lengths(ddf - example.truth)[example.mask] * example.spacing
    return float(error.mean()), float(np.percentile(error.numpy(), 95))


def run_demo(output_dir: str | Path, resolution: int = 2, seed: int = 0, progress: bool = True) -> str:
    """Refine the example's prediction, write ``demo.png``, and return a table of what it brought.

    Args:
        output_dir: folder for the picture, made if missing.
        resolution: voxel edge in millimetres.
        seed: of the example.
        progress: show a progress bar.

    Raises:
        ImportError: matplotlib or nilearn is not installed.
        ValueError: a resolution out of range, or a file where the folder should be.
    """
    figure_class()  # what is missing is found before the work
    check_outputs(Path(output_dir), ["demo.png"], overwrite=True)
    example = brain_example(resolution, seed)
    result = refine(example.fixed, example.moving, example.prediction, progress=progress)
    identity = torch.zeros_like(example.truth)
    lines = [f"{'':<20}{'dissimilarity':>14}{'folds':>8}{'error, mean':>14}{'95 %':>11}"]
    losses = {"network's prediction": result.initial_loss, "refined by LM": result.final_loss}
    fields = {"no registration": identity, "network's prediction": example.prediction, "refined by LM": result.ddf}
    for name, ddf in fields.items():
        mean, high = endpoint_error(example, ddf)
        loss = f"{float(losses[name][0]):14.4f}" if name in losses else f"{'':14}"
        lines.append(f"{name:<20}{loss}{int(fold_count(ddf)):8d}{mean:11.2f} mm{high:8.2f} mm")
    picture = Path(output_dir) / "demo.png"
    _draw(example, result, picture)
    lines.append(
        f"{len(result.history[0])} iterations in {result.seconds:.1f} s on {example.fixed.device}; see {picture}"
    )
    return "\n".join(lines)


def _draw(example: Example, result: RefinementResult, path: Path) -> None:
    """Fixed, moving, warped before and after, and where the field was wrong before and after."""
    middle = example.fixed.shape[-1] // 2

    def view(volume: Tensor) -> np.ndarray:
        """The middle plane of a volume, its last axis upwards."""
        return np.flipud(volume[..., middle].squeeze().numpy().T)

    def error(ddf: Tensor) -> Tensor:
        """Distance of a field to the truth inside the brain, ``(1, *S)`` in millimetres."""
        return lengths(ddf - example.truth) * example.spacing * example.mask

    figure = figure_class()(figsize=(9, 6.6), layout="constrained")
    axes = figure.subplots(2, 3)
    after = warp(example.moving, result.ddf)
    panels = [
        ("fixed", example.fixed, "gray", None),
        ("moving, as predicted", warp(example.moving, example.prediction), "gray", None),
        ("moving, refined", after, "gray", None),
        ("moving", example.moving, "gray", None),
        ("error of the prediction", error(example.prediction), "inferno", 4.0),
        ("error after refinement", error(result.ddf), "inferno", 4.0),
    ]
    for axis, (title, volume, colours, top) in zip(axes.flat, panels, strict=True):
        shown = axis.imshow(view(volume), cmap=colours, vmin=0, vmax=top)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[1, 2], label="mm", shrink=0.8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
