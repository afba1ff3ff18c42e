"""Lightning modules; importing this package imports ``pytorch_lightning``."""

from monai_lm.training.data import PairDataModule
from monai_lm.training.module import RegistrationModule
from monai_lm.training.writer import FieldWriter

__all__ = ["FieldWriter", "PairDataModule", "RegistrationModule"]
