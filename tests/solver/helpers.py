"""What the tests of the method's parts share."""

import math
from unittest import mock

import torch
from torch import Tensor

from monai_lm.fields import compose
from monai_lm.solver import acceptance as acceptance_module
from monai_lm.solver.method import make_method
from monai_lm.solver.smoothing import Elastic
from monai_lm.solver.trust import Trust

SHAPES = [(24, 21), (14, 12, 13)]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def waves(shape: tuple[int, ...], seed: int, channels: int = 1, cycles: float = 1.5) -> Tensor:
    """Band-limited image ``(1, channels, *S)`` in float64: at most ``cycles`` periods along an axis."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(0, 1, s, dtype=torch.float64) for s in shape]
    grid = torch.meshgrid(*axes, indexing="ij")
    out = []
    for _ in range(channels):
        total = torch.zeros(shape, dtype=torch.float64)
        for _ in range(4):
            frequency = cycles * (2 * torch.rand(len(shape), generator=generator, dtype=torch.float64) - 1)
            phase = 6.28 * float(torch.rand(1, generator=generator))
            total += torch.cos(2 * math.pi * sum(f * x for f, x in zip(frequency, grid, strict=True)) + phase)
        out.append(total / 4)
    return torch.stack(out)[None]


def interior_bump(shape: tuple[int, ...]) -> Tensor:
    """Smooth weight that vanishes at the border of the grid."""
    out = torch.ones(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        profile = torch.sin(torch.linspace(0, math.pi, size, dtype=torch.float64)) ** 2
        out = out * profile.view([-1 if a == axis else 1 for a in range(len(shape))])
    return out


def trust_of(
    damping: float | Tensor,
    reference: float | Tensor | None = None,
    loss: float = 0.0,
    expected: float = math.nan,
    memory: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Trust:
    damping = torch.as_tensor(damping, dtype=dtype).reshape(-1)
    reference = damping if reference is None else torch.as_tensor(reference, dtype=dtype).reshape(-1)

    def full(value: float) -> Tensor:
        return torch.full_like(damping, value)

    return Trust(damping, reference, full(loss), full(expected), full(memory), damping > 0)


def advance(residual: Tensor, v: Tensor, trust: Trust, sigma: float) -> Tensor:
    """The residual after a step that is composed into it, and smoothed."""
    out = residual.clone()
    Elastic(sigma).relax(compose(residual, v), (1.0,) * v.shape[1], trust.length, out)
    return out


def length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=1)


def direction(gradient: Tensor, trust: Trust, step: float, window: int = 1) -> Tensor:
    """The step of LM, of isotropic voxels."""
    descent = make_method("lm", "simple", "always", 0.5, window, 0).descent
    return descent.direction(gradient, trust, [1.0] * gradient.shape[1], step)


def judge(trust: Trust, loss, control="simple", acceptance="always", chance=0.5):
    """The verdict of a method made of these names; the random number is the one given."""
    loss = torch.as_tensor(loss, dtype=trust.loss.dtype).reshape(-1)
    with mock.patch.object(acceptance_module, "chance", return_value=chance):
        return make_method("lm", control, acceptance, 0.5, 1, 0).judge(trust, loss, 1)
