"""Recipes: what makes two results the same."""

import json
import os
from importlib import metadata

import numpy as np
import pytest
import torch

import monai_lm
from monai_lm.io.provenance import Recipe, describe, file_record, pair_recipe, settings_of, version_of, weights_digest
from monai_lm.similarity import LNCC
from monai_lm.solver.acceptance import Metropolis
from monai_lm.solver.damping import Simple
from monai_lm.solver.descent import WindowedLM
from monai_lm.solver.smoothing import Elastic


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    return tmp_path


def recorded(recipe):
    return json.loads(json.dumps(recipe.record()))


def test_the_same_recipe_has_no_changes_and_others_say_theirs(files):
    a, b = files / "a", files / "b"
    record = recorded(Recipe({"fixed": a}, {"step": 0.5, "refine": {"scales": [2, 1]}}))
    assert record["inputs"]["fixed"]["path"] == str(a)
    assert record["inputs"]["fixed"]["bytes"] == 1
    for inputs, settings, changes in (
        ({"fixed": a}, {"step": 0.5, "refine": {"scales": [2, 1]}}, []),
        ({"fixed": b}, {"step": 0.5, "refine": {"scales": [2, 1]}}, [f"fixed was {a}, is {b}"]),
        ({"fixed": a, "mask": b}, {"step": 0.5, "refine": {"scales": [2, 1]}}, [f"mask was none, is {b}"]),
        ({}, {"step": 0.5, "refine": {"scales": [2, 1]}}, [f"fixed was {a}, is none"]),
        ({"fixed": a}, {"step": 1, "refine": {"scales": [1]}}, [
            "step was 0.5, is 1", "refine.scales was [2, 1], is [1]",
        ]),
        ({"fixed": a}, {"step": 0.5, "refine": None}, ["refine.scales was [2, 1], is none"]),
    ):  # fmt: skip
        assert Recipe(inputs, settings).changes(record) == changes


def test_another_version_is_another_recipe(files, monkeypatch):
    recipe = Recipe({"fixed": files / "a"}, {})
    record = recorded(recipe)
    monkeypatch.setattr(monai_lm, "__version__", "9.9")
    assert recipe.changes(record) == [f"monai_lm was '{record['monai_lm']}', is '9.9'"]


def test_a_file_is_known_by_its_content(files):
    recipe = Recipe({"fixed": files / "a"}, {})
    record = recorded(recipe)
    (files / "c").write_text("a")
    os.utime(files / "a", ns=(1, 1))
    assert recipe.changes(record) == []
    assert Recipe({"fixed": files / "c"}, {}).changes(record) == []
    (files / "a").write_text("x")  # of the same length
    assert recipe.changes(record) == [f"fixed {files / 'a'} has changed since"]


def test_a_bundle_is_its_configuration_weights_and_scripts(tmp_path):
    for name in ("configs/inference.json", "models/model.pt", "scripts/net.py", "docs/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = file_record(tmp_path)
    (tmp_path / "docs/README.md").write_text("more words")
    assert file_record(tmp_path)["sha256"] == before["sha256"]
    for name in ("configs/inference.json", "models/model.pt", "scripts/net.py"):
        (tmp_path / name).write_text(name.upper())
        assert file_record(tmp_path)["sha256"] != before["sha256"]
        (tmp_path / name).write_text(name)


def test_defaults_that_are_given_are_no_change(files):
    images = [files / "a", files / "b"]
    record = recorded(pair_recipe(*images, settings={"progress": True}))
    assert pair_recipe(*images, settings={"similarity": "lncc"}).changes(record) == []
    assert pair_recipe(*images, file_format="fsl").changes(record) == ["file_format was 'itk', is 'fsl'"]
    assert pair_recipe(*images, labels=images).changes(record) == [
        f"fixed_label was none, is {files / 'a'}",
        f"moving_label was none, is {files / 'b'}",
    ]
    assert settings_of({"step": 0.25})["step"] == 0.25
    assert settings_of(None)["damping"] == [0.1, 0.1, 0.3, 1.0]


def test_objects_are_told_by_what_they_are_set_to():
    assert describe(LNCC(3)) == describe(LNCC(3)) != describe(LNCC(2))
    for one, same, other in (
        (Elastic(0.5), Elastic(0.5), Elastic(0.7)),
        (Simple(2.0), Simple(2.0), Simple(1.5)),
        (Metropolis(1), Metropolis(1), Metropolis(2)),
        (WindowedLM(3), WindowedLM(3), WindowedLM(5)),
    ):
        assert describe(one) == describe(same) != describe(other)
    assert describe({"a": (np.float32(0.5), np.int64(2), float("inf"), None)}) == {"a": [0.5, 2, "inf", None]}
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert describe(first) != describe(second)
    assert describe(test_objects_are_told_by_what_they_are_set_to).endswith("told_by_what_they_are_set_to")
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    assert weights_digest(first.bfloat16()) != weights_digest(second)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*field"):
        file_record(tmp_path / "field.nii.gz")


def test_versions_are_told_of_packages_under_any_name(monkeypatch):
    names = {"torch": torch.__version__, "numpy": np.__version__}
    assert {name: version_of(name) for name in names} == names

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert {name: version_of(name) for name in names} == names
