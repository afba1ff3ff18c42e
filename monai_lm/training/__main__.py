"""Run :func:`monai_lm.training.cli.main`."""

from monai_lm.training.cli import main

if __name__ == "__main__":
    main()
