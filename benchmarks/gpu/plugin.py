"""A plugin of pytest that writes a line for every test into the file ``$MONAI_LM_GPU_ROWS``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.steps import Values, write_row


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome, what the test has recorded, and why it failed or was skipped."""
    if report.when != "call" and report.passed:
        return
    values: Values = {"outcome": report.outcome, **dict(report.user_properties)}
    if report.failed:
        values["error"] = str(report.longreprtext).strip().splitlines()[-1][:500]
        values["traceback"] = report.longreprtext[-3000:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        values["reason"] = report.longrepr[2]
    write_row(Path(os.environ["MONAI_LM_GPU_ROWS"]), report.nodeid, **values)
