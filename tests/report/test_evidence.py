"""How far images explain each other, and how hard a field pulls."""

import pytest
import torch

from monai_lm import kernels, refine
from monai_lm.kernels import cpu
from monai_lm.report.evidence import (
    AGREEMENT,
    Evidence,
    agreement,
    doubts_of,
    evidence_of,
    extremes,
    gains_of,
    information,
    local_fit,
)


@pytest.mark.parametrize("size", [(40, 30), (40, 20, 18)])
def test_agreement_is_one_whatever_the_contrast_and_near_nothing_for_noise(smooth_image, random_tensor, size):
    image = smooth_image((1, 1, *size)).float()
    assert agreement(image, image) == pytest.approx(1, abs=0.02)
    assert agreement(image, 100 - 3 * image) == pytest.approx(agreement(image, image), abs=1e-4)
    assert agreement(image, random_tensor(image.shape, 1).float()) < 0.1


def test_agreement_is_that_of_a_fit_in_every_window(random_tensor):
    fixed, warped = random_tensor((1, 1, 9, 8), 1).float(), random_tensor((1, 1, 9, 8), 2).float()
    explained = whole = 0.0
    for i in range(9):
        for j in range(8):
            f, w = (m[0, 0, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3].double().flatten() for m in (fixed, warped))
            f, w = f - f.mean(), w - w.mean()
            explained += float((f * w).mean() ** 2 / (w * w).mean())
            whole += float((f * f).mean())
    assert agreement(fixed, warped) == pytest.approx(explained / whole, rel=0.01)


