"""Keypoints: their loss, their force, where they pull, and what is refused."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import compose, fold_count, sample_points
from monai_lm.fields.metrics import target_registration_error
from monai_lm.guidance import Keypoints
from monai_lm.guidance.base import Grid, Guide
from monai_lm.solver.pyramid import make_level
from tests.solver.helpers import noise
from tests.solver.pairs import pair, smooth, texture

SIZE, EDGES = (14, 12, 13), (1.0, 2.0, 1.5)


def grid_of(size=SIZE, edges=EDGES, scale=1, sigma=1.0):
    level = make_level(size, edges, scale)
    return Grid(tuple(size), tuple(edges), level.size, level.factor, level.unit, level.in_voxels(sigma))


def points(count=7, seed=0, batch=1):
    """Points inside the grid, and counterparts some voxels away."""
    fixed = 2 + torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 8
    return fixed, fixed + 2 * noise(batch, count, 3, seed=seed + 1)


def mean_distance(ddf, fixed, moving, edges, tolerance):
    missed = (fixed + sample_points(ddf, fixed) - moving) * torch.tensor(edges, dtype=ddf.dtype)
    return ((missed.square().sum(2) + tolerance**2).sqrt() - tolerance).mean(1)


def test_force_is_the_derivative_of_the_distance_by_a_step_composed_into_the_map():
    fixed, moving = points()
    slope = 0.2 * noise(3, 3, seed=5)
    at = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in SIZE), indexing="ij"))
    ddf = torch.einsum("ab,b...->a...", slope, at)[None]  # linear in space: sampling it is exact
    term = Keypoints(fixed, moving).at(grid_of())
    force = term.force(ddf)
    step = 1e-4 * noise(1, 3, seed=6)

    def distance(sign):
        moved = fixed + sign * step
        missed = (moved + sample_points(ddf, moved) - moving) * torch.tensor(EDGES, dtype=torch.float64)
        return (missed.square().sum(2) + term.tolerance**2).sqrt().sum()

    torch.testing.assert_close((force * step).sum(), (distance(1) - distance(-1)) / 2, rtol=1e-6, atol=0)


def test_loss_is_that_of_the_mean_robust_distance_in_millimetres():
    fixed, moving = points()
    ddf = 0.3 * noise(1, 3, *SIZE, seed=3)
    tolerance = (0.5**2 + 1) ** 0.5
    mean = mean_distance(ddf, fixed, moving, EDGES, tolerance)
    loss = Keypoints(fixed, moving, tolerance=0.5).at(grid_of()).evaluate(ddf, None, 1.0)
    torch.testing.assert_close(loss, mean / (mean + 5))


@pytest.mark.parametrize("copies", [1, 6])
def test_far_points_pull_one_however_many_there_are(copies):
    fixed = torch.tensor([[[7.0, 6.0, 6.0]]]).repeat(1, copies, 1)
    ddf = torch.zeros(1, 3, *SIZE)
    pull = torch.zeros_like(ddf)
    Keypoints(fixed, fixed + torch.tensor([50.0, 0, 0])).at(grid_of()).evaluate(ddf, pull, 1.0)
    assert 0.6 < float(pull.abs().max()) <= 1.01
    assert float(pull[0, 0, 7, 6, 6]) < -0.6  # the loss falls towards the counterpart


def test_unknown_points_count_as_none():
    fixed, moving = points(batch=2)
    ddf, gone = noise(2, 3, *SIZE, seed=3), moving.clone()
    gone[0, 3:] = torch.nan
    both, few = torch.zeros_like(ddf), torch.zeros(1, *ddf.shape[1:], dtype=ddf.dtype)
    loss = Keypoints(fixed, gone).at(grid_of()).evaluate(ddf, both, 1.0)
    alone = Keypoints(fixed[:1, :3], moving[:1, :3]).at(grid_of()).evaluate(ddf[:1], few, 1.0)
    torch.testing.assert_close(loss[:1], alone)
    torch.testing.assert_close(both[:1], few)


def test_the_map_is_the_prediction_after_the_residual():
    fixed, moving = points()
    prediction, residual = (smooth(SIZE, 2.0, seed=s).double() for s in (3, 4))
    gradient = torch.ones_like(residual)
    guide = Guide([Keypoints(fixed, moving, 2.0)], grid_of())
    whole = compose(prediction, residual)
    expected = guide.terms[0][0].evaluate(whole, None, 2.0) * 2 * guide.voxels
    torch.testing.assert_close(guide.loss(residual, prediction, residual), expected)
    torch.testing.assert_close(guide.pull(residual, prediction, gradient), expected)


@pytest.mark.parametrize("shape", [(32, 30), (24, 22, 20)])
@pytest.mark.parametrize("spacing", [1.0, 3.0])
def test_a_shift_is_found_from_keypoints_alone(shape, spacing):
    n = len(shape)
    image = 1e-6 * texture(shape)  # the same twice: it says that nothing has moved, hardly louder than nothing
    fixed = torch.rand(1, 40, n, generator=torch.Generator().manual_seed(0)) * (torch.tensor(shape) - 1)
    shift = torch.tensor([3.0, -2.0, 1.5][:n])
    result = refine(
        image, image, similarity="mse", spacing=(spacing,) * n, guidance=Keypoints(fixed, fixed + shift, weight=100)
    )
    missed = target_registration_error(result.ddf, fixed, fixed + shift, torch.ones(1, n))
    assert float(missed.mean()) < 0.35
    assert float(result.final_loss) < float(result.initial_loss)
    assert int(fold_count(result.ddf)) == 0


def test_points_that_contradict_images_and_each_other_fold_nothing():
    fixed, moving, _ = pair((16, 18, 17))
    where = torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(0)) * 15
    there = where[:, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    for weight in (1.0, 1e4):
        result = refine(fixed, moving, guidance=Keypoints(where, there, weight))
        assert int(fold_count(result.ddf)) == 0
        assert float(result.final_loss) <= float(result.initial_loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": torch.zeros(4, 3)}, r"fixed must be keypoints \(B, K, n\)"),
        ({"moving": torch.zeros(1, 5, 3)}, "fixed and moving keypoints must have one shape"),
        ({"moving": torch.full((1, 4, 3), torch.inf)}, "moving must not have infinite"),
        ({"moving": torch.full((1, 4, 3), torch.nan)}, "fixed and moving must have a keypoint in common"),
        ({"weight": 0.0}, "weight must be greater than 0"),
        ({"tolerance": -1.0}, "tolerance must be greater than 0"),
        ({"spacing": (1.0, 1.0)}, "spacing must be 3 positive numbers"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Keypoints(**({"fixed": torch.zeros(1, 4, 3), "moving": torch.zeros(1, 4, 3)} | change))


def test_points_that_do_not_fit_the_images_are_refused():
    image = texture(SIZE)
    for fixed, message in (
        (torch.zeros(2, 4, 3), "guidance must have keypoints"),
        (torch.full((1, 4, 3), 99.0), "voxels"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(image, image, guidance=Keypoints(fixed, fixed))
