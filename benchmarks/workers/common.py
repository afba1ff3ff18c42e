"""What a worker and the benchmark say to each other; standard library only, every peer's interpreter imports it."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def task() -> dict[str, Any]:
    """The worker's task: paths of images and labels, scales, iterations, threads."""
    return json.loads(sys.argv[1])


def say(event: str, **values: Any) -> None:
    """Tell the benchmark that something has happened, and give it a moment to look at the memory."""
    print("@" + json.dumps({"event": event, "time": time.time(), **values}), flush=True)
    time.sleep(0.2)
