"""The map of intensities that two images teach, LNCC behind it, and the choice between the two."""

from dataclasses import replace

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import warp
from monai_lm.similarity import LNCC, MIND, MSE, Combined, MappedLNCC
from monai_lm.similarity.auto import Auto
from monai_lm.similarity.mapped import intensity_maps, monotony
from monai_lm.similarity.weighted import Weighted, with_moving_weight, with_weight

PLANE, VOLUME = (72, 66), (36, 34, 32)


def folded(image):
    """The darkest becomes the brightest, dark grey the darkest, and the brightest grey."""
    low, high = image.amin(), image.amax()
    x = (image - low) / (high - low)
    return torch.where(x < 0.4, 1 - 2.5 * x, x - 0.4)


REMAPS = {"same": lambda x: 2 * x + 5, "inverted": torch.neg, "monotone": torch.exp, "folded": folded}


def blobs(size, smooth_image, smooth_field):
    """An image of large structures, it warped by some voxels, and the field that does it."""
    fixed = smooth_image((1, 1, *size), 4.0, 0, torch.float32)
    truth = smooth_field((1, len(size), *size), 2.0, 8.0, 1, torch.float32)
    return fixed, warp(fixed, truth), truth


def away(ddf, truth):
    """Mean distance of two fields, in voxels, away from the edges."""
    inner = (..., *[slice(6, -6)] * (truth.dim() - 2))
    return float((ddf - truth)[inner].norm(dim=1).mean())


@pytest.mark.parametrize("remap", REMAPS.values(), ids=REMAPS)
def test_any_map_is_learned_and_then_costs_little(remap, smooth_image):
    image = smooth_image((1, 1, *PLANE), 3.0, 0)
    other = remap(image)
    low, high = other.amin(), other.amax()
    of_fixed, of_moving = intensity_maps(image, other)
    assert bool(of_fixed.better.all()) != bool(of_moving.better.all())
    mapped = replace(of_fixed, better=torch.ones_like(of_fixed.better))(image)
    assert (mapped - (other - low) / (high - low)).abs().mean() < 0.015
    assert float(MappedLNCC()(other, image)) < 0.04 * image.numel()
    if remap is folded:
        assert float(LNCC()(other, image)) > 0.1 * image.numel()


def test_what_comes_together_by_chance_does_not_draw_it_to_the_mean(random_tensor, smooth_image):
    """Half of the voxels show something else: of their mean, half of the range would be left."""
    image = (smooth_image((1, 1, 90, 80), 3.0, 0) > 0).double() + 0.02 * random_tensor((1, 1, 90, 80), 1)
    other = -image
    other[..., ::2] = other[..., ::2].flip(2)
    known, _ = intensity_maps(image, other)
    common = known.shares[0, 0] > 0.01
    ends = known.values[0, 0, common]
    assert float(ends.amax() - ends.amin()) > 0.75
    assert float(known.shares.sum()) == pytest.approx(1)


def test_monotony_tells_contrasts_apart(smooth_image):
    image = smooth_image((1, 1, *PLANE), 3.0, 0)
    found = {name: float(monotony(image, remap(image))) for name, remap in REMAPS.items()}
    assert min(found[name] for name in ("same", "inverted", "monotone")) > 0.97
    assert found["folded"] < 0.75


def test_voxels_that_do_not_count_do_not_teach(smooth_image, random_tensor):
    image = smooth_image((1, 1, *PLANE), 3.0, 0)
    other, weight = folded(image), torch.ones_like(image)
    weight[..., :30, :] = 0
    spoiled = torch.where(weight > 0, other, other.amin() + random_tensor(image.shape, 3).sigmoid())
    clean, other_map = (intensity_maps(image, x, weight)[0].values for x in (other.clamp(max=1), spoiled.clamp(max=1)))
    assert (clean - other_map).abs().max() < 0.05
    pair = with_weight(image, weight), with_moving_weight(other, weight)
    measure, *maps = Weighted(MappedLNCC(), moving=True).matched(*pair)
    of_fixed, of_moving = (own(one) for own, one in zip(maps, pair, strict=True))
    assert isinstance(measure.measure, LNCC)
    assert torch.equal(of_fixed[:, 1:], pair[0][:, 1:])
    assert torch.equal(of_moving, pair[1])
    torch.testing.assert_close(of_fixed[:, :1], intensity_maps(image, other, weight)[0](image), rtol=0, atol=1e-6)


def test_groups_of_a_combination_learn_on_their_own(smooth_image):
    images = smooth_image((1, 2, *PLANE), 3.0, 0)
    other = torch.cat([folded(images[:, :1]), images[:, 1:]], 1)
    both = Combined([Auto(), MSE()], [1, 1])
    assert both.learns
    assert both.undecided
    assert [type(m) for m in both.unaligned.measures] == [MIND, MSE]
    assert [type(m) for m in both.decided(images, other).measures] == [MappedLNCC, MSE]
    assert [type(m) for m in both.decided(images, images).measures] == [LNCC, MSE]
    measure, of_fixed, of_moving = both.matched(images, other)
    assert [type(m) for m in measure.measures] == [LNCC, MSE]
    assert torch.equal(of_fixed(images)[:, 1:], images[:, 1:])
    assert not torch.equal(of_fixed(images)[:, :1], images[:, :1])
    assert torch.equal(of_moving(other), other)


