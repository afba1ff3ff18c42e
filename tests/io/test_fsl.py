"""FSL's warps: known shifts by hand, positions voxel by voxel, roundtrips, and the guess of relative or absolute."""

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import through_affine
from monai_lm.io import read_fsl_ddf, write_fsl_ddf, write_itk_ddf
from monai_lm.io.fsl import fsl_space

SHAPE, OTHER = (8, 7, 6), (9, 10, 5)


def affine(*diagonal: float, origin=(7.0, -20.0, 30.0)) -> np.ndarray:
    out = np.diag([*diagonal, 1.0])
    out[:3, 3] = origin
    return out


TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
OBLIQUE = affine(1, 1, 1)
OBLIQUE[:3, :3] = TURN @ np.diag([0.7, 1.3, 3.0])
LEFT = OBLIQUE @ np.diag([-1.0, 1, 1, 1])
SPACES = {
    "RAS": affine(1.5, 2, 3),
    "LAS": affine(-1.5, 2, 3),
    "LPS": affine(-1.5, -2, 3),
    "RPS": affine(1.5, -2, 3),
    "oblique": OBLIQUE,
    "oblique, left-handed": LEFT,
}


def random_field(shape=SHAPE, amplitude: float = 2.0) -> np.ndarray:
    ddf = gaussian_smooth(torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1)), 1.5)[0]
    return (ddf * (amplitude / ddf.abs().max())).numpy()


def stored(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize(("name", "sign"), [("RAS", -1), ("LAS", 1), ("LPS", -1), ("RPS", 1)])
def test_a_known_shift_is_millimetres_with_x_negated_in_neurological_storage(tmp_path, name, sign):
    shift = np.array([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1)
    write_fsl_ddf(tmp_path / "w.nii.gz", np.broadcast_to(shift, (3, *SHAPE)), SPACES[name])
    np.testing.assert_allclose(stored(tmp_path / "w.nii.gz"), np.broadcast_to([sign * 1.5, -4, 9], (*SHAPE, 3)))


@pytest.mark.parametrize("moving", SPACES)
@pytest.mark.parametrize("fixed", SPACES)
def test_positions_in_the_moving_image_voxel_by_voxel(tmp_path, fixed, moving):
    """Absolute: the moving voxel's index times its size, counted from the other end where neurological."""
    ddf, there, other = random_field(), SPACES[fixed], SPACES[moving]
    write_fsl_ddf(tmp_path / "w.nii", ddf, there, other, OTHER, relative=False)
    out = stored(tmp_path / "w.nii")
    size = np.linalg.norm(other[:3, :3], axis=0)
    for voxel in [(0, 0, 0), (3, 2, 5), (7, 6, 1)]:
        target = np.array(voxel) + ddf[(slice(None), *voxel)]
        if np.linalg.det(other) > 0:
            target[0] = OTHER[0] - 1 - target[0]
        np.testing.assert_allclose(out[voxel], target * size, atol=1e-4)
    back, _ = read_fsl_ddf(tmp_path / "w.nii", other, OTHER, relative=False)
    np.testing.assert_allclose(back, ddf, atol=1e-4)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", SPACES)
def test_what_is_written_is_read_back_and_the_kind_is_guessed(tmp_path, name, relative):
    for moving in ((), (SPACES["LPS"], OTHER), (SPACES["oblique"], OTHER)):
        ddf = random_field()
        if moving:  # a small motion in space, however the moving image is stored
            ddf = through_affine(torch.from_numpy(ddf)[None], SPACES[name], moving[0])[0].numpy()
        write_fsl_ddf(tmp_path / "w.nii.gz", ddf, SPACES[name], *moving, relative=relative)
        for said in (relative, None):
            back, there = read_fsl_ddf(str(tmp_path / "w.nii.gz"), *moving, relative=said)
            assert back.dtype == np.float32
            np.testing.assert_allclose(back, ddf, atol=1e-4)
            np.testing.assert_allclose(there, SPACES[name], atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_the_identity_and_a_large_motion_are_guessed(tmp_path, relative):
    for ddf in (np.zeros((3, *SHAPE)), random_field(amplitude=8.0), np.full((3, *SHAPE), 40.0)):
        write_fsl_ddf(tmp_path / "w.nii", ddf, SPACES["RAS"], relative=relative)
        np.testing.assert_allclose(read_fsl_ddf(tmp_path / "w.nii")[0], ddf, atol=1e-4)


def test_what_is_said_is_not_guessed(tmp_path):
    write_fsl_ddf(tmp_path / "w.nii", random_field(), SPACES["LAS"])
    wrong = read_fsl_ddf(tmp_path / "w.nii", relative=False)[0]
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in SHAPE], indexing="ij"))
    np.testing.assert_allclose(wrong, random_field() - voxels, atol=1e-4)


