"""Labels and points of a dictionary guide its refinement."""

import pytest
import torch

from monai_lm import refine
from monai_lm.guidance import Keypoints, Labels
from monai_lm.transforms import RefineDDF, RefineDDFd
from tests.solver.pairs import pair

SETTINGS = {"iterations": 5, "scales": (1,)}


@pytest.fixture
def data():
    fixed, moving, _ = pair((16, 18, 17))
    points = torch.tensor([[4.0, 5, 6], [10, 9, 8]])
    return {
        "fixed": fixed[0], "moving": moving[0], "a": (fixed[0] > 0).int(), "b": (moving[0] > 0).int(),
        "p": points, "q": points + 2,
    }  # fmt: skip


def test_labels_and_points_are_those_of_refine(data):
    transform = RefineDDFd(
        allow_missing_keys=True,
        label_keys=("a", "b"),
        point_keys=("p", "q"),
        guide_weight=3.0,
        guide_values=[1],
        **SETTINGS,
    )
    guides = [
        Labels(data["a"][None], data["b"][None], 3.0, [1]),
        Keypoints(data["p"][None], data["q"][None], 3.0),
    ]
    expected = refine(data["fixed"][None], data["moving"][None], guidance=guides, **SETTINGS)
    assert torch.equal(transform(data)["ddf"].as_tensor(), expected.ddf[0])
    assert torch.equal(
        RefineDDF(guidance=guides, **SETTINGS)(data["fixed"], data["moving"]).as_tensor(), expected.ddf[0]
    )


def test_missing_keys_guide_nothing_where_they_may_be_missing(data):
    del data["a"], data["q"]
    how = {"label_keys": ("a", "b"), "point_keys": ("p", "q"), **SETTINGS}
    plain = RefineDDF(**SETTINGS)(data["fixed"], data["moving"])
    assert torch.equal(RefineDDFd(allow_missing_keys=True, **how)(data)["ddf"], plain)
    with pytest.raises(KeyError):
        RefineDDFd(**how)(data)