def test_the_image_that_tells_more_apart_is_mapped(smooth_image):
    image = smooth_image((2, 1, *PLANE), 3.0, 0)
    other = folded(image)
    for pair, maps in (((image, other), (True, False)), ((other, image), (False, True))):
        found = intensity_maps(*pair)
        assert [bool(one.better.all()) for one in found] == list(maps)
        assert bool((monotony(*pair) < 0.75).all())
        mapped, kept = (own(one) for own, one in zip(found[:: 1 if maps[0] else -1], (image, other), strict=True))
        assert kept is other
        low, high = (limit((2, 3), keepdim=True) for limit in (other.amin, other.amax))
        assert (mapped - (other - low) / (high - low)).abs().mean() < 0.02
    one, both = torch.cat([image[:1], other[:1]]), torch.cat([other[:1], image[:1]])
    assert [one.better.flatten().tolist() for one in intensity_maps(one, both)] == [[True, False], [False, True]]


@pytest.mark.parametrize("side", ["moving", "fixed"])
@pytest.mark.parametrize("shape", [PLANE, VOLUME])
def test_a_warp_is_recovered_where_lncc_fails(shape, side, smooth_image, smooth_field):
    moving, fixed, truth = blobs(shape, smooth_image, smooth_field)
    images = (fixed, folded(moving)) if side == "moving" else (folded(fixed), moving)
    found = {name: refine(*images, similarity=name, smooth_residual=0.6) for name in ("lncc", "auto")}
    start = away(0 * truth, truth)
    assert away(found["auto"].ddf, truth) < 0.5 * start
    assert away(found["lncc"].ddf, truth) > 0.7 * start
    assert found["auto"].similarity == "mapped_lncc"
    assert "similarity=mapped_lncc" in repr(found["auto"])


@pytest.mark.parametrize("remap", [torch.neg, torch.exp])
def test_where_contrasts_correspond_auto_is_lncc(remap, smooth_image, smooth_field):
    moving, fixed, _ = blobs(PLANE, smooth_image, smooth_field)
    chosen, expected = (refine(fixed, remap(moving), similarity=name) for name in ("auto", "lncc"))
    assert chosen.similarity == "lncc"
    assert torch.equal(chosen.ddf, expected.ddf)
    assert [row[:3] for row in chosen.history[0]] == [row[:3] for row in expected.history[0]]


@pytest.mark.parametrize("how", ["prediction", "masks", "symmetric", "half", "batch"])
def test_it_goes_with_all_that_a_refinement_knows(how, smooth_image, smooth_field):
    moving, fixed, truth = blobs(PLANE, smooth_image, smooth_field)
    moving, arguments = torch.exp(2 * moving) if how == "symmetric" else folded(moving), {}
    start = away(0 * truth, truth)
    if how == "prediction":
        arguments, start = {"ddf": 0.5 * truth}, away(0.5 * truth, truth)
    elif how == "masks":
        hole = torch.ones_like(fixed)
        hole[..., 30:36, 30:36] = 0
        fixed = fixed.masked_fill(hole == 0, float("nan"))
        arguments = {"mask": hole, "moving_mask": hole.roll(9, 2)}
    elif how == "batch":  # of the second pair the other image is mapped
        fixed, moving = torch.cat([fixed, moving.flip(2)]), torch.cat([moving, fixed.flip(2)])
    else:
        arguments = {"symmetric": True} if how == "symmetric" else {"memory": "half"}
    found = refine(fixed, moving, similarity="mapped_lncc", **arguments).ddf
    assert away(found[:1], truth) < (0.9 if how == "prediction" else 0.6) * start
    if how == "batch":
        for pair in (slice(0, 1), slice(1, 2)):
            assert torch.equal(found[pair], refine(fixed[pair], moving[pair], similarity="mapped_lncc").ddf)


def test_the_order_in_memory_changes_nothing(smooth_image, smooth_field):
    moving, fixed, _ = blobs(VOLUME, smooth_image, smooth_field)
    moving = folded(moving)
    turned = moving.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    assert not turned.is_contiguous()
    for name in ("lncc", "mapped_lncc"):
        found = [refine(fixed, image, similarity=name, iterations=5).ddf for image in (moving, turned)]
        assert torch.equal(*found)


@pytest.mark.parametrize("value", [7, 257, 16.0, True, None])
def test_a_number_of_bins_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=f"bins must be a whole number from 8 to 256, got {value}"):
        MappedLNCC(bins=value)
