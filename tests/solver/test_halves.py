"""Two halves of an image: what both show is followed, what either makes up is not, and places are told apart."""

import os
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss

from monai_lm import refine
from monai_lm.fields import fold_count, warp
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.guidance import Keypoints
from monai_lm.inferers import RegistrationInferer
from monai_lm.solver import choice, halves, refinement
from monai_lm.solver.smoothing import Elastic

SIZE = (96, 88)
SHARED = Path(__file__).parents[3] / "shared" / "data"
HIPPOCAMPI = Path(os.environ.get("MONAI_LM_DATA", SHARED)).resolve() / "hippocampus" / "images"


@pytest.fixture
def image(smooth_image):
    return smooth_image((1, 1, *SIZE), 3.0, 0, torch.float32)


@pytest.fixture
def truth(smooth_field):
    return smooth_field((1, 2, *SIZE), 2.0, 8.0, 1, torch.float32)


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy(image, level, seed):
    return image + level * image.std() * noise(image.shape, seed)


def error(ddf, truth):
    return float((ddf - truth)[..., 8:-8, 8:-8].square().sum(1).sqrt().mean())


def test_what_both_halves_show_is_followed_as_before(image, truth):
    fixed = warp(image, truth)
    usual, auto = (refine(fixed, image, smooth_residual=smooth) for smooth in (0.6, "auto"))
    assert error(usual.ddf, truth) < 0.4
    assert torch.equal(auto.ddf, usual.ddf)
    assert float(auto.held) == 0
    assert 0 < float(auto.apart) < 3
    assert usual.apart is usual.held is None


@pytest.mark.parametrize("predicted", [False, True])
def test_noise_is_not_followed(predicted, image, truth):
    """Nothing corresponds: what one half makes up the other one does not, and the field stays where it began."""
    fixed, moving = noise(image.shape, 2), noise(image.shape, 3)
    start = truth if predicted else None
    usual, auto = (refine(fixed, moving, start, smooth_residual=smooth) for smooth in (0.6, "auto"))
    began = truth if predicted else torch.zeros_like(truth)
    assert error(auto.ddf, began) < (0.5 if predicted else 0.1) * error(usual.ddf, began)
    assert float(auto.apart) > 3
    assert float(auto.held) > 0.9
    assert int(fold_count(auto.ddf)) == 0


def test_what_coarse_levels_made_up_is_not_kept(smooth_image, monkeypatch):
    """Coarse levels that are begun with before halves are asked are led again, held, where these do not agree."""
    fixed, moving = (smooth_image((1, 1, 128, 120), 3.0, seed, torch.float32) for seed in (4, 5))
    found = refine(fixed, moving, similarity="mapped_lncc")
    assert float(found.held) > 0.9
    assert float(found.ddf.square().sum(1).sqrt().mean()) < 1
    first = []
    monkeypatch.setattr(refinement, "decided", lambda *given: first.append(choice.decided(*given)) or first[0])
    monkeypatch.setattr(refinement, "beginnings", lambda *_: first[0][1])
    kept = refine(fixed, moving, similarity="mapped_lncc")
    assert float(kept.ddf.square().sum(1).sqrt().mean()) > 5


def test_places_are_told_apart(smooth_image, smooth_field):
    """One half of the images is noise, the other is not."""
    image = smooth_image((1, 1, 80, 240), 3.0, 0, torch.float32)
    truth = smooth_field((1, 2, 80, 240), 2.0, 8.0, 1, torch.float32)
    fixed, moving = warp(image, truth), image.clone()
    for one, seed in ((fixed, 2), (moving, 3)):
        one[..., 120:] = image.std() * noise(one[..., 120:].shape, seed)
    usual, auto = (refine(fixed, moving, smooth_residual=smooth) for smooth in (0.6, "auto"))
    quiet, loud = (slice(8, 90), slice(150, 232))
    away = [(result.ddf - truth).square().sum(1).sqrt()[:, 8:-8] for result in (usual, auto)]
    assert float(away[1][..., quiet].mean()) < float(away[0][..., quiet].mean()) + 0.1
    rough = [float(sd_log_jacobian(result.ddf[:, :, 8:-8, loud])) for result in (usual, auto)]
    assert rough[1] < 0.5 * rough[0]
    assert 0.3 < float(auto.held) < 0.8


