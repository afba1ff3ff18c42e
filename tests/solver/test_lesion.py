"""Lesions: the field follows from around them, what is around does not notice, and nothing folds."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, warp
from monai_lm.fields.extension import extend_in_place
from tests.solver.pairs import error, smooth, texture

SHAPES = [(48, 44), (24, 22, 20)]


def ball(shape, batch=1, radius=0.45):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, s) for s in shape], indexing="ij")
    inside = torch.stack(axes).square().sum(0).sqrt() < radius
    return inside.float().expand(batch, 1, *shape).clone()


def sick(image, lesion):
    """An image with something else in its lesion."""
    return torch.where(lesion > 0, 3 + 2 * texture(tuple(image.shape[2:]), len(image), seed=9), image)


def pair(shape, batch=1):
    moving, truth = texture(shape, batch), smooth(shape, 2.5, batch, sigma=5.0)
    return warp(moving, truth), moving, truth


def beyond_harmonic(field, inside):
    """Largest difference to the extension of what is around, in voxels."""
    extended = field.double()
    extend_in_place(extended, inside.double(), (1.0,) * (field.dim() - 2), 40)
    return float((extended - field).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_field_follows_from_around_the_lesion_of_either_image(shape):
    fixed, moving, truth = pair(shape)
    healthy, lesion = refine(fixed, moving), ball(shape)
    for moved in (False, True):
        images = (fixed, sick(moving, lesion)) if moved else (sick(fixed, lesion), moving)
        masked = refine(*images, **({"moving_mask": 1 - lesion} if moved else {"mask": 1 - lesion}))
        result = refine(*images, **{"moving_lesion" if moved else "lesion": lesion})
        inside = warp(lesion, result.ddf) > 0.5 if moved else lesion > 0
        assert int(fold_count(result.ddf)) == 0
        assert beyond_harmonic(result.ddf, inside.float()) < 0.05
        there, around = inside.expand_as(truth), ~inside.expand_as(truth)
        missed = [(r.ddf - truth)[there].abs().mean() for r in (masked, result)]
        assert missed[1] < 0.6 * missed[0]
        assert (result.ddf - healthy.ddf)[around].abs().mean() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_prediction_does_in_a_lesion_is_not_believed(shape):
    fixed, moving, truth = pair(shape)
    lesion, wrong = ball(shape), smooth(shape, 2.0, sigma=2.0, seed=5)
    start = truth + torch.where(ball(shape, radius=0.4) > 0, wrong, 0.0)
    result = refine(sick(fixed, lesion), moving, start, lesion=lesion, iterations=0)
    there = (lesion > 0).expand_as(truth)
    assert (result.ddf - truth)[there].abs().mean() < 0.5 * (start - truth)[there].abs().mean()
    torch.testing.assert_close(result.ddf[~there], start[~there], rtol=0, atol=0.05)
    assert int(fold_count(result.ddf)) == 0


def test_what_is_in_a_lesion_is_not_seen():
    fixed, moving, _ = pair(SHAPES[0])
    lesion = ball(SHAPES[0])
    fields = [
        refine(torch.where(lesion > 0, value, fixed), moving, lesion=7 * lesion, iterations=5).ddf
        for value in (0.0, float("nan"))
    ]
    assert torch.equal(*fields)
    mask = torch.ones_like(lesion)
    assert torch.equal(refine(fixed, moving, None, mask, lesion=lesion, iterations=5).ddf, fields[0])


def test_no_lesion_changes_no_bit_and_pairs_have_lesions_of_their_own():
    fixed, moving, _ = pair(SHAPES[0], batch=2)
    lesion = ball(SHAPES[0], batch=2).roll(5, 3)
    lesion[1] = 0
    fixed = sick(fixed, lesion)
    together = refine(fixed, moving, lesion=lesion, iterations=15).ddf
    alone = [refine(fixed[k : k + 1], moving[k : k + 1], lesion=lesion[k : k + 1], iterations=15).ddf for k in (0, 1)]
    assert error(together, torch.cat(alone)) < 1e-4
    assert torch.equal(alone[1], refine(fixed[1:], moving[1:], iterations=15).ddf)


@pytest.mark.parametrize(
    ("how", "less"), [({"memory": "half"}, 0.7), ({"acceptance": "descent"}, 0.7), ({"scales": (2,)}, 1.01)]
)
def test_lesions_go_with_other_settings(how, less):
    fixed, moving, truth = pair(SHAPES[1])
    lesion = ball(SHAPES[1])
    result = refine(sick(fixed, lesion), moving, 0.5 * truth, moving_lesion=lesion, lesion=lesion, iterations=10, **how)
    assert int(fold_count(result.ddf)) == 0
    assert error(result.ddf, truth) < less * error(0.5 * truth, truth)


def test_lesions_that_do_not_fit():
    fixed, moving, _ = pair(SHAPES[0])
    lesion = ball(SHAPES[0])
    for change, message in (
        ({"lesion": lesion[0]}, r"lesion must be \(B, 1, \*S\) = \(1, 1, 48, 44\) on the grid of fixed"),
        ({"moving_lesion": lesion - 0.5}, "moving_lesion must be zero where there is none and positive"),
        ({"lesion": torch.ones_like(lesion)}, r"lesion must leave something of fixed, got all of it for pairs \[0\]"),
        ({"lesion": lesion, "symmetric": True}, "lesion and moving_lesion must be None with symmetric"),
        (
            {"lesion": lesion, "mask": lesion},
            r"mask must leave something outside of the lesion, got nothing for pairs \[0\]",
        ),
        ({"lesion": lesion / 0}, "lesion must be finite"),
        ({"lesion": lesion, "similarity": torch.nn.MSELoss()}, "mask must be None for a similarity that cannot weigh"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(fixed, moving, **change)
    with pytest.raises(TypeError, match=r"lesion must be a torch.Tensor"):
        refine(fixed, moving, lesion=[1])
