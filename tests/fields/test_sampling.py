"""Sampling against loops, MONAI's Warp, exact shifts and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp

from monai_lm.fields import sample_points, warp

MODES = list(itertools.product(["bilinear", "nearest"], ["border", "zeros"]))


def value_at(image, index, padding_mode):
    """Voxel of an array that is continued outside by its border or by zeros."""
    inside = all(0 <= i < s for i, s in zip(index, image.shape, strict=True))
    if not inside and padding_mode == "zeros":
        return 0.0
    return image[tuple(min(max(i, 0), s - 1) for i, s in zip(index, image.shape, strict=True))]


def sample_at(image, position, mode, padding_mode):
    """Interpolate an array at one position, the definition written out."""
    if mode == "nearest":
        return value_at(image, [math.floor(p + 0.5) for p in position], padding_mode)
    total = 0.0
    for corner in itertools.product((0, 1), repeat=len(position)):
        index = [math.floor(p) + c for p, c in zip(position, corner, strict=True)]
        weight = math.prod(1 - abs(p - i) for p, i in zip(position, index, strict=True))
        total += weight * value_at(image, index, padding_mode)
    return total


def warp_by_loops(image, ddf, mode, padding_mode):
    image, ddf = image.double().numpy(), ddf.double().numpy()
    out = np.zeros((*image.shape[:2], *ddf.shape[2:]))
    for b, c, *x in np.ndindex(*out.shape):
        position = [i + ddf[(b, a, *x)] for a, i in enumerate(x)]
        out[(b, c, *x)] = sample_at(image[b, c], position, mode, padding_mode)
    return torch.from_numpy(out)


def off_grid(shape, generator, reach=3):
    """A field whose positions keep away from the kinks at voxel centres and halfway between them."""
    whole = torch.randint(-reach, reach, shape, generator=generator)
    fraction = torch.rand(shape, generator=generator, dtype=torch.float64)
    return whole + torch.where(fraction < 0.5, 0.2 + 0.4 * fraction, 0.4 + 0.4 * fraction)


@pytest.mark.parametrize(("mode", "padding_mode"), MODES)
def test_equals_loops(size, mode, padding_mode, random_tensor, generator):
    image = random_tensor((2, 2, *size))
    ddf = off_grid((2, len(size), *size), generator())
    torch.testing.assert_close(
        warp(image, ddf, mode, padding_mode), warp_by_loops(image, ddf, mode, padding_mode), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("mode", "padding_mode"), MODES)
def test_image_on_another_grid_than_the_field_equals_loops(size, mode, padding_mode, random_tensor, generator):
    image = random_tensor((1, 2, *[s + 1 + a for a, s in enumerate(size)]))
    ddf = off_grid((1, len(size), *size), generator(1))
    out = warp(image, ddf, mode, padding_mode)
    assert out.shape == (1, 2, *size)
    torch.testing.assert_close(out, warp_by_loops(image, ddf, mode, padding_mode), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
@pytest.mark.parametrize(("mode", "padding_mode"), MODES)
def test_equals_monai_warp(size, mode, padding_mode, random_tensor, generator):
    image = random_tensor((2, 3, *size), 1)
    ddf = off_grid((2, len(size), *size), generator(2))
    expected = Warp(mode=mode, padding_mode=padding_mode)(image, ddf.clone())
    torch.testing.assert_close(warp(image, ddf, mode, padding_mode), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("shift", [-2, 1])
def test_integer_shift_is_exact(size, mode, shift, random_tensor):
    image = random_tensor((1, 1, *size), dtype=torch.float32)
    for axis, length in enumerate(size):
        ddf = torch.zeros(1, len(size), *size)
        ddf[:, axis] = shift
        index = (torch.arange(length) + shift).clamp(0, length - 1)
        assert torch.equal(warp(image, ddf, mode), image.index_select(2 + axis, index))


@pytest.mark.parametrize(("mode", "padding_mode"), MODES)
def test_zero_field_returns_the_image_exactly(size, mode, padding_mode, random_tensor):
    image = random_tensor((1, 2, *size), dtype=torch.float32)
    assert torch.equal(warp(image, torch.zeros(1, len(size), *size), mode, padding_mode), image)


def test_outside_far_away(size, random_tensor):
    image = random_tensor((1, 1, *size), dtype=torch.float32)
    ddf = torch.full((1, len(size), *size), 1e6)
    corner = image[(..., *[-1] * len(size))]
    assert torch.equal(warp(image, ddf), corner.view(1, 1, *[1] * len(size)).expand_as(image))
    assert not warp(image, ddf, padding_mode="zeros").any()


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_gradcheck_in_image_and_field(size, padding_mode, random_tensor, generator):
    size = tuple(s - 1 for s in size)
    image = random_tensor((1, 2, *size)).requires_grad_()
    ddf = off_grid((1, len(size), *size), generator(3), reach=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, d: warp(i, d, padding_mode=padding_mode), (image, ddf))


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_half_precision_image_is_sampled_in_the_precision_of_the_field(size, padding_mode, random_tensor, generator):
    image = random_tensor((1, 1, *size), dtype=torch.float16)
    ddf = off_grid((1, len(size), *size), generator(4)).float()
    out = warp(image, ddf, padding_mode=padding_mode)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, warp(image.float(), ddf, padding_mode=padding_mode), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_nearest_keeps_labels_and_their_dtype(size, padding_mode, generator):
    labels = torch.randint(0, 139, (1, 1, *size), generator=generator(5)).to(torch.uint8)
    out = warp(labels, off_grid((1, len(size), *size), generator(6)).float(), "nearest", padding_mode)
    assert out.dtype == torch.uint8
    assert set(out.unique().tolist()) <= {0, *labels.unique().tolist()}


def test_flipping_image_and_field_flips_the_result(size, random_tensor, generator, flip_field):
    image, ddf = random_tensor((1, 1, *size)), off_grid((1, len(size), *size), generator(7))
    for axis in range(len(size)):
        flipped = warp(image.flip(2 + axis), flip_field(ddf, axis))
        torch.testing.assert_close(flipped, warp(image, ddf).flip(2 + axis), rtol=1e-12, atol=1e-12)


def test_unknown_mode_is_refused(size):
    image, ddf = torch.zeros(1, 1, *size), torch.zeros(1, len(size), *size)
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest', got 'bicubic'"):
        warp(image, ddf, mode="bicubic")


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_unknown_padding_mode_is_refused(size, mode):
    image, ddf = torch.zeros(1, 1, *size), torch.zeros(1, len(size), *size)
    with pytest.raises(ValueError, match="padding_mode must be 'border' or 'zeros', got 'reflection'"):
        warp(image, ddf, mode=mode, padding_mode="reflection")


@pytest.mark.parametrize(
    ("image", "ddf"),
    [((1, 1, 4, 1), (1, 2, 4, 5)), ((1, 1, 4, 5, 6), (1, 2, 4, 5)), ((1, 1, 4, 5), (1, 3, 4, 5))],
)
def test_images_and_fields_that_do_not_fit(image, ddf):
    with pytest.raises(ValueError, match=r"image must be \(B, C, \*M\) .* got shapes \(.*\) and \(.*\)"):
        warp(torch.zeros(image), torch.zeros(ddf))


@pytest.mark.parametrize(
    ("mode", "padding_mode"), [("bilinear", "border"), ("bilinear", "zeros"), ("nearest", "zeros")]
)
@pytest.mark.parametrize("channels", [3, 5])
def test_a_compiler_is_shown_the_same_samples(mode, padding_mode, channels, random_tensor):
    """What is traced is plain PyTorch; the compiler's eager backend runs that without compiling."""
    image, ddf = random_tensor((2, channels, 7, 6)), 2 * random_tensor((2, 2, 4, 6), 1)
    shown = torch.compile(warp, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(shown(image, ddf, mode, padding_mode), warp(image, ddf, mode, padding_mode))


@pytest.mark.parametrize(("mode", "padding_mode"), MODES)
def test_positions_of_a_half_precision_field_are_not_rounded(mode, padding_mode, random_tensor):
    image = torch.arange(3000.0).view(1, 1, -1, 1).expand(1, 1, 3000, 2)
    field = torch.zeros(1, 2, 3000, 2, dtype=torch.half)
    field[:, 0] = 0.25
    expected = warp(image, field.float(), mode, padding_mode)
    assert torch.equal(warp(image, field, mode, padding_mode), expected)
    assert float(expected[0, 0, 2500, 0]) == 2500 + 0.25 * (mode == "bilinear")
    field = 3 * random_tensor((1, 2, 9, 8)).half()
    for values in (field.float(), field):
        out = warp(values, field, mode, padding_mode)
        assert out.dtype == values.dtype
        reference = warp(values.float(), field.float(), mode, padding_mode)
        torch.testing.assert_close(out.float(), reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 7), (5, 6, 7)])
