"""What is compiled ahead is what a refinement launches."""

from collections.abc import Sequence

import pytest
import torch

from monai_lm import kernels, refine
from monai_lm.fields import warp
from monai_lm.kernels.reference import gaussian_taps
from monai_lm.solver import refinement
from monai_lm.solver.rehearsal import PRECISIONS, _perform, rehearsal_of, rehearse

COMPILED = [name for name in kernels.__all__ if hasattr(torch.ops.monai_lm, name) and name != "mend"]
SETTINGS = {"scales": (2, 1), "iterations": (5, 5)}


def compiled(name, args):
    """What a call of a kernel has compiled."""
    if name == "unfolded" and args[1] is not None:  # composes first, in float32
        composed = torch.empty_like(args[0], dtype=torch.float32)
        return {*compiled("compose", (args[1], args[0], composed)), *compiled(name, (composed, None, *args[2:]))}
    if name in ("smooth", "gradient_sums", "step"):  # one compilation serves all widths and units
        args = [a for a in args if isinstance(a, torch.Tensor) or a is None]
    return {(name, *map(kind, args))}


def kind(value):
    """What of an argument decides what is compiled."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.dim()) if value.dim() > 3 else "numbers"
    if isinstance(value, Sequence):
        return tuple(len(gaussian_taps(float(v))) for v in value)
    return type(value) if isinstance(value, float) else value


@pytest.fixture
def launched(monkeypatch):
    """A set of the kernels that were called, each with the kinds of its arguments."""
    calls = set()

    def recorded(name):
        plain = getattr(kernels, name)

        def run(*args):
            calls.update(compiled(name, args))
            return plain(*args)

        return run

    for name in COMPILED:
        monkeypatch.setattr(kernels, name, recorded(name))
    return calls


@pytest.fixture
def pair(smooth_image, smooth_field):
    def make(n):
        moving = smooth_image((1, 1, *(20, 18, 16)[:n]), 1.5, dtype=torch.float32)
        prediction = smooth_field((1, n, *(20, 18, 16)[:n]), 1.0, 4.0, 1, torch.float32)
        return warp(moving, prediction), moving, 0.5 * prediction

    return make


@pytest.mark.parametrize("similarity", ["lncc", "mi", "mse", "ncc"])
@pytest.mark.parametrize(
    ("n", "predicted", "settings"),
    [
        (3, True, {}),
        (3, False, {}),
        (2, True, {}),
        (3, True, {"memory": "half"}),
        (3, True, {"control": "trust_region", "acceptance": "descent"}),
        (3, True, {"mask": True}),
        (3, True, {"spacing": (1.0, 2.0, 1.5)}),
    ],
    ids=["prediction", "identity", "2D", "half", "trust region", "mask", "anisotropic"],
)
def test_all_that_is_launched_was_rehearsed(n, predicted, settings, similarity, pair, launched, monkeypatch):
    fixed, moving, prediction = pair(n)
    given = []
    monkeypatch.setattr(refinement, "rehearse", lambda *args: given.append(args))
    mask = (torch.arange(fixed.numel()).view(fixed.shape) > 99).float() if settings.get("mask") else None
    launched.clear()
    settings = SETTINGS | {"similarity": similarity} | {k: v for k, v in settings.items() if k != "mask"}
    refine(fixed, moving, prediction if predicted else None, mask, **settings)
    refined = set(launched)
    launched.clear()
    problem, weighed, stages, how = given[0]
    for weights in {weighed, True}:  # halves of an image are told by weights
        for precisions in PRECISIONS if settings.get("memory") else PRECISIONS[:1]:
            for part in rehearsal_of(problem, weights, stages, how, precisions).parts():
                part()
    assert sorted(map(str, refined - launched)) == []
    assert {name for name, *_ in refined} >= {"sample", similarity, "step", "elastic", "unfolded"}


def test_it_is_done_once_for_settings_and_never_on_a_cpu(pair, launched, monkeypatch):
    given = []
    monkeypatch.setattr(refinement, "rehearse", lambda *args: given.append(args))
    for step, radius_of in ((0.5, 1.0), (0.4, 1.0), (0.5, 1.5)):
        refine(*pair(3), step=step, smooth_gradient=radius_of, **SETTINGS)
    first, same, other = (rehearsal_of(*args, PRECISIONS[0]) for args in given)
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    launched.clear()
    rehearse(*given[0])
    assert not launched
    _perform(first)
    assert launched
    launched.clear()
    _perform(same)
    assert not launched
