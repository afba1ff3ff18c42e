"""A prediction that cannot be meant is not used, and its repair ends; one that is merely bad is."""

import time
import warnings

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import compose, fold_count, warp
from monai_lm.fields.topology import repair
from monai_lm.prediction import believed
from monai_lm.pyramid import make_level
from monai_lm.similarity import LNCC, MSE

SETTINGS = {"scales": (2, 1), "iterations": 5, "compile": False}


@pytest.fixture(params=[(40, 36), (26, 24, 22)], ids=["2D", "3D"])
def case(request, smooth_image, smooth_field):
    """Fixed, moving and the truth, two pairs."""
    size = request.param
    moving = smooth_image((2, 1, *size), 2.0, dtype=torch.float32)
    truth = smooth_field((2, len(size), *size), 3.0, 6.0, 1, torch.float32)
    assert fold_count(truth).tolist() == [0, 0]
    return warp(moving, truth), moving, truth


def mirrored(ddf):
    """The field as it is where the first axis runs the other way, which its vectors do not know."""
    size = ddf.shape[2]
    axis = torch.arange(size, dtype=ddf.dtype).view(-1, *[1] * (ddf.dim() - 3))
    turned = ddf.clone()
    turned[:, 0] = size - 1 - 2 * axis + ddf[:, 0]
    return turned


MISTAKES = {
    "mirrored": (mirrored, r"folds in \d+% of its cells"),
    "of the other direction": (lambda u: -2 * u, "makes the images less alike than no field does"),
    "in another unit": (lambda u: 8 * u, "less alike"),
    "channels reversed": (lambda u: 2 * u.flip(1), "less alike"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_prediction_that_cannot_be_meant_is_not_used_and_said_so(mistake, case):
    fixed, moving, truth = case
    change, reason = MISTAKES[mistake]
    given = change(truth)
    with pytest.warns(UserWarning, match=rf"ddf of pair 0 .*{reason}.*not used.*Likely reasons: .*millimetres"):
        result = refine(fixed, moving, given, **SETTINGS)
    expected = refine(fixed, moving, torch.zeros_like(truth), **SETTINGS)
    assert torch.equal(result.ddf, expected.ddf)
    assert torch.equal(result.predicted_folds, fold_count(given))
    torch.testing.assert_close(result.repair_shift, torch.linalg.vector_norm(given, dim=1).flatten(1).mean(1))


def test_only_the_pair_that_is_wrong_loses_its_prediction(case):
    fixed, moving, truth = case
    given = torch.cat([truth[:1], mirrored(truth[1:])])
    before = given.clone()
    with pytest.warns(UserWarning, match="ddf of pair 1 "):
        result = refine(fixed, moving, given, **SETTINGS)
    alone = refine(fixed[:1], moving[:1], truth[:1], **SETTINGS)
    torch.testing.assert_close(result.ddf[:1], alone.ddf, rtol=0, atol=1e-5)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    "better",
    [
        lambda u: u,
        lambda u: 0.3 * u,
        lambda u: 0.0 * u,
        lambda u: 1.4 * u,
        lambda u: u + 0.4 * torch.randn(u.shape, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["the truth", "part of it", "nothing", "too much", "with noise and folds"],
)
@pytest.mark.parametrize("similarity", [LNCC(), MSE()], ids=["lncc", "mse"])
def test_what_brings_the_images_nearer_is_believed(better, similarity, case):
    fixed, moving, truth = case
    size = truth.shape[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddf = better(truth)
        assert (
            believed(ddf, fixed, moving, similarity, make_level(size, [1.0] * len(size), 1), [1.0] * len(size)) is ddf
        )


def test_a_time_budget_holds_for_the_repair_too(case, monkeypatch):
    """Rounds take what they take; none begins after the deadline, and what is left is shrunk, not folded."""
    _, _, truth = case
    noisy = truth + 1.5 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    rounds = []
    smooth = repair.__globals__["_smooth_near"]
    monkeypatch.setitem(repair.__globals__, "_smooth_near", lambda *args: rounds.append(1) or smooth(*args))
    out = repair(noisy, deadline=time.perf_counter() - 1)
    assert rounds == []
    assert fold_count(out).tolist() == [0, 0]
    mean = noisy.mean(dim=tuple(range(2, noisy.dim())), keepdim=True)
    for pair in range(2):  # a part of the way to its mean, as far as it has to be to a hundredth
        deviation, kept = (noisy - mean)[pair], (out - mean)[pair]
        part = float((kept * deviation).sum() / deviation.square().sum())
        torch.testing.assert_close(kept, part * deviation, rtol=0, atol=1e-4)
        assert 0 < part < 1
        assert fold_count((mean + (part + 0.01) * (noisy - mean))[pair : pair + 1]).item() > 0


def test_repair_ends_whatever_the_field(case, monkeypatch):
    """A mirrored map cannot be smoothed into one that does not fold: the work is bounded by the size of the field."""
    _, _, truth = case
    smoothed = []
    smooth = repair.__globals__["_smooth_near"]

    def counting(field, folded, sigma):
        boxes = smooth(field, folded, sigma)
        smoothed.append(sum(torch.Size(last - first for first, last in box).numel() for box in boxes))
        return boxes

    monkeypatch.setitem(repair.__globals__, "_smooth_near", counting)
    out = repair(mirrored(truth[:1]))
    assert fold_count(out).item() == 0
    assert sum(smoothed) <= 8 * truth[0, 0].numel()
    inner = repair(mirrored(truth[:1]), outer=truth[:1])
    assert fold_count(compose(truth[:1], inner)).item() == 0
