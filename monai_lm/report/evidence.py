"""What speaks for or against a field beside the loss: how the images explain each other, and how hard it pulls.

The bounds are from real pairs, of one contrast and of several, and from nonsense in place of the moving image;
``docs/results.md`` has the table and the command that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_lm.fields import gaussian_smooth, jacobian_determinant, warp
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.kernels.reference import box_sum, inverse_window_counts, over_voxels
from monai_lm.report.rivals import rivals_of
from monai_lm.similarity import LNCC, MI, MIND, MSE, NCC, MappedLNCC
from monai_lm.similarity.base import contrast, normalized
from monai_lm.similarity.lookup import MEASURES

__all__ = [
    "AGREEMENT",
    "EXTREMES",
    "HARDLY",
    "LOSS",
    "MIRROR",
    "MIRRORS",
    "NOISE",
    "POLARITY",
    "ROUGHNESS",
    "TOLD",
    "Evidence",
    "agreement",
    "doubts_of",
    "evidence_of",
    "extremes",
    "gains_of",
    "information",
    "local_fit",
]

AGREEMENT = 0.5
"""A field whose images explain less of each other than this is doubted, if the measure asks for one contrast."""

NOISE = 0.77
"""What the agreement of noise, .01 to .20 before, has come to by being refined onto a real image."""

POLARITY = 0.96
"""A field of LNCC, NCC or MSE under which less of the local covariance is of one sign is doubted: 'brighter here is
brighter there' holds in some places, and its opposite in others."""

LOSS, HARDLY = {"information": -0.005, "agreement": -0.01}, 0.01
"""A field that costs smoothed images more :func:`information` than this is doubted, and one that costs them more
:func:`agreement`, if information rises by less than the second."""

TOLD = 0.3
"""Below this :func:`information` a field of MI or MIND is doubted, of which no local fit can be asked."""

ROUGHNESS = 0.82
"""A field whose log Jacobian varies more than this is doubted."""

EXTREMES = 0.2
"""A field that changes the volume of more than this share of the voxels more than four-fold is doubted."""

MIRROR = {"lncc": -0.015, "mind": -0.15}
"""Images of which a mirror image matches better by this share are doubted, by what they were compared with; see
:class:`~monai_lm.report.rivals.Rivals`. Brains, nearly the same in the mirror, come to -.006 and -.07."""

MIRRORS = {"lncc": 0.03, "mind": 0.045}
"""So are those whose mirror images match on average worse by less than this."""

_RADIUS, _EPSILON, _ROWS = 2, 2e-3, 16

_LITTLE, _SMOOTH = 1.0, 2.0
"""Voxels by which images are smoothed where noise must not count: a field that follows it fits them no better. Much
noise needs the second; where contrasts differ, it takes the borders' contrast away, too."""


@dataclass(frozen=True)
class Evidence:
    """Values of one field.

    Attributes:
        agreement: see :func:`local_fit`; NaN for a constant fixed image.
        sdlogj: standard deviation of the logarithm of the Jacobian determinant.
        extremes: see :func:`extremes`.
        polarity: see :func:`local_fit`, of smoothed images; its absolute value where a measure does not care for the
            sign; NaN where it does not ask for one contrast everywhere, or nobody knows.
        information: see :func:`information`.
        gained: by how much that rose with the field; see :func:`gains_of`.
        agreed: by how much the agreement did.
        mirror: :attr:`~monai_lm.report.rivals.Rivals.best` of the mirror images; NaN where they tell nothing.
        mirrors: :attr:`~monai_lm.report.rivals.Rivals.mean` of them.
        centred: :attr:`~monai_lm.report.rivals.Rivals.centred`.
        any_contrast: whether the measure is made for images of different contrast.
        witness: what mirror images were compared with, ``"lncc"``, or ``"mind"`` where contrasts may differ.
    """

    agreement: float
    sdlogj: float
    extremes: float
    polarity: float = float("nan")
    information: float = float("nan")
    gained: float = float("nan")
    agreed: float = float("nan")
    mirror: float = float("nan")
    mirrors: float = float("nan")
    centred: float = float("nan")
    any_contrast: bool = False
    witness: str = "lncc"


