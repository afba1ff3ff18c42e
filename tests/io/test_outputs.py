"""Outputs that cannot be written are found before the work."""

import pytest

from monai_lm.io.outputs import check_field_output, check_outputs, made


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "ddf.nii.gz").mkdir(parents=True)
    (tmp_path / "out" / "b").write_text("")
    with pytest.raises(ValueError, match=f"output_dir must be a folder, got the file {tmp_path / 'file'}"):
        check_outputs(tmp_path / "file" / "below", ["a"], overwrite=True)
    with pytest.raises(ValueError, match=r"outputs must be files, got the folder .*ddf\.nii\.gz"):
        check_outputs(tmp_path / "out", ["ddf.nii.gz"], overwrite=True)
    with pytest.raises(FileExistsError, match="b exists; --overwrite replaces it"):
        check_outputs(tmp_path / "out", ["a", "b"], overwrite=False)
    check_outputs(tmp_path / "out", ["a", "b"], overwrite=True)
    check_outputs(tmp_path / "new" / "er", ["a"], overwrite=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    with pytest.raises(PermissionError, match=f"output_dir cannot be written to: '{tmp_path}'"):
        check_outputs(tmp_path / "new", ["a"], overwrite=False)


@pytest.mark.parametrize(("name", "file_format"), [("a.npz", "itk"), ("a.nii.gz", "learn2reg"), ("a.txt", "fsl")])
def test_the_suffix_is_that_of_the_format(tmp_path, name, file_format):
    with pytest.raises(ValueError, match=f"output must end in .* for {file_format} fields, got '{name}'"):
        check_field_output(tmp_path / name, file_format, overwrite=False)


def test_only_what_was_made_goes_again(tmp_path):
    with pytest.raises(KeyError), made(tmp_path / "a" / "b"):  # noqa: PT012
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
