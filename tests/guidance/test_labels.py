"""Labels: soft Dice, its derivative, where it pulls, and what is refused."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.fields.metrics import compare_labels
from monai_lm.guidance import Labels, SoftLabels
from monai_lm.guidance.base import Grid
from monai_lm.guidance.overlap import dice_loss
from monai_lm.kernels.reference import gaussian_taps
from monai_lm.solver.pyramid import make_level, shrink
from tests.solver.helpers import interior_bump, noise
from tests.solver.pairs import smooth, texture

SIZE, EDGES = (30, 26, 20), (1.0, 1.0, 1.5)


def grid_of(scale=1, sigma=1.0, size=SIZE):
    level = make_level(size, EDGES, scale)
    return Grid(size, EDGES, level.size, level.factor, level.unit, level.in_voxels(sigma)), level


def maps(shape=SIZE, seed=1, many=4, amplitude=2.0):
    """Blobs ``1 … many``, and the same after a smooth warp."""
    levels = torch.bucketize(gaussian_smooth(texture(shape, seed=seed), 1.5), torch.linspace(-0.5, 1, many)).float()
    return warp(levels, smooth(shape, amplitude), mode="nearest"), levels


def test_derivative_is_that_of_the_loss():
    warped, fixed = (noise(1, 1, 5, 6, 7, seed=s).abs().requires_grad_() for s in (0, 1))
    squares = fixed.detach().square().sum() + 3  # what of the label lies outside the box
    loss, derivative = dice_loss(warped, fixed.detach(), squares)
    (exact,) = torch.autograd.grad(loss, warped)
    torch.testing.assert_close(exact * (squares + warped.square().sum()) / 2, derivative, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1, 2])
def test_boxes_change_nothing(scale):
    fixed, moving = maps()
    grid, level = grid_of(scale)
    ddf = 3 * gaussian_smooth(noise(1, 3, *grid.size, seed=4).float(), 2.0) + torch.tensor([2.0, -1, 0]).view(
        1, 3, 1, 1, 1
    )
    values = [2, 3]
    pull = torch.zeros_like(ddf)
    loss = Labels(fixed, moving, values=values).at(grid).evaluate(ddf, pull, 1.0)
    losses = []
    for value in values:
        soft = [gaussian_smooth(shrink((x == value).float(), level), list(grid.unit)) for x in (fixed, moving)]
        warped = warp(soft[1], ddf)
        losses.append(dice_loss(warped, soft[0], soft[0].square().sum())[0])
    torch.testing.assert_close(float(loss), float(sum(losses)) / 2, rtol=2e-3, atol=0)


def test_pull_is_the_derivative_by_a_step_composed_into_the_map():
    fixed, moving = (x.double() for x in maps(many=3))
    grid, _ = grid_of(sigma=0.0)
    term = Labels(fixed, moving, values=[2], sigma=2.0).at(grid)
    ddf = torch.zeros(1, 3, *SIZE, dtype=torch.float64)
    pull = torch.zeros_like(ddf)
    term.evaluate(ddf, pull, 1.0)
    step = 1e-3 * gaussian_smooth(noise(1, 3, *SIZE, seed=6), 5.0) * interior_bump(SIZE)
    ends = [term.evaluate(s * step, None, 1.0) for s in (1, -1)]
    squares = sum(soft.square().sum() for soft in (term.soft[0].fixed, term.soft[0].moving))
    expected = (ends[0] - ends[1]) / 2 * squares / 2 * term.strength
    torch.testing.assert_close((pull * step).sum(), expected[0], rtol=0.03, atol=0)


def test_a_border_pulls_as_hard_in_a_small_label_as_in_a_large_one():
    found = []
    for length in (6, 14):
        fixed, moving = torch.zeros(2, 1, 1, *SIZE)
        fixed[..., 5 : 5 + length, 5:20, 4:16] = 1
        moving[..., 6 : 6 + length, 5:20, 4:16] = 1
        pull = torch.zeros(1, 3, *SIZE)
        Labels(fixed, moving).at(grid_of()[0]).evaluate(torch.zeros_like(pull), pull, 1.0)
        assert float(pull[0, 0, 5, 12, 10]) < -1  # the loss falls where the map leads further along the axis
        found.append(float(pull.abs().max()))
    assert found[0] == pytest.approx(found[1], rel=0.15)


def test_what_the_images_do_not_tell_is_told_by_labels():
    fixed, moving = maps(amplitude=5.0)
    images = texture(SIZE, seed=7)
    alone = refine(images, images)
    guided = refine(images, images, guidance=Labels(fixed, moving, weight=20))
    dice = [float(compare_labels(warp(moving, r.ddf, mode="nearest"), fixed)["dice"]) for r in (alone, guided)]
    assert dice[1] > dice[0] + 0.1
    assert int(fold_count(guided.ddf)) == 0


def test_pairs_of_a_batch_do_not_see_each_other():
    fixed, moving = (torch.cat(x) for x in zip(maps(seed=1), maps(seed=2), strict=True))
    ddf = smooth(SIZE, 3.0, batch=2)
    pull, alone = torch.zeros_like(ddf), torch.zeros_like(ddf[1:])
    grid, _ = grid_of()
    loss = Labels(fixed, moving).at(grid).evaluate(ddf, pull, 1.0)
    assert torch.equal(loss[1:], Labels(fixed[1:], moving[1:]).at(grid).evaluate(ddf[1:], alone, 1.0))
    assert torch.equal(pull[1:], alone)


def test_labels_of_one_voxel_and_at_the_border_are_well():
    fixed, moving = torch.zeros(2, 1, 1, *SIZE)
    fixed[0, 0, 0, 0, 0] = fixed[0, 0, -1, -1, -1] = 1
    moving[0, 0, -1, -1, -1], moving[0, 0, 3, 3, 3] = 1, 1
    for scale in (1, 2, 3):
        grid, _ = grid_of(scale)
        pull = torch.zeros(1, 3, *grid.size)
        loss = Labels(fixed, moving).at(grid).evaluate(100 * torch.ones_like(pull), pull, 1.0)
        assert bool(torch.isfinite(pull).all())
        assert 0 <= float(loss) <= 1


def test_labels_that_contradict_the_images_fold_nothing():
    images = texture(SIZE)
    fixed, moving = maps()
    for weight in (1.0, 1e4):
        result = refine(images, images, guidance=Labels(fixed, moving.flip(2), weight))
        assert int(fold_count(result.ddf)) == 0
        assert float(result.final_loss) <= float(result.initial_loss)


def onehot(labels, values):
    return torch.cat([(labels == value).float() for value in values], 1)


@pytest.mark.parametrize("scale", [1, 2])
def test_channels_of_ones_and_zeros_guide_as_their_labels_do_bit_by_bit(scale):
    fixed, moving = (torch.cat(x) for x in zip(maps(seed=1), maps(seed=2), strict=True))
    grid, _ = grid_of(scale)
    ddf = 3 * gaussian_smooth(noise(2, 3, *grid.size, seed=4).float(), 2.0)
    found = []
    soft = SoftLabels(onehot(fixed, [1, 0, 3]), onehot(moving, [1, 0, 3]), channels=[0, 2])
    for guide in (Labels(fixed, moving, values=[1, 3]), soft):
        pull = torch.zeros_like(ddf)
        found.append((guide.at(grid).evaluate(ddf, pull, 0.7), pull))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_probabilities_pull_as_the_derivative_of_their_dice():
    """Of the map composed with a small step, by differences in float64."""
    fixed, moving = (gaussian_smooth(onehot(x, [2, 3]).double(), 1.5) for x in maps(many=4))
    grid, _ = grid_of(sigma=0.0)
    term = SoftLabels(fixed, moving, channels=[1], sigma=2.0).at(grid)
    pull = torch.zeros(1, 3, *SIZE, dtype=torch.float64)
    term.evaluate(torch.zeros_like(pull), pull, 1.0)
    step = 1e-3 * gaussian_smooth(noise(1, 3, *SIZE, seed=6), 5.0) * interior_bump(SIZE)
    ends = [term.evaluate(s * step, None, 1.0) for s in (1, -1)]
    squares = sum(soft.square().sum() for soft in (term.soft[0].fixed, term.soft[0].moving))
    expected = (ends[0] - ends[1]) / 2 * squares / 2 * term.strength
    torch.testing.assert_close((pull * step).sum(), expected[0], rtol=0.03, atol=0)


def test_what_is_uncertain_pulls_less_and_what_is_nearly_zero_not_at_all():
    fixed, moving = maps(many=3)
    strengths = []
    for share in (1.0, 0.5):
        pull = torch.zeros(1, 3, *SIZE)
        soft = [share * onehot(x, [2]) for x in (fixed, moving)]
        SoftLabels(*soft).at(grid_of()[0]).evaluate(torch.zeros_like(pull), pull, 1.0)
        strengths.append(float(pull.abs().max()))
    assert strengths[1] == pytest.approx(strengths[0] / 4, rel=1e-4)  # of the border's height, and of its slope
    haze = [onehot(x, [2]) * 0.9 + 0.009 for x in (fixed, moving)]
    bare = [onehot(x, [2]) * 0.9 + 0.009 * onehot(x, [2]) for x in (fixed, moving)]
    found = []
    for maps_ in (haze, bare):
        pull = torch.zeros(1, 3, *SIZE)
        SoftLabels(*maps_).at(grid_of()[0]).evaluate(torch.zeros_like(pull), pull, 1.0)
        found.append(pull)
    torch.testing.assert_close(*found)


def test_soft_labels_that_a_pair_lacks_are_left_out_and_contradictions_fold_nothing():
    fixed, moving = maps(many=3)
    soft = [torch.cat([onehot(x, [2]), torch.zeros_like(x)], 1) for x in (fixed, moving)]
    ddf = torch.zeros(1, 3, *SIZE)
    one = SoftLabels(soft[0], soft[1], channels=[0]).at(grid_of()[0]).evaluate(ddf, None, 1.0)
    assert torch.equal(SoftLabels(*soft).at(grid_of()[0]).evaluate(ddf, None, 1.0), one)
    images = texture(SIZE)
    result = refine(images, images, guidance=SoftLabels(soft[0], soft[1].flip(2), 1e3), iterations=10)
    assert int(fold_count(result.ddf)) == 0


def test_taps_reach_no_further_than_boxes_do():
    assert len(gaussian_taps(1.7)) - 1 <= 6  # three standard deviations, rounded up


MAP = torch.ones(1, 1, *SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": MAP[0, 0]}, r"fixed must be labels \(B, 1, \*S\)"),
        ({"moving": MAP[..., 1:]}, "fixed and moving labels must have one shape"),
        ({"moving": 0.5 * MAP}, "moving must hold whole numbers"),
        ({"moving": 2 * MAP}, "fixed and moving must have a label in common"),
        ({"values": [1, 7]}, r"values must be labels that both maps have, got \[7\]"),
        ({"weight": -1.0}, "weight must be greater than 0"),
        ({"sigma": -1.0}, "sigma must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Labels(**({"fixed": MAP, "moving": MAP} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": MAP[0, 0]}, r"fixed must be probabilities \(B, K, \*S\)"),
        ({"moving": 3 * MAP}, r"moving must hold probabilities in \[0, 1\]"),
        ({"moving": float("nan") * MAP}, r"moving must hold probabilities in \[0, 1\]"),
        ({"moving": 0 * MAP}, "fixed and moving must have a label in common"),
        ({"channels": [1]}, r"channels must be among the 1 of fixed and moving, got \[1\]"),
    ],
)
def test_wrong_probabilities_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SoftLabels(**({"fixed": MAP, "moving": MAP} | change))


def test_labels_that_do_not_fit_the_images_are_refused():
    image = texture(SIZE[:2])
    with pytest.raises(ValueError, match="guidance must have labels"):
        refine(image, image, guidance=Labels(MAP, MAP))
    with pytest.raises(ValueError, match=r"guidance must have labels \(B, 1, \*S\)"):
        refine(image, image, guidance=SoftLabels(MAP, MAP))
