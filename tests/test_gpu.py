"""The same result on a CUDA device as on the CPU."""

import pytest
import torch

from monai_lm import refine
from monai_lm.fields import fold_count, gaussian_smooth, warp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compile_", [False, True])
def test_refinement_on_the_gpu_equals_that_on_the_cpu(compile_):
    generator = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.randn(2, 1, 32, 30, 28, generator=generator), 2.0)
    truth = 20 * gaussian_smooth(torch.randn(2, 3, 32, 30, 28, generator=generator), 4.0)
    fixed = warp(moving, truth)
    settings = {"scales": (2, 1), "iterations": (20, 10), "tolerance": 0}
    expected = refine(fixed, moving, 0.7 * truth, compile=False, **settings).ddf
    result = refine(fixed.cuda(), moving.cuda(), 0.7 * truth.cuda(), compile=compile_, **settings)
    assert result.ddf.is_cuda
    assert float(torch.linalg.vector_norm(result.ddf.cpu() - expected, dim=1).mean()) < 0.01
    assert fold_count(result.ddf).tolist() == [0, 0]
