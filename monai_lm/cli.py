"""The ``monai-lm`` command."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from monai_lm.demo import run_demo

__all__ = ["main"]


def demo(output_dir: str = "monai_lm_demo", resolution: int = 2, seed: int = 0) -> None:
    """Refine an imperfect prediction of a known deformation of a real brain; no download.

    Args:
        output_dir: folder for the picture.
        resolution: voxel edge in millimetres, 1 to 4.
        seed: of the deformation, the noise and the error of the prediction.
    """
    print(run_demo(output_dir, resolution, seed))


def hippocampus(root_dir: str, fixed: int = 0, moving: int = 1) -> None:
    """Register two real hippocampus images; fetches the Decathlon's Task04 (28 MB) if it is not in the folder yet.

    Args:
        root_dir: folder that holds, or will hold, ``Task04_Hippocampus``.
        fixed: index of the fixed image among the training images.
        moving: index of the moving image.
    """
    from monai_lm.decathlon import register_pair

    print(register_pair(Path(root_dir), fixed, moving))


def main() -> None:
    """Run a subcommand; errors that a user can mend end with one line and exit code 2."""
    try:
        auto_cli({"demo": demo, "hippocampus": hippocampus}, as_positional=False)
    except (ImportError, OSError, ValueError) as error:
        print(f"monai-lm: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
