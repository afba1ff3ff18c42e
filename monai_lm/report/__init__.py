"""One page that shows whether to trust a refinement."""

from monai_lm.report.page import write_report

__all__ = ["write_report"]
