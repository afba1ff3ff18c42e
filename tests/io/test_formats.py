"""Formats by name, and which one a file is."""

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.fields import gaussian_smooth
from monai_lm.io import (
    FORMATS,
    file_suffix,
    guess_format,
    read_ddf,
    read_fsl_ddf,
    read_itk_ddf,
    write_ddf,
    write_fsl_ddf,
)

GRID, MOVING = np.diag([-1.5, 2.0, 3.0, 1.0]), np.diag([-1.4, 2.1, 2.9, 1.0])
DDF = gaussian_smooth(torch.randn(1, 3, 8, 7, 6, generator=torch.Generator().manual_seed(1)), 1.5)[0].numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_told_and_read_back(tmp_path, name):
    path = tmp_path / "a" / f"u{file_suffix(name)}"
    target = {} if name in ("voxel", "learn2reg") else {"moving_affine": MOVING, "moving_size": (9, 9, 9)}
    write_ddf(path, DDF, GRID, name, **target)
    assert guess_format(path) == name
    for said in (name, "auto"):
        back, affine = read_ddf(path, said, **target)
        np.testing.assert_allclose(back, DDF, atol=1e-3)
        if name == "learn2reg":
            assert affine is None
        else:
            np.testing.assert_allclose(affine, GRID, atol=1e-6)


def test_the_moving_grid_reaches_the_formats_in_millimetres(tmp_path):
    for name, read in (("itk", read_itk_ddf), ("fsl", lambda p, a: read_fsl_ddf(p, a, (9, 9, 9)))):
        write_ddf(tmp_path / "u.nii", DDF, GRID, name, moving_affine=MOVING, moving_size=(9, 9, 9))
        np.testing.assert_allclose(read(tmp_path / "u.nii", MOVING)[0], DDF, atol=1e-4)
        assert np.abs(read_ddf(tmp_path / "u.nii")[0] - DDF).max() > 0.1
    write_fsl_ddf(tmp_path / "u.nii", DDF, GRID)
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in DDF.shape[1:]], indexing="ij"))
    np.testing.assert_allclose(read_ddf(tmp_path / "u.nii", relative=False)[0], DDF - voxels, atol=1e-4)
    write_ddf(tmp_path / "u.npz", DDF[:, ::2, ::2, ::2], GRID, "learn2reg")
    assert read_ddf(tmp_path / "u.npz", size=(8, 7, 6))[0].shape == DDF.shape


@pytest.mark.parametrize(
    ("shape", "intent", "expected"),
    [
        ((5, 6, 7, 1, 3), 1007, "itk"),
        ((5, 6, 7, 1, 3), 1006, "itk"),
        ((5, 6, 1, 1, 2), 1007, "itk"),
        ((5, 6, 7, 3), 2006, "fsl"),
        ((5, 6, 7, 3), 2007, "fsl"),
    ],
)
def test_intent_and_shape_tell(tmp_path, shape, intent, expected):
    image = nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4))
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "u.nii")
    assert guess_format(str(tmp_path / "u.nii")) == expected


@pytest.mark.parametrize(
    ("shape", "intent"),
    [((5, 6, 7, 1, 3), 0), ((5, 6, 7, 3), 0), ((5, 6, 1, 2), 0), ((5, 6, 7, 3), 1007), ((5, 6, 7, 3), 1006)],
)
def test_a_file_that_does_not_say_what_it_is_is_asked_about(tmp_path, shape, intent):
    """The same vectors may be voxels, millimetres of either system or positions: none of them is taken for granted."""
    grid = np.diag([-2.0, 2.0, 3.0, 1.0])
    vectors = np.zeros(shape, np.float32)
    vectors[..., 0], vectors[..., 1] = 4.0, 1.0
    image = nib.Nifti1Image(vectors, grid)
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "u.nii")
    advice = r"say file_format='lps' or 'ras' .*, 'positions' .*, 'voxel' .* or 'fsl'"
    with pytest.raises(ValueError, match=rf"u.nii must say what its vectors are, got shape .* {intent}; {advice}"):
        read_ddf(tmp_path / "u.nii")
    n = shape[-1]
    for said, expected in {"voxel": (4.0, 1.0), "ras": (-2.0, 0.5), "lps": (2.0, -0.5)}.items():
        ddf, affine = read_ddf(tmp_path / "u.nii", said)
        assert ddf.shape == (n, *shape[:n])
        assert ddf[:2].reshape(2, -1)[:, 7].tolist() == list(expected)
        np.testing.assert_array_equal(affine, grid)
    if intent:  # ITK's but for the fourth axis: said to be ITK's, its intent counts
        assert read_ddf(tmp_path / "u.nii", "itk")[0][:, 2, 3, 1].tolist() == (
            [2.0, -0.5, 0.0] if intent == 1007 else [-2.0, 0.5, 0.0]
        )


def test_what_is_no_field_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), tmp_path / "image.nii")
    with pytest.raises(
        ValueError, match=r"image.nii must hold a displacement field, got shape \(5, 6, 7\) and intent 0"
    ):
        guess_format(tmp_path / "image.nii")
    (tmp_path / "u.mha").write_text("ObjectType = Image")
    with pytest.raises(ValueError, match=r"u.mha must be a whole NIfTI file"):
        read_ddf(tmp_path / "u.mha")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_ddf(tmp_path / "absent.nii")
    for call in (
        lambda: read_ddf(tmp_path / "image.nii", "mrtrix"),
        lambda: write_ddf(tmp_path / "u.nii", DDF, GRID, "mrtrix"),
        lambda: file_suffix("mrtrix"),
    ):
        with pytest.raises(ValueError, match=r"file_format must be one of \('itk', .*, got 'mrtrix'"):
            call()
