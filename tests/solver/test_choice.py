"""Where measures that learn begin, alone and beside others."""

import pytest
import torch
from monai.losses import SSIMLoss

from monai_lm import refine
from monai_lm.fields import warp
from monai_lm.similarity import LNCC, MI, MIND, MSE
from monai_lm.similarity.mapped import MappedLNCC

SETTINGS = {"scales": (4, 2, 1), "iterations": (8, 6, 4), "tolerance": 0.0}


@pytest.fixture
def pair(smooth_image, smooth_field):
    """An image whose darkest and brightest parts look alike, and it warped, in its own contrast."""
    image = smooth_image((1, 1, 56, 52), 4.0, 0, torch.float32)
    fixed = warp(image, smooth_field((1, 2, 56, 52), 2.0, 8.0, 1, torch.float32))
    return fixed, (image - image.mean()).abs()


def levels(result):
    return list(dict.fromkeys(row.level for row in result.history[0]))


@pytest.mark.parametrize(
    ("similarity", "name", "seen"),
    [
        ("lncc", "lncc", [4, 2, 1]),
        ("mapped_lncc", "mapped_lncc", [4, 2, 1]),
        (("mi", "mapped_lncc"), "mapped_lncc", [4, 2, 1]),
        (("mi", "auto"), "mapped_lncc", [4, 2, 1]),  # MI led, to see what suits the images
        (("auto", "lncc"), "lncc", [4, 2, 1]),
        (("mi", MSE()), "mse", [4, 2, 1]),
        (LNCC(3), "lncc", [4, 2, 1]),
        (SSIMLoss(spatial_dims=2), "SSIMLoss", [4, 2, 1]),
    ],
)
def test_the_result_names_the_measure_of_the_finest_level_and_tells_what_it_did(similarity, name, seen, pair):
    result = refine(*pair, similarity=similarity, **SETTINGS)
    assert result.similarity == name
    assert levels(result) == seen


def test_a_level_that_does_not_learn_is_that_of_its_measure_alone(pair):
    both = refine(*pair, similarity=("mi", "mapped_lncc"), **SETTINGS)
    alone = refine(*pair, similarity="mi", **SETTINGS)
    first = [[row.loss for row in result.history[0] if row.level == 4] for result in (both, alone)]
    assert first[0] == first[1]


def test_every_pair_begins_where_the_better_of_the_starts_leads(pair, monkeypatch):
    """A batch takes for each pair what the pair takes alone, with its history, and order does not matter."""
    fixed, moving = (torch.cat([image, image.flip(3).roll(5, 3)]) for image in pair)
    settings = SETTINGS | {"smooth_residual": 0.6}
    starts = MIND(), MI()
    monkeypatch.setattr(MappedLNCC, "starts", starts)
    plain = refine(fixed, moving, similarity="mapped_lncc", **settings)
    monkeypatch.setattr(MappedLNCC, "starts", starts[::-1])
    assert torch.equal(refine(fixed, moving, similarity="mapped_lncc", **settings).ddf, plain.ddf)
    ends = []
    for start in starts:
        monkeypatch.setattr(MappedLNCC, "starts", (start, start))
        ends.append(refine(fixed, moving, similarity="mapped_lncc", **settings))
    assert not torch.equal(ends[0].ddf, ends[1].ddf)
    for number in range(2):
        (end,) = [end for end in ends if torch.equal(plain.ddf[number], end.ddf[number])]
        losses = [[row.loss for row in result.history[number]] for result in (plain, end)]
        assert losses[0] == losses[1]
        seconds = [row.seconds for row in plain.history[number]]
        assert 0 < seconds[0] < seconds[-1] <= plain.seconds


@pytest.mark.parametrize("settings", [{}, {"smooth_residual": 0.6}, {"symmetric": True}])
def test_of_two_starts_the_better_one_is_taken(settings, smooth_image, smooth_field, monkeypatch):
    """Whose order does not matter. What dark and bright that look alike are squared differences mistake."""
    image = smooth_image((1, 1, 96, 88), 3.0, 0, torch.float32)
    truth = smooth_field((1, 2, 96, 88), 4.0, 10.0, 1, torch.float32)
    pair = warp(image, truth), (image - image.mean()).abs()
    settings = {"scales": (4, 2, 1), "iterations": (20, 10, 5), "similarity": "mapped_lncc"} | settings
    found = {}
    for starts in ((MIND(), MIND()), (MSE(), MSE()), (MSE(), MIND()), (MIND(), MSE())):
        monkeypatch.setattr(MappedLNCC, "starts", starts)
        found[tuple(type(start) for start in starts)] = refine(*pair, **settings).ddf
    away = {way: float((found[way] - truth).norm(dim=1).mean()) for way in ((MIND, MIND), (MSE, MSE))}
    assert away[MIND, MIND] < away[MSE, MSE]
    for way in ((MSE, MIND), (MIND, MSE)):
        assert torch.equal(found[way], found[MIND, MIND])


def test_a_constant_pair_has_no_say_in_the_measure_of_a_batch(smooth_image, smooth_field):
    image = smooth_image((1, 1, 56, 52), 4.0, 0, torch.float32)
    fixed = warp(image, smooth_field((1, 2, 56, 52), 2.0, 8.0, 1, torch.float32))
    alone = refine(fixed, image, similarity="auto", **SETTINGS)
    with pytest.warns(UserWarning, match="constant"):
        both = refine(torch.cat([fixed, fixed]), torch.cat([image, 0 * image]), similarity="auto", **SETTINGS)
    assert alone.similarity == both.similarity == "lncc"
    assert torch.equal(both.ddf[:1], alone.ddf)


def test_who_is_told_hears_of_the_levels_that_led(pair):
    heard = []
    settings = {**SETTINGS, "smooth_residual": 0.6}
    result = refine(*pair, similarity="mapped_lncc", callback=lambda *entry: heard.append(entry), **settings)
    assert heard == [(0, number, row) for number, row in enumerate(result.history[0])]


def test_levels_that_are_all_coarse_end_on_the_grid_of_the_images(smooth_image, smooth_field):
    image = smooth_image((1, 1, 56, 52), 4.0, 0, torch.float32)
    truth = smooth_field((1, 2, 56, 52), 2.0, 8.0, 1, torch.float32)
    result = refine(warp(image, truth), image, similarity="mapped_lncc", scales=(8, 4), iterations=(20, 20))
    assert levels(result) == [8, 4]  # others led through both
    assert result.final_loss < result.initial_loss
    assert float((result.ddf - truth).norm(dim=1).mean()) < 0.8 * float(truth.norm(dim=1).mean())
