"""NiftyReg's transformations, by what its headers say: the name NREG_TRANS and the kind in ``intent_p1``."""

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io import guess_format, read_ddf, read_itk_ddf, read_niftyreg_ddf

GRID = np.array([[-2.0, 0, 0, 90.0], [0, 2.0, 0, -126.0], [0, 0, 2.5, -72.0], [0, 0, 0, 1]])
SIZE = (5, 6, 7)


def save(path, vectors, kind, affine=GRID, name="NREG_TRANS"):
    image = nib.Nifti1Image(np.asarray(vectors, np.float32), affine)
    image.header.set_intent(1007, name=name)
    image.header["intent_p1"] = kind
    nib.save(image, path)
    return path


def places(size=SIZE):
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return (voxels @ GRID[:3, :3].T + GRID[:3, 3])[:, :, :, None]


def test_a_displacement_is_in_ras_millimetres(tmp_path):
    """+4 mm to the right on voxels of 2 mm that run to the left is -2 voxels, +5 mm up two of 2.5 mm."""
    save(tmp_path / "disp.nii.gz", np.broadcast_to([4.0, 2.0, 5.0], (*SIZE, 1, 3)), 1)
    assert guess_format(tmp_path / "disp.nii.gz") == "niftyreg"
    for said in ("auto", "niftyreg"):
        ddf, affine = read_ddf(tmp_path / "disp.nii.gz", said)
        np.testing.assert_allclose(ddf, np.broadcast_to([[[[-2.0]]], [[[1.0]]], [[[2.0]]]], (3, *SIZE)), atol=1e-5)
        np.testing.assert_allclose(affine, GRID)


def test_a_deformation_is_where_voxels_are_led(tmp_path):
    save(tmp_path / "def.nii", places(), 0)
    np.testing.assert_allclose(read_ddf(tmp_path / "def.nii")[0], 0, atol=1e-4)
    save(tmp_path / "def.nii", places() + np.array([4.0, 2.0, 5.0]), 0)
    np.testing.assert_allclose(read_niftyreg_ddf(tmp_path / "def.nii")[0][:, 1, 2, 3], [-2.0, 1.0, 2.0], atol=1e-4)
    moving = np.diag([1.0, 1.0, 1.0, 1.0])
    ddf, _ = read_ddf(tmp_path / "def.nii", moving_affine=moving)
    np.testing.assert_allclose(ddf[:, 1, 2, 3] + [1, 2, 3], places()[1, 2, 3, 0] + [4.0, 2.0, 5.0], atol=1e-4)


def test_two_dimensions(tmp_path):
    save(tmp_path / "disp.nii", np.broadcast_to([4.0, 2.0], (5, 6, 1, 1, 2)), 1)
    np.testing.assert_allclose(read_ddf(tmp_path / "disp.nii")[0][:, 3, 3], [-2.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "what"),
    [(2, "cubic spline"), (3, "velocity field as positions"), (4, "velocity"), (5, "control points of a velocity"),
     (6, "linear spline"), (9, "something else")],
)  # fmt: skip
def test_control_points_and_velocities_are_refused_by_name(tmp_path, kind, what):
    save(tmp_path / "cpp.nii", places(), kind)
    way_out = r"reg_transform -ref FIXED -def cpp.nii FIELD.nii.gz makes a field of it"
    with pytest.raises(
        ValueError, match=rf"cpp.nii must hold NiftyReg's positions .* got .*{what}.* \({kind}\); {way_out}"
    ):
        read_ddf(tmp_path / "cpp.nii")


def test_the_other_reader_is_named(tmp_path):
    save(tmp_path / "disp.nii", np.ones((*SIZE, 1, 3)), 1)
    with pytest.raises(ValueError, match=r"disp.nii must be ITK's, got NiftyReg's; say file_format='niftyreg'"):
        read_itk_ddf(tmp_path / "disp.nii")
    save(tmp_path / "itk.nii", np.ones((*SIZE, 1, 3)), 1, name="")
    with pytest.raises(ValueError, match=r"itk.nii must be named NREG_TRANS to be NiftyReg's, got b''"):
        read_niftyreg_ddf(tmp_path / "itk.nii")
