"""Images in other files than NIfTI, in other units, and label maps that are scaled."""

import nibabel as nib
import numpy as np
import pytest

from monai_lm.io import read_ddf, write_voxel_ddf
from monai_lm.io.images import Image

AFFINE = np.array([[-1.5, 0, 0, 7], [0, 0, 3.0, -20], [0, 2.0, 0, 30], [0, 0, 0, 1]])
VALUES = np.random.default_rng(0).integers(0, 200, (5, 6, 7))


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int32])
def test_freesurfers_images(tmp_path, suffix, dtype):
    nib.save(nib.MGHImage(VALUES.astype(dtype), AFFINE), tmp_path / f"i{suffix}")
    image = Image(tmp_path / f"i{suffix}", label=True)
    np.testing.assert_array_equal(image.data[0, 0].numpy(), VALUES)
    np.testing.assert_allclose(image.grid.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii", ".mgz", ".mha"])
def test_what_is_not_finite_is_counted_and_has_a_remedy_that_works(tmp_path, suffix):
    values, path = VALUES.astype(np.float32), tmp_path / f"i{suffix}"

    def save():
        if suffix == ".mha":
            sitk = pytest.importorskip("SimpleITK")
            sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
        else:
            nib.save((nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image)(values, AFFINE), path)

    values[0, :2, 0] = np.nan
    save()
    for label, end in ((True, "$"), (False, r", and a mask \(fixed_mask, moving_mask\) or a lesion hides them")):
        with pytest.raises(ValueError, match=f"must be finite, got 2 NaN .*; np.nan_to_num makes zeros of NaN{end}"):
            Image(path, label)
    values = np.nan_to_num(values)
    save()
    assert Image(path).data.isfinite().all()


def test_broken_mgh_files_are_named(tmp_path):
    nib.save(nib.MGHImage(VALUES.astype(np.float32), AFFINE), tmp_path / "i.mgh")
    whole = (tmp_path / "i.mgh").read_bytes()
    for content in (b"", b"a letter", whole[:200], whole[:400], b"\0\0\0\2" + whole[4:]):
        (tmp_path / "i.mgh").write_bytes(content)
        with pytest.raises(ValueError, match=r"i.mgh must be a whole MGH file, got"):
            Image(tmp_path / "i.mgh")
    with pytest.raises(FileNotFoundError, match="no file"):
        Image(tmp_path / "absent.mgz")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("u.m3z", r"FreeSurfer's morph, which is read as a field"),
        ("u.HEAD", "AFNI's dataset; 3dcopy makes a NIfTI file of it"),
        ("u.lta", "a linear transform, which is read as an affine"),
        ("u.h5", "an ITK transform, which is read as a field"),
    ],
)
def test_siblings_are_told_by_name(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ValueError, match=f"{name} must be a NIfTI file, got the suffix of {advice}"):
        Image(tmp_path / name)


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1e-3), ("meter", 1e3)])
def test_grids_in_other_units_are_brought_to_millimetres(tmp_path, unit, scale):
    write_voxel_ddf(tmp_path / "u.nii", np.ones((3, 5, 6, 7), np.float32), AFFINE)
    image = nib.load(tmp_path / "u.nii")
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "v.nii")
    ddf, affine = read_ddf(tmp_path / "v.nii")  # in voxels: they stay
    np.testing.assert_array_equal(ddf, 1)
    np.testing.assert_allclose(affine, np.diag([scale, scale, scale, 1]) @ AFFINE)
    for said in ("ras", "lps", "positions", "fsl"):
        with pytest.raises(ValueError, match=rf"v.nii must be in millimetres, got {unit}, which says .* vectors are"):
            read_ddf(tmp_path / "v.nii", said)


def scaled_labels(path, stored, slope, inter=0.0):
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)  # nibabel scales anew while it saves
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(raw)
    return path


def test_labels_that_a_slope_leaves_whole_are_rounded(tmp_path):
    path = scaled_labels(tmp_path / "l.nii", VALUES.astype(np.uint8), 1.00001)
    np.testing.assert_array_equal(Image(path, label=True).data[0, 0].numpy(), VALUES)
    path = scaled_labels(tmp_path / "l.nii", VALUES.astype(np.uint8), 1.0, 2.0)
    np.testing.assert_array_equal(Image(path, label=True).data[0, 0].numpy(), VALUES + 2)


@pytest.mark.parametrize("slope", [0.9882, 2.0235])
def test_labels_that_a_slope_breaks_are_refused_by_name(tmp_path, slope):
    path = scaled_labels(tmp_path / "l.nii", VALUES.astype(np.uint8), slope)
    with pytest.raises(ValueError, match=rf"l.nii must hold labels, .* stores them scaled by {slope} .*get_unscaled"):
        Image(path, label=True)
    assert Image(path).data.max() == pytest.approx(slope * VALUES.max(), rel=1e-5)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_whether_a_file_says_how_long_its_voxels_are(tmp_path, suffix):
    pytest.importorskip("SimpleITK")
    if suffix == ".mha":
        head, edges, end = (
            "NDims = 3\nDimSize = 7 6 5\nElementType = MET_UCHAR\n",
            "ElementSpacing = 1 1 2\n",
            ("ElementDataFile = LOCAL\n"),
        )
    else:
        head, edges, end = (
            "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 7 6 5\n",
            "spacings: 1 1 2\n",
            "encoding: raw\n\n",
        )
    for said in ("", edges):
        path = tmp_path / f"i{suffix}"
        path.write_bytes((head + said + end).encode() + VALUES.astype(np.uint8).tobytes())
        image = Image(path)
        assert (image.is_measured, image.grid.spacing) == (bool(said), (1, 1, 2 if said else 1))
