"""What ``monai-lm info FILE`` says of files."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest

from monai_lm.apps import cli
from monai_lm.apps.info import describe_file
from monai_lm.io import FORMATS, file_suffix, write_ddf, write_itk_transform

GRID = np.array([[-1.5, 0, 0, 7], [0, 0, 3.0, -20], [0, 2.0, 0, 30], [0, 0, 0, 1]])
SIZE = (7, 6, 5)


def bump():
    """One voxel that is led by 4 mm along the second axis, over its neighbour."""
    ddf = np.zeros((3, *SIZE), np.float32)
    ddf[1, 3, 3, 2] = 2.0
    return ddf


@pytest.mark.parametrize("name", FORMATS)
def test_a_field(tmp_path, name):
    if name in ("itk_transform", "metaimage", "nrrd"):
        pytest.importorskip("SimpleITK")
    if name == "itk_transform":
        pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    path = tmp_path / f"u{file_suffix(name)}"
    write_ddf(path, bump(), GRID, name)
    said = describe_file(path)
    assert (said["kind"], said["format"], said["size"], said["components"]) == ("field", name, "7 6 5", 3)
    assert said["folds"] == 4
    assert ("same grid" in said.get("note", "")) == (name in ("voxel", "fsl", "learn2reg"))
    assert said["direction"].startswith("from points of the fixed image")
    if name == "learn2reg":
        assert said["largest (voxels)"] == 2
        return
    assert said["largest (mm)"] == pytest.approx(4, rel=1e-5)
    assert (said["spacing (mm)"], said["orientation"], said["origin (RAS mm)"]) == ("1.5 2 3", "LSA", "7 -20 30")
    assert ("LPS" if name in ("itk", "itk_transform", "metaimage", "nrrd") else "") in said["values"]


def test_images_labels_and_vectors_that_do_not_say_what_they_are(tmp_path):
    values = np.linspace(-1, 2, 210, dtype=np.float32).reshape(SIZE)
    for name, data in {
        "i": values,
        "l": (values > 0).astype(np.uint8) * 3,
        "v": np.zeros((*SIZE, 3), np.float32),
    }.items():
        nib.save(nib.Nifti1Image(data, GRID), tmp_path / f"{name}.nii")
    image, label, vectors = (describe_file(tmp_path / f"{name}.nii") for name in "ilv")
    assert (image["kind"], image["range"], image["size"]) == ("image", "-1 2", "7 6 5")
    assert (label["kind"], label["labels"]) == ("label map", "0 3")
    assert vectors["kind"] == "vectors"
    assert "must say what its vectors are" in vectors["note"]
    assert describe_file(tmp_path / "v.nii", "ras")["kind"] == "field"


def test_affines_points_and_transforms(tmp_path):
    pytest.importorskip("SimpleITK")
    pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    turn = np.array([[0, -1.0, 0, 3], [1, 0, 0, -2], [0, 0, 2, 1], [0, 0, 0, 1]])
    np.savetxt(tmp_path / "a.txt", turn)
    said = describe_file(tmp_path / "a.txt")
    assert (said["kind"], said["determinant"]) == ("affine", pytest.approx(2))
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n-1,5,0\n")
    assert describe_file(tmp_path / "p.csv")["lowest"] == "-1 2 0"
    write_itk_transform(tmp_path / "u.h5", bump(), GRID, initial=turn)
    assert describe_file(tmp_path / "u.h5")["parts"] == "DisplacementFieldTransform, then AffineTransform"


@pytest.mark.parametrize("words", [["FILE", "--json"], ["--file", "FILE", "--json", "true"]])
def test_as_a_command(tmp_path, monkeypatch, capsys, words):
    write_ddf(tmp_path / "u.nii.gz", bump(), GRID)
    monkeypatch.setattr(sys, "argv", ["monai-lm", "info", *(w.replace("FILE", f"{tmp_path}/u.nii.gz") for w in words)])
    cli.main()
    assert json.loads(capsys.readouterr().out)["format"] == "itk"
