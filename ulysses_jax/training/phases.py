"""Where the time of a run goes; and the end of one that waits for ever."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from ulysses_jax.training import store
from ulysses_jax.training.endings import (
    LOST,
    leave,
    let_others_look,
    say_where,
    tell_others,
)

Phase = Literal["data", "dispatch", "compute", "checkpoint", "validation"]
# What a row has of each phase, and of what is in none: all the time that is its own.
PARTS = ("data", "dispatch", "compute", "checkpoint", "validation", "other")
_POLL_SECONDS = 1.0
_MINUTES, _TIMES_THE_LONGEST = 10.0, 5.0
# Of a save: that long, and what its bytes take on a disk so slow.
_SAVE_MINUTES, _SLOWEST_BYTES_A_SECOND = 30.0, 50e6


def whole_seconds(row: Mapping[str, float]) -> float:
    """All the time of a row; of one that an older run wrote, that of its step."""
    if "other_seconds" not in row:
        return row.get("seconds", 0.0)
    return sum(row.get(f"{part}_seconds", 0.0) for part in PARTS)


class Phases:
    """The seconds that the main thread of a run spends: each in one phase, or in none.

    Args:
      hang_minutes: of one wait, from which on it is taken to be without end. None: 10,
        and five times the longest wait so far, once a step has been waited for; of a
        checkpoint 30, and a minute for each 3 GB of it.
      saved_bytes: of a checkpoint.
    """

    def __init__(self, hang_minutes: float | None = None, *, saved_bytes: int = 0):
        self._hang_minutes = hang_minutes
        self._saved_bytes = saved_bytes
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "other", time.monotonic()
        self._now: tuple[Phase, float] | None = None
        self._longest = 0.0
        self._step = 0
        self._unlike: int | None = None

    @contextmanager
    def __call__(
        self, phase: Phase, step: int, *, is_one_wait: bool = True
    ) -> Iterator[None]:
        """In a phase; one inside of another takes its seconds from that.

        Args:
          is_one_wait: it is watched, since one thing is waited for.
        """
        outer_phase, outer = self._phase, self._now
        began = self._turn_to(phase)
        self._now = (phase, began) if is_one_wait else None
        self._step = step
        try:
            yield
        finally:
            ended = self._turn_to(outer_phase)
            self._now = outer and (outer[0], ended)
            if phase == "compute" and is_one_wait:
                self._longest = max(self._longest, ended - began)
                if self._unlike is not None and step >= self._unlike:
                    self._unlike = None

    def _turn_to(self, phase: str) -> float:
        """Counts what has passed as the phase's that was; from now on it is this."""
        now = time.monotonic()
        passed = now - self._since
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + passed
        self._phase, self._since = phase, now
        return now

    def unlike(self, step: int) -> None:
        """Of a step that may take far longer than all before, as one of longer rows:
        until it has been waited for, `hang_minutes` None ends nothing."""
        self._unlike = step

    def take(self, *parts: str) -> dict[str, float]:
        """`<part>_seconds` of these, where any have passed since they were last taken;
        of none: of all, and of what is in no phase as `other_seconds` in any case. What
        all calls have given adds up to the time that has passed."""
        self._turn_to(self._phase)
        names = parts or ("other", *self._seconds)
        return {
            f"{part}_seconds": self._seconds.pop(part, 0.0)
            for part in dict.fromkeys(names)
            if not parts or part in self._seconds
        }

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ends the process in a wait without end, and those of a pod with it.

        It says the step, the phase and where each thread stands, in all processes, and
        ends with `endings.LOST`.
        """
        done = threading.Event()

        def look() -> None:
            while not done.wait(_POLL_SECONDS):
                if (now := self._now) is None:
                    continue
                waited, limit = time.monotonic() - now[1], self._limit_seconds(now[0])
                if limit is not None and waited > limit:
                    self._end(now[0], waited)

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()

    def _limit_seconds(self, phase: Phase) -> float | None:
        if self._hang_minutes is not None:
            return 60 * self._hang_minutes
        if phase == "checkpoint":
            return 60 * _SAVE_MINUTES + self._saved_bytes / _SLOWEST_BYTES_A_SECOND
        if not self._longest or self._unlike is not None:
            return None
        return max(60 * _MINUTES, _TIMES_THE_LONGEST * self._longest)

    def _end(self, phase: Phase, waited: float) -> None:
        of = f" of process {store.this_process()}" if store.num_processes() > 1 else ""
        why = (
            f"step {self._step}{of} hangs: {waited:.0f} s of waiting for {phase}; the "
            "same command goes on from the last checkpoint, if there is one; if it "
            "does take so long, raise training.hang_minutes"
        )
        print(why, file=sys.stderr, flush=True)
        say_where()
        tell_others(LOST, why)
        let_others_look()  # this end breaks the collectives that they stand in
        leave(LOST)
