"""What holds of any guidance: none changes no bit, weights bound the pull, and what is refused."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count
from monai_lm.fields.metrics import target_registration_error
from monai_lm.guidance import Keypoints, Labels
from monai_lm.guidance.base import Grid, Guide
from monai_lm.transforms import RefineDDFd
from tests.solver.pairs import pair, smooth

SHAPE = (16, 18, 17)
GRID = Grid(SHAPE, (1.0,) * 3, SHAPE, (1.0,) * 3, (1.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("start", [False, True])
def test_no_guidance_changes_no_bit(start):
    fixed, moving, ddf = pair(SHAPE)
    prediction = 0.5 * ddf if start else None
    results = [refine(fixed, moving, prediction, **how) for how in ({}, {"guidance": None}, {"guidance": []})]
    for result in results[1:]:
        assert torch.equal(result.ddf, results[0].ddf)
        assert torch.equal(result.final_loss, results[0].final_loss)


@pytest.mark.parametrize("weight", [0.1, 1.0, 1e6])
def test_no_weight_makes_a_gradient_longer_than_images_and_guidance_are(weight):
    gradient = smooth(SHAPE, 1.0, sigma=2.0)
    longest = float(torch.linalg.vector_norm(gradient, dim=1).max())
    point = torch.tensor([[[8.0, 8.0, 8.0]]])
    guide = Guide([Keypoints(point, point + 30, weight)], GRID)
    guide.pull(torch.zeros_like(gradient), None, gradient)
    assert float(torch.linalg.vector_norm(gradient, dim=1).max()) <= longest + 1e-6


def test_losses_add_up_with_their_weights():
    point, labels = torch.tensor([[[8.0, 8.0, 8.0]]]), torch.ones(1, 1, *SHAPE)
    labels[..., :5] = 0
    terms = [Keypoints(point, point + 3, 2.0), Labels(labels, labels.flip(4), 0.5)]
    zero = torch.zeros(1, 3, *SHAPE)
    parts = [float(t.at(GRID).evaluate(zero, None, 1.0)) * t.weight for t in terms]
    assert float(Guide(terms, GRID).loss(None, None, zero)) == pytest.approx(sum(parts) * labels.numel(), rel=1e-5)


def test_losses_of_the_result_are_those_of_images_plus_guidance():
    fixed, moving, _ = pair(SHAPE)
    point = torch.tensor([[[8.0, 8.0, 8.0]]])
    alone, guided = (refine(fixed, moving, guidance=g) for g in (None, Keypoints(point, point + 4, 0.5)))
    mean = (48 + 1 + 1) ** 0.5 - 2**0.5
    difference = float(guided.initial_loss - alone.initial_loss)
    assert difference == pytest.approx(0.5 * mean / (mean + 10), rel=1e-4)


@pytest.mark.parametrize(
    "how", [{"memory": "half"}, {"acceptance": "descent"}, {"kernels": "reference"}, {"window": 3}]
)
def test_guidance_goes_with_other_settings(how):
    fixed, moving, ddf = pair(SHAPE)
    where = 2 + 12 * torch.rand(1, 12, 3, generator=torch.Generator().manual_seed(0))
    there = where + torch.tensor([2.0, 0, 0])
    result = refine(fixed, moving, 0.5 * ddf, guidance=[Keypoints(where, there, 3.0)], iterations=20, **how)
    before, after = (
        target_registration_error(u, where, there, torch.ones(1, 3)).mean() for u in (0.5 * ddf, result.ddf)
    )
    assert float(after) < 0.7 * float(before)
    assert int(fold_count(result.ddf)) == 0


def test_guidance_that_contradicts_the_images_costs_little_and_folds_nothing():
    """Labels and points of another place, with a weight of 1: what the images tell prevails but near them."""
    fixed, moving, ddf = pair((28, 26, 24))
    wrong = torch.tensor([[[8.0, 8.0, 8.0], [20.0, 8.0, 16.0]]])
    labels = torch.zeros(2, 1, 1, 28, 26, 24)
    labels[0, ..., 6:12, 6:12, 6:12] = labels[1, ..., 6:12, 14:20, 6:12] = 1
    guides = [Keypoints(wrong, wrong.flip(1), 1.0), Labels(labels[0], labels[1], 1.0)]
    alone, misled = refine(fixed, moving), refine(fixed, moving, guidance=guides)
    start, plain, guided = (float((u - ddf).norm(dim=1).mean()) for u in (0 * ddf, alone.ddf, misled.ddf))
    assert int(fold_count(misled.ddf)) == 0
    assert plain < guided < 3 * start
    away = torch.zeros(28, 26, 24, dtype=torch.bool)
    away[:, :, 20:] = True
    assert float((misled.ddf - ddf).norm(dim=1)[0, away].mean()) < 0.7 * float(ddf.norm(dim=1)[0, away].mean())
    assert bool(torch.isfinite(misled.final_loss).all())


def test_wrong_kinds_and_controls_are_refused():
    fixed, moving, _ = pair(SHAPE)
    with pytest.raises(TypeError, match="guidance must be a Guidance"):
        refine(fixed, moving, guidance="labels")
    with pytest.raises(TypeError, match=r"guidance must be a Guidance.* got 1"):
        RefineDDFd(guidance=1)
    point = torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="guidance must be None with a control"):
        refine(fixed, moving, guidance=Keypoints(point, point), control="trust_region")
