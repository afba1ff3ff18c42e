"""The command for hippocampi: what is measured of a pair."""

import pytest
import torch

from benchmarks.hippocampus import _measure


def test_a_field_that_undoes_a_shift_is_measured_as_one(smooth_image):
    image, label = smooth_image((1, 1, 16, 14, 12), 1.5, 0, torch.float32), torch.zeros(1, 1, 16, 14, 12)
    label[..., 4:9, 4:9, 4:9] = 1
    pair = {"fixed": image.roll(2, 2), "moving": image, "fixed_label": label.roll(2, 2), "moving_label": label}
    ddf = torch.zeros(1, 3, 16, 14, 12)
    ddf[:, 0] = -2.0
    before, after = (_measure(pair, field, torch.zeros_like(ddf), 1.0) for field in (torch.zeros_like(ddf), ddf))
    assert (before["dice"], before["hd95"], before["change"]) == pytest.approx((0.6, 2.0, 0.0))
    assert (after["dice"], after["hd95"], after["change"], after["folds"]) == pytest.approx((1.0, 0.0, 2.0, 0))
    assert after["loss"] < 0.25 * before["loss"]
