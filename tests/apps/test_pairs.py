"""Files in, files out, in physical space: what was written leads where the images say."""

import json
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm import refine
from monai_lm.apps import commands, pairs
from monai_lm.apps.console import console
from monai_lm.fields import fold_count, gaussian_smooth
from monai_lm.fields.space import through_affine
from monai_lm.io import read_ddf, write_itk_ddf
from tests.apps.scenes import FIXED, MOVING, QUICK, refined, save, world_of

SHEARED = FIXED.copy()
SHEARED[0, 1] = 0.3


def test_a_mask_says_where_the_images_are_compared(pair, tmp_path):
    world = world_of((18, 17, 14), FIXED)
    near = save(tmp_path / "mask.nii.gz", (world[..., 0] < 18).astype(np.uint8), FIXED)
    spoilt = np.where(world[..., 0] < 18, nib.load(pair["fixed"]).get_fdata(), 5 * np.cos(world[..., 1]))
    pair["fixed"] = save(tmp_path / "spoilt.nii.gz", spoilt.astype(np.float32), FIXED)
    masked, plain = (refined(pair, tmp_path / n, mask=m) for n, m in (("masked", near), ("plain", None)))
    assert masked["tre_mm_after"] < 0.3 * masked["tre_mm_before"]
    assert masked["tre_mm_after"] < plain["tre_mm_after"]
    assert masked["loss_after"] < plain["loss_after"]
    full = save(tmp_path / "full.nii.gz", (255 * (world[..., 0] < 18)).astype(np.uint8), FIXED)
    assert refined(pair, tmp_path / "full", mask=full)["loss_after"] == masked["loss_after"]
    for given in (near, full):
        field = tmp_path / "masked" / "ddf.nii.gz"
        again = commands.evaluate_field(field, pair["fixed"], pair["moving"], mask=given)
        assert again["sdlogj"] == pytest.approx(masked["sdlogj_after"], rel=1e-4)
        assert again["folds"] == masked["folds_after"] == 0
    elsewhere = save(tmp_path / "elsewhere.nii.gz", np.ones((18, 17, 14), np.uint8), np.diag([1.5, 1.5, 2.5, 1]))
    with pytest.raises(ValueError, match=r"elsewhere.nii.gz must lie on the grid of its image"):
        refined(pair, tmp_path / "no", mask=elsewhere)
    assert not (tmp_path / "no").exists()


def test_a_mask_of_the_moving_image_hides_a_lesion_on_any_grid(pair, tmp_path):
    world = world_of((26, 27, 20), MOVING)
    distance = np.linalg.norm(world - world.mean((0, 1, 2)), axis=-1)
    healthy, shown = nib.load(pair["moving"]).get_fdata(), (distance > 7).astype(np.uint8)
    paths = {}
    for value in (4.0, -300.0, np.nan):
        lesion = np.where(distance < 7, value, healthy)
        paths[value] = save(tmp_path / f"lesion{value}.nii.gz", lesion.astype(np.float32), MOVING)
    mask = save(tmp_path / "shown.nii.gz", shown, MOVING)
    fields, metrics = {}, {}
    for name, value, given in (
        ("plain", 4.0, None),
        ("masked", 4.0, mask),
        ("other", -300.0, mask),
        ("nan", np.nan, mask),
    ):
        metrics[name] = refined(pair | {"moving": paths[value]}, tmp_path / name, moving_mask=given)
        fields[name] = nib.load(tmp_path / name / "ddf.nii.gz").get_fdata()
    for other in ("other", "nan"):
        np.testing.assert_array_equal(fields["masked"], fields[other])
    hole = save(tmp_path / "hole.nii.gz", 1 - shown, MOVING)
    for name, value in (("hole", 4.0), ("nan_hole", np.nan)):
        refined(pair | {"moving": paths[value]}, tmp_path / name, moving_lesion=hole)
        fields[name] = nib.load(tmp_path / name / "ddf.nii.gz").get_fdata()
    np.testing.assert_array_equal(fields["hole"], fields["nan_hole"])
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
        wrong = save(tmp_path / "no.nii.gz", values, affine)
        with pytest.raises(ValueError, match=message):
            refined(pair | {"moving": paths[4.0]}, tmp_path / "no", moving_mask=wrong)
    assert not (tmp_path / "no").exists()


