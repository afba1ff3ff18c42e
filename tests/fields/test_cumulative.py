"""MONAI's metrics of fields against the functions that they gather."""

import numpy as np
import pytest
import torch

from monai_lm.fields import cumulative, fold_count, metrics
from monai_lm.fields.cumulative import (
    FoldCountMetric,
    InverseConsistencyMetric,
    LabelDiceMetric,
    SDLogJacobianMetric,
    TargetRegistrationErrorMetric,
)
from monai_lm.fields.metrics import compare_labels, inverse_consistency, sd_log_jacobian, target_registration_error


def test_they_are_found_among_the_functions():
    assert all(getattr(metrics, name) is getattr(cumulative, name) for name in cumulative.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fold_counts'"):
        _ = metrics.fold_counts


def test_metrics_of_monai_gather_what_the_functions_say():
    ddf = torch.randn(3, 3, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    points = torch.full((3, 2, 3), 2.0)
    points[1, 0] = points[2] = torch.nan
    spacing = torch.tensor([[1.0, 2.0, 0.5]]).expand(3, 3)
    mask = ddf[:, :1] > 0.5
    error = target_registration_error(ddf, points, points, spacing).nanmean(1)
    for metric, arguments, keywords, expected in (
        (FoldCountMetric(), (), {}, fold_count(ddf).float()),
        (SDLogJacobianMetric(), (), {}, sd_log_jacobian(ddf)),
        (FoldCountMetric(), (), {"mask": mask}, fold_count(ddf, mask).float()),
        (SDLogJacobianMetric(), (), {"mask": mask}, sd_log_jacobian(ddf, mask=mask)),
        (InverseConsistencyMetric(), (-ddf,), {}, inverse_consistency(ddf, -ddf)),
        (TargetRegistrationErrorMetric(), (points,), {"fixed_points": points, "spacing": spacing}, error),
    ):
        for part in (slice(0, 2), slice(2, 3)):
            given = {key: value[part] for key, value in keywords.items()}
            metric(ddf[part], *[value[part] for value in arguments], **given)
        assert float(metric.aggregate()) == pytest.approx(float(expected.nanmean()))
        np.testing.assert_allclose(metric.get_buffer()[:, 0], expected)
        metric.reset()
        assert metric.get_buffer() is None
    counted = TargetRegistrationErrorMetric(get_not_nans=True)
    counted(ddf, points, fixed_points=points)
    assert int(counted.aggregate()[1]) == 2  # the third pair has no landmark


def test_dice_of_labels_is_gathered(random_tensor):
    warped, fixed = (random_tensor((3, 1, 6, 7, 8), seed).abs().floor() for seed in (0, 1))
    metric = LabelDiceMetric(reduction="none")
    metric(warped[:1], fixed[:1])
    metric(warped[1:], fixed[1:])
    torch.testing.assert_close(metric.aggregate()[:, 0], compare_labels(warped, fixed)["dice"])


def test_dice_of_large_labels_is_gathered():
    fixed = torch.tensor([[16777216, 16777217], [614454277, 614454278]]).to(torch.uint32)
    warped = torch.tensor([[16777217, 16777216], [614454277, 614454278]]).to(torch.uint32)
    metric = LabelDiceMetric()
    metric(warped[None, None], fixed[None, None])
    assert float(metric.aggregate()) == 0.5


def test_metrics_say_what_they_lack():
    ddf = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="fixed_points must be given"):
        TargetRegistrationErrorMetric()(ddf, torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="inverse field"):
        InverseConsistencyMetric()(ddf)
    with pytest.raises(ValueError, match=r"the fixed label maps \(y\) must be given"):
        LabelDiceMetric()(ddf)
