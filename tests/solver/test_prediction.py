"""A prediction that cannot be meant is not used, and its repair ends; one that is merely bad is."""

import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm import kernels, refine
from monai_lm.apps import commands, pairs
from monai_lm.apps.cohort import refine_cohort
from monai_lm.fields import compose, fold_count, warp
from monai_lm.fields.topology import repair
from monai_lm.io import write_ddf
from monai_lm.similarity import LNCC, MSE
from monai_lm.solver.prediction import believed
from monai_lm.solver.pyramid import make_level

SETTINGS = {"scales": (2, 1), "iterations": 5}


@pytest.fixture(params=[(40, 36), (26, 24, 22)], ids=["2D", "3D"])
def case(request, smooth_image, smooth_field):
    """Fixed, moving and the truth, two pairs."""
    size = request.param
    moving = smooth_image((2, 1, *size), 2.0, dtype=torch.float32)
    truth = smooth_field((2, len(size), *size), 3.0, 6.0, 1, torch.float32)
    assert fold_count(truth).tolist() == [0, 0]
    return warp(moving, truth), moving, truth


def mirrored(ddf):
    """The field as it is where the first axis runs the other way, which its vectors do not know."""
    size = ddf.shape[2]
    axis = torch.arange(size, dtype=ddf.dtype).view(-1, *[1] * (ddf.dim() - 3))
    turned = ddf.clone()
    turned[:, 0] = size - 1 - 2 * axis + ddf[:, 0]
    return turned


