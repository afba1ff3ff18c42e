"""How a command speaks: values, warnings and errors in a line each, and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from monai_lm.io.outputs import as_json

__all__ = ["both", "console", "show"]


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def console(name: str, worded: Callable[[str], str] = str) -> Iterator[None]:
    """Within it warnings and errors are printed for people, without lines of source.

    Warnings appear as ``name: warning: …`` on stderr. Errors that a user can mend (``ImportError``, ``OSError``,
    ``TypeError``, ``ValueError``, a GPU without enough memory) end with a paragraph and exit code 2, an interrupt
    (Ctrl-C) with a line and exit code 130, a request to end (SIGTERM, as of a scheduler) with one and 143, so that what
    is half done is taken away; anything else is a defect and keeps its traceback.

    Args:
        name: of the command.
        worded: makes of a warning or an error what is printed.
    """

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        """Print a warning in a line, with the name of the command."""
        print(f"{name}: warning: {worded(str(message))}", file=sys.stderr)

    with warnings.catch_warnings(), _ending():
        warnings.showwarning = tell
        try:
            yield
        except KeyboardInterrupt as error:
            print(f"{name}: interrupted", file=sys.stderr)
            raise SystemExit(130) from error
        except _Terminated as error:
            print(f"{name}: terminated", file=sys.stderr)
            raise SystemExit(143) from error
        except (ImportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            print(f"{name}: {worded(str(error))}", file=sys.stderr)
            raise SystemExit(2) from error


@contextmanager
def _ending() -> Iterator[None]:
    """Within it SIGTERM is an exception, which does what has to be done at an end."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there alone
        yield
        return

    def end(*_: Any) -> None:
        """Raise what a signal means."""
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def both(name: str, fixed: str | None, moving: str | None) -> tuple[str, str] | None:
    """Two files that belong together, or none; ValueError for one of them alone."""
    if (fixed is None) != (moving is None):
        given = f"--fixed_{name} {fixed}" if moving is None else f"--moving_{name} {moving}"
        raise ValueError(f"--fixed_{name} and --moving_{name} must be given together, got {given} alone")
    return None if fixed is None or moving is None else (fixed, moving)


def show(values: dict[str, Any], json: bool) -> None:
    """Print values a line each, or as JSON."""
    if json:
        print(as_json(values))
        return
    for key, value in values.items():
        if key == "alignment" and isinstance(value, dict):
            print(value["text"])
        elif key == "remarks":
            print("".join(f"- {text}\n" for text in value.values()), end="")
        elif not isinstance(value, dict):
            print(f"{key:<20}{value:.4g}" if isinstance(value, float) else f"{key:<20}{value}")
