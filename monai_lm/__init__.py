"""Test-time refinement of predicted deformation fields with the factored Levenberg-Marquardt optimizer, inside MONAI."""

from monai_lm.refinement import refine
from monai_lm.result import RefinementResult

__version__ = "0.1.0"

__all__ = ["RefinementResult", "__version__", "refine"]
