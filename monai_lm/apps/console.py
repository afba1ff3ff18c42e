"""How a command speaks: warnings and errors in a line each, and an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["console"]


@contextmanager
def console(name: str) -> Iterator[None]:
    """Within it warnings and errors are printed for people, without lines of source.

    Warnings appear as ``name: warning: …`` on stderr. Errors that a user can mend (``ImportError``, ``OSError``,
    ``TypeError``, ``ValueError``, a GPU without enough memory) end with a paragraph and exit code 2, an interrupt
    (Ctrl-C) with a line and exit code 130; anything else is a defect and keeps its traceback.

    Args:
        name: of the command.
    """

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{name}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except KeyboardInterrupt as error:
            print(f"{name}: interrupted", file=sys.stderr)
            raise SystemExit(130) from error
        except (ImportError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            raise SystemExit(2) from error
