"""What the package shows of itself."""

import subprocess
import sys

import pytest

import monai_lm


def test_everything_public_is_there_and_listed():
    assert set(monai_lm.__all__) <= set(dir(monai_lm))
    assert all(getattr(monai_lm, name) is not None for name in monai_lm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'refined'"):
        _ = monai_lm.refined


def test_refining_does_not_import_monai_and_changes_no_flag_of_torch():
    code = (
        "import sys, torch;"
        "told = lambda: (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()); before = told();"
        " import monai_lm; x = torch.rand(1, 1, 12, 12); monai_lm.refine(x, x.flip(2), iterations=2);"
        "assert told() == before; assert 'monai' not in sys.modules; monai_lm.RegistrationInferer();"
        "assert 'monai' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
