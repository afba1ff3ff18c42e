"""Fields, affines and landmarks in files."""

from monai_lm.io.affine import read_affine, write_affine
from monai_lm.io.afni import read_afni_ddf
from monai_lm.io.formats import FORMATS, READABLE, file_suffix, guess_format, read_ddf, write_ddf
from monai_lm.io.freesurfer import read_freesurfer_ddf, write_freesurfer_ddf
from monai_lm.io.fsl import read_fsl_ddf, write_fsl_ddf
from monai_lm.io.itk import read_itk_ddf, write_itk_ddf
from monai_lm.io.itk_images import read_itk_image_ddf, write_itk_image_ddf
from monai_lm.io.itk_transform import read_itk_transform, write_itk_transform
from monai_lm.io.m3z import read_m3z_ddf
from monai_lm.io.niftyreg import read_niftyreg_ddf
from monai_lm.io.points import read_points
from monai_lm.io.vectors import read_millimetre_ddf
from monai_lm.io.voxel import read_learn2reg_ddf, read_voxel_ddf, write_learn2reg_ddf, write_voxel_ddf

__all__ = [
    "FORMATS",
    "READABLE",
    "file_suffix",
    "guess_format",
    "read_affine",
    "read_afni_ddf",
    "read_ddf",
    "read_freesurfer_ddf",
    "read_fsl_ddf",
    "read_itk_ddf",
    "read_itk_image_ddf",
    "read_itk_transform",
    "read_learn2reg_ddf",
    "read_m3z_ddf",
    "read_millimetre_ddf",
    "read_niftyreg_ddf",
    "read_points",
    "read_voxel_ddf",
    "write_affine",
    "write_ddf",
    "write_freesurfer_ddf",
    "write_fsl_ddf",
    "write_itk_ddf",
    "write_itk_image_ddf",
    "write_itk_transform",
    "write_learn2reg_ddf",
    "write_voxel_ddf",
]