def test_origin_and_direction_play_no_part():
    np.testing.assert_allclose(fsl_space(OBLIQUE, SHAPE), fsl_space(affine(0.7, 1.3, 3, origin=(0, 0, 0)), SHAPE))
    np.testing.assert_allclose(fsl_space(LEFT, SHAPE), np.diag([0.7, 1.3, 3, 1]))
    np.testing.assert_allclose(fsl_space(OBLIQUE, SHAPE)[0], [-0.7, 0, 0, 4.9])


def test_the_header_says_what_it_is(tmp_path):
    write_fsl_ddf(tmp_path / "a" / "w.nii.gz", random_field(), OBLIQUE)
    image = nib.load(tmp_path / "a" / "w.nii.gz")
    assert image.shape == (*SHAPE, 3)
    assert int(image.header["intent_code"]) == 2006
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms()[:3], [0.7, 1.3, 3.0], rtol=1e-5)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.nii.gz"]


def test_the_voxel_size_is_the_headers_as_for_fsl(tmp_path):
    """FSL looks at pixdim, whatever the scale of the affine."""
    image = nib.Nifti1Image(np.full((*SHAPE, 3), 6.0, np.float32), None)
    image.header.set_sform(np.diag([-2.0, 2.0, 2.0, 1.0]), 1)
    image.header["pixdim"][1:4] = (1.0, 2.0, 3.0)
    nib.save(image, tmp_path / "w.nii")
    np.testing.assert_allclose(read_fsl_ddf(tmp_path / "w.nii", relative=True)[0][:, 1, 2, 3], [6, 3, 2])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_other_files_are_refused(tmp_path):
    for intent in (2007, 2008, 2009, 2016):
        image = nib.Nifti1Image(np.ones((*SHAPE, 3), np.float32), np.eye(4))
        image.header["intent_code"] = intent
        nib.save(image, tmp_path / "c.nii")
        with pytest.raises(
            ValueError, match=rf"c.nii must be a warp field, got FNIRT's coefficients \(intent {intent}"
        ):
            read_fsl_ddf(tmp_path / "c.nii")
    write_itk_ddf(tmp_path / "i.nii", random_field(), np.eye(4))
    with pytest.raises(
        ValueError, match=r"i.nii must be \(X, Y, Z, 3\) .* got shape \(8, 7, 6, 1, 3\) and intent 1007"
    ):
        read_fsl_ddf(tmp_path / "i.nii")
    nib.save(nib.Nifti1Image(np.ones((*SHAPE, 4), np.float32), np.eye(4)), tmp_path / "x.nii")
    with pytest.raises(ValueError, match=r"x.nii must be \(X, Y, Z, 3\) .* got shape \(8, 7, 6, 4\)"):
        read_fsl_ddf(tmp_path / "x.nii")
    write_fsl_ddf(tmp_path / "w.nii.gz", random_field(), np.eye(4))
    (tmp_path / "w.nii.gz").write_bytes((tmp_path / "w.nii.gz").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"w.nii.gz must be a whole NIfTI file"):
        read_fsl_ddf(tmp_path / "w.nii.gz")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_fsl_ddf(tmp_path / "absent.nii")


def test_invalid_arguments_are_named_and_nothing_is_written(tmp_path):
    path, ddf = tmp_path / "w.nii", random_field()
    with pytest.raises(ValueError, match=r"ddf must be \(3, \*S\), as FSL's images are 3D, got shape \(2, 4, 5\)"):
        write_fsl_ddf(path, np.zeros((2, 4, 5)), np.eye(4))
    with pytest.raises(ValueError, match="moving_affine must be an invertible"):
        write_fsl_ddf(path, ddf, np.eye(4), np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"size must be 3 voxel counts, .* got \(4, 5\)"):
        write_fsl_ddf(path, ddf, np.eye(4), np.eye(4), (4, 5))
    with pytest.raises(ValueError, match=r"path must end in .nii or .nii.gz, got 'w.mif'"):
        write_fsl_ddf(tmp_path / "w.mif", ddf, np.eye(4))
    ddf[0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="ddf must be finite, got 1 NaN or infinite values"):
        write_fsl_ddf(path, ddf, np.eye(4))
    assert list(tmp_path.iterdir()) == []