MISTAKES = {
    "mirrored": (mirrored, r"folds in \d+% of its cells"),
    "of the other direction": (lambda u: -2 * u, "makes the images less alike than no field does"),
    "in another unit": (lambda u: 8 * u, "less alike"),
    "channels reversed": (lambda u: 2 * u.flip(1), "less alike"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_prediction_that_cannot_be_meant_is_not_used_and_said_so(mistake, case):
    fixed, moving, truth = case
    change, reason = MISTAKES[mistake]
    given = change(truth)
    with pytest.warns(UserWarning, match=rf"ddf of pair 0 .*{reason}.*not used.*Likely reasons: .*millimetres"):
        result = refine(fixed, moving, given, **SETTINGS)
    expected = refine(fixed, moving, torch.zeros_like(truth), **SETTINGS)
    assert torch.equal(result.ddf, expected.ddf)
    assert torch.equal(result.predicted_folds, fold_count(given))
    assert result.repair_shift.tolist() == [0, 0]
    assert result.prediction_used.tolist() == [False, False]
    assert result.unused == [0, 1]
    assert expected.unused == []
    assert refine(fixed, moving, **SETTINGS).prediction_used is None


def test_only_the_pair_that_is_wrong_loses_its_prediction(case):
    fixed, moving, truth = case
    given = torch.cat([truth[:1], mirrored(truth[1:])])
    before = given.clone()
    with pytest.warns(UserWarning, match="ddf of pair 1 "):
        result = refine(fixed, moving, given, **SETTINGS)
    alone = refine(fixed[:1], moving[:1], truth[:1], **SETTINGS)
    torch.testing.assert_close(result.ddf[:1], alone.ddf, rtol=0, atol=1e-5)
    assert torch.equal(given, before)
    assert result.prediction_used.tolist() == [True, False]


@pytest.mark.parametrize(
    "better",
    [
        lambda u: u,
        lambda u: 0.3 * u,
        lambda u: 0.0 * u,
        lambda u: 1.4 * u,
        lambda u: u + 0.4 * torch.randn(u.shape, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["the truth", "part of it", "nothing", "too much", "with noise and folds"],
)
@pytest.mark.parametrize("similarity", [LNCC(), MSE()], ids=["lncc", "mse"])
def test_what_brings_the_images_nearer_is_believed(better, similarity, case):
    fixed, moving, truth = case
    size = truth.shape[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddf = better(truth)
        finest = make_level(size, [1.0] * len(size), 1)
        field, used = believed(ddf, fixed, moving, similarity, finest, [1.0] * len(size))
        assert field is ddf
        assert used.tolist() == [True, True]


def test_a_time_budget_holds_for_the_repair_too(case, monkeypatch):
    """Rounds take what they take; none begins after the deadline, and what is left is shrunk, not folded."""
    _, _, truth = case
    noisy = truth + 1.5 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    rounds = []
    mend = kernels.mend
    monkeypatch.setattr(kernels, "mend", lambda *args: rounds.append(1) or mend(*args))
    out = repair(noisy, deadline=time.perf_counter() - 1)
    assert rounds == []
    assert fold_count(out).tolist() == [0, 0]
    mean = noisy.mean(dim=tuple(range(2, noisy.dim())), keepdim=True)
    for pair in range(2):  # a part of the way to its mean, as far as it has to be to a hundredth
        deviation, kept = (noisy - mean)[pair], (out - mean)[pair]
        part = float((kept * deviation).sum() / deviation.square().sum())
        torch.testing.assert_close(kept, part * deviation, rtol=0, atol=1e-4)
        assert 0 < part < 1
        assert fold_count((mean + (part + 0.01) * (noisy - mean))[pair : pair + 1]).item() > 0


def test_repair_ends_whatever_the_field(case, monkeypatch):
    """A mirrored map cannot be smoothed into one that does not fold: the work is bounded by the size of the field."""
    _, _, truth = case
    smoothed = []
    mend = kernels.mend

    def counting(*args):
        out = mend(*args)
        smoothed.append(int(out[0, 1]))
        return out

    monkeypatch.setattr(kernels, "mend", counting)
    out = repair(mirrored(truth[:1]))
    assert fold_count(out).item() == 0
    assert sum(smoothed) <= 8 * truth[0, 0].numel()
    inner = repair(mirrored(truth[:1]), outer=truth[:1])
    assert fold_count(compose(truth[:1], inner)).item() == 0


FLAT = np.diag([1.5, 1.0, 2.0, 1.0])


@pytest.fixture
def written(case, tmp_path):
    """The first pair of images and a field of the wrong direction as files; 3D only."""
    fixed, moving, truth = case
    if truth.shape[1] == 2:
        pytest.skip("once is enough")
    for name, image in (("fixed", fixed), ("moving", moving)):
        nib.save(nib.Nifti1Image(image[0, 0].numpy(), FLAT), tmp_path / f"{name}.nii.gz")
    write_ddf(tmp_path / "wrong.nii.gz", -2 * truth[0].numpy(), FLAT)
    write_ddf(tmp_path / "right.nii.gz", 0.7 * truth[0].numpy(), FLAT)
    return tmp_path


def refined(folder, name, **kwargs):
    paths = folder / "fixed.nii.gz", folder / "moving.nii.gz", folder / f"out_{name}"
    return pairs.refine_pair(*paths, report=False, settings=SETTINGS, **kwargs)


def test_files_say_that_the_prediction_was_not_used(written):
    with pytest.warns(UserWarning, match="is not used"):
        wrong = refined(written, "wrong", ddf=written / "wrong.nii.gz")
    right, none = refined(written, "right", ddf=written / "right.nii.gz"), refined(written, "none")
    assert (wrong["prediction_used"], right["prediction_used"], none["prediction_used"]) == (False, True, None)
    assert "The prediction was not used" in wrong["remarks"]["unused"]
    assert "repaired" not in wrong["remarks"]
    assert wrong["verdict"] == "check"
    assert wrong["repair_shift"] == 0
    kept = [k for k, v in none.items() if isinstance(v, float) and k != "seconds"]  # also all that is of "before"
    assert {k: wrong[k] for k in kept} == pytest.approx({k: none[k] for k in kept}, nan_ok=True)
    assert right["loss_before"] < none["loss_before"]


def test_a_cohort_s_table_says_so_too(written):
    row = {"fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "ddf": "wrong.nii.gz"}
    entries = [{k: str(written / v) for k, v in row.items()}]
    with pytest.warns(UserWarning, match="is not used"):
        rows, failed = refine_cohort(entries, written / "cohort", report=False, settings=SETTINGS)
    assert failed == {}
    assert rows[0]["prediction_used"] is False
    assert rows[0]["remarks"].split()[0] == "unused"
    assert "prediction_used" in (written / "cohort" / "metrics.csv").read_text().splitlines()[0].split(",")


def test_images_that_do_not_overlap_are_refused_before_the_work(written):
    far = FLAT.copy()
    far[0, 3] = 500
    nib.save(nib.Nifti1Image(nib.load(written / "moving.nii.gz").get_fdata().astype("f4"), far), written / "far.nii.gz")
    with pytest.raises(ValueError, match=r"far.nii.gz must overlap, no voxel .* in the other; pass an affine"):
        pairs.refine_pair(written / "fixed.nii.gz", written / "far.nii.gz", written / "out_far")
    np.savetxt(written / "away.txt", far)
    with pytest.raises(ValueError, match=r"must overlap, .* in the other; the affine must lead from points of"):
        pairs.refine_pair(
            written / "fixed.nii.gz", written / "moving.nii.gz", written / "out_far", affine=written / "away.txt"
        )
    assert not (written / "out_far").exists()


def test_a_prediction_that_leads_out_of_the_moving_image_is_not_the_images_fault(written):
    write_ddf(written / "out.nii.gz", np.full((3, *nib.load(written / "fixed.nii.gz").shape), 500, np.float32), FLAT)
    with pytest.warns(UserWarning, match="ddf of pair 0 makes the images less alike .* is not used"):
        assert refined(written, "leads_out", ddf=written / "out.nii.gz")["prediction_used"] is False


def test_the_warning_points_at_the_caller(case):
    fixed, moving, truth = case
    with pytest.warns(UserWarning, match="is not used") as told:
        refine(fixed, moving, -2 * truth, **SETTINGS)
    assert {Path(w.filename).name for w in told if "is not used" in str(w.message)} == {"test_prediction.py"}


def test_an_image_and_itself_match_already(written):
    folder = written / "out_self"
    metrics = pairs.refine_pair(written / "fixed.nii.gz", written / "fixed.nii.gz", folder, report=False)
    assert (metrics["verdict"], metrics["remarks"]) == ("good", {})
    assert metrics["headline"].startswith("The images matched already")
    assert metrics["headline"].endswith("Nothing better was found; this is the start (the identity).")


def test_composing_says_where_the_second_field_does_not_reach(written):
    first, output = written / "right.nii.gz", written / "both.nii.gz"
    size = nib.load(first).shape[:3]
    beside, apart = FLAT.copy(), FLAT.copy()
    beside[0, 3], apart[0, 3] = FLAT[0, 0] * size[0] / 2, 500
    for name, affine in (("beside", beside), ("apart", apart)):
        write_ddf(written / f"{name}.nii.gz", np.zeros((3, *size), np.float32), affine)
    with pytest.warns(UserWarning, match=r"^(4|5)\d\.\d% of the voxels of .* where .*beside.nii.gz does not reach"):
        commands.compose_fields(first, written / "beside.nii.gz", output)
    with pytest.raises(ValueError, match=r"right.nii.gz must lead to the grid of .*apart.nii.gz"):
        commands.compose_fields(first, written / "apart.nii.gz", written / "nowhere.nii.gz")
    assert not (written / "nowhere.nii.gz").exists()
