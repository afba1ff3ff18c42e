"""A field and its inverse that are refined together: exchanged images give the inverse."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import compose, fold_count, invert
from monai_lm.guidance import Keypoints
from monai_lm.solver.symmetric import both_ways, reconciled, swapped
from tests.solver.pairs import FLAT, SHAPES, error, pair, smooth

VARIANTS = [{}, {"similarity": "mi"}, {"control": "trust_region", "acceptance": "descent"}, {"memory": "half"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_is_found_with_the_field(shape):
    fixed, moving, truth = pair(shape, batch=2)
    result = refine(fixed, moving, symmetric=True)
    ddf, inverse = result.ddf, result.inverse()
    assert inverse is result.backward
    assert error(ddf, truth) < 0.6 * error(truth, 0.0)
    for composed in (compose(ddf, inverse), compose(inverse, ddf)):
        assert error(composed, 0.0) < 0.05
    assert fold_count(torch.cat([ddf, inverse])).tolist() == [0] * 4
    assert (result.final_loss < 0.8 * result.initial_loss).all()
    assert len(result.history) == 2


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_exchanged_images_give_the_inverse_bit_by_bit(shape, variant):
    fixed, moving, _ = pair(shape)
    settings = {"symmetric": True, "iterations": 10, **variant}
    one, other = refine(fixed, moving, **settings), refine(moving, fixed, **settings)
    assert error(one.ddf, 0.0) > 0.1
    assert torch.equal(one.ddf, other.inverse())
    assert torch.equal(one.inverse(), other.ddf)
    assert torch.equal(one.final_loss, other.final_loss)
    losses, others = ([row.loss for row in result.history[0]] for result in (one, other))
    assert losses == others


def test_exchanged_masks_go_with_their_images():
    fixed, moving, _ = pair(FLAT)
    masks = [torch.ones_like(fixed) for _ in range(2)]
    masks[0][:, :, :8], masks[1][:, :, 10:16, 10:16] = 0, 0
    for mask, moving_mask in (masks, (masks[0], None)):
        settings = {"symmetric": True, "iterations": 10}
        one = refine(fixed, moving, mask=mask, moving_mask=moving_mask, **settings)
        other = refine(moving, fixed, mask=moving_mask, moving_mask=mask, **settings)
        assert torch.equal(one.ddf, other.inverse())
        assert error(one.ddf, refine(fixed, moving, **settings).ddf) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prediction_is_refined_as_its_inverse_is(shape):
    fixed, moving, truth = pair(shape)
    predicted = 0.6 * truth
    one = refine(fixed, moving, predicted, symmetric=True)
    other = refine(moving, fixed, invert(predicted)[0], symmetric=True)
    assert error(one.ddf, truth) < 0.7 * error(predicted, truth)
    assert error(one.ddf, other.inverse()) < 0.05
    assert error(compose(one.ddf, one.inverse()), 0.0) < 0.05


def test_a_pair_that_gains_nothing_keeps_its_prediction():
    _, moving, truth = pair(FLAT)
    with pytest.warns(UserWarning, match="constant"):
        result = refine(torch.ones_like(moving), moving, truth, symmetric=True)
    assert torch.equal(result.ddf, truth)
    assert error(compose(truth, result.inverse()), 0.0) < 0.05


def test_a_pair_gets_the_result_it_would_get_alone():
    fixed, moving, _ = pair(FLAT, batch=2)
    together, alone = (
        refine(f, m, symmetric=True, iterations=10) for f, m in ((fixed, moving), (fixed[1:], moving[1:]))
    )
    torch.testing.assert_close(together.ddf[1:], alone.ddf, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.inverse()[1:], alone.inverse(), rtol=0, atol=1e-4)


def test_what_is_reconciled_is_between_a_field_and_the_others_inverse():
    ddf = smooth(FLAT, 2.0)
    both = both_ways(ddf)
    assert error(compose(*both.split(1)), 0.0) < 0.02
    off = both + torch.cat([smooth(FLAT, 0.3, seed=5), torch.zeros_like(ddf)])
    found, inverse = reconciled(off.clone(), None, torch.tensor([True]))
    assert error(found, (off[:1] + ddf) / 2) < 0.02
    assert error(compose(found, inverse), 0.0) < 0.02
    assert torch.equal(swapped(off), torch.cat([off[1:], off[:1]]))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"guidance": Keypoints(torch.ones(1, 1, 2), torch.ones(1, 1, 2))}, ValueError, "guidance must be None with"),
    ],
)
def test_what_does_not_go_with_it_is_named(settings, kind, message):
    fixed, moving, _ = pair(FLAT)
    with pytest.raises(kind, match=message):
        refine(fixed, moving, **{"symmetric": True, **settings})
