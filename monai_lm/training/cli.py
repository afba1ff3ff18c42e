"""``python -m monai_lm.training``: Lightning's own command line on the module and the pairs of this package."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import SIGTERMException

from monai_lm.training.data import PairDataModule
from monai_lm.training.module import RegistrationModule

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` as the arguments and ``--config`` files say.

    Raises:
        SystemExit: with 143, as shells have it, where SIGTERM ended what ran; Lightning's own exit code is 0.
    """
    try:
        return LightningCLI(
            RegistrationModule,
            PairDataModule,
            args=None if args is None else list(args),
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
