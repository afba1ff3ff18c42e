"""Fields of files applied, inverted, composed, converted and measured, in physical space."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps import commands
from monai_lm.fields import gaussian_smooth
from monai_lm.fields.space import through_affine
from monai_lm.io import FORMATS, file_suffix, read_ddf, read_points, write_ddf, write_itk_ddf
from monai_lm.io.outputs import as_json
from tests.apps.scenes import FIXED, MOVING, refined, save


def test_the_inverse_leads_back(pair, tmp_path):
    refined(pair, tmp_path / "out")
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
    refined(pair, tmp_path / "out")
    for label, source, kept in ((False, pair["moving"], "warped"), (True, pair["labels"][1], "warped_label")):
        commands.apply_field(tmp_path / "out" / "ddf.nii.gz", source, tmp_path / f"{kept}.nii.gz", label=label)
        ours, written = (nib.load(f / f"{kept}.nii.gz") for f in (tmp_path, tmp_path / "out"))
        assert (np.abs(ours.get_fdata() - written.get_fdata()) > 1e-3).mean() < 1e-3
    assert ours.get_data_dtype() == np.uint8


def test_an_image_that_the_field_never_leads_into_is_told(pair, tmp_path):
    refined(pair, tmp_path / "out")
    image = nib.load(pair["moving"])
    shift = np.eye(4)
    shift[0, 3] = 1000
    far = save(tmp_path / "far.nii.gz", np.asarray(image.dataobj), shift @ image.affine)
    with pytest.warns(UserWarning, match=r"the field never leads into .*far.nii.gz"):
        commands.apply_field(tmp_path / "out" / "ddf.nii.gz", far, tmp_path / "w.nii.gz")


def test_a_voxel_field_leads_to_the_grid_that_is_given(pair, tmp_path):
    """Not to that of the image it is applied to, which may be stored in another orientation."""
    refined(pair, tmp_path / "out")
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
    refined(pair, tmp_path / "out")
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
    metrics = refined(pair, tmp_path / "out")
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
    image = save(tmp_path / "b.nii.gz", np.zeros(grids["b"], np.float32), MOVING)
    commands.compose_fields(tmp_path / "first.nii.gz", tmp_path / "second.nii.gz", tmp_path / "both.nii.gz")
    voxels = np.array([[5, 6, 4], [6, 7, 5], [4, 5, 6], [7, 5, 5]], dtype=float)  # nodes: nothing is interpolated twice
    np.savetxt(tmp_path / "start.csv", voxels @ FIXED[:3, :3].T + FIXED[:3, 3], delimiter=",")
    for field, source, target in (("first", "start", "half"), ("second", "half", "end"), ("both", "start", "at_once")):
        files = (tmp_path / f"{field}.nii.gz", tmp_path / f"{source}.csv", tmp_path / f"{target}.csv")
        commands.apply_field(*files, moving=image)
    start, end, at_once = (read_points(tmp_path / f"{name}.csv") for name in ("start", "end", "at_once"))
    np.testing.assert_allclose(at_once, end, atol=1e-3)
    assert np.abs(end - start).max() > 1
    third = save(tmp_path / "c.nii.gz", np.zeros((9, 8, 7), np.float32), FIXED)
    commands.convert_field(tmp_path / "second.nii.gz", tmp_path / "voxel.nii.gz", "voxel", moving=third)
    commands.compose_fields(tmp_path / "first.nii.gz", tmp_path / "voxel.nii.gz", tmp_path / "too.nii.gz", moving=third)
    np.testing.assert_allclose(read_ddf(tmp_path / "too.nii.gz")[0], read_ddf(tmp_path / "both.nii.gz")[0], atol=1e-3)


@pytest.mark.parametrize("to", FORMATS)
def test_converting_there_and_back_changes_nothing(tmp_path, to):
    ddf = gaussian_smooth(torch.randn(1, 3, 9, 10, 8, generator=torch.Generator().manual_seed(0)), 2.0)[0].numpy()
    write_itk_ddf(tmp_path / "a.nii.gz", ddf, FIXED)
    image = save(tmp_path / "fixed.nii.gz", np.zeros((9, 10, 8), np.float32), FIXED)
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
    images = [save(tmp_path / f"{i}.nii.gz", np.zeros((9, 10, 8), np.float32), (FIXED, MOVING)[i]) for i in range(2)]
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


def test_json_has_no_nan():
    text = as_json({"a": float("nan"), "b": 1.5, "c": 2, "d": float("inf")})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": 1.5, "c": 2, "d": None}


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
