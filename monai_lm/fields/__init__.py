"""Pure functions on displacement fields in voxel units; see ``docs/conventions.md`` for the convention."""

from monai_lm.fields.algebra import compose, integrate, invert, resample
from monai_lm.fields.sampling import warp
from monai_lm.fields.smoothing import gaussian_smooth
from monai_lm.fields.topology import fold_count, guard, jacobian_determinant, repair

__all__ = [
    "compose",
    "fold_count",
    "gaussian_smooth",
    "guard",
    "integrate",
    "invert",
    "jacobian_determinant",
    "repair",
    "resample",
    "warp",
]
