"""Lightning modules; importing this package imports ``pytorch_lightning``."""

from monai_lm.training.module import RegistrationModule

__all__ = ["RegistrationModule"]
