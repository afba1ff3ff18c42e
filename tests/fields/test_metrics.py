"""Metrics of fields against brute force and known maps."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from monai_lm.fields import fold_count, gaussian_smooth, invert, jacobian_determinant
from monai_lm.fields.metrics import (
    compare_labels,
    inverse_consistency,
    label_overlap,
    measure,
    sd_log_jacobian,
    target_registration_error,
)
from monai_lm.fields.topology import LOG_FLOOR

SPACING = (1.0, 0.5, 2.0)


def test_sd_log_jacobian_is_that_of_a_known_map():
    x = torch.arange(12, dtype=torch.float64)
    stretch = torch.where(x < 6, 0.0, 0.5 * (x - 6) ** 2 / 6)  # determinant 1 + (x - 6) / 6 inside the right half
    ddf = torch.zeros(1, 2, 12, 5, dtype=torch.float64)
    ddf[0, 0] = stretch[:, None]
    determinant = 1 + np.gradient(stretch.numpy())
    expected = np.log(np.repeat(determinant, 5)).std()
    assert float(sd_log_jacobian(ddf)) == pytest.approx(expected, rel=1e-6)


def test_sd_log_jacobian_vanishes_for_uniform_scaling_and_is_finite_for_folds():
    x = torch.arange(8.0)
    scaled = torch.stack([0.3 * x[:, None].expand(8, 8), 0.1 * x[None].expand(8, 8)])
    folded = -2 * scaled / 0.3
    values = sd_log_jacobian(torch.stack([scaled, folded]))
    assert float(values[0]) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("size", [(9, 8), (7, 6, 8)], ids=["2D", "3D"])
def test_inside_a_mask_sd_log_jacobian_is_that_of_its_voxels(size, random_tensor):
    ddf, mask = 0.2 * random_tensor((3, len(size), *size)), random_tensor((3, 1, *size), 1) > 0.5
    log = np.log(jacobian_determinant(ddf).clamp(min=LOG_FLOOR).numpy())
    expected = [log[pair][mask[pair, 0].numpy()].std() for pair in range(3)]
    np.testing.assert_allclose(sd_log_jacobian(ddf, mask=mask), expected, rtol=1e-10)
    np.testing.assert_allclose(sd_log_jacobian(ddf, mask=0.5 * mask.float()), expected, rtol=1e-10)  # weights
    np.testing.assert_allclose(sd_log_jacobian(ddf, mask=torch.ones_like(mask)), sd_log_jacobian(ddf), rtol=1e-10)
    values = measure(ddf, mask=mask)
    np.testing.assert_allclose(values["sdlogj"], expected, rtol=1e-10)
    assert values["folds"].tolist() == fold_count(ddf, mask).tolist() != fold_count(ddf).tolist()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5, 4), r"mask must be \(B, 1, \*S\) = \(2, 1, 5, 4\) .* got shape \(2, 5, 4\)"),
        (torch.ones(1, 1, 5, 4), r"mask must be .* got shape \(1, 1, 5, 4\)"),
        (torch.ones(2, 1, 5, 4) * torch.tensor([1, 0]).view(2, 1, 1, 1), r"mask must not be zero .* for pairs \[1\]"),
        (torch.full((2, 1, 5, 4), torch.nan), "mask must be finite"),
    ],
    ids=["no channel", "another batch", "empty", "NaN"],
)
@pytest.mark.parametrize("function", [fold_count, lambda ddf, mask: sd_log_jacobian(ddf, mask=mask)])
def test_masks_that_do_not_do_are_refused(function, mask, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 2, 5, 4), mask)


def test_target_registration_error_is_a_distance_in_millimetres():
    ddf = torch.zeros(1, 3, 6, 7, 8)
    ddf[:, 0], ddf[:, 2] = 1.0, torch.arange(6.0).view(6, 1, 1)  # the shift along z grows with x
    fixed = torch.tensor([[[2.5, 3.0, 4.0], [float("nan"), 0, 0], [0.0, 0.0, 0.0]]])
    moving = torch.tensor([[[3.5, 3.0, 5.5], [1.0, 1.0, 1.0], [1.0, 2.0, 0.0]]])
    error = target_registration_error(ddf, fixed, moving, torch.tensor([[1.0, 1.5, 2.0]]))
    assert error[0, 0].item() == pytest.approx(2.0 * 1.0)  # 4 + 2.5 = 6.5 against 5.5, voxels of 2 mm
    assert error[0, 1].isnan()
    assert error[0, 2].item() == pytest.approx(3.0)


def test_inverse_consistency_of_shifts_and_of_an_inverse():
    shift = torch.zeros(2, 2, 9, 8)
    shift[:, 0], shift[1, 1] = 1.5, 20.0  # the second pair is led out of the grid everywhere
    missed = inverse_consistency(shift, -0.5 * shift)
    assert float(missed[0]) == pytest.approx(0.75)
    assert missed[1].isnan()
    ddf = gaussian_smooth(torch.randn(1, 3, 16, 15, 14, generator=torch.Generator().manual_seed(0)), 3.0) * 20
    for axis, size in enumerate(ddf.shape[2:]):  # at rest on the border, beyond which an inverse is a guess
        ddf *= torch.linspace(0, torch.pi, size).sin().view([-1 if a == axis else 1 for a in range(3)])
    assert float(ddf.abs().max()) > 0.5
    assert int(fold_count(ddf)) == 0
    assert float(inverse_consistency(ddf, invert(ddf)[0])) < 0.02
    with pytest.raises(ValueError, match="inverse must have the shape of ddf"):
        inverse_consistency(ddf, ddf[..., 1:])


def test_landmarks_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"must be \(B, N, n\) for a ddf"):
        target_registration_error(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), torch.ones(1, 2))


@pytest.fixture
def labels():
    """Two label maps ``(2, 1, 9, 10, 8)`` of boxes: value 1 moved, 2 the same, 3 only in the first, 200 in both."""
    first, second = torch.zeros(2, 2, 1, 9, 10, 8)
    first[:, 0, 1:4, 2:6, 2:5], second[:, 0, 2:5, 2:6, 3:6] = 1, 1
    first[:, 0, 6:8, 6:9, 4:7] = second[:, 0, 6:8, 6:9, 4:7] = 2
    first[:, 0, 0, 0, 0] = 3
    first[1, 0, 5, 1:3, 1:3], second[1, 0, 5, 1:4, 1:3] = 200, 200
    return first, second


def brute_hd95(first, second):
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * SPACING for mask in (first, second)]
    distances = cdist(*surfaces)
    return max(np.percentile(distances.min(axis), 95) for axis in (0, 1))


def test_overlap_per_label_is_that_of_brute_force(labels):
    first, second = (maps[1, 0] for maps in labels)
    dice, hd95 = label_overlap(first, second, SPACING)
    assert list(dice) == list(hd95) == [1, 2, 3, 200]
    for value in (1, 2, 200):
        a, b = (maps.numpy() == value for maps in (first, second))
        assert dice[value] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert hd95[value] == pytest.approx(brute_hd95(a, b))
    assert dice[3] == 0
    assert np.isnan(hd95[3])
    assert label_overlap(first, second) == (dice, {})


@pytest.mark.filterwarnings("ignore:monai.metrics.utils:FutureWarning")
@pytest.mark.parametrize("size", [(9, 8), (7, 9, 8)], ids=["2D", "3D"])
def test_overlap_per_label_is_that_of_monai(size, random_tensor):
    smooth = [gaussian_smooth(random_tensor((1, 1, *size), seed), 1.0) for seed in (0, 1)]
    warped, fixed = (image > image.mean() for image in smooth)  # both reach the border
    dice, hd95 = label_overlap(warped[0, 0], fixed[0, 0], SPACING[: len(size)])
    masks = warped.float(), fixed.float()
    assert dice[1] == pytest.approx(float(compute_dice(*masks)))
    expected = compute_hausdorff_distance(*masks, True, percentile=95, spacing=list(SPACING[: len(size)]))
    assert hd95[1] > 1
    assert hd95[1] == pytest.approx(float(expected), rel=1e-5)  # float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.int8, torch.float64, torch.half])
def test_label_maps_of_any_type_are_compared(labels, dtype):
    first, second = ((maps[1, 0] % 2).to(dtype) for maps in labels)
    assert label_overlap(first, second, SPACING) == label_overlap(first.float(), second.float(), SPACING)


def test_maps_that_hold_no_labels_are_refused(labels):
    first = labels[0][1, 0].float()
    with pytest.raises(ValueError, match=r"label maps must hold whole numbers, got 0.5"):
        label_overlap(first, first + 0.5 * (first == 0))
    with pytest.raises(ValueError, match=r"warped and fixed must have one shape, got .* and .*"):
        label_overlap(first, first[:-1])


def test_means_are_over_the_labels_of_each_pair(labels):
    out = compare_labels(*labels, [SPACING, SPACING])
    for pair in range(2):
        dice, hd95 = label_overlap(labels[0][pair, 0], labels[1][pair, 0], SPACING)
        assert float(out["dice"][pair]) == pytest.approx(np.mean(list(dice.values())))
        assert float(out["hd95_mm"][pair]) == pytest.approx(np.nanmean(list(hd95.values())))
    nothing = torch.zeros(1, 1, 4, 4)
    assert compare_labels(nothing, nothing)["dice"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int32, torch.int64, torch.float64])
def test_large_labels_are_told_apart(dtype):
    fixed = torch.tensor([[16777216, 16777217], [614454277, 614454278]], dtype=torch.int64).to(dtype)
    warped = torch.tensor([[16777217, 16777216], [614454277, 614454278]], dtype=torch.int64).to(dtype)
    expected = {16777216: 0.0, 16777217: 0.0, 614454277: 1.0, 614454278: 1.0}
    assert label_overlap(warped, fixed)[0] == expected
    assert float(compare_labels(warped[None, None], fixed[None, None])["dice"]) == 0.5


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2**24), (torch.half, 2**11), (torch.bfloat16, 2**8)])
def test_labels_that_their_type_has_merged_are_refused(dtype, most):
    labels = torch.tensor([[0, most], [1, 1]], dtype=dtype)
    assert label_overlap(labels, labels)[0] == {1: 1.0, most: 1.0}
    labels[0, 0] = 2 * most
    with pytest.raises(
        ValueError, match=rf"warped must hold labels up to {most} in {dtype}, got larger ones; use integers"
    ):
        label_overlap(labels, labels)