def test_points_are_sampled_as_scipy_does(size):
    ndimage = pytest.importorskip("scipy.ndimage")
    n = len(size)
    generator = torch.Generator().manual_seed(0)
    ddf = torch.randn(2, n, *size, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 9, n, generator=generator, dtype=torch.float64) * 9 - 1  # some are outside
    points[0, 3, 1] = float("nan")
    got = sample_points(ddf, points)
    for b in range(2):
        for c in range(n):
            expected = ndimage.map_coordinates(ddf[b, c].numpy(), points[b].T.numpy(), order=1, mode="nearest")
            valid = ~points[b].isnan().any(1)
            torch.testing.assert_close(got[b, valid, c], torch.from_numpy(expected)[valid])
    assert got[0, 3, 1].isnan()


def test_points_are_sampled_as_exactly_however_many_there_are(random_tensor):
    ddf = random_tensor((1, 2, 9, 8))
    points = torch.rand(1, 100_000, 2, generator=torch.Generator().manual_seed(0)) * 7
    exact = sample_points(ddf, points.double())
    torch.testing.assert_close(sample_points(ddf.float(), points), exact.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_nearest_keeps_every_value_of_every_type(dtype, padding_mode):
    most = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    image = torch.tensor([[[[0, 1], [most, most - 1]]]], dtype=torch.uint64 if most > 2**62 else torch.int64).to(dtype)
    ddf = torch.zeros(1, 2, 2, 2)
    ddf[0, 0] = 1.0
    warped = warp(image, ddf, "nearest", padding_mode)
    assert warped.dtype == dtype
    outside = [0, 0] if padding_mode == "zeros" else [most, most - 1]
    assert warped[0, 0].tolist() == [[most, most - 1], outside]


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
def test_nearest_is_differentiable_in_the_image(padding_mode):
    image = torch.zeros(1, 1, 4, 5, requires_grad=True)
    ddf = torch.full((1, 2, 4, 5), 0.0)
    ddf[:, 0] = 1.0
    warp(image, ddf, "nearest", padding_mode).sum().backward()
    assert image.grad[0, 0, :, 0].tolist() == ([0, 1, 1, 2] if padding_mode == "border" else [0, 1, 1, 1])


def test_forward_derivatives_are_those_of_backward(random_tensor):
    image, ddf, tangent = (random_tensor((1, c, 9, 8), seed) for seed, c in enumerate((1, 2, 2)))
    _, forward = torch.func.jvp(lambda d: warp(image, d).sum(), (ddf,), (tangent,))
    leaf = ddf.clone().requires_grad_()
    warp(image, leaf).sum().backward()
    assert float(forward) == pytest.approx(float((leaf.grad * tangent).sum()), rel=1e-9)
    assert abs(float(forward)) > 0.1