def test_two_grids_are_registered_in_the_world(pair, tmp_path):
    metrics = refined(pair, tmp_path / "out")
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
    refined(pair, tmp_path / "out")
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
    metrics = refined(pair, tmp_path / "out", affine=tmp_path / "affine.txt", settings=QUICK | {"iterations": 0})
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
    metrics = refined(pair, tmp_path / "out", ddf=tmp_path / "warp.nii.gz", ddf_before_affine=True, **both)
    assert metrics["prediction_used"]
    assert metrics["provenance"]["settings"]["ddf_before_affine"] is True
    written, _ = read_ddf(tmp_path / "out" / "ddf.nii.gz", moving_affine=MOVING)
    np.testing.assert_allclose(written, whole, atol=1e-4)
    again = refined(pair, tmp_path / "whole", ddf=tmp_path / "whole.nii.gz", **both)
    assert again["loss_before"] == pytest.approx(metrics["loss_before"], abs=1e-5)
    assert "ddf_before_affine" not in again["provenance"]["settings"]
    for given in ({"ddf": tmp_path / "warp.nii.gz"}, {"ddf": tmp_path / "warp.nii.gz", "affine": "auto"}, both):
        with pytest.raises(ValueError, match="ddf_before_affine needs ddf and affine, both files, got"):
            refined(pair, tmp_path / "not", ddf_before_affine=True, **given)


def test_images_are_aligned_first_where_that_is_asked_for(pair, tmp_path):
    """The moving file, put 30 mm away by its header, is brought back; what was found is written and read again."""
    moving = nib.load(pair["moving"])
    far = moving.affine.copy()
    far[:3, 3] += (30, -10, 5)
    pair["moving"] = save(tmp_path / "far.nii.gz", moving.get_fdata().astype(np.float32), far)
    label = nib.load(pair["labels"][1])
    pair["labels"] = pair["labels"][0], save(tmp_path / "far_label.nii.gz", np.asarray(label.dataobj), far)
    near = np.loadtxt(pair["points"][1], delimiter=",")
    np.savetxt(pair["points"][1], near + np.array([30, -10, 5]), delimiter=",")
    still = {"settings": QUICK | {"iterations": 0}}
    found = refined(pair, tmp_path / "out", affine="rigid", **still)
    assert found["tre_mm_after"] < 1
    assert found["alignment"]["kind"] == "rigid"
    assert found["provenance"]["settings"]["affine"] == "rigid"
    assert found["alignment"]["text"].startswith("Aligned first, by a rigid map")
    again = refined(pair, tmp_path / "again", affine=tmp_path / "out" / "affine.txt", **still)
    assert again["tre_mm_after"] == pytest.approx(found["tre_mm_after"], abs=1e-4)


def test_a_prediction_is_refined_from_where_it_is(pair, tmp_path):
    refined(pair, tmp_path / "first")
    again = refined(
        pair, tmp_path / "second", ddf=tmp_path / "first" / "ddf.nii.gz", settings=QUICK | {"iterations": 0}
    )
    first = json.loads((tmp_path / "first" / "metrics.json").read_text())
    for key in ("tre_mm_after", "dice_after", "sdlogj_after", "loss_after"):
        assert again[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5)
        assert again["tre_mm_before"] == pytest.approx(first["tre_mm_after"], rel=1e-3)


def test_nothing_is_replaced_unless_asked(pair, tmp_path):
    refined(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    with pytest.raises(FileExistsError, match=r"ddf.nii.gz.* exists; --overwrite replaces it"):
        refined(pair, tmp_path / "out")
    refined(pair, tmp_path / "out", overwrite=True, settings=QUICK | {"iterations": 0})


def test_a_former_runs_report_and_labels_do_not_stay(pair, tmp_path):
    names = {"ddf.nii.gz", "inverse.nii.gz", "warped.nii.gz", "metrics.json"}
    (tmp_path / "out").mkdir()
    for name in ("report.html", "report.png", "warped_label.nii.gz", "mine.txt"):
        (tmp_path / "out" / name).write_text("of a former run")
    refined(pair, tmp_path / "out", overwrite=True, labels=None, settings=QUICK | {"iterations": 0})
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"mine.txt"}


