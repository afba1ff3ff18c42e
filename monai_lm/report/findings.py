"""What a report says in numbers and words: metrics before and after, warnings, the verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_lm.fields import fold_count, warp
from monai_lm.fields.algebra import lengths
from monai_lm.fields.metrics import label_overlap, sd_log_jacobian
from monai_lm.report.case import Case
from monai_lm.report.course import cut_short
from monai_lm.report.evidence import Evidence, agreement, doubts_of, evidence_of
from monai_lm.report.rivals import centre_of_mass
from monai_lm.similarity.outliers import squeezed, without_outliers

__all__ = [
    "CENTRED",
    "HELD",
    "LARGE_MISALIGNMENT",
    "STRAINED",
    "Assessment",
    "Case",
    "FieldMetrics",
    "assess",
    "measure_field",
    "verdict",
    "warnings_of",
]

_DOUBTS = {
    "agreement": "the images agree little", "rough": "the field is rough", "extreme": "volumes change a lot",
    "contrast": "the contrasts do not correspond", "information": "the images tell little of each other",
    "noise": "without noise the images match less than before", "mirror": "a mirror image fits as well or better",
    "misaligned": "the images were far apart", "iterations": "the iterations ran out",
}  # fmt: skip
"""What :func:`~monai_lm.report.evidence.doubts_of` finds, for the headline."""

ALIKE = 0.98
"""Agreement of images that match before the refinement, as an image does with itself."""

LARGE_MISALIGNMENT = 0.1
"""A start is far off if the two centres of mass are further apart than this part of the longest edge of the grid."""

HELD = 0.2
"""Share of what the fixed image shows that a field may be held in without a word, see
:class:`monai_lm.RefinementResult`."""

CENTRED, STRAINED = -0.2, 0.47
"""Images that were far apart have not come together if the field has an SDlogJ above the second, and, across contrasts,
where fields vary more, they match better by the first, a share, with their centres on each other
(:attr:`~monai_lm.report.rivals.Rivals.centred`)."""


@dataclass(frozen=True)
class FieldMetrics:
    """Values of one field; None where there is nothing to measure them on.

    Attributes:
        dice: per label of either map, in [0, 1].
        hd95: per label, 95th percentile of the symmetric surface distance in millimetres; NaN if one side is empty.
        tre: mean distance of the landmarks in millimetres.
        sdlogj: standard deviation of the logarithm of the Jacobian determinant, inside the mask where there is one.
        folds: folded cells, of the whole grid.
        folds_inside: those of them that the mask does not leave out, where there is one.
        displacement: mean length of the displacement in millimetres.
    """

    dice: dict[int, float] | None
    hd95: dict[int, float] | None
    tre: float | None
    sdlogj: float
    folds: int
    folds_inside: int
    displacement: float

    def values(self) -> dict[str, float]:
        """By the names of :func:`monai_lm.fields.metrics.measure`; NaN where labels have no value."""
        out = {"folds": float(self.folds_inside), "sdlogj": self.sdlogj}
        found = {"tre_mm": self.tre}
        if self.dice is not None:
            found = {"dice": self.mean_dice, "hd95_mm": self.mean_hd95(self.surfaces)} | found
            out |= dict.fromkeys(("dice", "hd95_mm"), float("nan"))
        return out | {name: value for name, value in found.items() if value is not None}

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels."""
        return sum(self.dice.values()) / len(self.dice) if self.dice else None

    @property
    def surfaces(self) -> set[int]:
        """Labels that have a distance: those that both maps have."""
        return {label for label, value in (self.hd95 or {}).items() if value == value}  # NaN is not itself

    def mean_hd95(self, labels: Collection[int]) -> float | None:
        """Mean over some of the labels."""
        return sum((self.hd95 or {})[label] for label in labels) / len(labels) if labels else None


def measure_field(case: Case, ddf: Tensor) -> FieldMetrics:
    """All values of a field ``(1, n, *S)`` that the case has something for."""
    edges = torch.tensor(case.spacing).view(1, -1, *[1] * len(case.spacing))
    dice, hd95 = None, None
    if (warped := case.warped_label(ddf)) is not None and case.labels is not None:
        dice, hd95 = label_overlap(warped[0, 0], case.labels[0][0, 0], case.spacing)
    return FieldMetrics(
        dice=dice,
        hd95=hd95,
        tre=case.landmark_error(ddf),
        sdlogj=float(sd_log_jacobian(ddf, mask=case.mask)),
        folds=int(fold_count(ddf)),
        folds_inside=int(fold_count(ddf, case.mask)),
        displacement=float(lengths(ddf * edges).mean()),
    )


