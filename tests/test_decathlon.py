"""The Decathlon's hippocampus images, in the layout that MONAI's downloader leaves behind."""

import json
import re

import pytest

from monai_lm.decathlon import register_pair


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
