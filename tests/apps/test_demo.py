"""The embedded example: its truth is exact, its prediction is imperfect, refinement mends it."""

import pytest
import torch

pytest.importorskip("nilearn", reason="the demo needs nilearn")

from monai_lm.apps import demo
from monai_lm.apps.demo import brain_example, endpoint_error, run_demo
from monai_lm.fields import fold_count, warp
from monai_lm.solver.refinement import refine


@pytest.fixture(scope="module")
def example():
    return brain_example(resolution=3, seed=0)


def test_truth_and_prediction_are_diffeomorphic_and_the_truth_is_exact(example):
    assert int(fold_count(example.truth)) == 0
    assert int(fold_count(example.prediction)) == 0
    assert endpoint_error(example, example.truth) == (0.0, 0.0)
    fixed, warped = example.fixed[:, 0][example.mask], warp(example.moving, example.truth)[:, 0][example.mask]
    assert float(torch.corrcoef(torch.stack([fixed, warped]))[0, 1]) > 0.8  # other contrast, same anatomy


def test_same_seed_same_example_other_seed_another(example):
    assert torch.equal(brain_example(3, 0).fixed, example.fixed)
    assert not torch.equal(brain_example(3, 1).truth, example.truth)


def test_refinement_reduces_the_error_of_the_prediction(example):
    identity = torch.zeros_like(example.truth)
    predicted = endpoint_error(example, example.prediction)[0]
    refined = endpoint_error(example, refine(example.fixed, example.moving, example.prediction).ddf)[0]
    assert predicted < endpoint_error(example, identity)[0]
    assert refined < 0.8 * predicted


def test_demo_writes_its_picture_and_prints_its_table(tmp_path):
    table = run_demo(tmp_path / "out", resolution=4, progress=False)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()[1:4]}
    assert set(rows) == {"no registration", "network's prediction", "refined by LM"}
    assert float(rows["refined by LM"][0]) < float(rows["network's prediction"][0])  # dissimilarity
    assert rows["refined by LM"][1] == "0"  # folds


def test_what_the_demo_lacks_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "brain_example", pytest.fail)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="output_dir must be a folder, got the file"):
        run_demo(tmp_path / "file", progress=False)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*monai_lm\[report\]"):
        run_demo(tmp_path / "out", progress=False)