@dataclass(frozen=True)
class Assessment:
    """What is to be said of a case.

    Attributes:
        before: values of the field that the refinement started from.
        after: values of the refined field.
        evidence: on the refined field.
        agreement_before: :func:`~monai_lm.report.evidence.agreement` of the images at the start.
        remarks: a short name of each condition that holds, and a sentence; the notes of the case last.
        state: ``"good"``, ``"check"`` or ``"bad"``.
        outcome: ``"improved"``, ``"no improvement"``, ``"suspicious"`` or ``"folded"``.
        headline: the first sentence of the report.
    """

    before: FieldMetrics
    after: FieldMetrics
    evidence: Evidence
    agreement_before: float
    remarks: dict[str, str]
    state: str
    outcome: str
    headline: str

    def values(self) -> dict[str, Any]:
        """What ``metrics.json`` keeps: measures and agreement before and after, extremes, verdict and remarks."""
        return {
            **{f"{name}_before": value for name, value in self.before.values().items()},
            **{f"{name}_after": value for name, value in self.after.values().items()},
            "agreement_before": self.agreement_before, "agreement_after": self.evidence.agreement,
            "extremes_after": self.evidence.extremes, "polarity_after": self.evidence.polarity,
            "information_after": self.evidence.information, "information_gained": self.evidence.gained,
            "agreement_gained": self.evidence.agreed,
            "mirror": self.evidence.mirror, "mirrors": self.evidence.mirrors, "centred": self.evidence.centred,
            "verdict": self.state, "outcome": self.outcome, "headline": self.headline, "remarks": self.remarks,
        }  # fmt: skip


def assess(case: Case) -> Assessment:
    """Measure the fields of a case and say what they are worth."""
    before, after = (measure_field(case, ddf) for ddf in (case.start, case.ddf))
    fixed, moving = without_outliers(case.fixed, case.moving)
    similarity = case.result.similarity
    evidence = evidence_of(fixed, moving, case.ddf, case.start, case.mask, similarity, case.spacing, case.device)
    start = agreement(fixed[:, :1], warp(moving[:, :1], case.start), case.mask)
    doubts = doubts_of(evidence)
    remarks = warnings_of(case, before, after) | doubts | _far_apart(case, evidence, bool(doubts)) | _cut_short(case)
    if narrow := [name for name, image in (("fixed", fixed), ("moving", moving)) if squeezed(image)]:
        remarks["outliers"] = (
            f"Nearly all voxels of the {' and the '.join(narrow)} image share a hundredth of its range, and those "
            "beyond are too many to be left out: the similarity may have seen little else. Clip the intensities, or "
            "mask what is brightest or darkest."
        )
    if start > ALIKE and set(remarks) == {"similarity"}:
        text = f"The images matched already, they explain {start:.2f} of each other. {_kept(case)}"
        return Assessment(before, after, evidence, start, dict(case.notes), "good", "no improvement", text)
    return Assessment(before, after, evidence, start, remarks | dict(case.notes), *verdict(case, remarks))


def _misalignment(case: Case) -> tuple[float, float]:
    """Distance of the centres of mass at the start, and the longest edge of the grid, both in millimetres."""
    start = warp(case.moving, case.start)
    centres = centre_of_mass(case.fixed[0, 0]), centre_of_mass(start[0, 0])
    offsets = [(a - b) * edge for a, b, edge in zip(*centres, case.spacing, strict=True)]
    edges = [s * edge for s, edge in zip(case.fixed.shape[2:], case.spacing, strict=True)]
    return sum(o * o for o in offsets) ** 0.5, max(edges)


def _far_apart(case: Case, evidence: Evidence, doubted: bool) -> dict[str, str]:
    """A remark on images that were far apart, unless all speaks for it that the field brought them together."""
    distance, longest = _misalignment(case)
    missed = doubted or (evidence.sdlogj > STRAINED and (evidence.witness == "lncc" or evidence.centred < CENTRED))
    if not (distance > LARGE_MISALIGNMENT * longest and missed):
        return {}
    way_out = "Align them first (--affine auto, monai_lm.align), or start from a better field."
    if case.aligned:
        way_out = "Their alignment did not suffice: give an affine of another program, or start from a better field."
    return {
        "misaligned": f"Large initial misalignment: at the start the centres of the two images were {distance:.1f} mm "
        f"apart ({100 * distance / longest:.0f} % of the longest edge), and it does not look as if the field had "
        f"brought them together. {way_out}"
    }


