"""How commands speak when something is odd, wrong or interrupted."""

import signal
import threading
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


def test_a_request_to_end_is_a_line_and_exit_code_143(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, console("monai-lm"):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    assert capsys.readouterr().err == "monai-lm: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_thread_the_command_runs_without_a_handler():
    done = []

    def run():
        with console("monai-lm"):
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize("error", [ImportError, OSError, TypeError, ValueError])
def test_what_a_user_can_mend_is_a_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as stop, console("monai-lm"):
        raise error("step must be positive")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "monai-lm: step must be positive\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError), console("monai-lm"):
        raise KeyError("ours")
