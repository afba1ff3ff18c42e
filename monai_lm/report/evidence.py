"""What speaks for or against a field beside the loss: how far the images explain each other, and how hard it pulls.

The bounds are from real pairs and from nonsense, noise and an image the wrong way round, in place of the moving image;
``docs/results.md`` has the table and the command that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_lm.fields import jacobian_determinant
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.kernels.reference import box_sum, inverse_window_counts, over_voxels
from monai_lm.similarity.base import contrast

__all__ = [
    "AGREEMENT",
    "EXTREMES",
    "NOISE",
    "ROUGHNESS",
    "Evidence",
    "agreement",
    "doubts_of",
    "evidence_of",
    "extremes",
]

AGREEMENT = 0.5
"""A field whose images explain less of each other than this is doubted."""

NOISE = 0.77
"""What the agreement of noise, .01 to .20 before, has come to by being refined onto a real image."""

ROUGHNESS = 0.65
"""A field whose log Jacobian varies more than this is doubted."""

EXTREMES = 0.07
"""A field that changes the volume of more than this share of the voxels more than four-fold is doubted."""

_RADIUS, _EPSILON, _ROWS = 2, 2e-3, 16


@dataclass(frozen=True)
class Evidence:
    """Values of one field.

    Attributes:
        agreement: see :func:`agreement`; NaN for a constant fixed image.
        sdlogj: standard deviation of the logarithm of the Jacobian determinant.
        extremes: see :func:`extremes`.
    """

    agreement: float
    sdlogj: float
    extremes: float


def evidence_of(fixed: Tensor, warped: Tensor, ddf: Tensor, mask: Tensor | None = None) -> Evidence:
    """Evidence on the first channels of two images ``(1, C, *S)`` and a field ``(1, n, *S)`` in voxels."""
    shown = agreement(fixed[:, :1], warped[:, :1], mask)
    return Evidence(shown, float(sd_log_jacobian(ddf)), extremes(ddf))


def agreement(fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> float:
    """Share of the fixed image's local variance that the warped image explains, whatever its contrast, in [0, 1].

    In windows of 5 voxels the warped image is fitted linearly to the fixed one: the sum of what the fits explain over
    the sum of the variances. Background, which has none, does not count.

    Args:
        fixed: ``(1, 1, *S)``.
        warped: ``(1, 1, *S)``.
        mask: ``(1, 1, *S)`` weights, or None.
    """
    images = [_standardized(image, mask) for image in (fixed, warped)]
    explained, whole = 0.0, 0.0
    for first in range(0, fixed.shape[2], _ROWS):  # slabs: a volume of windows' statistics is large
        low, high = max(0, first - _RADIUS), first + _ROWS + _RADIUS
        f, w = (image[:, :, low:high] for image in images)
        means = box_sum(torch.cat([f, w, f * f, w * w, f * w], 1), _RADIUS) * inverse_window_counts(f, _RADIUS)
        mf, mw, ff, ww, fw = means[:, :, first - low : first - low + _ROWS].split(1, 1)
        variance, other = (ff - mf * mf).clamp(min=0), (ww - mw * mw).clamp(min=0)
        fit = (fw - mf * mw).square() / (other + _EPSILON)
        weight = 1.0 if mask is None else mask[:, :, first : first + _ROWS]
        explained += float((torch.minimum(fit, variance) * weight).double().sum())
        whole += float((variance * weight).double().sum())
    return explained / whole if whole > 0 else float("nan")


def _standardized(image: Tensor, mask: Tensor | None) -> Tensor:
    """Without its mean, in units of its contrast, of what the mask shows."""
    shown = torch.ones_like(image) if mask is None else (mask > 0).to(image)
    centred = image - (image * shown).sum() / shown.sum()
    return centred / over_voxels(contrast(centred * shown), image).clamp(min=1e-12)


def extremes(ddf: Tensor) -> float:
    """Share of the voxels whose volume (in 2D: area) becomes less than a quarter or more than four times as large."""
    determinant = jacobian_determinant(ddf)
    return float(((determinant < 0.25) | (determinant > 4)).double().mean())


def doubts_of(evidence: Evidence) -> dict[str, str]:
    """What is unusual about a field: a short name of each bound that it is beyond, and a sentence."""
    found = {}
    if evidence.agreement < AGREEMENT:
        found["agreement"] = (
            f"The refined image explains only {evidence.agreement:.2f} of the fixed one's local variance, less than "
            f"{AGREEMENT:g}, which matched pairs of one contrast exceed. Noise, refined too, came to {NOISE:g}."
        )
    if evidence.sdlogj > ROUGHNESS:
        found["rough"] = (
            f"The field is rough: the log Jacobian varies by {evidence.sdlogj:.2f} (SDlogJ), beyond the {ROUGHNESS:g} "
            "that real pairs keep to. Noise that is fitted looks like this."
        )
    if evidence.extremes > EXTREMES:
        found["extreme"] = (
            f"The field changes the volume of {100 * evidence.extremes:.1f} % of the voxels more than four-fold, "
            f"beyond the {100 * EXTREMES:g} % that real pairs keep to."
        )
    return found
