"""A refinement on one page: pictures, curves, numbers and warnings in a single file."""

from monai_lm.report.page import write_report

__all__ = ["write_report"]