def test_bad_files_are_named_and_nothing_is_written(pair, tmp_path):
    (tmp_path / "text.nii.gz").write_text("no image")
    four = save(tmp_path / "four.nii.gz", np.zeros((4, 4, 4, 2), np.float32), FIXED)
    values = save(tmp_path / "values.nii.gz", np.full((18, 17, 14), 0.5, np.float32), FIXED)
    write_itk_ddf(tmp_path / "elsewhere.nii.gz", np.zeros((3, 18, 17, 14), np.float32), MOVING, FIXED)
    write_itk_ddf(tmp_path / "other.nii.gz", np.zeros((3, 5, 6, 7), np.float32), FIXED)
    (tmp_path / "words.csv").write_text("x,y,z\n1,2,three\n")
    cases = [
        ({"fixed": tmp_path / "none.nii.gz"}, {}, FileNotFoundError, "none.nii.gz"),
        ({"fixed": tmp_path / "text.nii.gz"}, {}, ValueError, r"text.nii.gz must be a whole NIfTI file"),
        (
            {"moving": four},
            {},
            ValueError,
            r"four.nii.gz must hold one 2D or 3D volume, got .*; monai-lm sequence takes a series",
        ),
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
            refined(pair | images, tmp_path / "out", **extra)
        assert not (tmp_path / "out").exists()


def test_a_folder_that_failed_work_made_goes_and_one_that_was_there_stays(pair, tmp_path):
    for there in (False, True):
        folder = tmp_path / "a" / "b"
        if there:
            folder.mkdir(parents=True)
        with pytest.raises(ValueError, match="step must be"):
            refined(pair, folder, settings=QUICK | {"step": -1})
        assert (tmp_path / "a").exists() == there
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file"):
        refined(pair, pair["fixed"])


def test_two_dimensions_work_too(tmp_path):
    image = gaussian_smooth(torch.randn(1, 1, 24, 26, generator=torch.Generator().manual_seed(0)), 2.0)[0, 0].numpy()
    fixed = save(tmp_path / "f.nii.gz", image[1:, :, None], np.eye(4))
    moving = save(tmp_path / "m.nii.gz", image[:-1, :, None], np.eye(4))
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
            refined(other, tmp_path / "out", labels=None, points=None)
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
    metrics = refined(pair, tmp_path / "out", report=True)
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
        save(tmp_path / f"{name}.nii.gz", np.expand_dims(part, axis), affine)
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
    metrics = refined(pair, tmp_path / "out", report=True, settings=QUICK | {"iterations": 3})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "moving.nii.gz onto fixed.nii.gz" in page
    assert f"<td>{metrics['tre_mm_after']:.2f}</td>" in page
    assert f"<td>{metrics['sdlogj_after']:.3f}</td>" in page


def test_the_report_has_what_metrics_json_has_with_an_affine_too(pair, tmp_path):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    affine = np.eye(4)
    affine[:3, 3] = pair["shift"] * 0.5
    np.savetxt(tmp_path / "affine.txt", affine)
    metrics = refined(
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
    metrics = refined(pair, tmp_path / "out", settings=QUICK | {"step": 0.25})
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


def test_an_image_that_shows_nothing_where_the_fixed_one_lies_is_not_called_constant_as_a_whole(pair, tmp_path):
    values = np.zeros((80, 27, 20), np.float32)
    values[60:] = np.random.default_rng(0).random((20, 27, 20))
    moving = save(tmp_path / "beyond.nii.gz", values, MOVING)
    with pytest.warns(UserWarning, match=r"moving is constant on the grid of fixed .* do the images overlap\?"):
        refined(pair | {"moving": moving}, tmp_path / "out", labels=None, points=None)


def test_noise_for_an_image_is_doubted(pair, tmp_path):
    noise = np.random.default_rng(0).standard_normal((26, 27, 20)).astype(np.float32)
    metrics = refined(
        pair | {"moving": save(tmp_path / "noise.nii.gz", noise, MOVING)}, tmp_path / "out", labels=None, points=None,
        settings={},
    )  # fmt: skip
    assert metrics["loss_after"] < metrics["loss_before"]  # similarity alone would be content
    assert metrics["verdict"] == "check"
    assert {"agreement", "extreme"} <= set(metrics["remarks"])


def test_a_plain_install_refines_and_says_that_there_is_no_report(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"no report is written: .*monai_lm\[report\]"):
        metrics = refined(pair, tmp_path / "out", report=True, settings=QUICK | {"iterations": 2})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ddf.nii.gz", "inverse.nii.gz", "metrics.json", "warped.nii.gz", "warped_label.nii.gz"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_a_run_that_fails_while_writing_leaves_no_metrics_of_a_former_one(pair, tmp_path, monkeypatch):
    refined(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})

    def full(*_, **__):
        raise OSError(28, "No space left on device", "ddf.nii.gz")

    monkeypatch.setattr(commands, "write_ddf", full)
    with pytest.raises(OSError, match=r"No space left on device: 'ddf\.nii\.gz'"):
        refined(pair, tmp_path / "out", overwrite=True, settings=QUICK | {"iterations": 1})
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_writing_that_fails_is_not_in_the_way_of_the_next_try(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "warped.nii.gz")

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "save_nifti", full)
        with pytest.raises(OSError, match=r"No space left on device: 'warped\.nii\.gz'"):
            refined(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    assert not (tmp_path / "out").exists()
    refined(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})


