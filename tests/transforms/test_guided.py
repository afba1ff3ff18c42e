"""Labels and points of a dictionary guide its refinement."""

import pytest
import torch

from monai_lm import refine
from monai_lm.guidance import Keypoints, Labels, SoftLabels
from monai_lm.solver.damping import TrustRegion
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


def test_probabilities_and_lesions_are_those_of_refine(data):
    soft = [torch.cat([data[key].float(), 1 - data[key].float()]) for key in "ab"]
    lesions = torch.zeros(2, 1, 16, 18, 17)
    lesions[0, ..., 4:9], lesions[1, ..., 9:12] = 1, 1
    data |= {"a": soft[0], "b": soft[1], "l": lesions[0], "m": lesions[1]}
    transform = RefineDDFd(
        allow_missing_keys=True, label_keys=("a", "b"), guide_values=[0], lesion_key="l", moving_lesion_key="m",
        **SETTINGS,
    )  # fmt: skip
    expected = refine(
        data["fixed"][None], data["moving"][None], guidance=SoftLabels(soft[0][None], soft[1][None], channels=[0]),
        lesion=lesions[:1], moving_lesion=lesions[1:], **SETTINGS,
    )  # fmt: skip
    assert torch.equal(transform(data)["ddf"].as_tensor(), expected.ddf[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_keys": ("a", "b"), "symmetric": True}, "guidance must be None with symmetric=True"),
        ({"point_keys": ("p", "q"), "symmetric": True}, "guidance must be None with symmetric=True"),
        ({"lesion_key": "l", "symmetric": True}, "lesion and moving_lesion must be None with symmetric=True"),
        ({"moving_lesion_key": "l", "symmetric": True}, "lesion and moving_lesion must be None with symmetric=True"),
        ({"label_keys": ("a", "b"), "control": "trust_region"}, "guidance must be None with a control that compares"),
        ({"point_keys": ("p", "q"), "control": TrustRegion()}, "guidance must be None with a control that compares"),
        ({"regularizer": "bending", "control": "trust_region"}, "regularizer must be None with a control that"),
    ],
)
def test_what_excludes_each_other_is_refused_when_the_transform_is_made(given, message):
    with pytest.raises(ValueError, match=message):
        RefineDDFd(**given)


def test_pairs_without_guides_are_refined_both_ways(data):
    expected = refine(data["fixed"][None], data["moving"][None], symmetric=True, **SETTINGS).ddf[0]
    for guidance in (None, ()):
        transform = RefineDDFd(ddf_key=None, guidance=guidance, symmetric=True, **SETTINGS)
        assert torch.equal(transform(data)["ddf"].as_tensor(), expected)


def test_missing_keys_guide_nothing_where_they_may_be_missing(data):
    del data["a"], data["q"]
    how = {"label_keys": ("a", "b"), "point_keys": ("p", "q"), **SETTINGS}
    plain = RefineDDF(**SETTINGS)(data["fixed"], data["moving"])
    assert torch.equal(RefineDDFd(allow_missing_keys=True, **how)(data)["ddf"], plain)
    with pytest.raises(KeyError):
        RefineDDFd(**how)(data)
