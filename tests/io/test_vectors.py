"""Vectors in millimetres that do not say whose they are, positions, and planes with a third component."""

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.io import guess_format, read_ddf, read_itk_ddf, read_millimetre_ddf
from monai_lm.io.images import Field, Image

OBLIQUE = np.array([[0.0, -1.5, 0.2, 90.0], [2.0, 0.0, 0.0, -126.0], [0.0, 0.3, 2.5, -72.0], [0, 0, 0, 1]])
SIZE = (7, 8, 6)


def places(affine, size):
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def save(path, vectors, affine, intent=0):
    image = nib.Nifti1Image(np.asarray(vectors, np.float32), affine)
    image.header["intent_code"] = intent
    nib.save(image, path)
    return path


def shift_of(n=3):
    """A smooth displacement in RAS millimetres ``(*SIZE, 3)``."""
    noise = torch.randn(1, n, *SIZE, generator=torch.Generator().manual_seed(0))
    return 20 * np.moveaxis(gaussian_smooth(noise, 2.0)[0].numpy(), 0, -1)


@pytest.mark.parametrize("fifth", [True, False])
def test_positions_as_spm_writes_them(tmp_path, fifth):
    """``y_`` files: where the voxels of the template are in the subject, RAS millimetres."""
    shift = shift_of()
    positions = places(OBLIQUE, SIZE) + shift
    save(tmp_path / "y.nii", positions[:, :, :, None] if fifth else positions, OBLIQUE)
    ddf, affine = read_ddf(tmp_path / "y.nii", "positions")
    np.testing.assert_allclose(np.moveaxis(ddf, 0, -1) @ OBLIQUE[:3, :3].T, shift, atol=1e-4)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)
    subject = np.diag([1.0, 1.2, 1.4, 1.0])
    ddf, _ = read_millimetre_ddf(tmp_path / "y.nii", "positions", subject)
    voxels = np.moveaxis(ddf, 0, -1) + np.stack(np.meshgrid(*[np.arange(s) for s in SIZE], indexing="ij"), -1)
    np.testing.assert_allclose(voxels @ subject[:3, :3].T, positions, atol=1e-4)


@pytest.mark.parametrize("intent", [1006, 1007])
def test_positions_that_are_called_vectors_are_not_taken_for_displacements(tmp_path, intent):
    save(tmp_path / "y.nii", (places(OBLIQUE, SIZE) + shift_of())[:, :, :, None], OBLIQUE, intent)
    for read in (read_ddf, read_itk_ddf):
        with pytest.raises(
            ValueError, match=r"y.nii must hold displacements, got what looks like positions .*y_ files"
        ):
            read(tmp_path / "y.nii")
    save(tmp_path / "u.nii", 5 * shift_of()[:, :, :, None], OBLIQUE, intent)
    read_ddf(tmp_path / "u.nii")


def test_what_synthmorph_writes_is_in_ras_millimetres(tmp_path):
    """``(X, Y, Z, 3)`` without an intent from before, 1006 with a fifth axis now; one field."""
    shift = shift_of()
    old, new = (
        save(tmp_path / "old.nii", shift, OBLIQUE),
        save(tmp_path / "new.nii", shift[..., None, :], OBLIQUE, 1006),
    )
    ddf = np.moveaxis(shift @ np.linalg.inv(OBLIQUE[:3, :3]).T, -1, 0)
    np.testing.assert_allclose(read_ddf(old, "ras")[0], ddf, atol=1e-4)
    np.testing.assert_allclose(read_ddf(new)[0], ddf, atol=1e-4)


def test_spms_deformation_is_recognised(tmp_path):
    """Big-endian, five dimensions, no intent, described as such: where voxels are led, in RAS millimetres."""
    shift = shift_of()
    image = nib.Nifti1Image((shift + places(OBLIQUE, shift.shape[:3]))[..., None, :].astype(">f4"), OBLIQUE)
    image.header["descrip"] = b"Deformation"
    nib.save(image, tmp_path / "y_a.nii")
    assert guess_format(tmp_path / "y_a.nii") == "positions"
    ddf = np.moveaxis(shift @ np.linalg.inv(OBLIQUE[:3, :3]).T, -1, 0)
    np.testing.assert_allclose(read_ddf(tmp_path / "y_a.nii")[0], ddf, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "intent", "fifth"),
    [
        ("auto", 1007, True),
        ("itk", 1006, True),
        ("ras", 0, False),
        ("lps", 0, True),
        ("positions", 0, True),
        ("voxel", 0, False),
    ],
)
def test_a_plane_with_a_third_component_is_a_field_in_2d_if_that_is_zero(tmp_path, said, intent, fifth):
    plane = np.diag([2.0, 1.5, 4.0, 1.0])
    plane[:3, 3] = (3.0, 4.0, 5.0)
    vectors = np.zeros((5, 6, 1, 3))
    vectors[..., 0] = 3.0
    sign = -1 if said in ("auto", "lps") else 1
    expected = [3.0 if said == "voxel" else 1.5 * sign, 0.0]
    if said == "positions":
        vectors += places(plane, (5, 6, 1))
    save(tmp_path / "u.nii", vectors[..., None, :] if fifth else vectors, plane, intent)
    ddf, _ = read_ddf(tmp_path / "u.nii", said)
    assert ddf.shape == (2, 5, 6)
    assert ddf[:, 2, 3].tolist() == expected
    image = Image(save(tmp_path / "image.nii", np.zeros((5, 6, 1)), plane))
    assert Field(tmp_path / "u.nii", image, image, said).ddf.shape == (1, 2, 5, 6)
    vectors[2, 2, 0, 2] += 1.0
    save(tmp_path / "u.nii", vectors[..., None, :] if fifth else vectors, plane, intent)
    with pytest.raises(ValueError, match=r"u.nii must hold a field in the plane of its grid, \(5, 6\) voxels, got one"):
        read_ddf(tmp_path / "u.nii", said)


