"""Whole files or none."""

import errno

import pytest

from monai_lm.io.nifti import replacing


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
