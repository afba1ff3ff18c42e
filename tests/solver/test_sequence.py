"""Series: frames to one reference, in order, without drift."""

import math

import pytest
import torch

from monai_lm.fields import invert, warp
from monai_lm.solver.refinement import refine
from monai_lm.solver.sequence import refine_sequence

SETTINGS = {"scales": (1,), "iterations": (30,)}
"""Too few levels for the largest motion."""


@pytest.fixture
def series(smooth_image, smooth_field):
    """A motion there and back in 13 frames, with noise; the frames and the fields from the first one."""
    image = smooth_image((1, 1, 48, 44), 1.2, dtype=torch.float32)
    motion = smooth_field((1, 2, 48, 44), 16.0, 12.0, 1, torch.float32)
    truth = [math.sin(math.pi * t / 12) ** 2 * motion for t in range(13)]
    noise = [0.03 * smooth_image((1, 1, 48, 44), 0.5, 10 + t, torch.float32) for t in range(13)]
    return torch.cat([warp(image, invert(u)[0]) + n for u, n in zip(truth, noise, strict=True)]), truth


def missed(ddf, truth):
    return float(torch.linalg.vector_norm(ddf - truth, dim=1)[..., 8:-8, 8:-8].mean())


def test_large_motions_are_followed_and_errors_do_not_add_up(series):
    frames, truth = series
    found = dict(refine_sequence(frames, **SETTINGS))
    errors = [missed(found[t].ddf, truth[t]) for t in range(1, 13)]
    assert max(errors) < 0.6
    alone = [missed(refine(frames[:1], frames[t : t + 1], **SETTINGS).ddf, truth[t]) for t in (6, 12)]
    assert errors[5] < 0.7 * alone[0]
    assert errors[11] < alone[1] + 0.1  # the motion is over


def test_frames_come_from_the_reference_outwards(series):
    frames, _ = series
    quick = {"scales": (2,), "iterations": (2,)}
    numbers, results = zip(*refine_sequence(frames, -11, **quick), strict=True)
    assert numbers == (*range(3, 13), 1, 0)
    alone = refine(frames[2:3], frames[1:2], **quick)
    assert torch.equal(results[-2].ddf, alone.ddf)  # after the turn nothing is left of the other side


@pytest.mark.parametrize(
    ("frames", "reference", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), 0, ValueError, r"at least 2 frames, got shape \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), 0, ValueError, r"frames must be \(T, C, \*S\)"),
        (torch.zeros(3, 1, 8, 8), 3, ValueError, "one of the 3 frames, from 0, got 3"),
        (
            torch.stack([torch.full((1, 8, 8), value) for value in (0.0, float("nan"), 1.0, float("inf"))]),
            0,
            ValueError,
            r"frames must be finite, got NaN or infinite values in the frames \[1, 3\] of 4, from 0; leave them",
        ),
        (torch.zeros(3, 1, 8, 8), 1.0, TypeError, "reference must be a whole number"),
    ],
)
def test_what_is_no_series_is_refused_at_once(frames, reference, error, message):
    with pytest.raises(error, match=message):
        refine_sequence(frames, reference)
