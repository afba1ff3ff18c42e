"""``python -m monai_lm.training``: Lightning's own command line on the module and the pairs of this package."""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning.cli import LightningCLI

from monai_lm.training.data import PairDataModule
from monai_lm.training.module import RegistrationModule

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as the arguments and ``--config`` files say."""
    return LightningCLI(
        RegistrationModule,
        PairDataModule,
        args=None if args is None else list(args),
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
