"""Whole files or none."""

import errno

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io.nifti import load_nifti, replacing


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, named):
    path = tmp_path / "ddf.nii.gz"
    path.write_text("old")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'") as error, replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", *([str(temporary)] if named else []))
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "a"):
        (tmp_path / "other").read_text()


@pytest.mark.parametrize("name", ["image.nii.gz", "image.NII.GZ"])
def test_a_compressed_file_with_a_wrong_check_sum_is_refused(tmp_path, name):
    path = tmp_path / name
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([1.0, 2.0, 3.0, 1.0])), path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # as after a flip of any bit of what is compressed
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} must be a whole NIfTI file, got a gzip file, cut off"):
        load_nifti(path)
