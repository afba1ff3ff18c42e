"""LNCC against loops over windows, and on a real image."""

import numpy as np
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

from monai_lm.similarity import LNCC


def standardized(image):
    differences = np.concatenate([np.abs(np.diff(image, axis=axis)).ravel() for axis in range(image.ndim)])
    return (image - image.mean()) * differences.sum() / (differences**2).sum()


def lncc_by_loops(warped, fixed, radius, sigma, epsilon):
    """``Σ 1 - A² / (B C)`` of one channel, windows cut at the edge of the image."""
    warped, fixed = standardized(warped), standardized(fixed)
    places = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"), -1)
    total = 0.0
    for x in np.ndindex(*fixed.shape):
        window = tuple(slice(max(i - radius, 0), i + radius + 1) for i in x)
        i, j = warped[window].ravel(), fixed[window].ravel()
        w = np.exp(-0.5 * ((places[window] - x) ** 2).sum(-1).ravel() / sigma**2)
        i, j = (image - np.average(image, weights=w) for image in (i, j))
        covariance, *variances = (np.average(product, weights=w) for product in (i * j, i * i, j * j))
        total += 1 - covariance**2 / ((variances[0] + epsilon) * (variances[1] + epsilon))
    return total


@pytest.mark.parametrize("epsilon", [1e-3, 0.3])
@pytest.mark.parametrize(
    ("measure", "radius", "sigma"),
    [
        *(({"radius": radius}, radius, np.inf) for radius in (1, 2, 9)),
        ({"window": "gaussian"}, 2, 5 / 3),
        ({"window": 0.8}, 3, 0.8),
        ({"window": 3, "radius": 1}, 1, 3.0),
    ],
    ids=str,
)
def test_loss_equals_loops(size, measure, radius, sigma, epsilon, random_tensor):
    warped, fixed = 4 * random_tensor((2, 2, *size), 0) + 2, random_tensor((2, 2, *size), 1)
    fixed = fixed + 0.1 * warped
    expected = [
        np.mean([lncc_by_loops(i.numpy(), j.numpy(), radius, sigma, epsilon) for i, j in zip(w, f, strict=True)])
        for w, f in zip(warped, fixed, strict=True)
    ]
    out = LNCC(**measure, epsilon=epsilon)(warped, fixed)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("window", "kind"), [("box", "rectangular"), ("gaussian", "gaussian")])
@pytest.mark.parametrize("radius", [1, 2])
def test_loss_is_monais_inside_the_image(window, kind, radius, random_tensor):
    """At the border MONAI's windows have zeros; here the images have them there, too."""
    warped, fixed = (torch.nn.functional.pad(random_tensor((1, 1, 9, 8, 7), seed), [2 * radius] * 6) for seed in (0, 1))
    measure = LNCC(radius, 1e-12, window)
    loss = measure.evaluate(warped, measure.reference(fixed))[0] / warped.numel() - 1
    theirs = LocalNormalizedCrossCorrelationLoss(3, 2 * radius + 1, kind, smooth_dr=1e-12)
    assert loss.item() == pytest.approx(theirs(warped, fixed).item(), rel=1e-5)  # its window is in float32


def test_defaults():
    assert (LNCC().radius, LNCC().epsilon, LNCC().window, LNCC().sigma) == (2, 2e-3, "box", 0)
    assert (LNCC(window=1.1).radius, LNCC(3, window=1.1).radius, LNCC(window="gaussian").radius) == (4, 3, 2)


@pytest.mark.parametrize(
    ("window", "kind", "message"),
    [
        ("triangular", ValueError, "window must be 'box', 'gaussian' or a standard deviation in voxels, got 'triangu"),
        (0, ValueError, "window must be greater than 0, got 0"),
        (None, TypeError, "window must be a number, got NoneType"),
    ],
)
def test_windows_that_cannot_be_are_refused(window, kind, message):
    with pytest.raises(kind, match=message):
        LNCC(window=window)


def test_derivative_vanishes_far_from_the_only_difference(smooth_image):
    """Two windows that share a voxel reach ``2 radius`` voxels from it; nothing is standardised here."""
    measure = LNCC(radius=1, epsilon=1e-9)
    fixed = smooth_image((1, 1, 17, 17), 1.0)
    warped = fixed.clone()
    warped[0, 0, 8, 8] += 1
    _, derivative = measure.evaluate(warped, measure.reference(fixed))
    near = torch.zeros(17, 17, dtype=torch.bool)
    near[6:11, 6:11] = True
    assert derivative[0, 0, near].abs().max() > 0.1
    assert derivative[0, 0, ~near].abs().max() < 1e-3


def test_flat_windows_count_little():
    """Background noise of a thousandth of the contrast must not count as structure."""
    generator = torch.Generator().manual_seed(0)
    fixed = 1e-3 * torch.randn(1, 1, 16, 16, generator=generator, dtype=torch.float64)
    warped = 1e-3 * torch.randn(1, 1, 16, 16, generator=generator, dtype=torch.float64)
    fixed[..., :4] += torch.tensor([0.0, 1.0, 0.0, 1.0])
    warped[..., :4] += torch.tensor([0.0, 1.0, 0.0, 1.0])
    _, derivative = LNCC(radius=1).loss_and_derivative(warped, fixed)
    tight = LNCC(radius=1, epsilon=1e-9).loss_and_derivative(warped, fixed)[1]
    assert derivative[..., 8:].abs().max() < 1
    assert tight[..., 8:].abs().max() > 100


def test_float32_agrees_with_float64_on_a_real_image(data_root):
    nibabel = pytest.importorskip("nibabel")
    path = data_root / "hippocampus" / "images" / "hippocampus_001.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    image = torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float64))[None, None]
    warped, fixed = image[:, :, 1:], image[:, :, :-1]
    measure = LNCC(radius=2)
    loss, derivative = measure.loss_and_derivative(warped, fixed)
    loss32, derivative32 = measure.loss_and_derivative(warped.float(), fixed.float())
    assert 0 < loss.item() < fixed.numel()
    assert loss32.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (derivative32.double() - derivative).norm() / derivative.norm() < 1e-3


@pytest.mark.parametrize("radius", [0, -1])
def test_radius_below_one_is_refused(radius):
    with pytest.raises(ValueError, match=f"radius must be at least 1 voxel, got {radius}"):
        LNCC(radius=radius)


@pytest.mark.parametrize("epsilon", [0, -1e-3, float("nan")])
def test_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"epsilon must be positive, got {epsilon}"):
        LNCC(epsilon=epsilon)
