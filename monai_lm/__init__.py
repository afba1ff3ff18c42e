"""Test-time refinement of predicted deformation fields with factored Levenberg-Marquardt, inside MONAI."""

from typing import TYPE_CHECKING, Any

from monai_lm.alignment import Alignment, align
from monai_lm.solver.optimizer import FactoredLM
from monai_lm.solver.refinement import refine
from monai_lm.solver.result import RefinementResult
from monai_lm.solver.sequence import refine_sequence
from monai_lm.solver.uncertainty import uncertainty

if TYPE_CHECKING:
    from monai_lm.inferers import RegistrationInferer

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "FactoredLM",
    "RefinementResult",
    "RegistrationInferer",
    "__version__",
    "align",
    "refine",
    "refine_sequence",
    "uncertainty",
]


def __getattr__(name: str) -> Any:
    """The inferer, imported when it is asked for: MONAI takes seconds to import, which :func:`refine` does without."""
    if name != "RegistrationInferer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from monai_lm.inferers import RegistrationInferer

    return RegistrationInferer


def __dir__() -> list[str]:
    """What the package has, the inferer before it is imported too."""
    return sorted({*globals(), *__all__})
