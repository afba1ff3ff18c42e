"""What comes before a field: a shift, a rigid or an affine map between two images as they were acquired."""

from monai_lm.alignment.align import MODES, align
from monai_lm.alignment.result import Alignment

__all__ = ["MODES", "Alignment", "align"]
