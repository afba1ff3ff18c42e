"""How smooth a field must be where: halves apart from each other, noise that is not followed, what is kept."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, warp
from monai_lm.fields.metrics import sd_log_jacobian
from monai_lm.inferers import RegistrationInferer
from monai_lm.similarity import LNCC
from monai_lm.solver.crossvalidation import SMOOTHER, adapted, halves_of
from monai_lm.solver.smoothing import Elastic

SIZE = (96, 88)


@pytest.fixture
def image(smooth_image):
    return smooth_image((1, 1, *SIZE), 3.0, 0, torch.float32)


@pytest.fixture
def truth(smooth_field):
    return smooth_field((1, 2, *SIZE), 2.0, 8.0, 1, torch.float32)


def noisy(image, level, seed):
    return image + level * image.std() * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def error(ddf, truth):
    return float((ddf - truth)[..., 8:-8, 8:-8].square().sum(1).sqrt().mean())


def found(fixed, moving, prediction=None, mask=None, **kwargs):
    """What cross-validation finds, ``(B, 1, *S)``: the share of the stiffest."""
    edges = (1.0,) * (fixed.dim() - 2)

    def refined(*args, **more):
        return refine(*args, **({"scales": (2, 1), "iterations": (20, 20)} | kwargs | more))

    return adapted(fixed, moving, prediction, (mask, None), edges, Elastic(), LNCC(), refined).share


@pytest.mark.parametrize("size", [(24, 30), (13, 12, 25), (40, 8, 24)])
def test_halves_have_all_voxels_and_judge_what_they_do_not_see(size):
    fitted, judging, blocks = halves_of(size)
    assert blocks == tuple(6 if length >= 12 else length for length in size)
    assert torch.equal(fitted.sum(0), torch.ones(1, *size))
    pool = torch.nn.functional.max_pool3d if len(size) == 3 else torch.nn.functional.max_pool2d
    assert not bool((pool(fitted, 3, 1, 1) * judging).any())  # nor their neighbours
    corner = (0, 0, *[slice(0, block) for block in blocks])
    assert len(fitted[corner].unique()) == 1
    assert 0.2 < float(judging.sum(0).mean()) < 0.7


def test_noise_is_not_followed(image):
    """A pair that lies exactly: all that a field does is wrong."""
    fixed, moving = noisy(image, 1.0, 0), noisy(image, 1.0, 1)
    usual, auto = (refine(fixed, moving, smooth_residual=smooth) for smooth in (0.6, "auto"))
    still = torch.zeros_like(usual.ddf)
    assert error(usual.ddf, still) > 0.5
    assert error(auto.ddf, still) < 0.5 * error(usual.ddf, still)


def test_what_the_images_show_is_followed_as_before(image, truth):
    fixed = warp(image, truth)
    usual, auto = (refine(fixed, image, smooth_residual=smooth) for smooth in (0.6, "auto"))
    assert error(usual.ddf, truth) < 0.4
    assert error(auto.ddf, truth) < error(usual.ddf, truth) + 0.05
    assert int(fold_count(auto.ddf)) == 0


def test_places_are_told_apart(image, truth):
    """One half of the images is noise, the other is not."""
    fixed, moving = warp(image, truth), image.clone()
    for one, seed in ((fixed, 2), (moving, 3)):
        one[..., 44:] = torch.randn(one[..., 44:].shape, generator=torch.Generator().manual_seed(seed))
    usual, auto = (refine(fixed, moving, smooth_residual=smooth).ddf for smooth in (0.6, "auto"))
    quiet, loud = (slice(8, 32), slice(56, 80))
    away = [(ddf - truth).square().sum(1).sqrt()[:, 8:-8] for ddf in (usual, auto)]
    assert float(away[1][..., quiet].mean()) < float(away[0][..., quiet].mean()) + 0.05
    rough = [float(sd_log_jacobian(ddf[:, :, 8:-8, loud])) for ddf in (usual, auto)]
    assert rough[1] < 0.5 * rough[0]
    share = found(fixed, moving)
    assert share.shape[2:] == (48, 44)
    assert float(share[..., -12:].mean()) > 0.25
    assert 0 <= float(share.min()) <= float(share.max()) <= 1


def test_a_prediction_is_where_it_begins(image, truth):
    """What it gets right needs nothing; what one does without would be stiff everywhere."""
    fixed, moving = noisy(warp(image, truth), 0.7, 4), noisy(image, 0.7, 5)
    usual, auto = (refine(fixed, moving, truth, smooth_residual=smooth) for smooth in (0.6, "auto"))
    assert error(auto.ddf, truth) < 0.7 * error(usual.ddf, truth)


def test_pairs_are_on_their_own_and_masks_hide(image, truth):
    fixed, moving = torch.cat([warp(image, truth), noisy(image, 1.0, 0)]), torch.cat([image, noisy(image, 1.0, 1)])
    both = found(fixed, moving)
    for pair in range(2):
        torch.testing.assert_close(found(fixed[pair : pair + 1], moving[pair : pair + 1]), both[pair : pair + 1])
    mask = torch.ones(1, 1, *SIZE)
    mask[..., 60:] = 0
    other = fixed[:1].clone()
    other[..., 70:] = torch.randn(other[..., 70:].shape, generator=torch.Generator().manual_seed(6))
    shares = [found(one, moving[:1], mask=mask)[..., :20] for one in (fixed[:1], other)]
    torch.testing.assert_close(*shares)


def test_of_volumes_and_thick_slices(smooth_image):
    image = smooth_image((1, 1, 48, 44, 8), 3.0, 0, torch.float32)
    fixed, moving = noisy(image, 1.0, 0), noisy(image, 1.0, 1)
    settings = {"spacing": (1.0, 1.0, 6.0), "scales": (2, 1), "iterations": (20, 10)}
    usual, auto = (refine(fixed, moving, smooth_residual=smooth, **settings) for smooth in (0.6, "auto"))
    assert float(auto.ddf.square().sum(1).sqrt().mean()) < 0.8 * float(usual.ddf.square().sum(1).sqrt().mean())


def test_a_usual_smoothness_beyond_all_others_is_kept(image):
    smoothing = adapted(image, image, None, (None, None), (1.0, 1.0), Elastic(SMOOTHER[-1]), LNCC(), refine)
    assert smoothing.low == smoothing.high == Elastic(SMOOTHER[-1])
    assert not bool(smoothing.share.any())


def test_what_it_cannot_be_asked_with(image):
    with pytest.raises(ValueError, match="smooth_residual must not be 'auto' with symmetric=True"):
        refine(image, image, smooth_residual="auto", symmetric=True)
    for refused in (lambda: refine(image, image, smooth_residual="much"), lambda: kept("much")):
        with pytest.raises(ValueError, match="smooth_residual must be 'auto', a number or a Smoothing, got 'much'"):
            refused()
    kept("auto")


def kept(value):
    RegistrationInferer(refine={"smooth_residual": value})


@pytest.mark.parametrize("hidden", ["fixed", "moving", "lesion"])
def test_what_a_mask_hides_changes_nothing(hidden, image, truth):
    """Not even NaN: the field is the same whatever is there."""
    fixed, moving = warp(image, truth), image
    mask = torch.ones(1, 1, *SIZE)
    mask[..., 60:] = 0
    given = {"fixed": {"mask": 255 * mask}, "moving": {"moving_mask": mask}, "lesion": {"lesion": 1 - mask}}[hidden]
    fields = []
    for value in (0.0, 100.0) if hidden == "lesion" else (0.0, float("nan")):
        images = {"fixed": fixed.clone(), "moving": moving.clone()}
        images["moving" if hidden == "moving" else "fixed"][..., 66:] = value
        fields.append(refine(**images, iterations=10, smooth_residual="auto", **given).ddf)
    torch.testing.assert_close(fields[0], fields[1], atol=1e-3, rtol=0)


def test_where_nothing_can_be_divided_all_is_as_usual(image):
    """A grid of one block, and a mask that shows one."""
    for size in ((6, 6), (40, 40)):
        fixed, moving = (image[..., at : at + size[0], : size[1]] for at in (2, 3))
        mask = torch.zeros_like(fixed)
        mask[..., :6, :6] = 1
        results = [refine(fixed, moving, mask=mask, iterations=5, smooth_residual=s).ddf for s in (0.6, "auto")]
        torch.testing.assert_close(results[0], results[1])


def test_images_of_other_contrast_are_compared_as_the_measure_makes_them(image, truth):
    """What is darkest and what is brightest in the fixed image looks alike in the moving one."""
    fixed, moving = warp(image, truth), (image - image.mean()).abs()
    usual, auto = (refine(fixed, moving, similarity="mapped_lncc", smooth_residual=s) for s in (0.6, "auto"))
    assert error(auto.ddf, truth) < error(usual.ddf, truth) + 0.05
