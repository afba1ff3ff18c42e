"""Run :func:`monai_lm.apps.cli.main`."""

from monai_lm.apps.cli import main

if __name__ == "__main__":
    main()
