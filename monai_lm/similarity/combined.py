"""A weighted sum of measures, each on channels of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from monai_lm.fields.finite import check_number
from monai_lm.similarity.base import Matched, Range, Similarity
from monai_lm.similarity.lookup import get_similarity

__all__ = ["Combined"]


class Combined(Similarity):
    """``Σ w_i · measure_i`` over consecutive groups of channels: intensities by one measure, soft labels by another.

    Args:
        measures: names, measures or loss modules, as ``similarity`` of :func:`monai_lm.refine`, in the order of the
            channels.
        channels: how many channels each of them gets.
        weights: weight of each, positive; default ones.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, sequences of unequal length, or a number out of range; when called, images with
            another number of channels.
    """

    def __init__(
        self,
        measures: Sequence[str | Similarity | nn.Module],
        channels: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> None:
        for name, value in (("measures", measures), ("channels", channels), ("weights", weights or ())):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a list, got {value!r}")
        weights = [1.0] * len(measures) if weights is None else list(weights)
        if not len(measures) == len(channels) == len(weights) > 0:
            raise ValueError(
                "measures, channels and weights must be of one length, not 0, got "
                f"{len(measures)}, {len(channels)} and {len(weights)}"
            )
        for count in channels:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"channels must be whole numbers of at least 1, got {list(channels)}")
        for weight in weights:
            check_number("weights", weight, 0, exclusive=True)
        self.measures = [get_similarity(measure) for measure in measures]
        self.channels = list(channels)
        self.weights = [float(weight) for weight in weights]
        self.weighable = all(measure.weighable for measure in self.measures)
        self.invariant = all(measure.invariant for measure in self.measures)
        self.learns = any(measure.learns for measure in self.measures)
        self.undecided = any(measure.undecided for measure in self.measures)

    @property
    @override
    def unaligned(self) -> Similarity:
        return self._of([measure.unaligned for measure in self.measures])

    @property
    @override
    def starts(self) -> tuple[Similarity, ...]:
        own = [measure.starts for measure in self.measures]
        return tuple(self._of([s[min(k, len(s) - 1)] for s in own]) for k in range(max(map(len, own))))

    @override
    def matched(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Matched:
        groups = zip(self.measures, self._plain(fixed), self._plain(warped), strict=True)
        measures, *sides = zip(*(measure.matched(f, w, weight) for measure, f, w in groups), strict=True)
        return Matched(self._of(measures), *(partial(self._each, side) for side in sides))

    def _each(self, maps: Sequence[Callable[[Tensor], Tensor]], image: Tensor) -> Tensor:
        return torch.cat([own(group) for own, group in zip(maps, self._plain(image), strict=True)], 1)

    @override
    def decided(self, fixed: Tensor, warped: Tensor, weight: Tensor | None = None) -> Similarity:
        groups = zip(self.measures, self._plain(fixed), self._plain(warped), strict=True)
        return self._of([measure.decided(f, w, weight) for measure, f, w in groups])

    def _of(self, measures: Sequence[Similarity]) -> Combined:
        return Combined(measures, self.channels, self.weights)

    def described(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Every group of channels as its measure describes it."""
        groups = zip(self.measures, self._plain(fixed), self._plain(moving), strict=True)
        of_fixed, of_moving = zip(*(measure.described(f, m) for measure, f, m in groups), strict=True)
        return torch.cat(of_fixed, 1), torch.cat(of_moving, 1)

    def described_channels(self, channels: int, n: int) -> int:  # noqa: ARG002
        """Of all the measures together."""
        return sum(self._counts(n))

    def ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """How to shift and scale every group of channels, by its measure."""
        groups = zip(self.measures, self._split(fixed), self._split(moving), strict=True)
        return _joined([(measure.ranges(f, m), f) for measure, f, m in groups])

    def image_ranges(self, fixed: Tensor, moving: Tensor) -> tuple[Range, Range]:
        """The same for images that are still to be described."""
        groups = zip(self.measures, self._plain(fixed), self._plain(moving), strict=True)
        return _joined([(measure.image_ranges(f, m), f) for measure, f, m in groups])

    def reference(self, fixed: Tensor, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The tuple of the measures' references."""
        return self.ranged_reference(fixed, None, weight)

    def ranged_reference(self, fixed: Tensor, range_: Range, weight: Tensor | None = None) -> tuple[Any, ...]:
        """The same of an image that is still to be shifted and scaled."""
        images, counts = self._split(fixed), self._counts(fixed.dim() - 2)
        ranges = (
            [None] * len(images) if range_ is None else list(zip(*(r.split(counts, 1) for r in range_), strict=True))
        )
        groups = zip(self.measures, images, ranges, strict=True)
        return tuple(measure.ranged_reference(f, range_, weight) for measure, f, range_ in groups)

    def evaluate(self, warped: Tensor, reference: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        groups = zip(self.measures, self._split(warped), reference, strict=True)
        return self._sum([measure.evaluate(w, r) for measure, w, r in groups])

    def loss_and_derivative(self, warped: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and its derivative with respect to ``warped`` as it was passed in, ``(B, C, *S)``."""
        groups = zip(self.measures, self._plain(warped), self._plain(fixed), strict=True)
        return self._sum([measure.loss_and_derivative(w, f) for measure, w, f in groups])

    def _counts(self, n: int) -> list[int]:
        """Channels of every measure, described, in ``n`` dimensions."""
        return [measure.described_channels(own, n) for measure, own in zip(self.measures, self.channels, strict=True)]

    def _split(self, described: Tensor) -> tuple[Tensor, ...]:
        return described.split(self._counts(described.dim() - 2), 1)

    def _plain(self, image: Tensor) -> tuple[Tensor, ...]:
        total = sum(self.channels)
        if image.shape[1] != total:
            raise ValueError(f"images must have {total} channels for {self.channels} per measure, got {image.shape[1]}")
        return image.split(self.channels, 1)

    def _sum(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        losses = [weight * loss for weight, (loss, _) in zip(self.weights, parts, strict=True)]
        derivatives = [weight * derivative for weight, (_, derivative) in zip(self.weights, parts, strict=True)]
        return torch.stack(losses).sum(0), torch.cat(derivatives, 1)


def _neutral(image: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and factor that leave an image ``(B, C, *S)`` as it is."""
    zeros = torch.zeros(image.shape[:2], dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
    return zeros, torch.ones_like(zeros)


def _joined(per_group: list[tuple[tuple[Range, Range], Tensor]]) -> tuple[Range, Range]:
    """The ranges of groups of channels ``(B, C, *S)`` as one."""
    joined = []
    for which in (0, 1):
        parts = [ranges[which] or _neutral(images) for ranges, images in per_group]
        joined.append((torch.cat([shift for shift, _ in parts], 1), torch.cat([factor for _, factor in parts], 1)))
    return joined[0], joined[1]