@pytest.mark.parametrize("said", ["itk", "voxel", "ras"])
def test_a_field_of_one_voxel_along_two_axes_is_refused(tmp_path, said):
    save(tmp_path / "u.nii", np.zeros((1, 6, 1, 1, 3)), OBLIQUE, 1007)
    with pytest.raises(ValueError, match=r"at least 2 voxels along every axis, got \(1, 6\)"):
        read_ddf(tmp_path / "u.nii", said)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["itk", "lps", "ras", "voxel", "positions", "niftyreg"])
def test_a_plane_of_any_axis_is_one_of_its_image(tmp_path, name, axis):
    """A sagittal slice as DICOM has it is one voxel long along its first axis: image and field are in 2D alike."""
    affine = np.array([[0, 0, -2.5, 40], [1.5, 0.2, 0, -5], [-0.2, 1.5, 0, 7], [0, 0, 0, 1.0]])
    affine = np.insert(np.delete(affine, 2, 1), axis, affine[:, 2], axis=1)
    size = np.insert([9, 8], axis, 1)
    rng = np.random.default_rng(0)
    ddf = np.insert(rng.normal(size=(*size, 2)), axis, 0, axis=-1)
    vectors = ddf if name == "voxel" else ddf @ affine[:3, :3].T
    vectors = vectors * [-1, -1, 1] if name in ("itk", "lps") else vectors
    if name == "positions":
        vectors = vectors + np.moveaxis(np.indices(size), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    file = nib.Nifti1Image(vectors[..., None, :], affine)
    if name in ("itk", "niftyreg"):
        file.header["intent_code"] = 1007
    if name == "niftyreg":
        file.header["intent_name"], file.header["intent_p1"] = b"NREG_TRANS", 1
    nib.save(file, tmp_path / "u.nii")
    nib.save(nib.Nifti1Image(rng.normal(size=size), affine), tmp_path / "i.nii")
    image = Image(tmp_path / "i.nii")
    field = Field(tmp_path / "u.nii", image, image, file_format=name)
    assert field.ddf.shape == (1, 2, 9, 8)
    np.testing.assert_allclose(field.ddf[0], np.moveaxis(np.delete(ddf, axis, -1), -1, 0).reshape(2, 9, 8), atol=1e-5)


def test_positions_that_are_nan_are_displaced_as_the_nearest_others(tmp_path):
    """As SPM has it outside of an image."""
    affine = np.diag([-2.0, 2, 3, 1])
    places = np.moveaxis(np.indices((6, 5, 4)), 0, -1) @ affine[:3, :3].T + [4.0, 2, 6]
    places[..., 0] += np.arange(6)[:, None, None]
    places[:2], places[5, 2, 2, 1] = np.nan, np.nan
    file = nib.Nifti1Image(places[..., None, :].astype(np.float32), affine)
    file.header["descrip"] = b"Deformation"
    nib.save(file, tmp_path / "y.nii")
    with pytest.warns(UserWarning, match=r"y.nii leads 41 of 120 voxels nowhere \(NaN\): they"):
        ddf = read_ddf(tmp_path / "y.nii")[0]
    np.testing.assert_allclose(ddf[0, :3], -3, atol=1e-5)  # 2 + 4 millimetres
    assert ddf[0, 5, 2, 2] in (-4.5, -4.0)
    places[:] = np.nan
    nib.save(nib.Nifti1Image(places[..., None, :], affine), tmp_path / "y.nii")
    with pytest.raises(ValueError, match=r"y.nii must be finite, got 360 NaN"):
        read_ddf(tmp_path / "y.nii", "positions")


def test_what_spms_deformations_saves_is_told(tmp_path):
    """Vectors named Mapping, positions in millimetres; by the intent alone they would be ITK's displacements."""
    path = save(tmp_path / "y.nii", (places(OBLIQUE, SIZE) + shift_of())[:, :, :, None], OBLIQUE)
    ddf = read_ddf(path, "positions")[0]
    image = nib.load(path)
    image.header.set_intent("vector", name="Mapping")
    image.header["descrip"] = b"Deformation field"
    nib.save(nib.Nifti1Image(image.get_fdata(), OBLIQUE, image.header), tmp_path / "m.nii")
    assert guess_format(tmp_path / "m.nii") == "positions"
    np.testing.assert_allclose(read_ddf(tmp_path / "m.nii")[0], ddf, atol=1e-4)