def test_large_motion_that_both_halves_mean_is_followed(smooth_image, smooth_field):
    """Either half misses some of it, so they end apart; but they go the same way."""
    image = smooth_image((1, 1, *SIZE), 3.0, 0, torch.float32)
    truth = smooth_field((1, 2, *SIZE), 12.0, 16.0, 1, torch.float32)
    fixed = warp(image, truth)
    usual, auto = (refine(fixed, image, smooth_residual=smooth) for smooth in (0.6, "auto"))
    assert torch.equal(auto.ddf, usual.ddf)
    assert float(auto.apart) > 3.2


def turned(length, cosine, axes=2, thin=False):
    """Two fields of one length, ``(2, axes, 12, 12, …)``, at an angle; with a few slices if thin."""
    directions = torch.zeros(2, axes)
    directions[:, :2] = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
    return (length * directions).view(2, axes, *[1] * axes).expand(2, axes, *size(axes, thin))


def size(axes, thin=False):
    return (12,) * (axes - thin) + (8,) * thin


class Asked(halves._Halved):
    """Halves of one pair that lead to fields that are known."""

    def __init__(self, levels, axes=2, smoother=None, thin=False):
        settings = SimpleNamespace(method=SimpleNamespace(smoothing=Elastic()))
        super().__init__(None, [[None] * levels], None, settings, None, None, torch.ones(1, 1, *size(axes, thin)))
        object.__setattr__(self, "smoother", smoother)

    def smoothing(self, fields):
        return halves._smoothing(self, torch.zeros(1, dtype=torch.long), fields, self.relation(fields))

    def led(self, smoothing, way):
        assert smoothing == Elastic(halves.SMOOTHER)
        assert way.tolist() == [0]
        return self.smoother


@pytest.mark.parametrize(
    ("axes", "levels", "length", "expected"),
    [
        (2, 1, 1.3, True), (2, 1, 1.5, False), (2, 2, 2.3, True), (2, 2, 2.5, False), (2, 3, 3.9, True),
        (2, 3, 4.1, False), (2, 4, 3.9, True), (3, 1, 1.1, True), (3, 1, 1.25, False), (3, 2, 1.25, True),
        (3, 2, 1.4, False), (3, 3, 3.9, True), (3, 3, 4.1, False),
    ],
)  # fmt: skip
def test_halves_lead_to_the_same_place_by_distance(axes, levels, length, expected):
    """With a cosine of .5 both fields are as far apart as they are long."""
    relation = Asked(levels, axes).relation(turned(length, 0.5, axes))
    assert float(relation.square) == pytest.approx(length**2, rel=1e-5)
    assert float(relation.correlation) == pytest.approx(0.5, rel=1e-5)
    assert bool(Asked(levels, axes).together(relation)) is expected


@pytest.mark.parametrize(("length", "expected"), [(2.3, True), (2.5, False)])
def test_a_few_thick_slices_are_as_planes(length, expected):
    asked = Asked(2, 3, thin=True)
    assert bool(asked.together(asked.relation(turned(length, 0.5, 3, thin=True)))) is expected


@pytest.mark.parametrize(
    ("axes", "levels", "length", "usual", "smoother", "expected"),
    [
        (2, 2, 5.9, 0.7, 0.55, True), (2, 2, 5.9, 0.7, 0.45, False), (2, 3, 5.9, 0.7, 0.55, True),
        (2, 1, 2.8, 0.7, 0.55, True), (2, 1, 3.2, 0.7, 0.55, False),
        (3, 1, 2.1, 0.45, 0.8, True), (3, 1, 2.3, 0.45, 0.8, False), (3, 1, 2.1, 0.5, 0.65, False),
        (3, 2, 5.9, 0.7, 0.8, False), (3, 2, 5.9, 0.75, 0.85, True), (3, 3, 5.9, 0.7, 0.9, True),
        (3, 3, 6.1, 0.1, 0.8, True), (3, 3, 6.1, 0.7, 0.75, False),
    ],
)  # fmt: skip
def test_halves_far_apart_mean_the_same_if_smooth_fields_do_too(axes, levels, length, usual, smoother, expected):
    """After one level not if they are farther apart than that leads; of motion longer than blocks these alone tell."""
    asked = Asked(levels, axes, turned(5.0, smoother, axes))
    smoothing, held = asked.smoothing(turned(length, usual, axes))
    assert float(held) == (0 if expected else 1)
    assert (smoothing == Elastic()) is expected


