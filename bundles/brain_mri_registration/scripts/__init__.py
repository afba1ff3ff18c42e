"""Code of the bundle that is not a class of MONAI or monai_lm."""
