"""Fields and affines in files."""

from monai_lm.fileio.affine import read_affine
from monai_lm.fileio.itk import read_itk_ddf, write_itk_ddf

__all__ = ["read_affine", "read_itk_ddf", "write_itk_ddf"]
