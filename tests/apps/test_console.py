"""How commands speak when something is odd, wrong or interrupted."""

import warnings

import pytest

from monai_lm.apps.console import console


def test_a_warning_is_a_line_without_source(capsys):
    shown = warnings.showwarning
    with console("monai-lm"):
        warnings.warn("the field is rough", stacklevel=1)
    assert capsys.readouterr().err == "monai-lm: warning: the field is rough\n"
    assert warnings.showwarning is shown


def test_an_interrupt_is_a_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stop, console("monai-lm"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "monai-lm: interrupted\n"


@pytest.mark.parametrize("error", [ImportError, OSError, TypeError, ValueError])
def test_what_a_user_can_mend_is_a_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as stop, console("monai-lm"):
        raise error("step must be positive")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "monai-lm: step must be positive\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError), console("monai-lm"):
        raise KeyError("ours")
