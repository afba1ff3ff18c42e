"""Any loss module as a similarity measure, through autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monai_lm.similarity.base import Similarity

__all__ = ["ModuleSimilarity"]


class ModuleSimilarity(Similarity):
    """Wrap a loss module that is called as ``module(warped, fixed)``, MONAI's losses for example.

    Pairs are passed one by one, ``(1, C, *S)``, so that a pair's result does not depend on its batch. Losses that the
    module averages are multiplied by the number of voxels, so that every measure is a sum over voxels; a derivative
    that is not finite counts as zero; modules whose
    ``reduction`` is ``"sum"`` or ``"none"`` are summed as they are. Works inside ``torch.no_grad()``,
    ``torch.inference_mode()`` and autocast, which it leaves for the evaluation.

    Args:
        module: the loss.

    Raises:
        TypeError: (when evaluated) the loss is no tensor.
        ValueError: (when evaluated) the loss does not depend on the warped image.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def evaluate(self, warped: Tensor, reference: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and derivative ``(B, C, *S)``; see :class:`Similarity`."""
        (fixed,) = reference
        losses, derivatives = [], []
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(warped.device.type, enabled=False):
            for w, f in zip(warped.split(1), fixed.split(1), strict=True):
                leaf = w.detach().clone().requires_grad_()
                loss = self._reduced(self.module(leaf, f.detach().clone()), leaf)
                derivative = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
                if derivative is None:
                    raise ValueError(
                        f"similarity must be differentiable: the loss that {type(self.module).__name__} returned "
                        "does not depend on the warped image"
                    )
                losses.append(loss.detach())
                derivatives.append(derivative.nan_to_num(0.0, 0.0, 0.0))
        return torch.stack(losses), torch.cat(derivatives)

    def _reduced(self, loss: Any, warped: Tensor) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"similarity must return its loss as a tensor, {type(self.module).__name__} returned a "
                f"{type(loss).__name__}"
            )
        if loss.numel() == 1 and getattr(self.module, "reduction", "mean") not in ("sum", "none"):
            return loss.sum() * warped[0, 0].numel()
        return loss.sum()
