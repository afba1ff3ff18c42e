"""Measures with a weight per voxel, on either side: the law, the derivative, what lies outside, the errors."""

import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

from monai_lm.similarity import LNCC, MSE, NCC, Combined, get_similarity, lookup
from monai_lm.similarity.weighted import Weighted, continued, counted, shown, with_moving_weight, with_weight

MEASURES = [measure for make in lookup.MEASURES.values() if (measure := make()).weighable]
MEASURES += [LNCC(1, window="gaussian"), Combined([LNCC(1), MSE()], [1, 1], [1.0, 3.0])]


def images(measure, size, random_tensor):
    shape = (2, sum(measure.channels) if isinstance(measure, Combined) else 1, *size)
    return random_tensor(shape, 0), random_tensor(shape, 1), random_tensor((2, 1, *size), 2).abs()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_weights_of_one_change_nothing(measure, size, random_tensor):
    warped, fixed, _ = images(measure, size, random_tensor)
    given = measure.evaluate(warped, measure.reference(fixed, torch.ones_like(fixed[:, :1])))
    for weighted, plain in zip(given, measure.evaluate(warped, measure.reference(fixed)), strict=True):
        torch.testing.assert_close(weighted, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_derivative_is_that_of_the_weighted_loss(measure, size, random_tensor):
    warped, fixed, weight = images(measure, size, random_tensor)
    reference = measure.reference(fixed, weight)
    derivative = measure.evaluate(warped, reference)[1]
    direction, h = random_tensor(tuple(warped.shape), 5), 1e-5
    ahead, behind = (measure.evaluate(warped + s * direction, reference)[0] for s in (h, -h))
    slope = (derivative * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-7)


def test_weighted_lncc_is_that_of_weighted_windows(size, random_tensor):
    warped, fixed, weight = images(LNCC(1), size, random_tensor)
    loss = LNCC(1, 1e-3).evaluate(warped, LNCC(1, 1e-3).reference(fixed, weight))[0]
    for pair in range(2):
        expected = 0.0
        for index in torch.cartesian_prod(*(torch.arange(s) for s in size)).tolist():
            window = tuple(slice(max(i - 1, 0), i + 2) for i in index)
            w, i, j = (t[pair, 0][window].flatten() for t in (weight, warped, fixed))
            w = w / w.sum()
            i, j = i - (w * i).sum(), j - (w * j).sum()
            ratio = (w * i * j).sum() ** 2 / (((w * i * i).sum() + 1e-3) * ((w * j * j).sum() + 1e-3))
            expected += float(weight[pair, 0][tuple(index)] * (1 - ratio))
        assert loss[pair].item() == pytest.approx(expected, rel=1e-9)


def test_weighted_ncc_is_that_of_the_voxels_that_count(size, random_tensor):
    warped, fixed, weight = images(NCC(), size, random_tensor)
    chosen = (weight > 0.5).double()
    loss = NCC(1e-12).evaluate(warped, NCC().reference(fixed, chosen))[0]
    for pair in range(2):
        inside = chosen[pair, 0] > 0
        both = torch.stack([warped[pair, 0][inside], fixed[pair, 0][inside]])
        expected = inside.sum() * (1 - torch.corrcoef(both)[0, 1] ** 2)
        torch.testing.assert_close(loss[pair], expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_voxels_without_weight_are_not_seen(measure, size, random_tensor):
    warped, fixed, weight = images(measure, size, random_tensor)
    weight = (weight > 0.5).double()
    other = [image + 100 * (1 - weight) for image in (warped, fixed)]
    loss, derivative = measure.evaluate(warped, measure.reference(fixed, weight))
    seen, slope = measure.evaluate(other[0], measure.reference(other[1], weight))
    torch.testing.assert_close(seen, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, derivative, rtol=1e-8, atol=1e-10)
    assert not derivative[(weight == 0).expand_as(derivative)].any()


def test_the_weight_is_a_channel_of_mean_one(size, random_tensor):
    _, fixed, weight = images(MSE(), size, random_tensor)
    joined = with_weight(fixed, 0.5 * weight)
    torch.testing.assert_close(joined[:, -1:].flatten(1).mean(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(joined, with_weight(fixed, weight), rtol=1e-12, atol=1e-12)
    assert torch.equal(joined[:, :-1], fixed)


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 9)])
def test_a_mask_shows_its_voxels_and_those_beside_them(shape):
    image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask, beside = torch.zeros_like(image), torch.zeros_like(image, dtype=torch.bool)
    mask[(0, 0, *(slice(4, 6) for _ in shape))], mask[1], beside[1] = 0.3, 1, True
    beside[(0, 0, *(slice(1, 9) for _ in shape))] = True
    seen = shown(image, mask)
    assert torch.equal(seen[beside], image[beside])
    for hidden in (1e3, float("nan"), float("inf")):
        assert torch.equal(shown(image.masked_fill(~beside, hidden), mask), seen)
    broken = image.masked_fill(mask == 0, float("nan"))  # beside it, too: filled from what is known
    assert torch.isfinite(shown(broken, mask)).all()
    assert torch.equal(shown(broken, mask)[mask > 0], image[mask > 0])


def test_a_hole_in_a_mask_is_not_seen_up_to_its_edge():
    image, mask = torch.rand(1, 1, 20, 18), torch.ones(1, 1, 20, 18)
    mask[..., 6:10, 7:12], mask[..., -4:, :] = 0, 0
    seen = shown(image, mask)
    assert not (seen == image)[..., 6:10, 7:12].any()
    assert torch.equal(seen[..., -4:-1, :], image[..., -4:-1, :])
    assert not (seen == image)[..., -1:, :].any()


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 9)])
def test_a_voxel_beyond_a_mask_counts_as_it_does_but_not_in_holes_nor_where_nothing_is(shape):
    image, mask = torch.rand(1, 1, *shape), torch.zeros(1, 1, *shape)
    mask[(..., *(slice(2, 7) for _ in shape))] = 0.5
    mask[(..., *(4 for _ in shape))] = 0
    expected = torch.zeros_like(mask)
    expected[(..., *(slice(1, 8) for _ in shape))] = 0.5
    expected[(..., *(4 for _ in shape))] = 0
    assert torch.equal(counted(mask, image), expected)
    image[:, :, 1], hidden = float("nan"), torch.zeros_like(mask)
    hidden[:, :, 7] = 1
    expected[:, :, 1], expected[:, :, 7] = 0, 0
    assert torch.equal(counted(mask, image, hidden), expected)
    assert not (shown(image, mask, hidden) == image)[:, :, 7].any()


