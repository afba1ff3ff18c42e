"""Self-similarity contexts against loops over voxels and patches, and what they do not see of intensities."""

import itertools

import numpy as np
import pytest
import torch

from monai_lm import refine
from monai_lm.fields import warp
from monai_lm.similarity import LNCC, MIND, MSE, Combined


def looped(image, radius, dilation):
    """Contexts of an array by their definition; borders continue, patches are averaged over what lies inside."""
    n, size = image.ndim, image.shape
    ends = [(axis, by) for axis in range(n) for by in (-dilation, dilation)]

    def at(x, end):
        y = list(x)
        y[end[0]] = min(max(y[end[0]] + end[1], 0), size[end[0]] - 1)
        return image[tuple(y)]

    pairs = [(p, q) for p, q in itertools.combinations(ends, 2) if p[0] != q[0]]
    distance = np.empty((len(pairs), *size))
    for k, (p, q) in enumerate(pairs):
        for x in np.ndindex(*size):
            patch = itertools.product(
                *(range(max(0, c - radius), min(s, c + radius + 1)) for c, s in zip(x, size, strict=True))
            )
            distance[(k, *x)] = np.mean([(at(y, p) - at(y, q)) ** 2 for y in patch])
    distance -= distance.min(0)
    variance = distance.mean(0)
    return np.exp(-distance / variance.clip(1e-3 * variance.mean(), 1e3 * variance.mean()))


@pytest.mark.parametrize(("radius", "dilation"), [(1, 1), (1, 2), (2, 1)])
def test_contexts_are_those_of_the_definition(size, radius, dilation, random_tensor):
    images = random_tensor((2, 2, *size), 0)
    contexts, same = MIND(radius, dilation).described(images, images)
    n = len(size)
    assert contexts.shape == (2, MIND().described_channels(2, n), *size)
    assert torch.equal(contexts, same)
    found = contexts.view(2, 2, -1, *size).numpy()
    for b, c in itertools.product(range(2), range(2)):
        np.testing.assert_allclose(found[b, c], looped(images[b, c].numpy(), radius, dilation), rtol=1e-9, atol=1e-12)


def test_a_constant_image_is_the_same_everywhere(size):
    flat = torch.full((1, 1, *size), 7.0)
    for image in MIND().described(flat, 0 * flat):
        assert torch.equal(image, torch.ones_like(image))


def test_half_precision_is_kept_and_close(size, smooth_image):
    image = smooth_image((1, 1, *size), 1.0, 0, torch.float32)
    half, full = MIND().described(image.half(), image)
    assert half.dtype == torch.half
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.02)


def blobs(size, smooth_image, smooth_field):
    """An image of large structures, it warped by some voxels, and the field that does it."""
    fixed = smooth_image((1, 1, *size), 4.0, 0, torch.float32)
    truth = smooth_field((1, len(size), *size), 2.0, 8.0, 1, torch.float32)
    return fixed, warp(fixed, truth), truth


def away(ddf, truth):
    """Mean distance of two fields, in voxels, away from the edges."""
    inner = (..., *[slice(6, -6)] * (truth.dim() - 2))
    return float((ddf - truth)[inner].norm(dim=1).mean())


def folded(image):
    """Dark and bright become the same: in planes, whose contexts are four, that hides too much."""
    return (image - image.quantile(0.1)).abs()


PLANE, VOLUME = (64, 60), (36, 34, 32)


@pytest.mark.parametrize(
    ("shape", "remap"),
    [(shape, remap) for shape in (PLANE, VOLUME) for remap in (lambda x: 3 - 2 * x, torch.exp)] + [(VOLUME, folded)],
)
def test_a_warp_is_recovered_across_contrasts(shape, remap, smooth_image, smooth_field):
    moving, fixed, truth = blobs(shape, smooth_image, smooth_field)
    result = refine(fixed, remap(moving), similarity="mind")
    near = refine(fixed, remap(moving), 0.5 * truth, similarity="mind")
    assert away(result.ddf, truth) < 0.6 * away(0 * truth, truth)
    assert away(near.ddf, truth) < 0.9 * away(0.5 * truth, truth)


def test_it_is_a_group_of_a_combination(random_tensor):
    fixed, warped = random_tensor((1, 3, 9, 8), 0), random_tensor((1, 3, 9, 8), 1)
    both = Combined([MSE(), MIND(), LNCC()], [1, 1, 1], [1.0, 2.0, 0.5])
    parts = zip((MSE(), MIND(), LNCC()), fixed.split(1, 1), warped.split(1, 1), strict=True)
    losses, derivatives = zip(*(measure.loss_and_derivative(w, f) for measure, f, w in parts), strict=True)
    loss, derivative = both.loss_and_derivative(warped, fixed)
    torch.testing.assert_close(loss, losses[0] + 2 * losses[1] + 0.5 * losses[2])
    torch.testing.assert_close(derivative, torch.cat([derivatives[0], 2 * derivatives[1], 0.5 * derivatives[2]], 1))
    reference, moving = both.prepare(fixed, warped)
    assert moving.shape[1] == both.described_channels(3, 2) == 6
    alone, described = MIND().prepare(fixed[:, 1:2], warped[:, 1:2])
    assert torch.equal(both.evaluate(moving, reference)[1][:, 1:5], 2 * MIND().evaluate(described, alone)[1])


@pytest.mark.parametrize("name", ["radius", "dilation"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None])
def test_a_size_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        MIND(**{name: value})


@pytest.mark.parametrize("measure", [MIND(), Combined([MIND(), MSE()], [1, 1])])
def test_half_precision_holds_images_of_any_scale(measure, smooth_image, smooth_field):
    moving, fixed, truth = blobs(VOLUME, smooth_image, smooth_field)
    if isinstance(measure, Combined):
        fixed, moving = (torch.cat([image, image], 1) for image in (fixed, moving))
    full, half = (refine(1e6 * fixed, 1e6 * moving, similarity=measure, memory=mode) for mode in ("full", "half"))
    assert away(half.ddf, full.ddf) < 0.1 * away(0 * truth, truth)
    assert away(half.ddf, truth) < 0.6 * away(0 * truth, truth)


def test_an_axis_too_short_for_neighbours_is_refused(random_tensor):
    """Two voxels have the same neighbours and patches, so nothing would be seen of a motion along that axis."""
    image = random_tensor((1, 1, 12, 11, 3))
    for short in (image[..., :2], image[..., :2, :].transpose(3, 4)):
        with pytest.raises(
            ValueError, match=r"^images must have at least 3 voxels along every axis for MIND.*got shape"
        ):
            refine(short, short.flip(2), similarity="mind")
    assert MIND().described(image, image)[0].diff(dim=4).abs().max() > 0.01
