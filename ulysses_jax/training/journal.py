"""What happened in a run besides its steps: a line each, never cut off."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MOST_ROWS = 4096  # in a line, which readers take up to 64 KiB


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
        self,
        event: str,
        step: int,
        *,
        at: float | None = None,
        of_rows: Sequence[int] | None = None,
        **fields: Any,
    ) -> None:
        """Args:
        at: when it happened, `time.time()`; None: now.
        of_rows: the numbers of the data's rows that it is of; the event has how many,
          and the numbers follow in events `rows`, as many as it takes.
        fields: values that JSON can hold; a number that is not finite is a word in it.
        """
        when = time.time() if at is None else at
        if of_rows is not None:
            fields |= {"num_rows": len(of_rows)}
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
        for start in range(0, len(of_rows or ()), _MOST_ROWS):
            part = (of_rows or ())[start : start + _MOST_ROWS]
            self.add("rows", step, of=event, rows=part)

    def close(self) -> None:
        self._file.close()

    def _is_half(self) -> bool:
        with open(self._file.name, "rb") as written:
            size = written.seek(0, 2)
            written.seek(max(0, size - 1))
            return written.read(1) not in (b"", b"\n")