def test_an_input_is_never_replaced(pair, tmp_path):
    refined(pair, tmp_path / "out", settings=QUICK | {"iterations": 0})
    field = tmp_path / "out" / "ddf.nii.gz"
    before = field.read_bytes()
    with pytest.raises(
        ValueError, match=r"output_dir must not be where the inputs are, .*ddf\.nii\.gz would be replaced"
    ):
        refined(pair, tmp_path / "out", ddf=field, overwrite=True, settings=QUICK | {"iterations": 1})
    assert field.read_bytes() == before


def test_a_log_that_is_there_is_not_replaced_unasked(pair, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("kept")
    with pytest.raises(FileExistsError, match=r"log\.jsonl"):
        refined(pair, tmp_path / "out", settings=QUICK, log_json=log)
    assert log.read_text() == "kept"
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="would be replaced"):
        refined(pair, tmp_path / "out", settings=QUICK, log_json=pair["moving"], overwrite=True)


@pytest.mark.parametrize("late", ["_refined", "assess", "_write_warped"])
def test_a_run_that_is_ended_leaves_no_empty_folder(pair, tmp_path, monkeypatch, late):
    def ended(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(pairs, late, ended)
    with pytest.raises(SystemExit) as stop, console("monai-lm"):
        refined(pair, tmp_path / "deep" / "out")
    assert stop.value.code == 143
    assert not (tmp_path / "deep").exists()


def test_the_log_grows_while_the_iterations_are_made_and_stays_if_they_fail(pair, tmp_path, monkeypatch):
    log, seen = tmp_path / "logs" / "log.jsonl", []

    def watched(*images, callback, **keywords):
        def look(*what):
            callback(*what)
            seen.append(len(log.read_text().splitlines()))
            if len(seen) == 30:
                raise RuntimeError("killed")

        return refine(*images, callback=look, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "refine", watched)
        with pytest.raises(RuntimeError, match="killed"):
            refined(pair, tmp_path / "out", settings=QUICK | {"tolerance": 0}, log_json=log)
    assert seen == list(range(1, 31))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(30))
    assert not (tmp_path / "out").exists()
    metrics = refined(pair, tmp_path / "out", settings=QUICK | {"tolerance": 0}, log_json=log, overwrite=True)
    assert len(log.read_text().splitlines()) == 62
    assert "callback" not in metrics["provenance"]["refine"]
    with pytest.raises(ValueError, match="settings must have no callback together with log_json"):
        refined(pair, tmp_path / "other", settings=QUICK | {"callback": print}, log_json=log)


def test_an_affine_that_is_neither_a_file_nor_a_way_to_find_one_is_named(pair, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"affine must be a file or one of .*'rigid'.*, found no file similarity"
    ):
        refined(pair, tmp_path / "out", settings=QUICK, affine="similarity")


def test_pictures_without_a_resolution_are_told_and_nothing_is_held_against_the_field(tmp_path):
    pictures = pytest.importorskip("PIL.Image", reason="Pillow, of the report extra, is not installed")
    values = (200 * gaussian_smooth(torch.rand(1, 1, 40, 48, generator=torch.Generator().manual_seed(0)), 2.0))[0, 0]
    kinds = {"f.png": {}, "m.png": {}, "m.tif": {"dpi": (300, 300)}}
    for name, options in kinds.items():
        pictures.fromarray(values.roll(int(name[0] == "m"), 0).byte().numpy()).save(tmp_path / name, **options)
    one = {"fixed": tmp_path / "f.png", "moving": tmp_path / "m.png", "report": True, "settings": QUICK}
    metrics = pairs.refine_pair(**one, output_dir=tmp_path / "out")
    assert metrics["remarks"].keys() == {"spacing"}
    assert "of f.png and m.png. It counts as 1 mm: millimetres are voxels here" in metrics["remarks"]["spacing"]
    assert metrics["verdict"] == "good"
    assert 'data-warning="spacing"' in (tmp_path / "out" / "report.html").read_text()
    assert pairs.refine_pair(**one, output_dir=tmp_path / "no", dry_run=True)["fixed"].endswith("1 x 1 mm, assumed")
    beside = pairs.refine_pair(**one | {"moving": tmp_path / "m.tif"}, output_dir=tmp_path / "two")
    told = r"of f.png. It counts as 1 mm, beside m.tif, which has 48×40 voxels of 0.08467×0.08467 mm"
    assert told in beside["remarks"]["spacing"]
    with pytest.warns(UserWarning, match="No size of a voxel is known of f.png and m.png"):
        commands.evaluate_field(tmp_path / "out" / "ddf.nii.gz", one["fixed"], one["moving"])
    both = pairs.refine_pair(
        **one | {"fixed": tmp_path / "m.tif", "moving": tmp_path / "m.tif"}, output_dir=tmp_path / "3"
    )
    assert "spacing" not in both["remarks"]
