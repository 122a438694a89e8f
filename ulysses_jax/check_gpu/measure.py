"""Has every row measured in processes that may die, and keeps results as they come."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ulysses_jax.check_gpu.worker import RESTART

WORKER = (sys.executable, "-m", "ulysses_jax.check_gpu.worker")
# When a table must be done, as a share of the time that there is.
UNTIL = {"errors": 0.5, "spots": 0.6, "rates": 0.62, "timings": 0.85, "steps": 1.0}
# Longer than a kernel's compile, any call, and the start of a process.
SILENCE_SECONDS = 120.0

Results = dict[str, Any]


class NoMachine(Exception):
    """No process could say what machine it runs on; the message says why."""


def measure(
    *,
    tables: Sequence[str] = tuple(UNTIL),
    minutes: float = 8,
    quick: bool = False,
    keep: Callable[[Results, int | None], None],
    worker: Sequence[str] = WORKER,
    silence_seconds: float = SILENCE_SECONDS,
) -> Results:
    """All rows of some tables, each with `status` "ok", "FAIL" or "skipped" and `why`.

    Args:
      keep: called with all results whenever a row is done, and its number.
      worker: the command that measures.

    Raises:
      NoMachine: the first process ended before it said anything.
    """
    started = time.time()
    until = {name: started + 60 * minutes * share for name, share in UNTIL.items()}
    results: Results = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "is_complete": False,
        "rows": [],
    }
    rows: list[dict[str, Any]] = results["rows"]

    def waiting() -> list[int]:
        asked = enumerate(rows)
        return [i for i, row in asked if row["table"] in tables and "status" not in row]

    def end(i: int, **columns: Any) -> None:
        rows[i] |= columns
        keep(results, i)

    while not rows or waiting():
        before = len(waiting())
        request = {
            "tables": list(tables),
            "done": [i for i, row in enumerate(rows) if "status" in row],
            "minutes": minutes,
            "until": until,
            "quick": quick,
        }
        begun, since, why = None, time.time(), ""
        with _Process(worker, request) as process:
            while True:
                left = started + 60 * minutes + 20 - time.time()
                # A step is compiled twice and is the last: it may take what is left.
                is_step = begun is not None and rows[begun]["table"] == "steps"
                message = process.hear(left if is_step else min(silence_seconds, left))
                if message is None:
                    why = process.ended
                    break
                if "machine" in message and not rows:
                    rows.extend(message["rows"])
                    results |= {n: message[n] for n in ("machine", "quick")}
                elif "begin" in message:
                    begun, since = message["begin"], time.time()
                elif "row" in message:
                    i, begun = message.pop("row"), None
                    seconds = round(time.time() - since, 2)
                    end(i, **message, **({} if "why" in message else {"took": seconds}))
        if not rows:
            raise NoMachine(why)
        is_late = time.time() > started + 60 * minutes
        if begun is not None:
            late = {"status": "skipped", "why": f"cut off by --minutes {minutes:g}"}
            end(begun, **(late if is_late else {"status": "FAIL", "why": why}))
        if len(waiting()) == before or is_late:
            for i in waiting():
                late = f"no time was left of --minutes {minutes:g}"
                status = "skipped" if is_late else "FAIL"
                end(i, status=status, why=late if is_late else why)
    results["rows"] = [row for row in rows if row["table"] in tables]
    results["is_complete"] = True
    results["took_seconds"] = round(time.time() - started, 1)
    keep(results, None)
    return results


class _Process:
    """A worker, what it says, and how it ended."""

    def __init__(self, command: Sequence[str], request: dict[str, Any]):
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request))
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, and how is said below
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.ended = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.errors.close()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None, and `ended` says why, where there is no more."""
        try:
            line = self.lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.ended = f"nothing was heard of it for {seconds:.0f} s: stopped"
            return None
        if line is not None:
            return json.loads(line)
        code = self.process.wait()
        if code not in (0, RESTART):
            self.errors.seek(0)
            lines = [x.strip() for x in self.errors.read().splitlines() if x.strip()]
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            last = f": {' / '.join(lines[-3:])[-400:]}" if lines else ""
            self.ended = f"the process ended {how}{last}"
        else:
            self.ended = "the process ended without a word about it"
        return None


def write_whole(path: Path, text: str) -> None:
    """A file that is as it was, or all new."""
    folder = path.absolute().parent
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:
        part.write(text)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)
