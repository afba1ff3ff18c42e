"""Images in which little corresponds: what is drawn is seeded, has texture, and shows the same places."""

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.nonsense import trial
from benchmarks.textures import stained, textured, ultrasound


@pytest.fixture
def image(smooth_image):
    return smooth_image((1, 1, 48, 44), 4.0, 0, torch.float32).clamp(min=0)


def correlation(a, b):
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


@pytest.mark.parametrize("made", [stained, textured, ultrasound])
def test_it_is_seeded_and_of_the_size_of_the_image(made, image):
    first, same, other = made(image, 0), made(image, 0), made(image, 1)
    assert first.shape == image.shape
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert bool(torch.isfinite(first).all())


def test_textures_of_two_images_do_not_correspond(image):
    flat = torch.full_like(image, 0.6)
    flat[..., :2] = 0
    flat[..., -2:] = 1
    assert correlation(textured(flat, 0)[..., 4:-4], stained(flat, 0)[..., 4:-4]) < 0.1
    assert correlation(textured(image, 0), image) > 0.7


def test_ultrasound_shows_borders_brighter_than_what_is_beside_them():
    image = torch.zeros(1, 1, 64, 64)
    image[:, :, 32:] = 1
    echo = ultrasound(image, 0)[0, 0]
    assert float(echo[31:33].mean()) > 1.5 * float(echo[16:24].mean())


def test_a_trial_has_the_fixed_image_textured_where_the_moving_one_is_stained(image):
    case = Case(image, image.flip(2), (image, image))
    assert torch.equal(trial(case, "stained, lncc", 3, "heart").case.moving, stained(image.flip(2), 3))
    assert torch.equal(trial(case, "stained, lncc", 3, "heart").case.fixed, textured(image, 3))
    assert torch.equal(trial(case, "ultrasound, mi", 3, "heart").case.moving, ultrasound(image.flip(2), 3))
