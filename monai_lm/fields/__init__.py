"""Pure functions on displacement fields in voxel units; the convention is in ``docs/method.md``.

A field with NaN or infinite values raises here; see :func:`monai_lm.fields.finite.checked` for when it does not. The
functions as they are, for a loop that has looked already, are those of the modules.
"""

from monai_lm.fields import algebra, sampling, topology
from monai_lm.fields.algebra import resample
from monai_lm.fields.finite import checked
from monai_lm.fields.inversion import invert
from monai_lm.fields.smoothing import gaussian_smooth
from monai_lm.fields.topology import fold_count, jacobian_determinant

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

compose = checked(algebra.compose, "outer", "inner")
integrate = checked(algebra.integrate, "velocity")
repair = checked(topology.repair, "ddf", "outer")
sample_points = checked(sampling.sample_points, "ddf")
warp = checked(sampling.warp, "ddf")
