"""The other descents in the engine: one step against its formula, and whole runs."""

import pytest
import torch

from benchmarks.descents import keywords
from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.kernels.reference import eulerian_gradient
from monai_lm.similarity import MSE
from monai_lm.solver.smoothing import Elastic


@pytest.fixture
def pair(smooth_image, smooth_field):
    moving = smooth_image((1, 1, 24, 22), 2.0, dtype=torch.float32)
    return warp(moving, smooth_field((1, 2, 24, 22), 1.5, 4.0, 1, torch.float32)), moving


STEPS = {
    "stateless": lambda g: -0.1 * g / torch.linalg.vector_norm(g, dim=1).max(),
    "momentum": lambda g: -0.1 * g / torch.linalg.vector_norm(g, dim=1).max(),
    "lion": lambda g: -0.1 * g.sign(),
    "adam": lambda g: -0.1 * g / (g.abs() + 1e-8 * g.abs().max()),  # its first step, corrected for the start
}


@pytest.mark.parametrize("descent", STEPS)
def test_the_first_step_is_that_of_the_formula(descent, pair):
    fixed, moving = pair
    derivative = MSE().loss_and_derivative(moving, fixed)[1]
    step = STEPS[descent](gaussian_smooth(eulerian_gradient(derivative, moving), 1.0))
    result = refine(fixed, moving, scales=(1,), iterations=(1,), similarity="mse", **keywords(descent, 0.1))
    relaxed = torch.empty_like(step)
    Elastic().relax(step, (1.0, 1.0), torch.ones(1), relaxed)
    torch.testing.assert_close(result.ddf, relaxed, rtol=0, atol=5e-4)
    assert float(step.abs().max()) > 0.05


@pytest.mark.parametrize("descent", STEPS)
def test_they_register(descent, pair):
    result = refine(*pair, scales=(2, 1), iterations=(30, 20), **keywords(descent, 0.2))
    assert float(result.final_loss) < 0.5 * float(result.initial_loss)
    assert fold_count(result.ddf).tolist() == [0]