@pytest.mark.parametrize(
    ("length", "cosine", "least", "expected"),
    [
        (1.0, 0.7, 0.6, True), (1.0, 0.5, 0.6, False), (1.0, 0.5, 0.4, True), (0.5, 0.0, 0.6, False),
        (0.5, -0.9, -1, True), (5.0, 0.8, 0.6, False), (0.0, 0.0, 0.6, True),
    ],
)  # fmt: skip
def test_around_a_place_halves_are_near_and_mean_the_same(length, cosine, least, expected):
    """Not near because neither moves; but where nothing moves at all nothing is held."""
    assert bool((Asked(2).around(turned(length, cosine), least) == expected).all())


@pytest.mark.parametrize("timely", [True, False])
def test_what_smooth_fields_do_not_agree_on_is_held_and_so_is_what_they_could_not_be_asked(timely):
    """Where halves agree on smooth fields only, the field is smooth."""
    asked = Asked(2, smoother=turned(1.0, 0.8) if timely else None)
    smoothing, held = asked.smoothing(turned(5.0, 0.1))
    assert float(held) == 1
    torch.testing.assert_close(smoothing.share, torch.ones(1, 1, 12, 12))
    torch.testing.assert_close(smoothing.still, torch.full((1, 1, 12, 12), 0.0 if timely else 1.0))


@pytest.mark.parametrize(("longer", "expected"), [(1.0, True), (5.0, False)])
def test_a_way_is_better_by_distance_and_where_motion_is_long_by_direction(longer, expected):
    near, alike = (Asked(2).relation(longer * turned(*pair)) for pair in ((1.5, 0.2), (3.0, 0.7)))
    assert float(near.square) < float(alike.square)
    assert bool(near.better(alike)) is expected
    assert bool(alike.better(near)) is not expected


@pytest.mark.skipif(not HIPPOCAMPI.is_dir(), reason=f"no hippocampus images in {HIPPOCAMPI} (set MONAI_LM_DATA)")
@pytest.mark.parametrize(("fixed", "moving"), [(297, 309), (289, 287)])
def test_small_images_that_fill_their_grid_are_followed(fixed, moving):
    """Real ones, on their own grids: one level leads neither half to the end, so both, which are right, end apart."""
    files = (HIPPOCAMPI / f"hippocampus_{number}.nii.gz" for number in (fixed, moving))
    first, second = (torch.from_numpy(nib.load(file).get_fdata(dtype=np.float32))[None, None] for file in files)
    size = first.shape[2:]
    room = [end for a, b in zip(second.shape[:1:-1], size[::-1], strict=True) for end in (0, max(0, b - a))]
    second = torch.nn.functional.pad(second, room)[(..., *(slice(length) for length in size))]
    usual, auto = (refine(first, second, smooth_residual=smooth) for smooth in (0.6, "auto"))
    assert torch.equal(auto.ddf, usual.ddf)
    assert float(auto.apart) > 4


def test_pairs_are_on_their_own(image, truth):
    fixed = torch.cat([warp(image, truth), noise(image.shape, 2), warp(image, truth)])
    moving = torch.cat([image, noise(image.shape, 3), image])
    both = refine(fixed, moving, iterations=15)
    assert (both.held > 0.5).tolist() == [False, True, False]
    for pair in range(3):
        alone = refine(fixed[pair : pair + 1], moving[pair : pair + 1], iterations=15)
        assert torch.equal(alone.ddf, both.ddf[pair : pair + 1])
        torch.testing.assert_close(alone.held, both.held[pair : pair + 1])
        torch.testing.assert_close(alone.apart, both.apart[pair : pair + 1])


