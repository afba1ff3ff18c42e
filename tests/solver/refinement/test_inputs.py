"""What may come in, where it may be called, and what is refused."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor, nn

from monai_lm import refine
from monai_lm.fields import warp
from monai_lm.similarity import LNCC, MSE, NCC
from monai_lm.similarity.base import normalized
from tests.solver.pairs import FLAT, error, noise, pair, run

MEASURES = {
    "lncc": lambda: "lncc",
    "mse": lambda: "mse",
    "ncc": NCC,
    "MSELoss": nn.MSELoss,
    "MSELoss_sum": lambda: nn.MSELoss(reduction="sum"),
    "monai_lncc": lambda: LocalNormalizedCrossCorrelationLoss(spatial_dims=2, kernel_size=5),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_and_modules_work_wherever_they_are_called(name):
    """The same bits under no_grad, inference_mode (inputs made inside it too) and bfloat16 autocast."""
    fixed, moving, truth = pair(FLAT)
    settings = {"similarity": MEASURES[name](), "iterations": 20}
    plain = run(fixed, moving, 0.5 * truth, **settings)
    assert error(plain.ddf, truth) < 0.7 * error(0.5 * truth, truth)
    with torch.no_grad():
        assert torch.equal(run(fixed, moving, 0.5 * truth, **settings).ddf, plain.ddf)
    with torch.inference_mode():
        assert torch.equal(run(fixed, moving, 0.5 * truth, **settings).ddf, plain.ddf)
        inside = run(fixed.clone(), moving.clone(), 0.5 * truth, **settings)
        assert torch.equal(inside.ddf, plain.ddf)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(fixed, moving, 0.5 * truth, **settings)
        assert cast.ddf.dtype == torch.float32
        assert torch.equal(cast.ddf, plain.ddf)


def test_a_module_gives_what_the_same_measure_gives():
    fixed, moving, truth = pair(FLAT)
    settings = {"iterations": 20, "acceptance": "descent", "control": "trust_region"}
    results = [
        run(fixed, moving, 0.5 * truth, similarity=similarity, **settings).ddf
        for similarity in ("mse", nn.MSELoss(), nn.MSELoss(reduction="none"))
    ]
    assert error(results[0], results[1]) < 0.01
    assert error(results[0], results[2]) < 0.01


def test_the_losses_are_those_of_the_measure():
    """Per voxel, at the finest level, for the field that came in and the one that goes out."""
    fixed, moving, truth = pair(FLAT, batch=2)
    for measure in (LNCC(radius=2), MSE(), NCC()):
        result = run(fixed, moving, 0.5 * truth, similarity=measure, iterations=10)
        reference, (_, moving_range) = measure.prepare(fixed, moving)[0], measure.ranges(fixed, moving)
        for field, reported in ((0.5 * truth, result.initial_loss), (result.ddf, result.final_loss)):
            warped = normalized(warp(moving, field), moving_range)
            loss = measure.evaluate(warped, reference)[0] / fixed[0, 0].numel()
            torch.testing.assert_close(reported, loss, rtol=1e-5, atol=1e-7)
        assert bool((result.final_loss < result.initial_loss).all())


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: (60 * x).to(torch.int16),
        lambda x: (30 * x + 128).clamp(0, 255).to(torch.uint8),
        lambda x: x > 0,
    ],
    ids=["half", "bfloat16", "double", "int16", "uint8", "bool"],
)
def test_other_dtypes_equal_their_float32_values(convert):
    fixed, moving, truth = pair(FLAT)
    fixed, moving = convert(fixed), convert(moving)
    result = run(fixed, moving, (0.5 * truth).double(), iterations=10)
    assert torch.equal(result.ddf, run(fixed.float(), moving.float(), 0.5 * truth, iterations=10).ddf)
    assert result.ddf.dtype == torch.float32
    assert error(result.ddf, 0.5 * truth) > 0.01


def test_meta_tensors_are_plain_inside_and_out():
    fixed, moving, truth = pair(FLAT)
    result = run(MetaTensor(fixed), MetaTensor(moving), MetaTensor(0.5 * truth), iterations=10)
    assert type(result.ddf) is torch.Tensor
    assert torch.equal(result.ddf, run(fixed, moving, 0.5 * truth, iterations=10).ddf)


@pytest.mark.parametrize("iterations", [0, 5])
def test_the_callers_tensors_stay_as_they_are(iterations):
    fixed, moving, truth = pair(FLAT)
    inputs = [t.clone().requires_grad_() for t in (fixed, moving, 0.5 * truth)]
    result = run(*inputs, iterations=iterations, similarity=nn.MSELoss())
    for tensor, original in zip(inputs, (fixed, moving, 0.5 * truth), strict=True):
        assert torch.equal(tensor, original)
        assert tensor.requires_grad
        assert tensor.grad is None
    assert not result.ddf.requires_grad
    result.ddf.add_(1)  # the result is the caller's own, no view of the prediction
    assert torch.equal(inputs[2], 0.5 * truth)


def test_noncontiguous_and_expanded_inputs():
    fixed, moving, truth = pair(FLAT)
    result = run(fixed, moving, 0.5 * truth, iterations=5).ddf
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (fixed, moving, 0.5 * truth)]
    torch.testing.assert_close(run(*strided, iterations=5).ddf, result)
    expanded = [t.expand(2, -1, -1, -1) for t in (fixed, moving, 0.5 * truth)]
    torch.testing.assert_close(run(*expanded, iterations=5).ddf, result.expand(2, -1, -1, -1))


@pytest.mark.parametrize("channels", [2, 3])
def test_channels_are_averaged(channels):
    """Copies of one channel change nothing."""
    fixed, moving, truth = pair(FLAT)
    for similarity in ("lncc", "mi", "mind", "mse", "ncc"):
        settings = {"similarity": similarity, "iterations": 5}
        one = run(fixed, moving, 0.5 * truth, **settings)
        many = run(fixed.repeat(1, channels, 1, 1), moving.repeat(1, channels, 1, 1), 0.5 * truth, **settings)
        assert error(many.ddf, one.ddf) < 1e-3
        torch.testing.assert_close(many.final_loss, one.final_loss, rtol=1e-3, atol=1e-6)


def image(*shape: int) -> Tensor:
    return noise(*(shape or (1, 1, 12, 12)))


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


BAD_TENSORS = {
    "fixed rank 3": ({"fixed": image(1, 12, 12)}, ValueError, r"fixed must be \(B, C, H, W\) or .*shape \(1, 12, 12\)"),
    "moving rank 6": ({"moving": image(1, 1, 2, 2, 2, 2)}, ValueError, r"moving must be \(B, C, H, W\) or .*2, 2, 2\)"),
    "ranks differ": ({"moving": image(1, 1, 12, 12, 12)}, ValueError, "fixed and moving must have the same batch size"),
    "grids differ": (
        {"moving": image(1, 1, 12, 13)},
        ValueError,
        r"same batch size and grid, got shapes \(1, 1, 12, 12\) and \(1, 1, 12, 13\); resample one",
    ),
    "batches differ": ({"moving": image(2, 1, 12, 12)}, ValueError, r"same batch size and grid, got shapes"),
    "channels differ": ({"moving": image(1, 2, 12, 12)}, ValueError, "must have the same channels, got 1 and 2"),
    "devices differ": (
        {"moving": image().to("meta")},
        ValueError,
        "fixed and moving must be on one device, got cpu and meta",
    ),
    "fixed empty": ({"fixed": image(0, 1, 12, 12)}, ValueError, r"fixed must not be empty, got shape \(0, 1, 12, 12\)"),
    "moving empty": ({"moving": image(1, 0, 12, 12)}, ValueError, "moving must not be empty, got shape"),
    "one voxel": (
        {"fixed": image(1, 1, 12, 1), "moving": image(1, 1, 12, 1)},
        ValueError,
        r"fixed must have at least 2 voxels along every axis, got shape \(1, 1, 12, 1\)",
    ),
    "fixed NaN": ({"fixed": with_value(image(), math.nan)}, ValueError, "fixed must be finite, got 1 NaN or infinite"),
    "moving inf": ({"moving": with_value(image(), -math.inf)}, ValueError, "moving must be finite, got 1 NaN or"),
    "fixed array": ({"fixed": image().numpy()}, TypeError, "fixed must be a torch.Tensor, got ndarray"),
    "moving None": ({"moving": None}, TypeError, "moving must be a torch.Tensor, got NoneType"),
    "complex": ({"fixed": image().to(torch.complex64)}, TypeError, "fixed must be real, got dtype torch.complex64"),
    "ddf channels": (
        {"ddf": image(1, 3, 12, 12)},
        ValueError,
        r"ddf must be \(B, n, \*S\) = \(1, 2, 12, 12\) on the grid of fixed, got shape \(1, 3, 12, 12\)",
    ),
    "ddf grid": ({"ddf": image(1, 2, 6, 6)}, ValueError, r"ddf must be .*got shape \(1, 2, 6, 6\)"),
    "ddf rank": ({"ddf": image(2, 12, 12)}, ValueError, r"ddf must be .*got shape \(2, 12, 12\)"),
    "ddf batch": ({"ddf": image(2, 2, 12, 12)}, ValueError, r"ddf must be .*got shape \(2, 2, 12, 12\)"),
    "ddf NaN": ({"ddf": with_value(image(1, 2, 12, 12), math.nan)}, ValueError, "ddf must be finite, got 1 NaN"),
    "ddf device": (
        {"ddf": image(1, 2, 12, 12).to("meta")},
        ValueError,
        "ddf must be on the device of fixed, cpu, got meta",
    ),
    "ddf list": ({"ddf": [[0.0]]}, TypeError, "ddf must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(case):
    arguments, error_type, message = BAD_TENSORS[case]
    with pytest.raises(error_type, match=message):
        refine(**{"fixed": image(), "moving": image(), **arguments})


BAD_SETTINGS = [
    (
        {"similarity": "ssim"},
        ValueError,
        r"similarity must be one of \['auto', 'lncc', 'mapped_lncc', 'mi', 'mind', 'mse', 'ncc'\]",
    ),
    ({"similarity": None}, TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got NoneType"),
    ({"similarity": nn.MSELoss}, TypeError, "similarity must be a name, a Similarity or a torch.nn.Module, got type"),
    (
        {"scales": (2, 1), "iterations": (5,)},
        ValueError,
        "iterations must have one number per level, 2 for scales .* 1$",
    ),
    (
        {"scales": (1,), "iterations": (5, 5)},
        ValueError,
        "iterations must have one number per level, 1 for scales .* 2$",
    ),
    ({"scales": (1, 2)}, ValueError, r"scales must be strictly decreasing and not empty, got \(1, 2\)"),
    ({"scales": (2, 2, 1)}, ValueError, r"scales must be strictly decreasing and not empty, got \(2, 2, 1\)"),
    ({"scales": ()}, ValueError, r"scales must be strictly decreasing and not empty, got \(\)"),
    ({"scales": (2, 0.5)}, ValueError, "scales must be (finite and )?at least 1, got 0.5"),
    ({"scales": (2, -1)}, ValueError, "scales must be (finite and )?at least 1, got -1"),
    ({"scales": "coarse"}, ValueError, "scales must be 'auto' or a sequence of numbers, got 'coarse'"),
    ({"scales": ("2", "1")}, TypeError, "scales must be a number, got str"),
    ({"scales": 2}, (TypeError, ValueError), "scales must be"),
    ({"scales": None}, (TypeError, ValueError), "scales must be"),
    ({"iterations": -1}, ValueError, "iterations must be (finite and )?at least 0, got -1"),
    ({"iterations": "many"}, ValueError, "iterations must be 'auto', a number or a sequence, got 'many'"),
    ({"scales": (1,), "iterations": (2.5,)}, TypeError, r"iterations must be .*got .*2\.5"),
    ({"iterations": 2.5}, (TypeError, ValueError), "iterations must be"),
    ({"iterations": True}, TypeError, "iterations must be .*got (bool|True)"),
    ({"iterations": None}, (TypeError, ValueError), "iterations must be"),
    ({"step": -0.5}, ValueError, "step must be (finite and )?greater than 0, got -0.5"),
    ({"step": 0}, ValueError, "step must be (finite and )?greater than 0, got 0"),
    ({"step": math.nan}, ValueError, "step must be (finite and )?greater than 0, got nan"),
    ({"step": math.inf}, ValueError, "step must be (finite and )?greater than 0, got inf"),
    ({"step": "big"}, TypeError, "step must be a number, got str"),
    ({"damping": 0}, ValueError, "damping must be (finite and )?greater than 0, got 0"),
    ({"damping": (1.0, 0.0)}, ValueError, "damping must be (finite and )?greater than 0, got 0.0"),
    (
        {"scales": (4, 2, 1), "damping": (1.0, 1.0)},
        ValueError,
        r"damping must be one number or at least one per level \(3\)",
    ),
    ({"damping": "low"}, TypeError, "damping must be a number.*, got str"),
    ({"damping": None}, (TypeError, ValueError), "damping must be"),
    ({"smooth_gradient": -1}, ValueError, "smooth_gradient must be (finite and )?at least 0, got -1"),
    ({"smooth_gradient": ()}, ValueError, "smooth_gradient must be one number or at least one per level"),
    ({"smooth_residual": -0.5}, ValueError, "smooth_residual must be (finite and )?at least 0, got -0.5"),
    ({"smooth_residual": (0.5, 0.5)}, TypeError, "smooth_residual must be a number, got tuple"),
    ({"window": 2}, ValueError, "window must be an odd number of voxels, got 2"),
    ({"window": 0}, ValueError, "window must be an odd number of voxels, got 0"),
    ({"window": 3.0}, ValueError, "window must be an odd number of voxels, got 3.0"),
    (
        {"control": "adam"},
        ValueError,
        r"control must be one of \('simple', 'trust_region', 'constant'\) or a Damping, got 'adam'",
    ),
    (
        {"acceptance": "sometimes"},
        ValueError,
        r"acceptance must be one of \('always', 'descent', 'metropolis'\) or a Acceptance, got 'so",
    ),
    ({"spacing": (1, 1, 1)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 1, 1\)"),
    ({"spacing": (1, 0)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, 0\)"),
    ({"spacing": (1, -2)}, ValueError, r"spacing must be 2 positive numbers, one per axis, got \(1, -2\)"),
    ({"spacing": (1, math.nan)}, ValueError, "spacing must be 2 positive numbers"),
    ({"spacing": (math.inf, 1)}, ValueError, "spacing must be 2 positive numbers"),
    ({"spacing": 2.0}, (TypeError, ValueError), "spacing must be"),
    ({"spacing": ("a", "b")}, (TypeError, ValueError), "spacing must be"),
    ({"seconds": 0}, ValueError, "seconds must be (finite and )?greater than 0, got 0"),
    ({"seconds": "short"}, TypeError, "seconds must be a number, got str"),
    ({"tolerance": -0.1}, ValueError, "tolerance must be (finite and )?at least 0, got -0.1"),
    ({"kernels": "fast"}, ValueError, r"kernels must be one of \('auto', 'native', 'reference'\), got 'fast'"),
    ({"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
    ({"kernels": None}, ValueError, r"kernels must be one of \('auto', 'native', 'reference'\), got None"),
]


@pytest.mark.parametrize(
    ("settings", "error_type", "message"), BAD_SETTINGS, ids=[str(case[0]) for case in BAD_SETTINGS]
)
def test_settings_out_of_range(settings, error_type, message):
    with pytest.raises(error_type, match=message):
        run(image(), image(), **settings)


def test_numpys_numbers_are_numbers():
    settings = {
        "scales": (2, 1),
        "iterations": (3, 2),
        "step": 0.25,
        "damping": (0.5, 1.0),
        "spacing": (1, 2),
        "seed": 3,
    }
    settings["acceptance"] = "metropolis"
    arrays = {"scales": np.array([2, 1]), "iterations": np.array([3, 2]), "step": np.float64(0.25)}
    arrays |= {"damping": tuple(np.array([0.5, 1.0])), "spacing": np.array([1, 2]), "seed": np.int64(3)}
    fixed, moving, _ = pair(FLAT)
    expected = run(fixed, moving, **settings).ddf
    for name, value in arrays.items():
        assert torch.equal(run(fixed, moving, **{**settings, name: value}).ddf, expected)


def test_a_loss_that_ignores_the_warped_image():
    class Blind(nn.Module):
        def forward(self, warped: Tensor, fixed: Tensor) -> Tensor:  # noqa: ARG002
            return fixed.sum()

    with pytest.raises(ValueError, match="similarity must be differentiable: the loss that Blind returned"):
        run(image(), image(), similarity=Blind())
