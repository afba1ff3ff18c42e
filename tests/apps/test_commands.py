"""Files in, files out, in physical space: what was written leads where the images say."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import commands, pairs
from monai_lm.fields import fold_count, gaussian_smooth
from monai_lm.fields.space import through_affine
from monai_lm.io import FORMATS, file_suffix, read_ddf, read_points, write_ddf, write_itk_ddf
from monai_lm.io.outputs import as_json

QUICK = {"scales": (2, 1), "iterations": (40, 20)}
FIXED = np.diag([1.5, 1.5, 2.0, 1.0])
# turned, mirrored, on other voxels, elsewhere
MOVING = np.array([[0, -1.2, 0, 34.0], [1.3, 0, 0, -2.0], [0, 0, 1.8, 1.0], [0, 0, 0, 1]])


def _scene(points):
    """A smooth picture of the world, at points ``(..., 3)`` in millimetres."""
    x, y, z = points.T
    return (np.sin(x / 3.1) * np.cos(y / 2.7) + np.sin(z / 3.3 + x / 5) + np.cos(y / 4.1 - z / 6)).T


def _world(size, affine):
    voxels = np.stack(np.meshgrid(*[np.arange(s) for s in size], indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def _save(path, values, affine):
    nib.save(nib.Nifti1Image(np.asarray(values), affine), path)
    return path


@pytest.fixture
def pair(tmp_path):
    """A fixed and a moving file of one scene, the moving one shifted by (1.2, -0.9, 0.6) mm, on other grids."""
    shift = np.array([1.2, -0.9, 0.6])
    fixed = _scene(_world((18, 17, 14), FIXED))
    moving = _scene(_world((26, 27, 20), MOVING) - shift)
    paths = {
        "fixed": _save(tmp_path / "fixed.nii.gz", fixed.astype(np.float32), FIXED),
        "moving": _save(tmp_path / "moving.nii.gz", moving.astype(np.float32), MOVING),
        "labels": (
            _save(tmp_path / "fl.nii.gz", (fixed > 0.3).astype(np.uint8), FIXED),
            _save(tmp_path / "ml.nii.gz", (moving > 0.3).astype(np.uint8), MOVING),
        ),
    }
    points = np.array([[9.0, 10.0, 12.0], [12.5, 8.0, 10.0], [15.0, 14.0, 16.0]])
    np.savetxt(tmp_path / "fp.csv", points, delimiter=",", header="x,y,z", comments="")
    np.savetxt(tmp_path / "mp.csv", points + shift, delimiter=",")
    return paths | {"points": (tmp_path / "fp.csv", tmp_path / "mp.csv"), "shift": shift}


def _refine(pair, folder, **kwargs):
    keywords = {"labels": pair["labels"], "points": pair["points"], "report": False, "settings": QUICK} | kwargs
    return pairs.refine_pair(pair["fixed"], pair["moving"], folder, **keywords)


def test_a_mask_says_where_the_images_are_compared(pair, tmp_path):
    world = _world((18, 17, 14), FIXED)
    near = _save(tmp_path / "mask.nii.gz", (world[..., 0] < 18).astype(np.uint8), FIXED)
    spoilt = np.where(world[..., 0] < 18, nib.load(pair["fixed"]).get_fdata(), 5 * np.cos(world[..., 1]))
    pair["fixed"] = _save(tmp_path / "spoilt.nii.gz", spoilt.astype(np.float32), FIXED)
    masked, plain = (_refine(pair, tmp_path / n, mask=m) for n, m in (("masked", near), ("plain", None)))
    assert masked["tre_mm_after"] < 0.3 * masked["tre_mm_before"]
    assert masked["tre_mm_after"] < plain["tre_mm_after"]
    assert masked["loss_after"] < plain["loss_after"]
    full = _save(tmp_path / "full.nii.gz", (255 * (world[..., 0] < 18)).astype(np.uint8), FIXED)
    assert _refine(pair, tmp_path / "full", mask=full)["loss_after"] == masked["loss_after"]
    for given in (near, full):
        field = tmp_path / "masked" / "ddf.nii.gz"
        again = commands.evaluate_field(field, pair["fixed"], pair["moving"], mask=given)
        assert again["sdlogj"] == pytest.approx(masked["sdlogj_after"], rel=1e-4)
        assert again["folds"] == masked["folds_after"] == 0
    elsewhere = _save(tmp_path / "elsewhere.nii.gz", np.ones((18, 17, 14), np.uint8), np.diag([1.5, 1.5, 2.5, 1]))
    with pytest.raises(ValueError, match=r"elsewhere.nii.gz must lie on the grid of its image"):
        _refine(pair, tmp_path / "no", mask=elsewhere)
    assert not (tmp_path / "no").exists()


def test_a_mask_of_the_moving_image_hides_a_lesion_on_any_grid(pair, tmp_path):
    world = _world((26, 27, 20), MOVING)
    distance = np.linalg.norm(world - world.mean((0, 1, 2)), axis=-1)
    healthy, shown = nib.load(pair["moving"]).get_fdata(), (distance > 7).astype(np.uint8)
    paths = {}
    for value in (4.0, -300.0, np.nan):
        lesion = np.where(distance < 7, value, healthy)
        paths[value] = _save(tmp_path / f"lesion{value}.nii.gz", lesion.astype(np.float32), MOVING)
    mask = _save(tmp_path / "shown.nii.gz", shown, MOVING)
    fields, metrics = {}, {}
    for name, value, given in (
        ("plain", 4.0, None),
        ("masked", 4.0, mask),
        ("other", -300.0, mask),
        ("nan", np.nan, mask),
    ):
        metrics[name] = _refine(pair | {"moving": paths[value]}, tmp_path / name, moving_mask=given)
        fields[name] = nib.load(tmp_path / name / "ddf.nii.gz").get_fdata()
    for other in ("other", "nan"):
        np.testing.assert_array_equal(fields["masked"], fields[other])
    after = {name: m["tre_mm_after"] for name, m in metrics.items()}  # the landmarks lie in the lesion
    assert after["masked"] < 0.4 * metrics["masked"]["tre_mm_before"]
    assert after["masked"] < 0.3 * after["plain"]
    assert metrics["masked"]["provenance"]["inputs"]["moving_mask"]["path"] == str(mask)
    assert nib.load(tmp_path / "other" / "warped.nii.gz").get_fdata().min() < -250  # what is written is whole
    for values, affine, message in (
        (shown, FIXED, r"no.nii.gz must lie on the grid of its image .*lesion4.0.nii.gz"),
        (
            np.where(shown, 1, -2).astype(np.int16),
            MOVING,
            r"no.nii.gz must be weights in \[0, 1\], .* got values from -2 to 1",
        ),
    ):
        wrong = _save(tmp_path / "no.nii.gz", values, affine)
        with pytest.raises(ValueError, match=message):
            _refine(pair | {"moving": paths[4.0]}, tmp_path / "no", moving_mask=wrong)
    assert not (tmp_path / "no").exists()


def test_two_grids_are_registered_in_the_world(pair, tmp_path):
    metrics = _refine(pair, tmp_path / "out")
    assert metrics["tre_mm_before"] == pytest.approx(np.linalg.norm(pair["shift"]), rel=1e-4)
    assert metrics["tre_mm_after"] < 0.12 * metrics["tre_mm_before"]
    assert metrics["dice_after"] > 0.85 > 0.75 > metrics["dice_before"]
    assert metrics["folds_after"] == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    warped = nib.load(tmp_path / "out" / "warped.nii.gz")
    np.testing.assert_allclose(warped.affine, FIXED)
    fixed = nib.load(pair["fixed"]).get_fdata()
    inside = (slice(3, -3),) * 3
    assert np.corrcoef(warped.get_fdata()[inside].ravel(), fixed[inside].ravel())[0, 1] > 0.995


def test_what_is_written_agrees_with_simpleitk(pair, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    _refine(pair, tmp_path / "out")
    field = sitk.ReadImage(str(tmp_path / "out" / "ddf.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    images = [sitk.ReadImage(str(pair[k]), sitk.sitkFloat32) for k in ("fixed", "moving")]
    expected = sitk.GetArrayFromImage(sitk.Resample(images[1], images[0], transform, sitk.sitkLinear)).T
    warped = nib.load(tmp_path / "out" / "warped.nii.gz").get_fdata()
    inside = (slice(3, -3),) * 3
    np.testing.assert_allclose(warped[inside], expected[inside], atol=2e-3)


def test_an_initial_affine_is_part_of_what_is_written(pair, tmp_path):
    affine = np.eye(4)
    affine[:3, 3] = pair["shift"]
    np.savetxt(tmp_path / "affine.txt", affine)
    metrics = _refine(pair, tmp_path / "out", affine=tmp_path / "affine.txt", settings=QUICK | {"iterations": 0})
    assert metrics["tre_mm_after"] == pytest.approx(0, abs=1e-4)
    vectors = nib.load(tmp_path / "out" / "ddf.nii.gz").get_fdata()[:, :, :, 0]
    np.testing.assert_allclose(vectors, np.broadcast_to(pair["shift"] * [-1, -1, 1], vectors.shape), atol=1e-4)
    back = nib.load(tmp_path / "out" / "inverse.nii.gz")
    np.testing.assert_allclose(back.affine, MOVING)
    np.testing.assert_allclose(back.get_fdata()[:, :, :, 0] + pair["shift"] * [-1, -1, 1], 0, atol=1e-4)


def test_a_field_may_end_where_its_affine_begins(pair, tmp_path):
    """As ANTs and greedy write the two: first the field, then the affine; the same as both in one field."""
    turn = np.eye(4)
    turn[:3] = [[1, -0.01, 0, 0.1], [0.01, 1, 0, -0.1], [0, 0, 1.01, 0.1]]
    np.savetxt(tmp_path / "affine.txt", turn)
    noise = gaussian_smooth(torch.randn(1, 3, 18, 17, 14, generator=torch.Generator().manual_seed(0)), 3.0)
    warp = 0.1 * noise / noise.abs().max() + torch.tensor(pair["shift"] / np.diag(FIXED)[:3]).view(1, 3, 1, 1, 1)
    write_itk_ddf(tmp_path / "warp.nii.gz", warp[0].numpy(), FIXED)
    whole = through_affine(warp, FIXED, MOVING, turn)[0].numpy()
    write_itk_ddf(tmp_path / "whole.nii.gz", whole, FIXED, MOVING)
    both = {"affine": tmp_path / "affine.txt", "settings": QUICK | {"iterations": 0}}
    metrics = _refine(pair, tmp_path / "out", ddf=tmp_path / "warp.nii.gz", ddf_before_affine=True, **both)
    assert metrics["prediction_used"]
    assert metrics["provenance"]["settings"]["ddf_before_affine"] is True
    written, _ = read_ddf(tmp_path / "out" / "ddf.nii.gz", moving_affine=MOVING)
    np.testing.assert_allclose(written, whole, atol=1e-4)
    again = _refine(pair, tmp_path / "whole", ddf=tmp_path / "whole.nii.gz", **both)
    assert again["loss_before"] == pytest.approx(metrics["loss_before"], abs=1e-5)
    assert "ddf_before_affine" not in again["provenance"]["settings"]
    for given in ({"ddf": tmp_path / "warp.nii.gz"}, {"ddf": tmp_path / "warp.nii.gz", "affine": "auto"}, both):
        with pytest.raises(ValueError, match="ddf_before_affine needs the files ddf and affine, got"):
            _refine(pair, tmp_path / "not", ddf_before_affine=True, **given)


def test_images_are_aligned_first_where_that_is_asked_for(pair, tmp_path):
    """The moving file, put 30 mm away by its header, is brought back; what was found is written and read again."""
    moving = nib.load(pair["moving"])
    far = moving.affine.copy()
    far[:3, 3] += (30, -10, 5)
    pair["moving"] = _save(tmp_path / "far.nii.gz", moving.get_fdata().astype(np.float32), far)
    label = nib.load(pair["labels"][1])
    pair["labels"] = pair["labels"][0], _save(tmp_path / "far_label.nii.gz", np.asarray(label.dataobj), far)
    near = np.loadtxt(pair["points"][1], delimiter=",")
    np.savetxt(pair["points"][1], near + np.array([30, -10, 5]), delimiter=",")
    still = {"settings": QUICK | {"iterations": 0}}
    found = _refine(pair, tmp_path / "out", affine="rigid", **still)
    assert found["tre_mm_after"] < 1
    assert found["alignment"]["kind"] == "rigid"
    assert found["provenance"]["settings"]["affine"] == "rigid"
    assert found["alignment"]["text"].startswith("Aligned first, by a rigid map")
    again = _refine(pair, tmp_path / "again", affine=tmp_path / "out" / "affine.txt", **still)
    assert again["tre_mm_after"] == pytest.approx(found["tre_mm_after"], abs=1e-4)


def test_a_prediction_is_refined_from_where_it_is(pair, tmp_path):
    _refine(pair, tmp_path / "first")
    again = _refine(
        pair, tmp_path / "second", ddf=tmp_path / "first" / "ddf.nii.gz", settings=QUICK | {"iterations": 0}
    )
    first = json.loads((tmp_path / "first" / "metrics.json").read_text())
    for key in ("tre_mm_after", "dice_after", "sdlogj_after", "loss_after"):
        assert again[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5)
        assert again["tre_mm_before"] == pytest.approx(first["tre_mm_after"], rel=1e-3)


def test_the_inverse_leads_back(pair, tmp_path):
    _refine(pair, tmp_path / "out")
    there, back = tmp_path / "there.csv", tmp_path / "back.csv"
    commands.apply_field(tmp_path / "out" / "ddf.nii.gz", pair["points"][0], there, moving=pair["moving"])
    commands.apply_field(tmp_path / "out" / "inverse.nii.gz", there, back, moving=pair["fixed"])
    np.testing.assert_allclose(read_points(back), read_points(pair["points"][0]), atol=0.05)
    inverse = tmp_path / "inverse.nii.gz"
    missed = commands.invert_field(tmp_path / "out" / "ddf.nii.gz", inverse, pair["moving"]).missed
    assert missed < 0.25  # in a grid this small, the border is near
    ours, kept = (nib.load(p).get_fdata() for p in (inverse, tmp_path / "out" / "inverse.nii.gz"))
    inside = (slice(6, -6),) * 3
    np.testing.assert_allclose(ours[inside], kept[inside], atol=0.05)


def test_applying_the_field_is_what_refine_wrote(pair, tmp_path):
    _refine(pair, tmp_path / "out")
    for label, source, kept in ((False, pair["moving"], "warped"), (True, pair["labels"][1], "warped_label")):
        commands.apply_field(tmp_path / "out" / "ddf.nii.gz", source, tmp_path / f"{kept}.nii.gz", label=label)
        ours, written = (nib.load(f / f"{kept}.nii.gz") for f in (tmp_path, tmp_path / "out"))
        assert (np.abs(ours.get_fdata() - written.get_fdata()) > 1e-3).mean() < 1e-3
    assert ours.get_data_dtype() == np.uint8


def test_a_voxel_field_leads_to_the_grid_that_is_given(pair, tmp_path):
    """Not to that of the image it is applied to, which may be stored in another orientation."""
    _refine(pair, tmp_path / "out")
    voxels = {"fixed": pair["fixed"], "moving": pair["moving"]}
    commands.convert_field(tmp_path / "out" / "ddf.nii.gz", tmp_path / "voxel.nii.gz", "voxel", **voxels)
    stored = nib.load(pair["moving"])
    turned = stored.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
    nib.save(turned, tmp_path / "turned.nii.gz")
    commands.apply_field(
        tmp_path / "voxel.nii.gz", tmp_path / "turned.nii.gz", tmp_path / "w.nii.gz", **voxels, file_format="voxel"
    )
    warped, expected = (nib.load(p).get_fdata() for p in (tmp_path / "w.nii.gz", tmp_path / "out" / "warped.nii.gz"))
    np.testing.assert_allclose(warped, expected, atol=2e-3)


def test_how_the_moving_image_is_stored_does_not_matter(pair, tmp_path):
    """Points outside the fixed grid, the metrics of a field and the miss of its inverse are of the world."""
    _refine(pair, tmp_path / "out")
    points = np.array([[9.0, 10.0, 12.0], [-4.0, 8.0, 10.0], [15.0, 40.0, 30.0]])
    np.savetxt(tmp_path / "fp.csv", points, delimiter=",")
    np.savetxt(tmp_path / "mp.csv", points + pair["shift"], delimiter=",")
    stored, found = nib.load(pair["moving"]), []
    for number, axes in enumerate(("RAS", "PIR", "LPS")):
        moving = tmp_path / f"m{number}.nii.gz"
        nib.save(stored.as_reoriented(nib.orientations.axcodes2ornt(tuple(axes))), moving)
        field, output = tmp_path / "out" / "ddf.nii.gz", tmp_path / f"p{number}.csv"
        commands.apply_field(field, tmp_path / "fp.csv", output, moving=moving)
        metrics = commands.evaluate_field(
            field, pair["fixed"], moving, points=(tmp_path / "fp.csv", tmp_path / "mp.csv")
        )
        missed = commands.invert_field(field, tmp_path / f"i{number}.nii.gz", moving).missed
        found.append([*read_points(output).ravel(), metrics["tre_mm"], missed])
    np.testing.assert_allclose(found[1:], found[:1] * 2, atol=2e-3)


def test_evaluating_the_field_is_what_refine_measured(pair, tmp_path):
    metrics = _refine(pair, tmp_path / "out")
    again = commands.evaluate_field(
        tmp_path / "out" / "ddf.nii.gz", pair["fixed"], pair["moving"], pair["labels"], pair["points"]
    )
    assert again == pytest.approx({k: metrics[f"{k}_after"] for k in again}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("file_format", ["itk", "fsl"])
def test_composed_fields_do_one_after_the_other(tmp_path, file_format):
    generator = torch.Generator().manual_seed(0)
    grids = {"a": (12, 13, 11), "b": (20, 22, 16)}
    noise = {k: gaussian_smooth(torch.randn(1, 3, *s, generator=generator), 3.0) * 10 for k, s in grids.items()}
    first = through_affine(noise["a"], FIXED, MOVING)  # on grid a, then the step to grid b
    led = {"moving_affine": MOVING, "moving_size": grids["b"]}
    write_ddf(tmp_path / "first.nii.gz", first[0].numpy(), FIXED, file_format, **led)
    write_itk_ddf(tmp_path / "second.nii.gz", noise["b"][0].numpy(), MOVING)
    image = _save(tmp_path / "b.nii.gz", np.zeros(grids["b"], np.float32), MOVING)
    commands.compose_fields(tmp_path / "first.nii.gz", tmp_path / "second.nii.gz", tmp_path / "both.nii.gz")
    voxels = np.array([[5, 6, 4], [6, 7, 5], [4, 5, 6], [7, 5, 5]], dtype=float)  # nodes: nothing is interpolated twice
    np.savetxt(tmp_path / "start.csv", voxels @ FIXED[:3, :3].T + FIXED[:3, 3], delimiter=",")
    for field, source, target in (("first", "start", "half"), ("second", "half", "end"), ("both", "start", "at_once")):
        files = (tmp_path / f"{field}.nii.gz", tmp_path / f"{source}.csv", tmp_path / f"{target}.csv")
        commands.apply_field(*files, moving=image)
    start, end, at_once = (read_points(tmp_path / f"{name}.csv") for name in ("start", "end", "at_once"))
    np.testing.assert_allclose(at_once, end, atol=1e-3)
    assert np.abs(end - start).max() > 1
    third = _save(tmp_path / "c.nii.gz", np.zeros((9, 8, 7), np.float32), FIXED)
    commands.convert_field(tmp_path / "second.nii.gz", tmp_path / "voxel.nii.gz", "voxel", moving=third)
    commands.compose_fields(tmp_path / "first.nii.gz", tmp_path / "voxel.nii.gz", tmp_path / "too.nii.gz", moving=third)
    np.testing.assert_allclose(read_ddf(tmp_path / "too.nii.gz")[0], read_ddf(tmp_path / "both.nii.gz")[0], atol=1e-3)


@pytest.mark.parametrize("to", FORMATS)
def test_converting_there_and_back_changes_nothing(tmp_path, to):
    ddf = gaussian_smooth(torch.randn(1, 3, 9, 10, 8, generator=torch.Generator().manual_seed(0)), 2.0)[0].numpy()
    write_itk_ddf(tmp_path / "a.nii.gz", ddf, FIXED)
    image = _save(tmp_path / "fixed.nii.gz", np.zeros((9, 10, 8), np.float32), FIXED)
    if to in ("itk_transform", "metaimage", "nrrd"):
        pytest.importorskip("SimpleITK")
    if to == "itk_transform":
        pytest.importorskip("pyfive", reason="pyfive, which reads .h5, is not installed")
    middle = tmp_path / f"b{file_suffix(to)}"
    commands.convert_field(tmp_path / "a.nii.gz", middle, to, fixed=image, moving=image)
    commands.convert_field(middle, tmp_path / "c.nii.gz", "itk", fixed=image, moving=image, file_format=to)
    np.testing.assert_allclose(read_ddf(tmp_path / "c.nii.gz")[0], ddf, atol=2e-3 if to == "learn2reg" else 1e-5)


def test_a_field_on_another_grid_is_brought_to_the_fixed_one(tmp_path):
    """A known affine map of space, which linear interpolation does not change, on a coarse, turned grid."""
    change = np.array([[1.1, 0.1, 0, 3], [0, 0.9, 0.05, -2], [0, 0, 1.2, 1], [0, 0, 0, 1]])
    coarse = FIXED @ np.array([[0, 2.0, 0, -6], [2.5, 0, 0, -6], [0, 0, 2.0, -6], [0, 0, 0, 1]])
    still = torch.zeros(1, 3, 12, 12, 12)
    write_itk_ddf(tmp_path / "coarse.nii.gz", through_affine(still, coarse, MOVING, change)[0].numpy(), coarse, MOVING)
    images = [_save(tmp_path / f"{i}.nii.gz", np.zeros((9, 10, 8), np.float32), (FIXED, MOVING)[i]) for i in range(2)]
    files = tmp_path / "coarse.nii.gz", tmp_path / "fine.nii.gz"
    with pytest.raises(ValueError, match=r"must lie on the grid(.|\n)*monai-lm convert --fixed … --resample"):
        commands.convert_field(*files, "itk", *images)
    with pytest.raises(ValueError, match="resample must be used together with fixed"):
        commands.convert_field(*files, "itk", resample=True)
    commands.convert_field(*files, "itk", *images, resample=True)
    ddf, affine = read_ddf(files[1], moving_affine=MOVING)
    np.testing.assert_allclose(affine, FIXED, atol=1e-5)
    expected = through_affine(torch.zeros(1, 3, 9, 10, 8), FIXED, MOVING, change)[0].numpy()
    np.testing.assert_allclose(ddf, expected, atol=1e-3)
    commands.convert_field(files[0], tmp_path / "coarse_voxel.nii.gz", "voxel", None, images[1])
    for source in ("coarse", "coarse_voxel"):  # voxels of the moving image, whose grid no file tells
        files = tmp_path / f"{source}.nii.gz", tmp_path / "fine_voxel.nii.gz"
        with pytest.raises(ValueError, match=r"^moving must be given to resample .*, \(12, 12, 12\) .*: voxel fields"):
            commands.convert_field(*files, "voxel", images[0], resample=True, overwrite=True)
        commands.convert_field(*files, "voxel", *images, resample=True, overwrite=True)
        np.testing.assert_allclose(read_ddf(files[1])[0], expected, atol=1e-3)
    write_ddf(tmp_path / "coarse.npz", np.zeros((3, 12, 12, 12), np.float32), coarse, "learn2reg")
    with pytest.raises(ValueError, match=r"coarse.npz must say where it lies to be resampled, learn2reg fields do not"):
        commands.convert_field(tmp_path / "coarse.npz", files[1], "itk", *images, resample=True, overwrite=True)


def test_nothing_is_replaced_unless_asked(pair, tmp_path):
    _refine(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    with pytest.raises(FileExistsError, match=r"ddf.nii.gz.* exists; --overwrite replaces it"):
        _refine(pair, tmp_path / "out")
    _refine(pair, tmp_path / "out", overwrite=True, settings=QUICK | {"iterations": 0})


def test_a_former_runs_report_and_labels_do_not_stay(pair, tmp_path):
    names = {"ddf.nii.gz", "inverse.nii.gz", "warped.nii.gz", "metrics.json"}
    (tmp_path / "out").mkdir()
    for name in ("report.html", "report.png", "warped_label.nii.gz", "mine.txt"):
        (tmp_path / "out" / name).write_text("of a former run")
    _refine(pair, tmp_path / "out", overwrite=True, labels=None, settings=QUICK | {"iterations": 0})
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"mine.txt"}


def test_bad_files_are_named_and_nothing_is_written(pair, tmp_path):
    (tmp_path / "text.nii.gz").write_text("no image")
    four = _save(tmp_path / "four.nii.gz", np.zeros((4, 4, 4, 2), np.float32), FIXED)
    values = _save(tmp_path / "values.nii.gz", np.full((18, 17, 14), 0.5, np.float32), FIXED)
    write_itk_ddf(tmp_path / "elsewhere.nii.gz", np.zeros((3, 18, 17, 14), np.float32), MOVING, FIXED)
    write_itk_ddf(tmp_path / "other.nii.gz", np.zeros((3, 5, 6, 7), np.float32), FIXED)
    (tmp_path / "words.csv").write_text("x,y,z\n1,2,three\n")
    cases = [
        ({"fixed": tmp_path / "none.nii.gz"}, {}, FileNotFoundError, "none.nii.gz"),
        ({"fixed": tmp_path / "text.nii.gz"}, {}, ValueError, r"text.nii.gz must be a whole NIfTI file"),
        ({"moving": four}, {}, ValueError, "four.nii.gz must hold one 2D or 3D volume"),
        ({}, {"labels": (values, pair["labels"][1])}, ValueError, "values.nii.gz must hold labels"),
        ({}, {"ddf": tmp_path / "elsewhere.nii.gz"}, ValueError, "must lie on the grid of the fixed image"),
        ({}, {"ddf": tmp_path / "other.nii.gz"}, ValueError, "got \\(5, 6, 7\\)"),
        ({}, {"device": "cuda:99"}, ValueError, "device must be auto or one that torch has here, cpu.*, got 'cuda:99'"),
        ({}, {"device": "toaster"}, ValueError, "got 'toaster'"),
        ({}, {"points": (tmp_path / "words.csv", pair["points"][1])}, ValueError, "words.csv must hold points"),
        ({}, {"settings": QUICK | {"similarity": "love"}}, ValueError, "similarity must be"),
        ({}, {"labels": (pair["labels"][1], pair["labels"][1])}, ValueError, "ml.nii.gz must lie on the grid"),
    ]
    for images, extra, error, message in cases:
        with pytest.raises(error, match=message):
            _refine(pair | images, tmp_path / "out", **extra)
        assert not (tmp_path / "out").exists()


def test_an_output_of_another_kind_is_refused(pair, tmp_path):
    write_itk_ddf(tmp_path / "ddf.nii.gz", np.zeros((3, 18, 17, 14), np.float32), FIXED)
    for source, output, message in (
        (pair["points"][0], "points.nii.gz", r"output must end in \.csv for points, got 'points\.nii\.gz'"),
        (pair["fixed"], "image.csv", r"output must end in \.nii or \.nii\.gz for an image, got 'image\.csv'"),
        (tmp_path / "flat.csv", "moved.csv", r"flat\.csv must hold points of 3 coordinates, got 2"),
    ):
        (tmp_path / "flat.csv").write_text("1,2\n")
        with pytest.raises(ValueError, match=message):
            commands.apply_field(tmp_path / "ddf.nii.gz", source, tmp_path / output)
        assert not (tmp_path / output).exists()


def test_a_folder_that_failed_work_made_goes_and_one_that_was_there_stays(pair, tmp_path):
    for there in (False, True):
        folder = tmp_path / "a" / "b"
        if there:
            folder.mkdir(parents=True)
        with pytest.raises(ValueError, match="step must be"):
            _refine(pair, folder, settings=QUICK | {"step": -1})
        assert (tmp_path / "a").exists() == there
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file"):
        _refine(pair, pair["fixed"])


def test_json_has_no_nan():
    text = as_json({"a": float("nan"), "b": 1.5, "c": 2, "d": float("inf")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": 1.5, "c": 2, "d": None}


def test_two_dimensions_work_too(tmp_path):
    image = gaussian_smooth(torch.randn(1, 1, 24, 26, generator=torch.Generator().manual_seed(0)), 2.0)[0, 0].numpy()
    fixed = _save(tmp_path / "f.nii.gz", image[1:, :, None], np.eye(4))
    moving = _save(tmp_path / "m.nii.gz", image[:-1, :, None], np.eye(4))
    metrics = pairs.refine_pair(fixed, moving, tmp_path / "out", report=False, settings=QUICK)
    assert metrics["loss_after"] < 0.2 * metrics["loss_before"]
    for file_format in ("fsl", "learn2reg"):
        with pytest.raises(
            ValueError, match=f"file_format must be 'itk' or .*'voxel' for 2D fields, got '{file_format}'"
        ):
            pairs.refine_pair(fixed, moving, tmp_path / "no", file_format=file_format)
    ddf, _ = read_ddf(tmp_path / "out" / "ddf.nii.gz")
    assert ddf.shape == (2, 23, 26)
    assert int(fold_count(torch.from_numpy(ddf)[None])) == 0


SHEARED = FIXED.copy()
SHEARED[0, 1] = 0.3


def test_a_sheared_grid_is_refused_before_the_work_and_held_by_other_formats(pair, tmp_path):
    """ITK would put the last voxel 5 mm elsewhere; the sform of what is written otherwise holds the shear."""
    for name in ("fixed", "moving"):
        image = nib.load(pair[name])
        sheared = nib.Nifti1Image(np.asarray(image.dataobj), SHEARED)
        sheared.set_qform(None, 0)
        nib.save(sheared, tmp_path / f"{name}_sheared.nii.gz")
        other = pair | {name: tmp_path / f"{name}_sheared.nii.gz"}
        with pytest.raises(
            ValueError, match=rf"(?s){name}_sheared.nii.gz must have voxel axes at right angles .*resample .*'voxel'"
        ):
            _refine(other, tmp_path / "out", labels=None, points=None)
        assert not (tmp_path / "out").exists()
    both = {"fixed": tmp_path / "fixed_sheared.nii.gz", "moving": tmp_path / "fixed_sheared.nii.gz"}
    settings = QUICK | {"iterations": 0}
    pairs.refine_pair(**both, output_dir=tmp_path / "out", report=False, settings=settings, file_format="voxel")
    for name in ("warped", "ddf", "inverse"):
        written = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        np.testing.assert_allclose(written.affine, SHEARED, atol=1e-5)
        assert int(written.header["qform_code"]) == 0
        np.testing.assert_allclose(written.header.get_zooms()[:3], np.linalg.norm(SHEARED[:3, :3], axis=0), rtol=1e-5)


def test_labels_beyond_single_precision_keep_their_values(pair, tmp_path):
    """Warped, measured, reported and written: two neighbours of 2^24 that float32 merges, one of 2^32 - 1."""
    names = np.array([0, 16777216, 16777217, 614454277, 2**32 - 1])
    for image, label in zip(("fixed", "moving"), pair["labels"], strict=True):
        scene = nib.load(pair[image])
        kinds = np.digitize(scene.get_fdata(), (-0.8, -0.2, 0.3, 0.9))
        nib.save(nib.Nifti1Image(names[kinds].astype(np.uint32), scene.affine), label)
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    metrics = _refine(pair, tmp_path / "out", report=True)
    written = nib.load(tmp_path / "out" / "warped_label.nii.gz")
    assert written.get_data_dtype() == np.uint32
    warped, fixed = (
        np.asarray(nib.load(p).dataobj) for p in (tmp_path / "out" / "warped_label.nii.gz", pair["labels"][0])
    )
    assert np.unique(warped).tolist() == names.tolist()
    dice = [2 * ((warped == n) & (fixed == n)).sum() / ((warped == n).sum() + (fixed == n).sum()) for n in names[1:]]
    assert metrics["dice_after"] == pytest.approx(np.mean(dice), rel=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"Dice of label {name}" in page for name in names[1:])
    commands.apply_field(tmp_path / "out" / "ddf.nii.gz", pair["labels"][1], tmp_path / "again.nii.gz", label=True)
    again = nib.load(tmp_path / "again.nii.gz")
    assert again.get_data_dtype() == np.uint32
    assert (np.asarray(again.dataobj) != warped).mean() < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plane_stored_along_any_axis_is_registered_and_stays_in_its_place(tmp_path, axis):
    """ITK knows planes of x and y only; what lies in another is refused before the work and written in voxels."""
    image = gaussian_smooth(torch.randn(1, 1, 24, 26, generator=torch.Generator().manual_seed(0)), 2.0)[0, 0].numpy()
    affine = np.diag([1.5, 1.2, 2.0, 1.0])
    affine[:3, 3] = (5.0, -7.0, 3.0)
    order = [*(a for a in range(3) if a != axis), axis, 3]
    paths = [
        _save(tmp_path / f"{name}.nii.gz", np.expand_dims(part, axis), affine)
        for name, part in (("f", image[1:]), ("m", image[:-1]))
    ]
    if axis != 2:
        with pytest.raises(ValueError, match=r"(?s)f.nii.gz must lie in a plane of x and y for ITK's .*'voxel'"):
            pairs.refine_pair(*paths, tmp_path / "out", report=False, settings=QUICK)
        assert not (tmp_path / "out").exists()
    form = "itk" if axis == 2 else "voxel"
    metrics = pairs.refine_pair(*paths, tmp_path / "out", report=False, settings=QUICK, file_format=form)
    assert metrics["loss_after"] < 0.2 * metrics["loss_before"]
    for name in ("ddf", "inverse", "warped"):
        np.testing.assert_allclose(nib.load(tmp_path / "out" / f"{name}.nii.gz").affine, affine[:, order], atol=1e-6)
    ddf, _ = read_ddf(tmp_path / "out" / "ddf.nii.gz")
    assert ddf.shape == (2, 23, 26)
    assert np.median(ddf[0]) == pytest.approx(1.0, abs=0.1)
    commands.apply_field(tmp_path / "out" / "ddf.nii.gz", paths[1], tmp_path / "again.nii.gz")
    again, warped = (
        nib.load(f / n).get_fdata() for f, n in ((tmp_path, "again.nii.gz"), (tmp_path / "out", "warped.nii.gz"))
    )
    np.testing.assert_allclose(again, warped, atol=1e-5)


def test_the_report_is_written_beside_the_fields(pair, tmp_path):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    metrics = _refine(pair, tmp_path / "out", report=True, settings=QUICK | {"iterations": 3})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "moving.nii.gz onto fixed.nii.gz" in page
    assert f"<td>{metrics['tre_mm_after']:.2f}</td>" in page
    assert f"<td>{metrics['sdlogj_after']:.3f}</td>" in page


def test_the_report_has_what_metrics_json_has_with_an_affine_too(pair, tmp_path):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    affine = np.eye(4)
    affine[:3, 3] = pair["shift"] * 0.5
    np.savetxt(tmp_path / "affine.txt", affine)
    metrics = _refine(
        pair, tmp_path / "out", affine=tmp_path / "affine.txt", report=True, command="monai-lm refine …",
        settings=QUICK | {"iterations": 3},
    )  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    for name, key, digits in (("mean Dice", "dice", 3), ("TRE, mm", "tre_mm", 2), ("SD of log Jacobian", "sdlogj", 3)):
        values = [f"<td>{metrics[k]:.{digits}f}</td>" for k in (f"{key}_before", f"{key}_after")]
        assert f'<th scope="row">{name}</th>{values[0]}{values[1]}' in page
    assert '<th scope="col">affine only</th>' in page
    assert "not registered" not in page
    for path in (pair["fixed"], pair["moving"], tmp_path / "affine.txt", *pair["labels"], *pair["points"]):
        assert str(path) in page
    assert '<th scope="row">command</th><td>monai-lm refine …</td>' in page
    assert '<th scope="row">similarity</th><td>lncc</td>' in page  # a default, too


def test_metrics_json_says_what_it_is_of_and_what_to_think_of_it(pair, tmp_path):
    metrics = _refine(pair, tmp_path / "out", settings=QUICK | {"step": 0.25})
    assert metrics["verdict"] in ("good", "check")
    assert metrics["headline"].startswith("The field has no folds")
    assert metrics["agreement_after"] > metrics["agreement_before"]
    made_of = metrics["provenance"]
    assert made_of["settings"]["step"] == made_of["refine"]["step"] == 0.25
    assert made_of["torch"] == torch.__version__
    assert set(made_of["inputs"]) == {
        "fixed", "moving", "fixed_label", "moving_label", "fixed_points", "moving_points",
    }  # fmt: skip
    assert made_of["inputs"]["fixed"]["path"] == str(pair["fixed"])
    assert made_of["inputs"]["fixed"]["bytes"] == pair["fixed"].stat().st_size


def test_noise_for_an_image_is_doubted(pair, tmp_path):
    noise = np.random.default_rng(0).standard_normal((26, 27, 20)).astype(np.float32)
    metrics = _refine(
        pair | {"moving": _save(tmp_path / "noise.nii.gz", noise, MOVING)}, tmp_path / "out", labels=None, points=None,
        settings={},
    )  # fmt: skip
    assert metrics["loss_after"] < metrics["loss_before"]  # similarity alone would be content
    assert metrics["verdict"] == "check"
    assert {"agreement", "extreme"} <= set(metrics["remarks"])


def test_a_plain_install_refines_and_says_that_there_is_no_report(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"no report is written: .*monai_lm\[report\]"):
        metrics = _refine(pair, tmp_path / "out", report=True, settings=QUICK | {"iterations": 2})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ddf.nii.gz", "inverse.nii.gz", "metrics.json", "warped.nii.gz", "warped_label.nii.gz"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_a_run_that_fails_while_writing_leaves_no_metrics_of_a_former_one(pair, tmp_path, monkeypatch):
    _refine(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})

    def full(*_, **__):
        raise OSError(28, "No space left on device", "ddf.nii.gz")

    monkeypatch.setattr(commands, "write_ddf", full)
    with pytest.raises(OSError, match=r"No space left on device: 'ddf\.nii\.gz'"):
        _refine(pair, tmp_path / "out", overwrite=True, settings=QUICK | {"iterations": 1})
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_outputs_of_fields_are_checked_before_the_work(pair, tmp_path, monkeypatch):
    write_itk_ddf(tmp_path / "ddf.nii.gz", np.zeros((3, 18, 17, 14), np.float32), FIXED)
    field, message = tmp_path / "ddf.nii.gz", "output must end in "
    monkeypatch.setattr(commands, "Field", pytest.fail)
    for work in (
        lambda: commands.invert_field(field, tmp_path / "inverse.npz"),
        lambda: commands.invert_field(field, tmp_path / "inverse.nii.gz", file_format="learn2reg"),
        lambda: commands.compose_fields(field, field, tmp_path / "both.txt"),
        lambda: commands.convert_field(field, tmp_path / "other.nii.gz", "learn2reg"),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    with pytest.raises(ValueError, match="the output's folder must be a folder, got the file"):
        commands.apply_field(field, pair["moving"], field / "warped.nii.gz")


def test_writing_that_fails_is_not_in_the_way_of_the_next_try(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "warped.nii.gz")

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "save_nifti", full)
        with pytest.raises(OSError, match=r"No space left on device: 'warped\.nii\.gz'"):
            _refine(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    assert list((tmp_path / "out").iterdir()) == []
    _refine(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})


def test_an_input_is_never_replaced(pair, tmp_path):
    _refine(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    field = tmp_path / "out" / "ddf.nii.gz"
    before = field.read_bytes()
    with pytest.raises(
        ValueError, match=r"output_dir must not be where the inputs are, .*ddf\.nii\.gz would be replaced"
    ):
        _refine(pair, tmp_path / "out", ddf=field, overwrite=True, settings=QUICK | {"iterations": 1})
    assert field.read_bytes() == before


def test_a_log_that_is_there_is_not_replaced_unasked(pair, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("kept")
    with pytest.raises(FileExistsError, match=r"log\.jsonl"):
        _refine(pair, tmp_path / "out", settings=QUICK, log_json=log)
    assert log.read_text() == "kept"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="would be replaced"):
        _refine(pair, tmp_path / "out", settings=QUICK, log_json=pair["moving"], overwrite=True)


def test_an_affine_that_is_neither_a_file_nor_a_way_to_find_one_is_named(pair, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"affine must be a file or one of .*'rigid'.*, found no file similarity"
    ):
        _refine(pair, tmp_path / "out", settings=QUICK, affine="similarity")
