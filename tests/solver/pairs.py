"""Pairs of images with a known warp between them, for the tests of whole refinements."""

import torch
from torch import Tensor

from monai_lm import refine
from monai_lm.fields import gaussian_smooth, warp
from monai_lm.similarity import Similarity

SHAPES = [(32, 30), (16, 18, 17)]
FLAT = (32, 30)

CONTROLS = ("simple", "trust_region")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texture(shape: tuple[int, ...], batch: int = 1, seed: int = 1) -> Tensor:
    image = gaussian_smooth(noise(batch, 1, *shape, seed=seed), 1.5)
    return image / image.std()


def smooth(shape: tuple[int, ...], amplitude: float, batch: int = 1, sigma: float = 4.0, seed: int = 2) -> Tensor:
    ddf = gaussian_smooth(noise(batch, len(shape), *shape, seed=seed), sigma)
    return ddf * (amplitude / ddf.abs().max())


def pair(shape: tuple[int, ...], batch: int = 1, amplitude: float = 1.6) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed and moving image ``(B, 1, *S)`` and the smooth field ``(B, n, *S)`` between them."""
    moving, ddf = texture(shape, batch), smooth(shape, amplitude, batch)
    return warp(moving, ddf), moving, ddf


def error(a: Tensor, b: Tensor | float) -> float:
    """Mean end-point error in voxels."""
    return float(torch.linalg.vector_norm(a - b, dim=1).mean())


def seen_of(mask: Tensor) -> Tensor:
    """What a mask ``(B, 1, *S)`` shows: where it is not zero, and three voxels beyond, bool."""
    pool = torch.nn.functional.max_pool2d if mask.dim() == 4 else torch.nn.functional.max_pool3d
    return pool((mask > 0).float(), 7, 1, 3) > 0


def run(fixed: Tensor, moving: Tensor, ddf: Tensor | None = None, mask: Tensor | None = None, **kwargs):
    return refine(fixed, moving, ddf, mask, **kwargs)


class Flat(Similarity):
    """A measure without a derivative."""

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return torch.ones(warped.shape[0]), torch.zeros_like(warped)


class Local(Similarity):
    """Squared error in the corner ``[:4, :4]`` only."""

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        difference = torch.zeros_like(warped)
        difference[..., :4, :4] = (warped - reference[0])[..., :4, :4]
        return difference.square().flatten(1).sum(1), 2 * difference
