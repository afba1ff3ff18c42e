"""Series in files: motion over time, in space, whatever their grid."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_lm.apps.sequence import register_sequence
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.io import read_ddf

SETTINGS = {"scales": (2, 1), "iterations": (30, 20)}
SHIFTS = (1.0, 0.0, -1.5)
"""Of the frames along the second axis, in voxels; the second one is the reference."""


@pytest.fixture
def series(smooth_image, tmp_path):
    """``series(n)``: files of frames that are shifted against one another, of labels on the second, and its affine."""

    def make(n, **header):
        size = (24, 22, 18)[:n]
        image = smooth_image((1, 1, *size), 2.0, dtype=torch.float32)
        frames = []
        for shift in SHIFTS:
            ddf = torch.zeros(1, n, *size)
            ddf[:, 1] = -shift
            frames.append(warp(image, ddf)[0, 0].numpy())
        values = np.stack(frames, -1)
        affine = np.diag([-1.0, 2.0, 1.5, 1.0])
        affine[:3, 3] = 5, -7, 9
        label = np.zeros(size, np.uint8)
        label[6:18, 6:16], label[:3] = 2, 7
        file = nib.Nifti1Image(values if n == 3 else values[:, :, None], affine)
        file.header.set_xyzt_units("mm", header.get("unit", "sec"))
        file.header.set_zooms((1.0, 2.0, 1.5, header.get("step", 0.5)))
        nib.save(file, tmp_path / "series.nii.gz")
        nib.save(nib.Nifti1Image(label if n == 3 else label[:, :, None], affine), tmp_path / "label.nii.gz")
        return tmp_path / "series.nii.gz", tmp_path / "label.nii.gz", affine

    return make


@pytest.mark.parametrize("n", [2, 3])
def test_motion_is_told_in_millimetres_and_undone(n, series, tmp_path):
    path, label, affine = series(n, step=500.0, unit="msec")
    out = tmp_path / "out"
    rows = register_sequence(path, out, 1, label, settings=SETTINGS)
    assert [row["frame"] for row in rows] == [0, 1, 2]
    assert [row["time"] for row in rows] == pytest.approx([0.0, 0.5, 1.0])
    assert rows[0]["mean_mm_2"] == pytest.approx(2 * 1.0, abs=0.1)
    assert rows[2]["mean_mm_2"] == pytest.approx(2 * 1.5, abs=0.1)
    assert rows[0]["folds"] == rows[2]["folds"] == 0
    assert rows[2]["loss_after"] < 0.1 * rows[2]["loss_before"]
    with (out / "motion.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[2]["mean_mm_2"]) == rows[2]["mean_mm_2"]
    assert table[1]["mean_mm"] == ""  # the reference does not move
    assert table[2]["over"] == "labels"  # not the image, most of which is at rest or cannot be known
    sizes = {value: int((np.asarray(nib.load(label).dataobj) == value).sum()) for value in (2, 7)}
    both = sum(rows[2][f"mean_mm_{value}"] * size for value, size in sizes.items()) / sum(sizes.values())
    assert rows[2]["mean_mm"] == pytest.approx(both, rel=1e-4)
    ddf, where = read_ddf(out / "ddf_0002.nii.gz")
    assert ddf[1, 8:16, 8:14].mean() == pytest.approx(-1.5, abs=0.1)
    np.testing.assert_allclose(where, affine)
    rest, moving = nib.load(out / "warped.nii.gz"), nib.load(path)
    assert rest.shape == moving.shape
    assert rest.header.get_zooms()[3] == 0.5
    assert rest.header.get_xyzt_units() == ("mm", "sec")
    still, moved = (np.asarray(image.dataobj)[8:16, 8:14] for image in (rest, moving))
    np.testing.assert_array_equal(still[..., 1], moved[..., 1])
    assert np.abs(still[..., 2] - still[..., 1]).mean() < 0.1 * np.abs(moved[..., 2] - moved[..., 1]).mean()
    record = json.loads((out / "metrics.json").read_text())["provenance"]
    assert record["settings"]["reference"] == 1
    assert set(record["inputs"]) == {"series", "label"}


def test_what_cannot_be_used_is_refused_before_the_work(series, tmp_path):
    path, label, affine = series(3)
    with pytest.raises(ValueError, match="must hold several volumes"):
        register_sequence(label, tmp_path / "out")
    with pytest.raises(ValueError, match="one of the 3 frames"):
        register_sequence(path, tmp_path / "out", 3)
    other = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(other.dataobj), 2 * affine), tmp_path / "other.nii.gz")
    with pytest.raises(ValueError, match="must lie on the grid of the frames"):
        register_sequence(path, tmp_path / "out", label=tmp_path / "other.nii.gz")
    image = nib.load(path)
    for value, frames, message in (
        (np.nan, [1], "finite, got NaN or infinite values in frame 1 of 3, counted from 0; leave it out"),
        (7.0, [0, 2], "images, got but one value in frames 0, 2 of 3, counted from 0; leave them out"),
    ):
        values = np.asarray(image.dataobj).copy()
        values[..., frames] = value
        nib.save(nib.Nifti1Image(values, affine), tmp_path / "bad.nii.gz")
        with pytest.raises(ValueError, match=f"bad.nii.gz must have frames that are {message}"):
            register_sequence(tmp_path / "bad.nii.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "motion.csv").write_text("kept")
    with pytest.raises(FileExistsError, match=r"motion\.csv"):
        register_sequence(path, tmp_path / "out", settings=SETTINGS)
    assert (tmp_path / "out" / "motion.csv").read_text() == "kept"


def test_fields_of_another_reference_do_not_stay(series, tmp_path):
    path, _, _ = series(2)
    quick = {"scales": (1,), "iterations": 1}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ddf_0009.nii.gz").write_text("somebody's")
    register_sequence(path, tmp_path / "out", 1, settings=quick)
    assert (tmp_path / "out" / "ddf_0009.nii.gz").exists()  # nobody said that it may be replaced
    register_sequence(path, tmp_path / "out", 0, overwrite=True, settings=quick)
    assert sorted(p.name for p in (tmp_path / "out").glob("ddf_*")) == ["ddf_0001.nii.gz", "ddf_0002.nii.gz"]


def test_motion_is_told_over_the_mask_or_the_foreground(tmp_path):
    """A bright square that moves on ground that does not: its motion is not made small by the ground."""
    square = torch.zeros(40, 40)
    square[12:28, 12:28] = 1
    square = gaussian_smooth(square[None, None], 1.0)
    ddf = torch.zeros(1, 2, 40, 40)
    ddf[:, 0] = -2
    frames = torch.stack([square[0, 0], warp(square, ddf)[0, 0]], -1)[:, :, None]
    nib.save(nib.Nifti1Image(frames.numpy(), np.eye(4)), tmp_path / "series.nii.gz")
    mask = np.zeros((40, 40, 1), np.uint8)
    mask[:14] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / "mask.nii.gz")
    for name, given in (("foreground", None), ("mask", tmp_path / "mask.nii.gz")):
        row = register_sequence(tmp_path / "series.nii.gz", tmp_path / name, mask=given, settings=SETTINGS)[1]
        moved = read_ddf(tmp_path / name / "ddf_0001.nii.gz")[0]
        where = mask[..., 0] > 0 if given else square[0, 0].numpy() > 0.5
        assert row["over"] == name
        length = np.linalg.norm(moved, axis=0)
        assert row["mean_mm"] == pytest.approx(length[where].mean(), rel=0.02)
        assert row["max_mm"] <= length.max()
    assert length.shape == (40, 40)
