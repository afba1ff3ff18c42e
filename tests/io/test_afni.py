"""AFNI's warps: DICOM order is LPS; the extension tells."""

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io import guess_format, read_afni_ddf, read_ddf

GRID = np.array([[0, 0, 2.0, 7], [-1.5, 0, 0, -20], [0, 3.0, 0, 30], [0, 0, 0, 1]])
SHIFT = np.array([1.25, -2.5, 0.75])


def save(path, volumes=3, grid=GRID, labels="x_delta~y_delta~z_delta~hexvol~BulkEn~ShearEn", fifth=True):
    data = np.zeros((5, 6, 7, volumes), np.float32)
    data[..., :3] = SHIFT[: min(3, volumes)]
    image = nib.Nifti1Image(data[..., None, :] if fifth else data, grid)
    if labels is not None:
        atr = f'<AFNI_atr\n ni_type="String"\n ni_dimen="1"\n atr_name="BRICK_LABS" >\n "{labels}"\n</AFNI_atr>'
        text = f'<?xml version="1.0"?>\n<AFNI_attributes>\n{atr}\n</AFNI_attributes>'
        image.header.extensions.append(nib.nifti1.Nifti1Extension("afni", text.encode()))
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("volumes", "fifth"), [(3, True), (6, True), (3, False)])
def test_a_known_shift(tmp_path, volumes, fifth):
    path = save(tmp_path / "w.nii.gz", volumes, fifth=fifth)
    assert guess_format(path) == "afni"
    ddf, affine = read_ddf(path)
    np.testing.assert_array_equal(affine, GRID)
    led = np.einsum("ij,j...->...i", GRID[:3, :3], ddf)
    np.testing.assert_allclose(led, np.broadcast_to([-1.25, 2.5, 0.75], led.shape), atol=1e-5)


def test_a_file_that_is_not_recognised_is_offered_the_name_of_the_convention(tmp_path):
    for labels, said in ((None, "no extension of AFNI's"), ("a~b~c", r"volumes named \['a', 'b', 'c'\]")):
        path = save(tmp_path / "w.nii", labels=labels)
        with pytest.raises(ValueError, match=rf"w.nii must name its volumes .*, got {said}; say file_format='lps'"):
            read_afni_ddf(path)
        np.testing.assert_allclose(read_ddf(path, "lps")[0][:, 0, 0, 0], [2.5 / -1.5, 0.25, -0.625], atol=1e-6)


def test_an_oblique_grid_is_refused_with_the_way_out(tmp_path):
    turn = np.eye(4)
    turn[:2, :2] = [[0.99, -np.sqrt(1 - 0.99**2)], [np.sqrt(1 - 0.99**2), 0.99]]
    with pytest.raises(ValueError, match=r"w.nii must lie along the axes of space for AFNI's(.|\n)*3dWarp -deoblique"):
        read_ddf(save(tmp_path / "w.nii", grid=turn @ GRID))
    with pytest.raises(ValueError, match=r"w.nii must be \(X, Y, Z, 1, 3\) to be AFNI's, got shape \(5, 6, 7, 1, 2\)"):
        read_ddf(save(tmp_path / "w.nii", 2), "afni")
