"""What a refinement returns: the field and the history of how it came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_lm.fields import invert
from monai_lm.fields.algebra import lengths
from monai_lm.fields.topology import fold_count
from monai_lm.kernels.devices import Stopwatch

__all__ = ["Iteration", "Record", "RefinementResult"]


class Iteration(NamedTuple):
    """One iteration of one pair.

    Attributes:
        level: reduction of the level against the finest grid; the first entry of a level is its starting point.
        loss: dissimilarity per voxel after the step, by the measure of the level.
        damping: λ that the step was taken with, relative to the typical squared gradient at the start of the level.
        gain_ratio: actual over expected decrease; NaN where it was not computed (``control="simple"``) or no step.
        accepted: whether the step was kept.
        seconds: since the call of :func:`monai_lm.refine`, when the iteration was done; on a GPU that is not a CUDA
            device, when it was queued.
    """

    level: float
    loss: float
    damping: float
    gain_ratio: float
    accepted: bool
    seconds: float


class Record:
    """Collects iterations on the device; they are read when the run is over, or when somebody is told of them.

    Args:
        pairs: batch size.
        watch: started with the call.
        callback: who is told, see :func:`monai_lm.refine`; ``None``: nobody.
    """

    def __init__(
        self, pairs: int, watch: Stopwatch, callback: Callable[[int, int, Iteration], Any] | None = None
    ) -> None:
        self._pairs = pairs
        self._watch = watch
        self._callback = callback
        self._levels: list[tuple[float, float, float]] = []
        self._values: list[tuple[Tensor, ...]] = []
        self._history: list[list[Iteration]] = [[] for _ in range(pairs)]
        self._laps = 0  # that have been read

    def add(self, level: float, units: tuple[float, float], *values: Tensor) -> None:
        """Note one iteration of all pairs; the tensors are kept as they are and must not change.

        Args:
            level: reduction against the finest grid.
            units: what a loss is divided by, and what the damping is multiplied with.
            values: loss, damping λ, λ₀, gain ratio, accepted and active, ``(B,)`` each; a pair that is not active has
                stopped. Of more than there are pairs, the first count.
        """
        self._watch.lap()
        self._levels.append((level, *units))
        self._values.append(tuple(value[: self._pairs] for value in values))

    def tell(self) -> None:
        """Tell what was noted since the last time, if somebody wants to know; then the host waits for the device."""
        if self._callback is not None:
            self._read()

    def again(self, times: int = 1) -> Record:
        """One that tells nobody, of the same pairs so many times."""
        return Record(times * self._pairs, self._watch.again())

    def take(self, others: Sequence[Record], chosen: Tensor) -> None:
        """Go on with what one of several others has noted of each pair, its number in ``chosen``, ``(B,)``."""
        self._read()
        histories = [other.history() for other in others]
        for pair, number in enumerate(chosen[: self._pairs].tolist()):
            for entry in histories[number][pair]:
                self._note(pair, entry)

    def elapsed(self) -> float:
        """Seconds since the call."""
        return self._watch.elapsed()

    def history(self) -> list[list[Iteration]]:
        """Per pair, its iterations."""
        self._read()
        return self._history

    def _read(self) -> None:
        """Move what was noted to the history, and tell it."""
        if not self._values:
            return
        dtype = self._values[0][0].dtype
        columns = [torch.stack(column).to(dtype) for column in zip(*self._values, strict=True)]
        loss, damping, reference, gain, accepted, active = torch.stack(columns).cpu()
        levels, voxels, deltas = zip(*self._levels, strict=True)
        loss = loss / loss.new_tensor(voxels)[:, None]
        damping = damping.new_tensor(deltas)[:, None] * damping / torch.where(reference > 0, reference, 1.0)
        table = [column.t().tolist() for column in (loss, damping, gain, accepted > 0, active)]
        seconds = self._watch.seconds()[self._laps :]
        self._laps += len(self._values)
        self._levels, self._values = [], []
        for pair, (*values, on) in enumerate(zip(*table, strict=True)):
            for *row, kept in zip(levels, *values, seconds, on, strict=True):
                if kept:
                    self._note(pair, Iteration(*row))

    def _note(self, pair: int, entry: Iteration) -> None:
        self._history[pair].append(entry)
        if self._callback is not None:
            self._callback(pair, len(self._history[pair]) - 1, entry)


@dataclass(frozen=True, repr=False)
class RefinementResult:
    """A refined field; as text, what to know of it in a line, and a line per pair.

    Attributes:
        ddf: ``(B, n, *S)`` displacement in voxels on the fixed grid, without folds.
        history: per pair, its iterations.
        initial_loss: ``(B,)`` dissimilarity per voxel at the finest level, by its measure, before the refinement.
        final_loss: ``(B,)`` the same after it; not above ``initial_loss``.
        predicted_folds: ``(B,)`` folded cells in the field that came in.
        repair_shift: ``(B,)`` mean displacement in voxels by which the repair of those folds moved the field.
        seconds: wall time of the call.
        prediction_used: ``(B,)`` bool, false for pairs whose prediction could not be meant, which started from the
            identity; ``None`` without a prediction.
        backward: ``(B, n, *S)`` field of the inverse map, without folds, where it was found with the field
            (``symmetric=True``); else ``None``.
        similarity: name of the measure that was minimised, also where the images chose it (``similarity="auto"``).
        apart: ``(B,)`` how far apart two halves of the fixed image lead, a root mean square in lengths of the finest
            voxel edge; ``None`` where they were not asked, see ``smooth_residual``.
        held: ``(B,)`` share in [0, 1] of what the fixed image shows where the field was therefore kept smoother than
            usual, or left as it began; ``None`` like ``apart``.
    """

    ddf: Tensor
    history: list[list[Iteration]]
    initial_loss: Tensor
    final_loss: Tensor
    predicted_folds: Tensor
    repair_shift: Tensor
    seconds: float
    prediction_used: Tensor | None = None
    backward: Tensor | None = None
    similarity: str = "lncc"
    apart: Tensor | None = None
    held: Tensor | None = None

    @property
    def unused(self) -> list[int]:
        """Pairs whose prediction was not used."""
        return [] if self.prediction_used is None else (~self.prediction_used).nonzero().flatten().tolist()

    @property
    def unimproved(self) -> list[int]:
        """Pairs that nothing better was found for: their field is the start, see :meth:`start`."""
        return (~(self.final_loss < self.initial_loss)).nonzero().flatten().tolist()

    def start(self, pair: int) -> str:
        """What the refinement of a pair started from: the prediction, without its folds, or the identity."""
        if self.prediction_used is None or pair in self.unused:
            return "the identity"
        return "the prediction, without its folds" if self.predicted_folds[pair] > 0 else "the prediction"

    def __repr__(self) -> str:
        """Size, measure, seconds; of every pair losses, folds before and after, mean and largest displacement."""
        moved = lengths(self.ddf).flatten(1)
        folds = fold_count(self.ddf).tolist()
        size = tuple(self.ddf.shape)
        lines = [f"RefinementResult(ddf={size}, similarity={self.similarity}, {self.seconds:.2f} s)"]
        for k, (before, after) in enumerate(zip(self.initial_loss.tolist(), self.final_loss.tolist(), strict=True)):
            came = "" if self.prediction_used is None else f" (predicted {int(self.predicted_folds[k])})"
            unused = ", prediction not used" if k in self.unused else ""
            kept = f"; nothing better was found, this is the start ({self.start(k)})" if k in self.unimproved else ""
            lines.append(
                f"  pair {k}: loss {before:.4f} to {after:.4f}, {folds[k]} folds{came}, moved by "
                f"{float(moved[k].mean()):.2f} voxels, at most {float(moved[k].max()):.2f}{unused}{kept}"
            )
        return "\n".join(lines)

    def inverse(self) -> Tensor:
        """Field of the inverse map, ``(B, n, *S)`` in voxels on the moving grid; see :func:`monai_lm.fields.invert`."""
        return invert(self.ddf)[0] if self.backward is None else self.backward