def evidence_of(
    fixed: Tensor,
    moving: Tensor,
    ddf: Tensor,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    similarity: str = "",
    spacing: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Evidence:
    """Evidence on the first channels of two images and a field.

    Args:
        fixed: ``(1, C, *S)``.
        moving: ``(1, C, *S)`` on the same grid.
        ddf: ``(1, n, *S)`` in voxels.
        start: ``(1, n, *S)`` the field that the refinement started from; default: none.
        mask: ``(1, 1, *S)`` weights, or None.
        similarity: name of what was optimised, as :class:`monai_lm.RefinementResult` has it.
        spacing: voxel edge per axis; default: 1.
        device: where the mirror images are refined; default: where the images are.
    """
    fixed, moving = (image[:, :1].float().contiguous() for image in (fixed, moving))
    measure = MEASURES.get(similarity)
    warped = warp(moving, ddf)
    began = moving if start is None else warp(moving, start)
    gained, agreed, polarity = gains_of(fixed, moving, ddf, start, mask)
    where = fixed.device if device is None else torch.device(device)
    witness = "lncc" if measure in (LNCC, NCC, MSE) else "mind"
    shown = None if mask is None else mask.to(where)
    rivals = rivals_of(fixed.to(where), began.to(where), MEASURES[witness](), spacing, shown)
    return Evidence(
        agreement=agreement(fixed, warped, mask),
        sdlogj=float(sd_log_jacobian(ddf)),
        extremes=extremes(ddf),
        polarity=polarity if measure is MSE else abs(polarity) if measure in (LNCC, NCC) else float("nan"),
        information=information(fixed, warped, mask),
        gained=gained,
        agreed=agreed,
        mirror=rivals.best,
        mirrors=rivals.mean,
        centred=rivals.centred,
        any_contrast=measure in (MI, MIND, MappedLNCC),
        witness=witness,
    )


def gains_of(
    fixed: Tensor, moving: Tensor, ddf: Tensor, start: Tensor | None = None, mask: Tensor | None = None
) -> tuple[float, float, float]:
    """What the field brings images that are smoothed first, which no measure has optimised.

    Args:
        fixed: ``(1, 1, *S)``.
        moving: ``(1, 1, *S)``.
        ddf: ``(1, n, *S)`` in voxels.
        start: ``(1, n, *S)`` the field to compare with; default: none.
        mask: ``(1, 1, *S)`` weights, or None.

    Returns:
        By how much :func:`information` rose, the lesser of images smoothed by a voxel and by two; by how much
        :func:`agreement` did of the latter; and the polarity of these, see :func:`local_fit`.
    """
    rises = []
    for sigma in (_LITTLE, _SMOOTH):
        still, smooth = gaussian_smooth(fixed, sigma), gaussian_smooth(moving, sigma)
        before, after = smooth if start is None else warp(smooth, start), warp(smooth, ddf)
        rises.append(information(still, after, mask) - information(still, before, mask))
    (fitted, _), (fits, polarity) = (local_fit(still, warped, mask) for warped in (before, after))
    return min(rises), fits - fitted, polarity


def information(fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> float:
    """Share of the warped image's intensities that the fixed one tells by any map of intensities, in [0, 1].

    It is what :class:`monai_lm.similarity.MI` maximises.

    Args:
        fixed: ``(1, 1, *S)``.
        warped: ``(1, 1, *S)``.
        mask: ``(1, 1, *S)`` weights, or None.
    """
    measure = MI()
    fixed_range, warped_range = measure.ranges(fixed, warped)
    weight = torch.ones_like(fixed) if mask is None else mask.to(fixed)
    reference = measure.ranged_reference(fixed, fixed_range, weight)
    return 1 - float(measure.evaluate(normalized(warped, warped_range), reference)[0] / weight.sum())


def agreement(fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> float:
    """The first value of :func:`local_fit`."""
    return local_fit(fixed, warped, mask)[0]


def local_fit(fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """How the warped image explains the fixed one in windows of 5 voxels.

    Args:
        fixed: ``(1, 1, *S)``.
        warped: ``(1, 1, *S)``.
        mask: ``(1, 1, *S)`` weights, or None.

    Returns:
        The *agreement*, the share of the fixed image's local variance that a linear fit of the warped image explains,
        whatever its contrast, in [0, 1]: the sum of what the fits explain over the sum of the variances. Background,
        which has none, does not count. And the *polarity*, the sum of the covariances over that of their sizes: 1 where
        what is brighter is brighter in the other image everywhere, -1 where it is darker. NaN where nothing varies.
    """
    images = [_standardized(image, mask) for image in (fixed, warped)]
    explained, whole, together, sizes = 0.0, 0.0, 0.0, 0.0
    for first in range(0, fixed.shape[2], _ROWS):  # slabs: a volume of windows' statistics is large
        low, high = max(0, first - _RADIUS), first + _ROWS + _RADIUS
        f, w = (image[:, :, low:high] for image in images)
        means = box_sum(torch.cat([f, w, f * f, w * w, f * w], 1), _RADIUS) * inverse_window_counts(f, _RADIUS)
        mf, mw, ff, ww, fw = means[:, :, first - low : first - low + _ROWS].split(1, 1)
        variance, other, both = (ff - mf * mf).clamp(min=0), (ww - mw * mw).clamp(min=0), fw - mf * mw
        fit = both.square() / (other + _EPSILON)
        weight = 1.0 if mask is None else mask[:, :, first : first + _ROWS]
        explained += float((torch.minimum(fit, variance) * weight).double().sum())
        whole += float((variance * weight).double().sum())
        together += float((both * weight).double().sum())
        sizes += float((both.abs() * weight).double().sum())
    nothing = float("nan")
    return explained / whole if whole > 0 else nothing, together / sizes if sizes > 0 else nothing


def _standardized(image: Tensor, mask: Tensor | None) -> Tensor:
    """Without its mean, in units of its contrast, of what the mask shows."""
    shown = torch.ones_like(image) if mask is None else (mask > 0).to(image)
    centred = image - (image * shown).sum() / shown.sum()
    centred = centred / centred.abs().max().clamp(min=torch.finfo(image.dtype).tiny)  # squares of the smallest are 0
    return centred / over_voxels(contrast(centred * shown), image).clamp(min=1e-12)


def extremes(ddf: Tensor) -> float:
    """Share of the voxels whose volume (in 2D: area) becomes less than a quarter or more than four times as large."""
    determinant = jacobian_determinant(ddf)
    return float(((determinant < 0.25) | (determinant > 4)).double().mean())


def doubts_of(evidence: Evidence) -> dict[str, str]:
    """What is unusual about a field: a short name of each bound that it is beyond, and a sentence."""
    found = {}
    if evidence.agreement < AGREEMENT and not evidence.any_contrast:
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
    if evidence.polarity < POLARITY:
        found["contrast"] = (
            f"The images' contrasts do not correspond: what is brighter in the one is brighter in the other in some "
            f"places and darker in others (polarity {evidence.polarity:.2f}, same or inverted contrast keeps to "
            f"{POLARITY:g}), and the measure expects one relation. Use similarity mapped_lncc or auto, and look at the "
            "result."
        )
    if evidence.any_contrast and evidence.information < TOLD:
        found["information"] = (
            f"The images tell little of each other: {evidence.information:.2f} of the warped one's intensities follow "
            f"from the fixed one's, less than {TOLD:g}."
        )
    uninformed = evidence.gained < HARDLY and evidence.agreed < LOSS["agreement"]
    if evidence.gained < LOSS["information"] or uninformed:
        found["noise"] = (
            f"Seen smoothed, without noise, the images match less than before (mutual information "
            f"{evidence.gained:+.3f}, agreement {evidence.agreed:+.3f}): the field follows noise, or the measure is "
            "wrong. Keep the field it started from, raise smooth_residual, or take another similarity."
        )
    better = evidence.mirror < MIRROR[evidence.witness]
    if better or evidence.mirrors < MIRRORS[evidence.witness]:
        how = (
            f"{-100 * evidence.mirror:.0f} % better than the image as it is"
            if better
            else f"nearly as well, on average but {100 * evidence.mirrors:.0f} % worse"
        )
        found["mirror"] = (
            f"Mirrored, the moving image matches {how}, as those of noise or of another organ do. Look at orientation, "
            "at whether both show the same, and at the place to start from."
        )
    return found
