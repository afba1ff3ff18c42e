"""Mirror images of the moving image against the image itself."""

import math

import pytest
import torch

from monai_lm.fields import warp
from monai_lm.report.rivals import centre_of_mass, rivals_of
from monai_lm.similarity import LNCC, MIND


def test_centre_of_mass_is_that_of_the_foreground():
    image = torch.full((5, 7), -3.0)
    image[1:3, 4] = 10
    assert centre_of_mass(image) == (1.5, 4.0)
    assert centre_of_mass(torch.ones(5, 7)) == (2.0, 3.0)


@pytest.mark.parametrize("measure", [LNCC(), MIND()])
def test_an_image_matches_better_than_its_mirror_images_and_mirrored_worse(smooth_image, measure):
    moving = smooth_image((1, 1, 40, 36), seed=1).float()
    ddf = torch.zeros(1, 2, 40, 36)
    ddf[:, 0] = torch.linspace(1, 3, 36)
    fixed = warp(moving, ddf)
    right, mirrored = rivals_of(fixed, moving, measure), rivals_of(fixed, moving.flip(3), measure)
    assert right.mean >= right.best > 0.2
    assert mirrored.best < -0.2
    assert mirrored.best < mirrored.mean
    unlike = rivals_of(fixed, smooth_image((1, 1, 40, 36), seed=2).float(), measure)
    assert unlike.best < unlike.mean < 0.5 * right.mean


def test_what_was_too_far_away_matches_better_in_the_middle():
    place = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij"))

    def thing(row):
        middle = torch.tensor([row, 24.0]).view(2, 1, 1)
        spokes = 1 + torch.cos(3 * torch.atan2(*(place - middle)) + 0.5)
        return ((place - middle).square().sum(0) < 50).float().mul(1 + spokes)[None, None]

    far, near = (rivals_of(thing(14.0), thing(row), LNCC()).centred for row in (50.0, 14.0))
    assert far < -0.05
    assert near == pytest.approx(0, abs=1e-5)


def test_a_ball_has_no_mirror_image_and_a_constant_image_no_rivals():
    place = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(26.0), indexing="ij"))
    balls = [torch.exp(-(place - torch.tensor([row, 12.0]).view(2, 1, 1)).square().sum(0) / 30) for row in (14.0, 16.0)]
    found = rivals_of(balls[0][None, None], balls[1][None, None], LNCC())
    assert math.isnan(found.best)
    assert math.isnan(found.mean)
    nothing = rivals_of(balls[0][None, None], torch.ones(1, 1, 30, 26), LNCC())
    assert all(math.isnan(value) for value in vars(nothing).values())


def test_axes_and_masks_do_not_matter_where_they_say_nothing(smooth_image):
    fixed, moving = (smooth_image((1, 1, 36, 40), seed=seed).float() for seed in (1, 2))
    plain = rivals_of(fixed, moving, LNCC())
    exchanged = rivals_of(fixed.transpose(2, 3), moving.transpose(2, 3), LNCC())
    shown = rivals_of(fixed, moving, LNCC(), mask=torch.ones_like(fixed))
    for other in (exchanged, shown):
        assert tuple(vars(other).values()) == pytest.approx(tuple(vars(plain).values()), abs=2e-2)
