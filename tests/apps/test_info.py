"""What ``monai-lm info FILE`` says of files."""

import json
import sys
from importlib.util import find_spec

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
    (tmp_path / "p.txt").write_text("id x_lps y_lps z_lps\n7 1 2 3\n8 -1 5 0\n")
    assert describe_file(tmp_path / "p.txt")["highest"] == "1 -2 3"
    write_itk_transform(tmp_path / "u.h5", bump(), GRID, initial=turn)
    assert describe_file(tmp_path / "u.h5")["parts"] == "DisplacementFieldTransform, then AffineTransform"


@pytest.mark.parametrize("words", [["FILE", "--json"], ["--file", "FILE", "--json", "true"]])
def test_as_a_command(tmp_path, monkeypatch, capsys, words):
    write_ddf(tmp_path / "u.nii.gz", bump(), GRID)
    monkeypatch.setattr(sys, "argv", ["monai-lm", "info", *(w.replace("FILE", f"{tmp_path}/u.nii.gz") for w in words)])
    cli.main()
    assert json.loads(capsys.readouterr().out)["format"] == "itk"


def test_what_it_is_not_is_said_in_a_line(tmp_path):
    """The file, what it should be, what it is."""
    pytest.importorskip("SimpleITK")
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "dicom").write_bytes(bytes(128) + b"DICM" + bytes(9))
    cases = {
        "folder.nii": (None, "must be a file, got a folder; of a folder of DICOM files dcm2niix makes a NIfTI file"),
        "dicom": (None, "must be a field, an affine, points, an image or a label map, got DICOM, of which dcm2niix"),
        "a.json": (b'{"a": 1}', "must be a field, .*, got JSON; what is read ends in .* .mrk.json"),
        "p.mrk.json": (b'{"a": 1}', r"must be Slicer's markups, a list 'markups' .* got JSON of \['a'\]"),
        "noise.nii": (b"noise" * 200, "must be a whole NIfTI file, got 1000 bytes that begin with b'noisenoiseno'"),
        "noise.nii.gz": (b"noise" * 200, "must be a whole NIfTI file, got 1000 bytes"),
        "noise.mha": (b"noise" * 200, "must be MetaImage, .*, got 1000 bytes"),
        "noise.mat": (b"noise" * 200, "must be ITK's .mat .*, got 1000 bytes"),
        "noise.npz": (b"noise" * 200, "must be a whole .npz file, got 1000 bytes"),
        "noise.mgh": (b"noise" * 200, "must be a whole MGH file, got 1000 bytes"),
        "empty.nii": (b"", "must be a whole NIfTI file, got an empty file"),
        "empty.txt": (b"", "must hold a linear transform, got an empty file"),
        "empty.csv": (b"", "must hold points, got none"),
    }
    if find_spec("pyfive"):
        cases["noise.h5"] = (b"noise" * 200, "must be a whole ITK transform file in HDF5, got 1000 bytes")
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}") as error:
            describe_file(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "kind", "beside"),
    [
        (np.zeros((4, 5, 6)), "image", {"note": "one value everywhere: there is nothing to register"}),
        (np.ones((4, 5, 6)), "image", {"note": "one value everywhere: there is nothing to register"}),
        (np.arange(120).reshape(4, 5, 6) % 3, "label map", {"labels": "0 1 2"}),
        (np.where(np.arange(6) == 2, np.nan, np.ones((4, 5, 6))), "image", {"range": "1 1"}),
        (np.where(np.arange(6) == 2, np.nan, np.ones((4, 5, 6))), "image", {"not finite": "20 voxels, NaN or inf"}),
        (np.arange(240).reshape(4, 5, 6, 2) % 3, "series", {"size": "4 5 6 2"}),
    ],
)
def test_images_are_what_their_numbers_say(tmp_path, values, kind, beside):
    nib.save(nib.Nifti1Image(values.astype(np.float32), GRID), tmp_path / "i.nii")
    said = describe_file(tmp_path / "i.nii")
    assert said["kind"] == kind
    assert ("labels" in said) == (kind == "label map")
    for key, start in beside.items():
        assert said[key].startswith(start)


def test_a_transform_without_a_grid_of_its_own_is_described_and_a_broken_one_is_not(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    parts = [sitk.DisplacementFieldTransform(sitk.Image(4, 5, 6, sitk.sitkVectorFloat64)), sitk.AffineTransform(3)]
    sitk.WriteTransform(sitk.CompositeTransform(parts), str(tmp_path / "u.tfm"))  # the affine comes first
    said = describe_file(tmp_path / "u.tfm")
    assert said["parts"] == "AffineTransform, then DisplacementFieldTransform"
    assert said["note"].startswith("it does not say on which grid it lies")
    text = (tmp_path / "u.tfm").read_text().replace("Parameters: 0 0", "Parameters: 0 1e300", 1)
    blocks = text.split("#Transform ")
    (tmp_path / "v.tfm").write_text(f"{blocks[0]}#Transform 0\n{blocks[2].partition(chr(10))[2]}")
    with pytest.raises(ValueError, match=r"v.tfm must lead to places that float32 can hold"):
        describe_file(tmp_path / "v.tfm")
