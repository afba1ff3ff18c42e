"""What the training configurations load before."""

from __future__ import annotations

from pathlib import Path

import torch

from monai_lm.inferers.networks import SemanticRegistrationNet

__all__ = ["with_frozen_segmenter"]


def with_frozen_segmenter(network: SemanticRegistrationNet, weights: str | Path) -> SemanticRegistrationNet:
    """Load weights into a network and keep training from its segmenter."""
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.segmenter.requires_grad_(False).eval()
    return network