def test_an_image_of_few_slices_goes_on():
    mask = torch.zeros(1, 1, 20, 18, 5)
    mask[:, :, 4:9, 4:9] = 1
    image = torch.where(mask > 0, 2.0, 7.0)
    torch.testing.assert_close(continued(image, mask), torch.full_like(image, 2.0))


def test_ranges_leave_the_weight_alone(size, random_tensor):
    warped, fixed, weight = images(LNCC(), size, random_tensor)
    reference, _ = Weighted(LNCC()).prepare(with_weight(fixed, weight), warped)
    torch.testing.assert_close(reference[3], weight / weight.mean(tuple(range(2, weight.dim())), keepdim=True))


def test_loss_modules_cannot_be_weighted(size):
    module = get_similarity(LocalNormalizedCrossCorrelationLoss(spatial_dims=len(size)))
    with pytest.raises(ValueError, match=r"^mask must be None .* ModuleSimilarity"):
        Weighted(module)
    with pytest.raises(ValueError, match=r"^moving_mask must be None .* ModuleSimilarity"):
        Weighted(module, fixed=False, moving=True)


# --- a weight of the moving image, which is warped with it


@pytest.mark.parametrize("of_fixed", [False, True], ids=["moving", "both"])
@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_the_derivative_is_that_of_the_loss_with_the_warped_weight_held(measure, of_fixed, size, random_tensor):
    """And of it none is told for the weight: that part is left out, see ``docs/method.md``."""
    warped, fixed, own = images(measure, size, random_tensor)
    weighted = Weighted(measure, fixed=of_fixed, moving=True)
    reference = weighted.reference(torch.cat([fixed, own], 1) if of_fixed else fixed)
    both = torch.cat([random_tensor((2, 1, *size), 3).abs(), warped], 1)
    derivative = weighted.evaluate(both, reference)[1]
    assert not derivative[:, :1].any()
    direction, h = random_tensor(tuple(both.shape), 5), 1e-5
    direction[:, :1] = 0
    ahead, behind = (weighted.evaluate(both + s * direction, reference)[0] for s in (h, -h))
    slope = (derivative * direction).flatten(1).sum(1)
    assert slope.abs().min() > 1e-6
    torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_a_voxel_counts_with_the_product_of_both_weights(measure, size, random_tensor):
    warped, fixed, own = images(measure, size, random_tensor)
    other = random_tensor((2, 1, *size), 3).abs()
    both, product = Weighted(measure, moving=True), own * other
    product = product / product.mean(tuple(range(1, product.dim())), keepdim=True)
    expected = measure.evaluate(warped, measure.reference(fixed, product))
    for scale in (1.0, 0.3):  # a mean over the weights: less of them is not less of the loss
        given = both.evaluate(torch.cat([scale * other, warped], 1), both.reference(torch.cat([fixed, own], 1)))
        torch.testing.assert_close(given[0], expected[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(given[1][:, 1:], expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_a_weight_means_the_same_on_either_side(measure, size, random_tensor):
    warped, fixed, own = images(measure, size, random_tensor)
    own = own / own.flatten(1).mean(1).view(-1, *[1] * (own.dim() - 1))
    there, here = Weighted(measure, fixed=False, moving=True), Weighted(measure)
    loss, derivative = there.evaluate(torch.cat([own, warped], 1), there.reference(fixed))
    expected = here.evaluate(warped, here.reference(torch.cat([fixed, own], 1)))
    torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(derivative[:, 1:], expected[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: type(m).__name__)
def test_the_derivative_is_written_for_the_image_alone(measure, size, random_tensor):
    warped, fixed, own = images(measure, size, random_tensor)
    weighted = Weighted(measure, fixed=False, moving=True)
    both, out = torch.cat([own, warped], 1), torch.empty_like(warped)
    loss, derivative = weighted.evaluate(both, weighted.reference(fixed))
    assert torch.equal(weighted.evaluate_into(both, weighted.reference(fixed), out), loss)
    assert torch.equal(out, derivative[:, 1:])


def test_a_pair_of_which_nothing_counts_has_no_finite_loss(size, random_tensor):
    warped, fixed, own = images(MSE(), size, random_tensor)
    own[1] = 0
    weighted = Weighted(MSE(), fixed=False, moving=True)
    loss, derivative = weighted.evaluate(torch.cat([own, warped], 1), weighted.reference(fixed))
    assert loss.isinf().tolist() == [False, True]
    assert not derivative[1].any()


def test_the_moving_weight_is_a_channel_before_the_image(size, random_tensor):
    _, moving, weight = images(MSE(), size, random_tensor)
    joined = with_moving_weight(moving, weight)
    assert torch.equal(joined[:, :1], weight)
    assert torch.equal(joined[:, 1:], moving)


def test_an_image_goes_on_smoothly_where_its_mask_is_zero():
    size = (24, 20)
    slope = torch.linspace(0, 1, 24, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 1, *size)
    mask = torch.ones(1, 1, *size)
    mask[:, :, 8:15, 5:12] = 0
    goes_on = continued(torch.where(mask > 0, slope, 99.0), mask)
    assert (goes_on - slope).abs().max() < 0.15  # its mean over the mask is .35 off at worst
    steps = goes_on.diff(dim=2).abs()
    assert steps.max() < 3 / 23
    constant = continued(torch.where(mask > 0, 3.0, slope), mask)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))
    assert continued(slope, torch.ones(1, 1, *size)) is slope


def test_ranges_do_not_see_the_moving_weight(size, random_tensor):
    warped, fixed, weight = images(LNCC(), size, random_tensor)
    weighted = Weighted(LNCC(), fixed=False, moving=True)
    both = torch.cat([weight, warped], 1)
    of_fixed, (shift, factor) = weighted.ranges(fixed, both)
    expected_fixed, expected = LNCC().ranges(fixed, warped)
    assert all(torch.equal(a, b) for a, b in zip(of_fixed, expected_fixed, strict=True))
    assert torch.equal(shift[:, 1:], expected[0])
    assert torch.equal(factor[:, 1:], expected[1])
    assert torch.equal(weighted.prepare(fixed, both)[1][:, :1], weight)
