"""What the options of ``monai-lm`` may be, as types: a wrong one is told before anything is imported or read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, restricted_number_type

Alignment: TypeAlias = Literal["auto", "center", "rigid", "affine"]
Kernels: TypeAlias = Literal["auto", "native", "reference"]
Measure: TypeAlias = Literal["lncc", "mapped_lncc", "mi", "mind", "mse", "ncc", "auto"]
Memory: TypeAlias = Literal["auto", "full", "half"]
Regularization: TypeAlias = Literal["diffusion", "bending", "sliding"]
Written: TypeAlias = Literal["itk", "itk_transform", "metaimage", "nrrd", "fsl", "voxel", "learn2reg", "freesurfer"]
Readable: TypeAlias = Literal[
    "auto", "itk", "itk_transform", "metaimage", "nrrd", "fsl", "voxel", "learn2reg", "niftyreg", "freesurfer", "m3z",
    "afni", "ras", "lps", "positions",
]  # fmt: skip

if TYPE_CHECKING:
    Count: TypeAlias = int
    Positive: TypeAlias = float
    Resolution: TypeAlias = int
    Scale: TypeAlias = float
    Weight: TypeAlias = float
else:  # these check
    Count, Positive, Weight = NonNegativeInt, PositiveFloat, NonNegativeFloat
    Resolution = restricted_number_type("Resolution", int, [(">=", 1), ("<=", 4)])
    Scale = restricted_number_type("Scale", float, (">=", 1))
