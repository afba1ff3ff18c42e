"""Fields in files."""

from monai_lm.fileio.itk import read_itk_ddf, write_itk_ddf

__all__ = ["read_itk_ddf", "write_itk_ddf"]
