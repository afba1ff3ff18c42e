"""PairDataModule: parts, grids, caches, landmarks."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_lm.training import PairDataModule
from monai_lm.training.data import read_points
from tests.gpu.pretend import Pretend


def _batches(loader):
    return list(loader)


def test_pairs_of_a_folder_are_on_one_grid_and_in_one_part(cohort):
    data = PairDataModule(cohort, split=(0.5, 0.0, 0.5), pairs={"train": 5, "test": 4}, grid=(16, 16, 16), labels=3)
    data.setup()
    train, test, predict = (
        _batches(loader()) for loader in (data.train_dataloader, data.test_dataloader, data.predict_dataloader)
    )
    assert (len(train), len(test), len(predict), data.val_dataloader()) == (5, 4, 4, [])
    subjects = [{s for b in batches for s in b["name"][0].split("__")} for batches in (train, test)]
    assert not subjects[0] & subjects[1]
    assert test[0]["fixed"].shape == (1, 1, 16, 16, 16)
    assert float(test[0]["fixed"].max()) == 1
    assert float(test[0]["fixed"].min()) == 0
    assert [b["name"] for b in test] == [b["name"] for b in predict]


def test_training_pairs_are_drawn_anew_and_test_pairs_are_not(cohort):
    data = PairDataModule(cohort, split=(1.0, 0.0, 0.0), pairs=8, predict="train")
    data.setup()
    torch.manual_seed(0)
    loader = data.train_dataloader()
    first, second = ([b["name"][0] for b in loader] for _ in range(2))
    assert first != second
    again = [[b["name"][0] for b in data.predict_dataloader()] for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("cache", ["memory", "folder", None])
def test_caches_hold_the_same_images(cohort, tmp_path, cache):
    data = PairDataModule(cohort, split=(0, 0, 1), pairs=2, cache=tmp_path / "cache" if cache == "folder" else cache)
    data.setup("test")
    for batch in data.test_dataloader():
        stored = nib.load(cohort / "images" / f"{batch['name'][0].split('__')[0]}.nii.gz").get_fdata()
        low, high = np.percentile(stored, [0.5, 99.5])
        expected = ((stored - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(batch["fixed"][0, 0].numpy(), expected, atol=1e-5)


def test_augmentation_changes_training_pairs_only(cohort):
    def dark(pair):
        return {**pair, "fixed": pair["fixed"] * 0}

    data = PairDataModule(cohort, split=(0.5, 0, 0.5), pairs=2, augmentation=dark)
    data.setup()
    assert all(float(b["fixed"].max()) == 0 for b in data.train_dataloader())
    assert all(float(b["fixed"].max()) == 1 for b in data.test_dataloader())


def test_landmarks_follow_their_image_onto_the_grid(cohort, tmp_path):
    np.savetxt(tmp_path / "points.csv", [[3.0, 4.5, 2.0], [0, 0, 0]], delimiter=",")
    images = [str(cohort / "images" / f"s{i}.nii.gz") for i in range(2)]
    points = str(tmp_path / "points.csv")
    pair = {"fixed": images[0], "moving": images[1], "fixed_points": points, "moving_points": points}
    for grid, shift in ((None, 0), ((16, 14, 10), (2, 0, 0))):
        data = PairDataModule([pair], grid=grid)
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        torch.testing.assert_close(
            batch["fixed_points"][0], torch.tensor([[3.0, 4.5, 2.0], [0, 0, 0]]) + torch.tensor(shift)
        )


@pytest.mark.parametrize("text", ["x,y,z\n1,2,3\n", "1;2;3\n", "1,2\n"])
def test_landmarks_that_are_no_voxels_are_named(cohort, tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    stored = str(cohort / "images" / "s0.nii.gz")
    image = MetaTensor(torch.zeros(1, 12, 14, 10))
    with pytest.raises(ValueError, match=r"p.csv: must be lines of 3 numbers between commas, voxels without a header"):
        read_points(str(tmp_path / "p.csv"), stored, image)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"pairs": {"trian": 2}}, r"pairs must name parts among .*, got \['trian'\]"),
        ({"grid": (48,)}, r"grid must be 2 or 3 voxel counts of at least 2, got \(48,\)"),
        ({"grid": "48"}, "grid must be 2 or 3 voxel counts"),
        ({"grid": (48, -64, 48)}, "grid must be 2 or 3 voxel counts"),
    ],
)
def test_wrong_settings_are_found_at_once(cohort, keywords, message):
    with pytest.raises(ValueError, match=message):
        PairDataModule(cohort, **keywords)


def test_a_subject_in_two_parts_is_refused(cohort):
    images = [str(cohort / "images" / f"s{i}.nii.gz") for i in range(3)]
    pairs = {"train": [{"fixed": images[0], "moving": images[1]}], "test": [{"fixed": images[1], "moving": images[2]}]}
    with pytest.raises(ValueError, match=r"every subject in one part only.*\n.*s1.nii.gz: in train and in test"):
        PairDataModule(pairs).setup()


def test_images_of_other_shapes_need_a_grid(cohort, tmp_path):
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((9, 14, 10)), np.diag([1.5, 1, 2, 1])),
        tmp_path / "small.nii.gz",
    )
    pair = {"fixed": str(cohort / "images" / "s0.nii.gz"), "moving": str(tmp_path / "small.nii.gz")}
    with pytest.raises(ValueError, match="give a common grid"):
        PairDataModule([pair]).setup("predict")
    data = PairDataModule([pair], grid=(12, 14, 10))
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["moving"].shape == (1, 1, 12, 14, 10)


def test_pairs_of_other_sizes_are_no_batch(cohort, tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 14, 10)), np.eye(4)), tmp_path / "small.nii.gz")
    large, small = str(cohort / "images" / "s0.nii.gz"), str(tmp_path / "small.nii.gz")
    pairs = [{"fixed": path, "moving": path, "name": name} for name, path in (("a", large), ("b", small))]
    data = PairDataModule(pairs, batch_size=2)
    data.setup("predict")
    with pytest.raises(ValueError, match=r"pairs of one batch must have one size, got .*\(9, 14, 10\).*; give a grid"):
        next(iter(data.predict_dataloader()))


def test_a_stage_without_pairs_says_so(cohort):
    data = PairDataModule(cohort, split=(1, 0, 0), pairs=2)
    data.setup()
    with pytest.raises(ValueError, match="pairs for the part 'test'"):
        data.test_dataloader()


def test_as_many_pairs_are_predicted_as_asked_for(cohort):
    data = PairDataModule(cohort, split=(0, 0, 1), pairs={"predict": 5})
    data.setup()
    assert (len(data.predict_dataloader()), len(data.test_dataloader())) == (5, 30)
    images = [str(cohort / "images" / f"s{i}.nii.gz") for i in range(4)]
    listed = PairDataModule([{"fixed": images[0], "moving": moving} for moving in images[1:]], pairs={"predict": 2})
    listed.setup()
    assert [b["name"][0] for b in listed.predict_dataloader()] == ["s0__s1", "s0__s2"]


def test_a_cache_on_disk_is_of_the_files_and_the_grid_that_are_asked_for(cohort, tmp_path):
    image = tmp_path / "a.nii.gz"
    pair = {"fixed": str(image), "moving": str(cohort / "images" / "s1.nii.gz")}

    def fixed(**kwargs):
        data = PairDataModule([pair], cache=tmp_path / "cache", **kwargs)
        data.setup("predict")
        return next(iter(data.predict_dataloader()))["fixed"]

    image.write_bytes((cohort / "images" / "s0.nii.gz").read_bytes())
    first = fixed()
    assert fixed(grid=(16, 16, 16)).shape == (1, 1, 16, 16, 16)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert fixed().equal(first)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == times
    image.write_bytes((cohort / "images" / "s2.nii.gz").read_bytes())
    assert not fixed().equal(first)


@pytest.mark.parametrize(("given", "pinned"), [(None, True), (False, False), (True, True)])
def test_batches_are_pinned_where_there_is_a_cuda_device(given, pinned, cohort):
    data = PairDataModule(cohort, split=(0, 0, 1), pairs=2, pin_memory=given)
    data.setup("predict")
    with Pretend():
        assert data.predict_dataloader().pin_memory is pinned
    assert PairDataModule(cohort, split=(0, 0, 1), pairs=2).pin_memory is None
