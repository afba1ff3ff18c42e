"""A linear alignment that was found, and what it does in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Alignment"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """What :func:`monai_lm.align` found.

    Attributes:
        matrix: ``(4, 4)`` float64 in RAS millimetres, from points of the fixed to points of the moving image; in 2D the
            third axis stays as it is.
        kind: ``"none"`` (the headers' places are kept), ``"center"``, ``"rigid"`` or ``"affine"``.
        mode: what was asked for.
        losses: dissimilarity per voxel of each kind that was tried, on the coarse images that it was found with.
        centre: ``(n,)`` middle of what the fixed image shows, in RAS millimetres.
        seconds: how long it took.
        apart: distance in millimetres between the rigid maps that two halves of the fixed image find on their own, root
            mean square over what it shows; ``None`` where they were not asked.
    """

    matrix: np.ndarray
    kind: str
    mode: str
    losses: Mapping[str, float]
    centre: np.ndarray
    seconds: float
    apart: float | None = None

    @property
    def shift(self) -> float:
        """How far it moves the middle of the fixed image, in millimetres."""
        n = len(self.centre)
        return float(np.linalg.norm(self.matrix[:n, :n] @ self.centre + self.matrix[:n, 3] - self.centre))

    @property
    def rotation(self) -> float:
        """Its angle in degrees, of the rotation that is nearest to it."""
        u, _, v = np.linalg.svd(self.matrix[:3, :3])
        return float(np.degrees(np.arccos(np.clip((np.trace(u @ v) - 1) / 2, -1, 1))))

    @property
    def scales(self) -> tuple[float, ...]:
        """Its least and its largest change of a length, as a factor."""
        n = len(self.centre)
        lengths = np.linalg.svd(self.matrix[:n, :n], compute_uv=False)
        return float(lengths[-1]), float(lengths[0])

    @property
    def _refused(self) -> str:
        if self.losses[self.mode] >= self.losses[self.kind]:
            return "was no better"
        return "is not taken: too few voxels tell it, or what half of them tell does not hold for the others"

    def values(self) -> dict[str, Any]:
        """As JSON values, the matrix row by row."""
        return {
            "kind": self.kind, "mode": self.mode, "matrix": self.matrix.tolist(), "shift_mm": self.shift,
            "rotation_degrees": self.rotation, "scales": list(self.scales), "losses": dict(self.losses),
            "seconds": self.seconds,
        }  # fmt: skip

    def __str__(self) -> str:
        """One or two sentences for a reader."""
        before = self.losses["none"]
        if self.apart is not None and self.kind in ("none", "center"):
            stay = "stay where their headers put them" if self.kind == "none" else "are shifted onto each other only"
            return (
                f"No alignment is taken: two halves of the fixed image, aligned on their own, lead {self.apart:.1f} mm "
                f"apart (root mean square); the images {stay}."
            )
        if self.kind == "none":
            tried = {name: loss for name, loss in self.losses.items() if name != "none"}
            best = min(tried, key=lambda name: tried[name])
            return (
                f"No alignment was needed, or found: none makes the images clearly more alike than they are where "
                f"their headers put them (dissimilarity {before:.4g}; {best} {tried[best]:.4g}); they stay there."
            )
        name = {"center": "a shift", "rigid": "a rigid map", "affine": "an affine map"}[self.kind]
        parts = [f"the middle moves by {self.shift:.1f} mm"]
        if self.kind != "center":
            parts.append(f"turns by {self.rotation:.1f}°")
        if self.kind == "affine":
            parts.append(f"lengths change by {self.scales[0]:.2f} to {self.scales[1]:.2f}")
        text = f"Aligned first, by {name}: {', '.join(parts)}. "
        reached = f"{before:.4g} → {self.losses[self.kind]:.4g}" if np.isfinite(before) else "there was no overlap"
        text += f"Dissimilarity of the coarse images: {reached}."
        if self.mode in ("rigid", "affine") and self.mode != self.kind:
            text += f" The {self.mode} map that was asked for {self._refused}."
        return text
