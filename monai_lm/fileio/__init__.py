"""Fields in files."""

from monai_lm.fileio.itk import write_itk_ddf

__all__ = ["write_itk_ddf"]
