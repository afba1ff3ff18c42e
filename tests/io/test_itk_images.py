"""Fields and images in MetaImage and NRRD, as SimpleITK writes and reads them."""

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from monai_lm.io import guess_format, read_ddf, write_itk_image_ddf
from monai_lm.io.images import Image

sitk = pytest.importorskip("SimpleITK")

SIZE = (7, 6, 5)
TURN = Rotation.from_euler("XYZ", (20, -35, 50), degrees=True).as_matrix()
SCALES = {"RAS": (1.5, 2.0, 3.0), "LAS": (-0.7, 1.3, 3.0), "LPS": (-1.0, -1.5, 2.0)}
GRIDS = {name: np.diag([*scale, 1.0]) for name, scale in SCALES.items()}
GRIDS["oblique"] = np.block([[TURN @ np.diag([0.7, -1.3, 3.0]), np.zeros((3, 1))], [np.zeros(3), 1.0]])
for each in GRIDS.values():
    each[:3, 3] = 7.0, -20.0, 30.0
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
SUFFIX = pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd", ".nhdr"])


def through_nifti(folder, array, grid):
    """An image of SimpleITK's on the grid of a NIfTI affine, by ITK's own reader of NIfTI."""
    image = nib.Nifti1Image(np.zeros(SIZE, np.float32), grid)
    image.set_qform(grid, 1)
    nib.save(image, folder / "where.nii")
    out = sitk.GetImageFromArray(
        np.ascontiguousarray(np.moveaxis(array, (0, 1, 2), (2, 1, 0))), isVector=array.ndim == 4
    )
    out.CopyInformation(sitk.ReadImage(str(folder / "where.nii")))
    return out


@SUFFIX
@EVERY_GRID
def test_a_known_shift_that_simpleitk_wrote(tmp_path, grid, suffix):
    shift = np.array([1.25, -2.5, 0.75])
    image = through_nifti(tmp_path, np.broadcast_to(shift, (*SIZE, 3)).astype(np.float32), grid)
    sitk.WriteImage(image, str(tmp_path / f"u{suffix}"), True)
    assert guess_format(tmp_path / f"u{suffix}") == ("nrrd" if "r" in suffix else "metaimage")
    ddf, affine = read_ddf(tmp_path / f"u{suffix}")
    np.testing.assert_allclose(affine, grid, atol=1e-5)
    led = np.einsum("ij,j...->i...", grid[:3, :3], ddf)
    np.testing.assert_allclose(led, np.broadcast_to([[[[-1.25]]], [[[2.5]]], [[[0.75]]]], led.shape), atol=1e-3)


@EVERY_GRID
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_simpleitk_reads_what_was_written(tmp_path, grid, suffix):
    ddf = np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)
    write_itk_image_ddf(tmp_path / "a" / f"u{suffix}", ddf, grid)
    theirs = np.moveaxis(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a" / f"u{suffix}"))), (0, 1, 2), (2, 1, 0)
    )
    expected = np.einsum("ij,j...->...i", np.diag([-1, -1, 1]) @ grid[:3, :3], ddf)
    np.testing.assert_allclose(theirs, expected, atol=1e-5)
    np.testing.assert_allclose(read_ddf(tmp_path / "a" / f"u{suffix}")[0], ddf, atol=2e-6)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"u{suffix}"]


@SUFFIX
@EVERY_GRID
def test_images_lie_where_they_lie_in_nifti(tmp_path, grid, suffix):
    values = np.random.default_rng(1).integers(0, 9, SIZE).astype(np.int16)
    sitk.WriteImage(through_nifti(tmp_path, values, grid), str(tmp_path / f"i{suffix}"), True)
    image = Image(tmp_path / f"i{suffix}", label=True)
    np.testing.assert_array_equal(image.data[0, 0].numpy(), values)
    np.testing.assert_allclose(image.grid.affine, grid, atol=1e-5)


def test_an_nrrd_in_ras_is_an_image_but_no_field(tmp_path):
    """ITK turns its grid to LPS, and leaves its vectors as they are."""
    sitk.WriteImage(through_nifti(tmp_path, np.ones((*SIZE, 3), np.float32), GRIDS["RAS"]), str(tmp_path / "u.nhdr"))
    header = (tmp_path / "u.nhdr").read_text().replace("left-posterior-superior", "right-anterior-superior")
    (tmp_path / "u.nhdr").write_text(header)
    with pytest.raises(ValueError, match=r"u.nhdr must have the space left-.*'right-anterior-super.*'ras'"):
        read_ddf(tmp_path / "u.nhdr")


@pytest.mark.parametrize(
    ("array", "vector", "message"),
    [
        (np.zeros((5, 6, 7), np.float32), False, r"must be \(X, Y, Z, 1, 3\)"),
        (np.zeros((5, 6, 7, 2), np.float32), True, r"must be \(X, Y, Z, 1, 3\)"),
        (np.zeros((2, 5, 6, 7, 3), np.float32), True, "must hold real numbers in 2D or 3D, got .* in 4D"),
        (np.full((5, 6, 7, 3), np.nan), True, "must be finite, got 630 NaN"),
    ],
)
def test_what_is_no_field_is_refused(tmp_path, array, vector, message):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(tmp_path / "u.mha"))
    with pytest.raises(ValueError, match=f"u.mha {message}"):
        read_ddf(tmp_path / "u.mha")


@pytest.mark.parametrize("compressed", [True, False])
@SUFFIX
def test_data_that_are_cut_off_are_missed(tmp_path, suffix, compressed):
    """ITK does not say it of MetaImage."""
    image = through_nifti(tmp_path, np.random.default_rng(2).normal(size=(*SIZE, 3)), GRIDS["LAS"])
    sitk.WriteImage(image, str(tmp_path / f"u{suffix}"), compressed)
    read_ddf(tmp_path / f"u{suffix}")
    longest = max(tmp_path.glob("u*"), key=lambda file: file.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:-500])
    with pytest.raises(ValueError, match=f"u{suffix} must"):
        read_ddf(tmp_path / f"u{suffix}")


def test_broken_files_and_other_suffixes_are_named(tmp_path):
    for name, text, message in (
        ("u.mha", "ObjectType = Image", "must be MetaImage, a header from NDims to ElementDataFile, got MetaImage"),
        ("u.mha", "a letter", "must be MetaImage, .* got 8 bytes that begin with b'a letter'"),
        (
            "u.mha",
            "NDims = 3\nElementDataFile = LOCAL\n",
            "must be a whole MetaImage or NRRD file, got RuntimeError: MetaImageIO: File cannot be read",
        ),
        ("u.nrrd", "ObjectType = Image", "must be NRRD, got MetaImage"),
        (
            "u.nrrd",
            "NRRD0004\n",
            "must be a whole MetaImage or NRRD file, got RuntimeError: [a-zA-Z]*:? ?.*trouble reading",
        ),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read_ddf(tmp_path / name)
    with pytest.raises(ValueError, match=r"path must end in .mha or .nrrd, got 'u.mhd'"):
        write_itk_image_ddf(tmp_path / "u.mhd", np.zeros((3, *SIZE)), np.eye(4))
    with pytest.raises(FileNotFoundError, match="no file"):
        read_ddf(tmp_path / "absent.mha")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7), np.float32)), str(tmp_path / "i.nrrd"))
    with pytest.raises(ValueError, match=r"i.nrrd must be a NIfTI file, got the suffix of NRRD"):
        read_ddf(tmp_path / "i.nrrd", "itk")
