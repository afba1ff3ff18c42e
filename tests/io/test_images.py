"""Files as images, fields and pairs: what is read, and what is refused."""

import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.io import write_itk_ddf, write_voxel_ddf
from monai_lm.io.images import Field, Image, load_pair

AFFINE = np.array([[0, -1.2, 0, 34.0], [1.3, 0, 0, -2.0], [0, 0, 1.8, 1.0], [0, 0, 0, 1]])
SIZE = (5, 6, 7)


def _shift(x):
    out = np.zeros((4, 4))
    out[0, 3] = x
    return out


@pytest.fixture
def save(tmp_path):
    """Save values as a NIfTI file in the temporary folder."""

    def _save(name, values, affine=AFFINE):
        nib.save(nib.Nifti1Image(np.asarray(values, dtype=np.float32), affine), tmp_path / name)
        return tmp_path / name

    return _save


def test_an_image_has_its_values_and_place(save):
    values = np.arange(210, dtype=np.float32).reshape(SIZE)
    image = Image(save("a.nii", values))
    np.testing.assert_array_equal(image.data[0, 0], values)
    np.testing.assert_allclose(image.grid.affine, AFFINE, atol=1e-6)
    assert image.grid.size == SIZE
    assert Image(save("flat.nii", values[..., :1])).grid.size == SIZE[:2]


def test_labels_are_whole_numbers(save):
    assert not Image(save("a.nii", np.ones(SIZE))).is_label
    assert Image(save("a.nii", np.ones(SIZE)), label=True).is_label
    with pytest.raises(ValueError, match=r"big.nii must hold labels up to 16777216"):
        Image(save("big.nii", np.full(SIZE, 2.0**25)), label=True)
    for value in (0.5, -1):
        with pytest.raises(ValueError, match=r"b.nii must hold labels, whole numbers of at least 0"):
            Image(save("b.nii", np.full(SIZE, value)), label=True)


def test_labels_keep_their_values(tmp_path):
    """Allen's 614454277, neighbours beyond 2^24, and what 32 bits hold, signed and unsigned."""
    values = np.zeros(SIZE, np.int64)
    found = [1, 16777216, 16777217, 614454277, 2**31 - 1]
    values.ravel()[: len(found)] = found
    for dtype, last in ((np.int32, 2**31 - 1), (np.uint32, 2**32 - 1), (np.int64, 2**40 + 1), (np.float64, 2**40 + 1)):
        values[-1, -1, -1] = last
        nib.save(nib.Nifti1Image(values.astype(dtype), AFFINE, dtype=dtype), tmp_path / "labels.nii")
        image = Image(tmp_path / "labels.nii", label=True)
        assert image.data.dtype == (torch.int32 if last < 2**31 else torch.int64)
        np.testing.assert_array_equal(image.data[0, 0], values)
    values[0, 0, 0] = 2**53 + 1
    nib.save(nib.Nifti1Image(values, AFFINE, dtype=np.int64), tmp_path / "labels.nii")
    with pytest.raises(ValueError, match=r"labels.nii must hold numbers up to 9007199254740992"):
        Image(tmp_path / "labels.nii", label=True)


@pytest.mark.parametrize(
    ("shape", "order"),
    [((5, 6, 1), (0, 1, 2)), ((1, 5, 6), (1, 2, 0)), ((5, 1, 6), (0, 2, 1)), ((1, 5, 6, 1), (1, 2, 0))],
)
def test_a_plane_may_lack_any_axis(save, shape, order):
    """Every voxel stays where it is in space."""
    values = np.arange(30, dtype=np.float32)
    image = Image(save("a.nii", values.reshape(shape)))
    assert image.grid.size == (5, 6)
    np.testing.assert_array_equal(image.data[0, 0], values.reshape(5, 6))
    stored = np.zeros(3)
    stored[list(order)] = (3, 4, 0)
    np.testing.assert_allclose(image.grid.affine @ [3, 4, 0, 1], AFFINE @ [*stored, 1], atol=1e-5)
    assert abs(np.linalg.det(image.grid.affine)) == pytest.approx(abs(np.linalg.det(AFFINE)), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 7), (7, 1), (1, 6, 1), (5, 6, 7, 2), (5, 6, 1, 3)])
