"""Pure functions on displacement fields in voxel units; the convention is in ``docs/method.md``."""

from monai_lm.fields.algebra import compose, integrate, resample
from monai_lm.fields.inversion import invert
from monai_lm.fields.sampling import sample_points, warp
from monai_lm.fields.smoothing import gaussian_smooth
from monai_lm.fields.topology import fold_count, jacobian_determinant, repair

__all__ = [
    "compose",
    "fold_count",
    "gaussian_smooth",
    "integrate",
    "invert",
    "jacobian_determinant",
    "repair",
    "resample",
    "sample_points",
    "warp",
]