def test_agreement_does_not_see_the_background_nor_the_slabs(smooth_image):
    image, other = smooth_image((1, 1, 24, 22), seed=1).float(), smooth_image((1, 1, 24, 22), seed=2).float()
    window = torch.hann_window(24, periodic=False)[:, None] * torch.hann_window(22, periodic=False)
    image, other = image * window, other * window
    plain = agreement(image, other)
    padded = [torch.nn.functional.pad(i, (9, 9, 40, 7)) for i in (image, other)]
    assert agreement(*padded) == pytest.approx(plain, rel=0.01)
    assert agreement(image.transpose(2, 3), other.transpose(2, 3)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_agreement_does_not_see_the_unit_of_intensities(smooth_image, scale):
    one, other = (smooth_image((1, 1, 24, 22, 20), 2.0, seed, torch.float32) for seed in (0, 1))
    moving = one + 0.5 * other
    assert agreement(one, scale * moving) == pytest.approx(agreement(one, moving), rel=1e-4)
    assert agreement(scale * one, moving) == pytest.approx(agreement(one, moving), rel=1e-4)


def test_a_constant_image_has_no_agreement():
    flat = torch.ones(1, 1, 12, 12)
    value = agreement(flat, flat)
    assert value != value
    assert doubts_of(Evidence(value, 0.1, 0.0)) == {}


def test_extremes_are_voxels_that_change_four_fold():
    ddf = torch.zeros(1, 2, 20, 10)
    grow = torch.zeros(20)
    grow[10:] = 4.0 * torch.arange(1, 11)  # from voxel 10 on every step leads 5 voxels on
    ddf[:, 0] = grow[:, None]
    assert extremes(torch.zeros_like(ddf)) == 0
    assert extremes(ddf) == pytest.approx(10 / 20)
    assert (
        extremes(
            -0.9 * torch.arange(20.0).view(1, 1, 20, 1).expand(1, 2, 20, 10) * torch.tensor([1.0, 0]).view(1, 2, 1, 1)
        )
        == 1
    )


def test_doubts_name_the_bound_that_is_crossed():
    good = [
        Evidence(0.95, 0.3, 0.01),
        Evidence(0.95, 0.3, 0.01, 0.99, 0.9, 0.01),
        Evidence(0.95, 0.3, 0.01, 1.0, 0.4, 0.1),
    ]
    good.append(Evidence(0.3, 0.3, 0.01, information=0.6, gained=0.2, agreed=-0.1, any_contrast=True))
    assert [doubts_of(evidence) for evidence in good] == [{}] * 4
    for evidence, name, text in (
        (Evidence(0.3, 0.3, 0.01), "agreement", "explains only 0.30 of the fixed one's local variance"),
        (Evidence(0.95, 1.29, 0.01), "rough", "varies by 1.29 (SDlogJ)"),
        (Evidence(0.95, 0.3, 0.25), "extreme", "the volume of 25.0 % of the voxels more than four-fold"),
        (Evidence(0.95, 0.3, 0.01, 0.47), "contrast", "(polarity 0.47, same or inverted contrast keeps to 0.96)"),
        (Evidence(0.95, 0.3, 0.01, gained=-0.12, agreed=0.03), "noise", "(mutual information -0.120, agreement +0.030"),
        (Evidence(0.95, 0.3, 0.01, gained=0.005, agreed=-0.02), "noise", "+0.005, agreement -0.020)"),
        (Evidence(0.2, 0.3, 0.01, information=0.03, gained=0.05, any_contrast=True), "information", "0.03 of"),
        (Evidence(0.95, 0.3, 0.01, mirror=-0.1, mirrors=0.2), "mirror", "matches 10 % better than the image as it is"),
        (Evidence(0.95, 0.3, 0.01, mirror=0.0, mirrors=0.01), "mirror", "on average but 1 % worse"),
    ):
        found = doubts_of(evidence)
        assert list(found) == [name]
        assert text in found[name]


def test_evidence_is_of_the_first_channel(smooth_image, random_tensor):
    image, noise = smooth_image((1, 1, 24, 22)).float(), random_tensor((1, 1, 24, 22)).float()
    ddf = torch.zeros(1, 2, 24, 22)
    found = evidence_of(torch.cat([image, image], 1), torch.cat([image, noise], 1), ddf)
    assert found.agreement > AGREEMENT
    assert (found.sdlogj, found.extremes) == (0, 0)


@pytest.mark.parametrize("size", [(40, 30), (40, 20, 18)])
def test_polarity_tells_one_contrast_from_two(smooth_image, size):
    image = smooth_image((1, 1, *size)).float()
    assert local_fit(image, 3 * image + 1)[1] == pytest.approx(1)
    assert local_fit(image, 3 - image)[1] == pytest.approx(-1)
    row = torch.arange(size[0]).view(1, 1, -1, *[1] * (len(size) - 1))
    both = torch.where(row < size[0] // 2 + 4, image, -image)
    assert abs(local_fit(image, both)[1]) < 0.5
    assert local_fit(image, both, (row < size[0] // 2).expand_as(image))[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [("lncc", 1.0), ("ncc", 1.0), ("mse", -1.0), ("mi", None), ("mind", None), ("mapped_lncc", None), ("", None),
     ("SSIMLoss", None)],
)  # fmt: skip
def test_polarity_is_asked_of_measures_that_expect_one_contrast(smooth_image, similarity, expected):
    image = smooth_image((1, 1, 24, 22)).float()
    found = evidence_of(image, -image, torch.zeros(1, 2, 24, 22), similarity=similarity).polarity
    assert found != found if expected is None else found == pytest.approx(expected)


def test_information_is_that_of_any_map_and_falls_with_noise(smooth_image, random_tensor):
    image = smooth_image((1, 1, 60, 50)).float()
    noise = random_tensor(image.shape, 1).float()
    same, mapped, other = (information(image, x) for x in (image, (image - image.mean()).abs(), noise))
    assert same > mapped > 0.6 > 0.1 > other
    found = evidence_of(image, noise, torch.zeros(1, 2, 60, 50))
    assert (found.information, found.gained) == pytest.approx((other, 0))
    assert not found.any_contrast
    assert found.polarity != found.polarity
    mask = torch.zeros_like(image)
    mask[..., :30, :] = 1
    assert information(image, torch.where(mask > 0, image, noise), mask) > 0.7


def test_noise_that_mutual_information_refined_onto_noise_is_doubted():
    fixed, moving = (torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ddf = refine(fixed, moving, similarity="mi", smooth_residual=0.6).ddf
    found = evidence_of(fixed, moving, ddf, similarity="mi")
    assert found.information > information(fixed, moving) + 0.02
    assert "information" in doubts_of(found)


def test_a_field_that_follows_noise_loses_what_smoothed_images_tell(smooth_image):
    image = smooth_image((1, 1, 64, 60), seed=1).float()
    draw = torch.Generator().manual_seed(0)
    fixed, moving = (image + 0.2 * image.std() * torch.randn(image.shape, generator=draw) for _ in range(2))
    still = torch.zeros(1, 2, 64, 60)
    ddf = refine(fixed, moving).ddf
    found = evidence_of(fixed, moving, ddf, similarity="lncc")
    assert found.information > information(fixed, moving)  # as if it had gained something
    assert "noise" in doubts_of(found)
    assert gains_of(fixed, moving, still)[:2] == (0, 0)
    gained, agreed, _ = gains_of(fixed, moving, still, ddf)
    assert found.gained < gained
    assert agreed == pytest.approx(-found.agreed, abs=1e-6)


def test_a_field_that_leads_borders_away_from_each_other_loses_agreement(smooth_image):
    """Whatever the contrasts: a map of intensities in windows, either way, is all that it asks for."""
    fixed = smooth_image((1, 1, 64, 60), seed=1).float()
    away = torch.full((1, 2, 64, 60), 3.0)
    for moving in (fixed, 5 - 2 * fixed):
        gained, agreed, polarity = gains_of(fixed, moving, away)
        assert max(gained, agreed) < -0.1
        back, again, _ = gains_of(fixed, moving, torch.zeros_like(away), away)
        assert back > 0.1
        assert again == pytest.approx(-agreed)
        assert abs(polarity) < 1


def test_images_in_another_order_of_memory_take_the_kernels_too(smooth_image, monkeypatch):
    """As files give them; the references would take many times as long."""
    fixed, moving = (smooth_image((1, 1, 24, 20, 22), 2.0, seed).float() for seed in (0, 1))
    still = torch.zeros(1, 3, 24, 20, 22)
    expected = evidence_of(fixed, moving, still, similarity="lncc")
    turned = [image.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2) for image in (fixed, moving)]
    assert not turned[0].is_contiguous()
    if kernels.missing(fixed.device) is None:
        served = cpu.available
        monkeypatch.setattr(cpu, "available", lambda *tensors: served(*tensors) or pytest.fail("not served"))
    assert evidence_of(*turned, still, similarity="lncc") == expected
