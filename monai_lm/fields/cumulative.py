"""Metrics of fields as MONAI's, which gather values batch by batch, across processes too.

As in::

    metric = FoldCountMetric()
    metric(ddf)              # (B, 1), kept; metric(ddf, mask=mask) counts inside a mask
    metric.aggregate()       # mean over all pairs that have a value
"""

from __future__ import annotations

from typing import Any

from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction
from torch import Tensor

from monai_lm.fields import fold_count
from monai_lm.fields.metrics import compare_labels, inverse_consistency, sd_log_jacobian, target_registration_error

__all__ = [
    "FoldCountMetric",
    "InverseConsistencyMetric",
    "LabelDiceMetric",
    "SDLogJacobianMetric",
    "TargetRegistrationErrorMetric",
]


class _FieldMetric(CumulativeIterationMetric):
    """A value per pair, gathered and reduced as MONAI's metrics are.

    Args:
        reduction: of all pairs' values, see :class:`monai.utils.MetricReduction`.
        get_not_nans: :meth:`aggregate` also returns how many pairs had a value.
    """

    def __init__(self, reduction: MetricReduction | str = MetricReduction.MEAN, get_not_nans: bool = False) -> None:
        super().__init__()
        self.reduction, self.get_not_nans = reduction, get_not_nans

    def aggregate(self, reduction: MetricReduction | str | None = None) -> Any:
        """The reduced value, with the number of pairs that have one if ``get_not_nans``."""
        value, count = do_metric_reduction(self.get_buffer(), reduction or self.reduction)
        return (value, count) if self.get_not_nans else value


class FoldCountMetric(_FieldMetric):
    """Folded cells of fields ``(B, n, *S)``, see :func:`monai_lm.fields.fold_count`: ``metric(ddf, mask=None)``."""

    def _compute_tensor(self, y_pred: Tensor, *_: Any, mask: Tensor | None = None, **__: Any) -> Tensor:
        return fold_count(y_pred, mask).float()[:, None]


class SDLogJacobianMetric(_FieldMetric):
    """:func:`~monai_lm.fields.metrics.sd_log_jacobian` of fields ``(B, n, *S)``: ``metric(ddf, mask=None)``."""

    def _compute_tensor(self, y_pred: Tensor, *_: Any, mask: Tensor | None = None, **__: Any) -> Tensor:
        return sd_log_jacobian(y_pred, mask=mask)[:, None]


class TargetRegistrationErrorMetric(_FieldMetric):
    """Mean :func:`~monai_lm.fields.metrics.target_registration_error` of a pair's landmarks, in millimetres.

    ``metric(ddf, moving_points, fixed_points=..., spacing=...)``; spacing ``(B, n)``, default 1.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        if y is None or "fixed_points" not in kwargs:
            raise ValueError("moving points (y) and fixed_points must be given for a target registration error")
        spacing = kwargs.get("spacing")
        spacing = y_pred.new_ones(y_pred.shape[:2]) if spacing is None else spacing
        return target_registration_error(y_pred, kwargs["fixed_points"], y, spacing).nanmean(1, keepdim=True)


class InverseConsistencyMetric(_FieldMetric):
    """:func:`~monai_lm.fields.metrics.inverse_consistency` in voxels: ``metric(ddf, inverse)``."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError("the inverse field (y) must be given for its consistency")
        return inverse_consistency(y_pred, y)[:, None]


class LabelDiceMetric(_FieldMetric):
    """Mean Dice over the labels that either of two label maps ``(B, 1, *S)`` has.

    See :func:`~monai_lm.fields.metrics.compare_labels`.
    """

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise ValueError("the fixed label maps (y) must be given for their Dice with the warped ones")
        return compare_labels(y_pred, y)["dice"][:, None]