def test_of_volumes_and_thick_slices():
    fixed, moving = (noise((1, 1, 48, 44, 8), seed) for seed in (0, 1))
    settings = {"spacing": (1.0, 1.0, 6.0), "scales": (2, 1), "iterations": (20, 10)}
    usual, auto = (refine(fixed, moving, smooth_residual=smooth, **settings) for smooth in (0.6, "auto"))
    assert float(auto.ddf.square().sum(1).sqrt().mean()) < 0.4 * float(usual.ddf.square().sum(1).sqrt().mean())


@pytest.mark.parametrize("hidden", ["fixed", "moving", "lesion"])
def test_what_a_mask_hides_changes_nothing(hidden, image, truth):
    """Not even NaN: the field is the same whatever is there."""
    fixed, moving = warp(image, truth), image
    mask = torch.ones(1, 1, *SIZE)
    mask[..., 60:] = 0
    given = {"fixed": {"mask": 255 * mask}, "moving": {"moving_mask": mask}, "lesion": {"lesion": 1 - mask}}[hidden]
    found = []
    for value in (0.0, 100.0) if hidden == "lesion" else (0.0, float("nan")):
        images = {"fixed": fixed.clone(), "moving": moving.clone()}
        images["moving" if hidden == "moving" else "fixed"][..., 66:] = value
        found.append(refine(**images, iterations=10, **given))
    torch.testing.assert_close(found[0].ddf, found[1].ddf, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[0].apart, found[1].apart)


@pytest.mark.parametrize("size", [(6, 6), (11, 20)])
def test_where_nothing_can_be_divided_all_is_as_usual(size):
    fixed, moving = (noise((1, 1, *size), seed) for seed in (0, 1))
    usual, auto = (refine(fixed, moving, iterations=5, smooth_residual=s) for s in (0.6, "auto"))
    assert torch.equal(usual.ddf, auto.ddf)
    assert auto.apart is auto.held is None


def test_what_guides_is_followed_where_the_images_tell_nothing(image):
    fixed, moving = noise(image.shape, 2), noise(image.shape, 3)
    points = torch.tensor([[[20.0, 30.0], [60.0, 40.0], [40.0, 70.0]]])
    result = refine(fixed, moving, guidance=Keypoints(points, points + 4.0, weight=10.0))
    there = points[0].long()
    led = result.ddf[0, :, there[:, 0], there[:, 1]].T
    assert float((led - 4).norm(dim=1).mean()) < 0.5 * 4 * 2**0.5
    assert result.apart is None


@pytest.mark.parametrize("settings", [{"symmetric": True}, {"similarity": SSIMLoss(spatial_dims=2)}])
def test_those_who_cannot_be_asked_are_smoothed_as_usual(settings, image, truth):
    auto, usual = (
        refine(warp(image, truth), image, iterations=4, **settings, **s) for s in ({}, {"smooth_residual": 0.6})
    )
    assert torch.equal(auto.ddf, usual.ddf)
    assert auto.apart is None


def test_half_precision_and_a_time_budget(image):
    fixed, moving = noise(image.shape, 2), noise(image.shape, 3)
    full, half = (refine(fixed, moving, memory=memory) for memory in ("full", "half"))
    torch.testing.assert_close(half.apart, full.apart, rtol=0.2, atol=0)
    assert float(half.held) > 0.9
    assert refine(fixed, moving, seconds=1e-4).held is None  # too little time to ask
    assert float(refine(fixed, moving, seconds=600.0).held) > 0.9


def test_what_it_is_not_told():
    image = torch.rand(1, 1, 16, 16)
    for refused in (
        lambda: refine(image, image, smooth_residual="much"),
        lambda: RegistrationInferer(refine={"smooth_residual": "much"}),
    ):
        with pytest.raises(ValueError, match="smooth_residual must be 'auto', a number or a Smoothing, got 'much'"):
            refused()


def test_images_of_other_contrast_are_compared_as_the_measure_makes_them(image, truth):
    """What is darkest and what is brightest in the fixed image looks alike in the moving one."""
    fixed, moving = warp(image, truth), (image - image.mean()).abs()
    usual, auto = (refine(fixed, moving, similarity="mapped_lncc", smooth_residual=s) for s in (0.6, "auto"))
    assert error(auto.ddf, truth) < error(usual.ddf, truth) + 0.05