def test_what_is_no_plane_and_no_volume_is_refused(save, shape):
    with pytest.raises(ValueError, match=r"a.nii must hold one 2D or 3D volume, got shape \("):
        Image(save("a.nii", np.zeros(shape)))


def test_planes_that_stand_on_one_another_are_refused(save):
    fixed, moving = save("f.nii", np.zeros((5, 6, 1))), save("m.nii", np.zeros((1, 5, 6)))
    with pytest.raises(ValueError, match=r"m.nii must lie in parallel planes, got 90 degrees between them; store both"):
        load_pair(fixed, moving)
    load_pair(moving, moving)


def test_points_and_affines_in_2d_are_of_x_and_y(save, tmp_path):
    np.savetxt(tmp_path / "p.csv", [[1.0, 2.0]], delimiter=",")
    np.savetxt(tmp_path / "a.txt", np.eye(4))
    points, affine = (tmp_path / "p.csv",) * 2, tmp_path / "a.txt"
    flat, upright = save("f.nii", np.zeros((5, 6, 1))), save("u.nii", np.zeros((1, 5, 6)))
    assert load_pair(flat, flat, affine, points=points).points[0].tolist() == [[1.0, 2.0]]
    for given in ({"affine": affine}, {"points": points}, {"affine": affine, "points": points}):
        with pytest.raises(ValueError, match=f"u.nii must lie in a plane of x and y where {' and '.join(given)} are"):
            load_pair(upright, upright, **given)


def test_a_field_takes_its_grid_from_the_file_or_an_image(save, tmp_path):
    ddf = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    write_itk_ddf(tmp_path / "itk.nii.gz", ddf, AFFINE)
    field = Field(tmp_path / "itk.nii.gz")
    np.testing.assert_allclose(field.ddf[0], ddf, atol=1e-5)
    np.testing.assert_allclose(field.moving.affine, AFFINE, atol=1e-5)
    write_voxel_ddf(tmp_path / "voxel.nii.gz", ddf, AFFINE)
    again = Field(tmp_path / "voxel.nii.gz", Image(save("a.nii", np.zeros(SIZE))), file_format="voxel")
    np.testing.assert_allclose(again.ddf[0], ddf, atol=1e-5)


def test_a_field_of_another_grid_is_refused(save, tmp_path):
    write_itk_ddf(tmp_path / "f.nii.gz", np.zeros((3, *SIZE), np.float32), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += 0.5
    for name, size, affine in (("small.nii", (5, 6, 6), AFFINE), ("moved.nii", SIZE, moved)):
        with pytest.raises(ValueError, match=rf"f.nii.gz must lie on the grid of the fixed image .*{name}"):
            Field(tmp_path / "f.nii.gz", Image(save(name, np.zeros(size), affine)))


def test_a_moving_image_has_the_axes_of_the_field(save, tmp_path):
    write_itk_ddf(tmp_path / "f.nii.gz", np.zeros((3, *SIZE), np.float32), AFFINE)
    with pytest.raises(ValueError, match=r"flat.nii must have as many axes as the field .*f.nii.gz, 3, got \(5, 6\)"):
        Field(tmp_path / "f.nii.gz", moving=Image(save("flat.nii", np.zeros((*SIZE[:2], 1)))))


def test_where_programs_disagree_about_the_place_is_told(tmp_path):
    image = nib.Nifti1Image(np.zeros(SIZE, np.float32), AFFINE)
    image.set_sform(AFFINE, 2)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "both.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image(tmp_path / "both.nii")
    image.set_sform(AFFINE + _shift(3.0), 2)
    nib.save(image, tmp_path / "differ.nii")
    with pytest.warns(UserWarning, match=r"differ.nii has two affines that differ: its sform is used"):
        np.testing.assert_allclose(Image(tmp_path / "differ.nii").grid.affine, AFFINE + _shift(3.0), atol=1e-5)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "nowhere.nii")
    with pytest.warns(UserWarning, match=r"nowhere.nii does not say where it lies"):
        Image(tmp_path / "nowhere.nii")
    image.header.set_xyzt_units("micron")
    image.set_sform(AFFINE, 1)
    nib.save(image, tmp_path / "micron.nii")
    np.testing.assert_allclose(
        Image(tmp_path / "micron.nii").grid.affine, np.diag([1e-3] * 3 + [1]) @ AFFINE, rtol=1e-6
    )


