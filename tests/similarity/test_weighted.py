"""Measures with a weight per voxel: the law, the derivative, what lies outside, the errors."""

import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

from monai_lm.similarity import LNCC, MSE, NCC, Combined, get_similarity, lookup
from monai_lm.similarity.weighted import Weighted, with_weight

MEASURES = [measure for make in lookup.MEASURES.values() if (measure := make()).weighable]
MEASURES.append(Combined([LNCC(1), MSE()], [1, 1], [1.0, 3.0]))


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


def test_the_weight_is_a_channel_of_mean_one_and_hides_the_rest(size, random_tensor):
    _, fixed, weight = images(MSE(), size, random_tensor)
    mask = (weight > 0.5).double()
    joined = with_weight(fixed, 0.5 * mask)
    torch.testing.assert_close(joined[:, -1:].flatten(1).mean(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(joined, with_weight(fixed + 7 * (1 - mask), mask), rtol=1e-12, atol=1e-12)
    assert torch.equal(joined[:, :-1][mask > 0], fixed[mask > 0])


def test_ranges_leave_the_weight_alone(size, random_tensor):
    warped, fixed, weight = images(LNCC(), size, random_tensor)
    reference, _ = Weighted(LNCC()).prepare(with_weight(fixed, weight), warped)
    torch.testing.assert_close(reference[3], weight / weight.mean(tuple(range(2, weight.dim())), keepdim=True))


def test_loss_modules_cannot_be_weighted(size):
    module = get_similarity(LocalNormalizedCrossCorrelationLoss(spatial_dims=len(size)))
    with pytest.raises(ValueError, match=r"mask must be None .* ModuleSimilarity"):
        Weighted(module)
