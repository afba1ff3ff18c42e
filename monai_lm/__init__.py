"""Test-time refinement of predicted deformation fields with factored Levenberg-Marquardt, inside MONAI."""

from monai_lm.inferers import RegistrationInferer
from monai_lm.optimizer import FactoredLM
from monai_lm.refinement import refine
from monai_lm.result import RefinementResult

__version__ = "0.1.0"

__all__ = ["FactoredLM", "RefinementResult", "RegistrationInferer", "__version__", "refine"]
