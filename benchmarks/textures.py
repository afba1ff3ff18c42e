"""Images in which little corresponds: what an ultrasound probe, or a stain, makes of another image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monai_lm.fields import gaussian_smooth

__all__ = ["stained", "textured", "ultrasound"]

_CELLS = 1.2
"""Standard deviation in voxels of the Gaussian that a stain's texture has its size from."""


def ultrasound(image: Tensor, seed: int) -> Tensor:
    """Echoes of borders across the first axis, of tissues at random, under speckle that depth darkens.

    Args:
        image: ``(1, 1, *S)``.
        seed: of what is drawn.
    """
    draw, scaled = torch.Generator().manual_seed(seed), _scaled(image)
    slopes = torch.stack(torch.gradient(gaussian_smooth(scaled, 0.7)[0, 0]))
    border = 0.7 * slopes[0].abs() + 0.3 * slopes.square().sum(0).sqrt()
    border = border / torch.from_numpy(np.quantile(border.numpy(), [0.98])).to(border)
    waves = [_noise(image, 0.8, draw) for _ in range(2)]
    speckle = ((waves[0].square() + waves[1].square()) / 2).sqrt()[0, 0]
    depth = torch.linspace(0, 1, image.shape[2]).view(-1, *[1] * (image.dim() - 3))
    echo = 0.15 + 0.35 * _tissues(scaled, 1000 + seed)[0, 0] + 1.2 * border
    return torch.log1p(6 * (echo * speckle * (1 - 0.5 * depth)).clamp(min=0))[None, None]


def stained(image: Tensor, seed: int) -> Tensor:
    """Tissues in grey values at random, each with a texture of the size of cells; arguments as of ultrasound."""
    scaled = _scaled(image)
    texture = _noise(image, _CELLS, torch.Generator().manual_seed(seed + 77))
    return 0.7 * _tissues(scaled, 2000 + seed) + 0.25 * texture * (scaled > 0.1)


def textured(image: Tensor, seed: int) -> Tensor:
    """The image itself with such a texture."""
    scaled = _scaled(image)
    return scaled + 0.2 * _noise(image, _CELLS, torch.Generator().manual_seed(seed + 99)) * (scaled > 0.1)


def _scaled(image: Tensor) -> Tensor:
    """From the .1 to the 99.9 percentile to [0, 1]."""
    low, high = np.quantile(image.numpy(), (0.001, 0.999))
    return ((image - low) / (high - low)).clamp(0, 1).float()


def _tissues(scaled: Tensor, seed: int) -> Tensor:
    """Six grey values in another order, linearly between them."""
    values = np.random.default_rng(seed).permutation(6) / 5
    return torch.from_numpy(np.interp(scaled.numpy(), np.linspace(0, 1, 6), values)).float()


def _noise(like: Tensor, sigma: float, draw: torch.Generator) -> Tensor:
    noise = gaussian_smooth(torch.randn(like.shape, generator=draw), sigma)
    return noise / noise.std()
