"""What the training configurations load before, and write after."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from monai_lm.networks import SemanticRegistrationNet

__all__ = ["halved", "save_weights", "with_frozen_segmenter"]


def with_frozen_segmenter(network: SemanticRegistrationNet, weights: str | Path) -> SemanticRegistrationNet:
    """Load weights into a network and keep training from its segmenter."""
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.segmenter.requires_grad_(False).eval()
    return network


def save_weights(network: nn.Module, file: str | Path) -> None:
    """Write a plain state dictionary in half precision."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(halved(network.state_dict()), file)


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision; modules that share a tensor still share it, so that the file holds it once."""
    shared: dict[int, Tensor] = {}
    for tensor in weights.values():
        shared.setdefault(tensor.data_ptr(), tensor.half() if tensor.is_floating_point() else tensor)
    return {name: shared[tensor.data_ptr()] for name, tensor in weights.items()}
