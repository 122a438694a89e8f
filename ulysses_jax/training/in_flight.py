"""The step in flight: numbers are read one step late, so that devices never wait."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf, isfinite
from typing import Any, TypeVar

from ulysses_jax.training.phases import Phases

T = TypeVar("T")


class InFlight:
    """Reads the metrics of a step when the next one has been dispatched.

    Args:
      tokens: of a step, over all devices.
      log: `f(step, loss=, tokens_per_second=, seconds=, ...)`, as `RunLog.log_step`;
        loss is None where none of the step's tokens counts.
      phases: the wait for numbers is one of them, and a row has the seconds of each.
      most_skipped: steps in a row that may be skipped.
      on_skipped: `f(step, why)`, called before such a step is logged, which is without
        a loss, and without the numbers that are not finite.
      on_last: `f(step, row)`, called with a row that is not logged, since a number of
        it ends the run.
    """

    def __init__(
        self,
        tokens: int,
        log: Callable[..., Any],
        phases: Phases,
        *,
        most_skipped: int = 0,
        on_skipped: Callable[[int, str], Any] = lambda *_: None,
        on_last: Callable[[int, Mapping[str, Any]], Any] = lambda *_: None,
    ):
        self._most_skipped, self._on_skipped = most_skipped, on_skipped
        self._on_last = on_last
        self._skipped = 0  # in a row
        self._tokens = tokens
        self._phases = phases
        self._seconds = 0.0
        self._log = log
        self._steps: list[tuple[int, Mapping[str, Any], float]] = []
        self._last_read = -inf

    def add(self, number: int, metrics: Mapping[str, Any], started: float) -> None:
        """Takes a step that was dispatched, and logs the one before it.

        Args:
          metrics: scalars that may still be on their way.
          started: `time.monotonic()` before its batch was asked for.

        Raises:
          ValueError: as `settle`, of the step before.
        """
        self._steps.append((number, metrics, started))
        self._read(len(self._steps) - 1)

    def seconds_left(self) -> float | None:
        """Until the step added last should end, if each takes as long as the last one
        that was read; None: none was. From any thread."""
        steps, now = list(self._steps), time.monotonic()
        if not self._seconds:
            return None
        since = max(steps[0][2], self._last_read) if steps else now
        return max(0.0, len(steps) * self._seconds - (now - since))

    def forget(self) -> None:
        """Leaves the numbers of the steps that were not read."""
        self._steps.clear()

    def settle(self) -> None:
        """Waits for the step in flight and logs it: then its state may be saved.

        Its seconds are those since it was started, or since the step before it was
        read, so that those of all steps add up to the time that passed, but for what
        came between two of them. Those of the row's phases add up to all of it.

        Raises:
          ValueError: a number is not finite, and neither is the state then.
        """
        self._read(len(self._steps))

    def _read(self, count: int) -> None:
        for _ in range(count):
            try:
                self._read_one(*self._steps[0])
            finally:
                del self._steps[0]

    def _read_one(
        self, number: int, metrics: Mapping[str, Any], started: float
    ) -> None:
        with self._phases("compute", number):
            row: dict[str, float | None] = {
                name: value if isinstance(value, int) else float(value)
                for name, value in metrics.items()
            }
        now = time.monotonic()
        self._seconds = seconds = now - max(started, self._last_read)
        self._last_read = now
        row |= self._phases.take()
        if row.get("counted_tokens") == 0:  # means of nothing
            row["loss"] = None
            row.pop("objective", None)
        self._skipped = self._skipped + 1 if row.pop("skipped", 0) else 0
        if 0 < self._skipped <= self._most_skipped:
            bad = _not_finite(row)
            self._on_skipped(number, " and ".join(bad.values()))
            row = {name: value for name, value in row.items() if name not in bad}
            row |= {"loss": None, "skipped": 1}  # also where only a gradient is not
        if _not_finite(row):
            self._on_last(number, row)
        check_finite(number, row, skipped=max(self._skipped - 1, 0))
        self._log(
            number, tokens_per_second=self._tokens / seconds, seconds=seconds, **row
        )


def check_finite(
    step: int, row: Mapping[str, float | None], *, skipped: int | None = None
) -> None:
    """Raises ValueError where a number of a step is not finite.

    Args:
      skipped: so many steps before it were; None: it cannot be.
    """
    if bad := _not_finite(row):
        after = f", after {skipped} that were skipped" if skipped else ""
        more = "" if skipped is None else ", or raise training.skipped_steps"
        raise ValueError(
            f"{' and '.join(bad.values())} at step {step}{after}: lower "
            f"training.learning_rate{more}; the same command resumes from the last "
            "checkpoint, if there is one"
        )


def _not_finite(row: Mapping[str, float | None]) -> dict[str, str]:
    """By name, in words."""
    return {
        name: f"{name} is {value}"
        for name, value in row.items()
        if value is not None and not isfinite(value)
    }


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each when the next one has been made."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before
