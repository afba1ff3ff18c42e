"""Results as JSON, one per line, written as they come: what was interrupted goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_row(path: str | Path | None, row: Row) -> None:
    """Append a line, in place of one that was cut off; ``None`` writes nothing."""
    if path is None:
        return
    with Path(path).open("a+b") as file:
        file.seek(0)
        text = file.read()
        tail = text[text.rfind(b"\n") + 1 :]
        if _is_whole(tail):
            file.write(b"\n")
        else:
            file.truncate(len(text) - len(tail))
        file.write(json.dumps(row, default=str).encode() + b"\n")


def read_rows(path: str | Path | None) -> list[Row]:
    """All lines so far; one that was cut off in the middle, which only the last can be, is left out."""
    if path is None or not Path(path).is_file():
        return []
    *lines, tail = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in (*lines, *([tail] if _is_whole(tail) else []))]


def _is_whole(tail: bytes) -> bool:
    """Whether what stands behind the last line break is a row; of a row that was cut off nothing can be read."""
    try:
        json.loads(tail)
    except ValueError:
        return False
    return True
