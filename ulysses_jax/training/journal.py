"""What happened in a run besides its steps: a line each, never cut off."""

import json
import math
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to `events.jsonl` in a run's folder; docs/trainer.md lists the events.

    A line is `{"unix_seconds", "step", "event", ...}`, on disk as soon as it is added.
    One that a full disk cut off is ended by the next, so that it alone is lost.

    Args:
      folder: the run's, which is there.
    """

    def __init__(self, folder: Path):
        self._file = open(folder / "events.jsonl", "ab")

    def add(
        self, event: str, step: int, *, at: float | None = None, **fields: Any
    ) -> None:
        """Args:
        at: when it happened, `time.time()`; None: now.
        fields: values that JSON can hold; a number that is not finite is a word in it.
        """
        when = time.time() if at is None else at
        said = {
            name: str(value)
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in fields.items()
        }
        line = {"unix_seconds": when, "step": step, "event": event, **said}
        start = b"\n" if self._is_half() else b""
        self._file.write(start + json.dumps(line).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _is_half(self) -> bool:
        with open(self._file.name, "rb") as written:
            size = written.seek(0, 2)
            written.seek(max(0, size - 1))
            return written.read(1) not in (b"", b"\n")