def test_a_pair_brings_images_smoothly_and_labels_whole(save):
    values = np.random.default_rng(0).integers(0, 3, SIZE)
    file = save("a.nii", values)
    pair = load_pair(file, file, labels=(file, file))
    ddf = torch.zeros(1, 3, *SIZE)
    ddf[:, 0] = 0.4
    np.testing.assert_array_equal(pair.brought(pair.labels[1], ddf)[0, 0], values)
    expected = 0.6 * values[:-1] + 0.4 * values[1:]
    np.testing.assert_allclose(pair.brought(pair.moving, ddf)[0, 0, :-1], expected, atol=1e-5)


def test_what_does_not_fit_together_is_refused(save, tmp_path):
    image, flat = save("a.nii", np.zeros(SIZE)), save("flat.nii", np.zeros((*SIZE[:2], 1)))
    moved = AFFINE.copy()
    moved[1, 3] += 1.0
    elsewhere = save("elsewhere.nii", np.ones(SIZE), moved)
    for name, text in (("one", "1,2,3\n"), ("two", "1,2,3\n4,5,6\n"), ("plane", "1,2\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    one, two, plane = (tmp_path / f"{name}.csv" for name in ("one", "two", "plane"))
    planar = tmp_path / "planar.tfm"
    planar.write_text(
        "#Insight Transform File V1.0\nTransform: AffineTransform_double_2_2\n"
        "Parameters: 1 0 0 1 0 0\nFixedParameters: 0 0\n"
    )
    for moving, extra, message in (
        (flat, {}, "fixed and moving must both be 2D or 3D"),
        (image, {"labels": (elsewhere, image)}, r"elsewhere.nii must lie on the grid of its image"),
        (image, {"affine": planar}, r"planar.tfm must hold a transform of points in space, .* got 'AffineTransform_"),
        (image, {"points": (one, two)}, r"one.csv and .*two.csv must hold as many points, got 1 and 2"),
        (image, {"points": (one, plane)}, r"plane.csv must hold points of 3 coordinates, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pair(image, moving, **extra)


def test_what_a_mask_or_a_lesion_hides_need_not_be_finite(save):
    values = np.arange(5.0 * 6 * 7).reshape(SIZE)
    values[2, 3, 3:5] = np.nan
    broken, whole = save("broken.nii.gz", values), save("whole.nii.gz", np.ones(SIZE))
    first, second = np.zeros(SIZE), np.zeros(SIZE)
    first[2, 3, 3] = second[2, 3, 4] = 1
    shown, hole, both = save("m.nii.gz", 1 - first), save("l.nii.gz", second), save("b.nii.gz", first + second)
    for given in ({"mask": shown, "lesion": hole}, {"lesion": both}):
        pair = load_pair(broken, whole, **given)
        assert torch.isfinite(pair.fixed.data).all()
        assert pair.fixed.data[0, 0, 0, 0, 1] == 1
    for given in ({"mask": shown}, {"lesion": hole}):
        with pytest.raises(
            ValueError, match=r"broken.nii.gz must be finite, got 1 NaN or infinite values where neither"
        ):
            load_pair(broken, whole, **given)
    with pytest.raises(ValueError, match=r"got 2 NaN .* a mask \(fixed_mask, moving_mask\) or a lesion hides them"):
        load_pair(broken, whole, moving_lesion=hole)


def test_landmarks_outside_of_their_image_are_told_as_voxels_taken_for_millimetres_are(save, tmp_path):
    fixed = save("f.nii", np.arange(210).reshape(SIZE), np.diag([1.0, 1, 1, 1]) + 50 * np.eye(4, k=3))
    voxels = np.array([[1.0, 2, 3], [4, 4, 4], [52, 3, 3]])
    for name, x in (("voxels.csv", 0), ("mm.csv", 50)):
        np.savetxt(tmp_path / name, voxels + np.array([x, 0, 0]), delimiter=",")
    both = tmp_path / "mm.csv", tmp_path / "voxels.csv"
    with pytest.warns(
        UserWarning, match=r"^moving_points .*voxels.csv: 2 of 3 lie outside of .*: are they voxels\?"
    ) as told:
        load_pair(fixed, fixed, points=both)
    assert len(told) == 1
