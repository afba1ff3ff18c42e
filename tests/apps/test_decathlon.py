"""The Decathlon's hippocampus images, in the layout that MONAI's downloader leaves behind."""

import json
import re

import pytest

from monai_lm.apps import decathlon
from monai_lm.apps.decathlon import register_pair


@pytest.fixture
def task_folder(tmp_path, data_root):
    """Task04_Hippocampus as the archive unpacks it, with three of the real images."""
    names = [f.name for f in sorted((data_root / "hippocampus" / "images").glob("*.nii.gz"))[:3]]
    task = tmp_path / "Task04_Hippocampus"
    for folder, source in (("imagesTr", "images"), ("labelsTr", "labels")):
        (task / folder).mkdir(parents=True)
        for name in names:
            (task / folder / name).symlink_to((data_root / "hippocampus" / source / name).resolve())
    training = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    description = {"name": "Hippocampus", "modality": {"0": "MRI"}, "labels": {"0": "background"}, "numTraining": 3}
    description |= {"numTest": 0, "training": training, "test": [], "tensorImageSize": "3D"}
    description |= {"description": "", "licence": "CC-BY-SA 4.0", "reference": "", "release": "1.0"}
    (task / "dataset.json").write_text(json.dumps(description))
    return tmp_path


def test_registration_of_a_real_pair_improves_its_labels(task_folder):
    message = register_pair(task_folder, 0, 1)
    before, after, folds = re.search(r"([\d.]+) -> ([\d.]+), (\d+) folds", message).groups()
    assert float(after) > float(before) + 0.04
    assert folds == "0"


def test_index_out_of_range_says_which(task_folder):
    with pytest.raises(ValueError, match="moving must be between 0 and 2, got 3"):
        register_pair(task_folder, 0, 3)


def test_a_folder_that_was_unpacked_in_part_is_fetched_again(task_folder, monkeypatch):
    asked = []

    def dataset(*_, download, **__):
        asked.append(download)
        raise ValueError("looked")

    monkeypatch.setattr(decathlon, "DecathlonDataset", dataset)
    task = task_folder / "Task04_Hippocampus"
    for missing in (None, next((task / "labelsTr").iterdir()), task / "dataset.json"):
        if missing:
            missing.unlink()
        with pytest.raises(ValueError, match="looked"):
            register_pair(task_folder, 0, 1)
    assert asked == [False, True, True]
