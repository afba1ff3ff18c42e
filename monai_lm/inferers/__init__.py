"""A MONAI inferer that predicts and refines, and networks that go with it."""

from monai_lm.inferers.inferer import RegistrationInferer

__all__ = ["RegistrationInferer"]