def _cut_short(case: Case) -> dict[str, str]:
    """A remark on levels that ended by their limit of iterations, unless it was the time that ended them."""
    budget, found = case.settings.get("seconds"), cut_short(case.result.history[0])
    if not found or (budget is not None and case.result.seconds >= float(budget)):
        return {}
    late = " and ".join(
        f"the last ones of {cut.iterations} at scale {cut.scale:g} brought {100 * cut.share:.0f} % of what they gained"
        for cut in found
    )
    return {
        "iterations": f"The iterations ran out while the images still got more alike: {late}. Allow more iterations, "
        f"or start from {'a better field' if case.aligned else 'a better field (--affine auto)'}."
    }


def warnings_of(case: Case, before: FieldMetrics, after: FieldMetrics) -> dict[str, str]:
    """What a reader must know before trusting the field: a short name of each condition that holds, and a sentence.

    Args:
        case: the pair.
        before: values of the field that the refinement started from.
        after: values of the refined field.
    """
    found: dict[str, str] = {}
    if after.folds > 0:
        found["folds"] = (
            f"The refined field still folds in {after.folds} cells. This must never happen: do not use the field, and "
            "report it as a defect of monai_lm."
        )
    if case.result.unimproved:
        found["similarity"] = f"{_kept(case)} The dissimilarity is {float(case.result.initial_loss[0]):.4g}, as before."
    if case.result.unused:
        found["unused"] = (
            "The prediction was not used: it folds in most of its cells, or makes the images less alike than no field "
            "does. The refinement started from the identity. Look at the prediction's axes, units and direction."
        )
    folds = before.folds
    if case.prediction is not None and folds > 0:
        shift = float(case.result.repair_shift[0])
        found["repaired"] = (
            f"The prediction folded space in {folds} cells; it was repaired first, which moved it by {shift:.3g} "
            "voxels on average."
        )
    held = case.result.held
    if case.result.apart is not None and held is not None and float(held[0]) > HELD:
        found["halves"] = (
            f"Two halves of the fixed image, refined on their own, lead {float(case.result.apart[0]):.1f} voxels "
            f"apart. So in {100 * float(held[0]):.0f} % of what it shows the field was kept smoother than usual, or "
            "left as it began: there the images do not tell where things belong. Look at contrasts, noise, alignment; "
            "if these are fine, smooth_residual 0.6 follows the images all the same."
        )
    found.update(_worse(before, after))
    budget = case.settings.get("seconds")
    if budget is not None and case.result.seconds >= float(budget):
        found["budget"] = f"The time budget of {float(budget):g} s was used up; more time may bring a better match."
    return found


def _worse(before: FieldMetrics, after: FieldMetrics) -> dict[str, str]:
    found = {}
    if before.mean_dice is not None and after.mean_dice is not None and after.mean_dice < before.mean_dice:
        found["dice"] = f"The mean Dice of the labels fell from {before.mean_dice:.3f} to {after.mean_dice:.3f}."
    if before.tre is not None and after.tre is not None and after.tre > before.tre:
        found["tre"] = f"The landmarks moved apart: their mean error rose from {before.tre:.2f} to {after.tre:.2f} mm."
    return found


def _kept(case: Case) -> str:
    """What a field is that nothing better was found than."""
    return f"Nothing better was found; this is the start ({case.result.start(0)})."


def verdict(case: Case, warnings: Mapping[str, str]) -> tuple[str, str, str]:
    """State, outcome and headline of an :class:`Assessment`."""
    if "folds" in warnings:
        return "bad", "folded", "Do not use this field: it folds space."
    initial, final = float(case.result.initial_loss[0]), float(case.result.final_loss[0])
    free = "The field has no folds"
    if "similarity" in warnings:
        return "check", "no improvement", _kept(case)
    worse = [name for key, name in (("dice", "labels"), ("tre", "landmarks")) if key in warnings]
    if worse:
        told = f"but the {' and the '.join(worse)} fit worse than before"
        return "check", "suspicious", f"{free} and the images look more alike, {told}."
    doubts = [name for key, name in _DOUBTS.items() if key in warnings]
    if doubts:
        return "check", "suspicious", f"{free} and the images look more alike, but suspiciously: {', '.join(doubts)}."
    change = f"{free} and the images match better than before (dissimilarity {initial:.4g} → {final:.4g})"
    state, end = ("check", "; see the remarks below.") if warnings else ("good", ".")
    return state, "improved", f"{change}{end}"
