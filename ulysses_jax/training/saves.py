"""A run's saves as its log has them: begun, whole on disk, and how long they took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.metrics import RunLog
from ulysses_jax.training.phases import Phases


class Saves:
    """Saves, waits for saves, and writes down that they are whole as soon as known.

    Args:
      first_step: which is saved, or has nothing to save.
      num_bytes: of a state.

    Attributes:
      at: when the last one began to be written, `time.monotonic()`.
      step: of the last one; at first `first_step`.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        log: RunLog,
        phases: Phases,
        *,
        first_step: int,
        num_bytes: int,
    ):
        self._checkpointer, self._log, self._phases = checkpointer, log, phases
        self._first_step = self.step = first_step
        self._num_bytes = num_bytes
        self.at = time.monotonic()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> str | None:
        """As `Checkpointer.save`; nothing where the step is saved already, as where a
        run is told to stop right after."""
        if step == self.step:
            return None
        started = time.monotonic()
        with self._phases("checkpoint", step):
            said = self._checkpointer.save(step, state, meta)
        self.at, self.step = time.monotonic(), step
        self.look()
        stood_still = self.at - started
        self._log.happened("saved", step, seconds=stood_still, bytes=self._num_bytes)
        self.add_seconds(step)
        return said

    def look(self) -> None:
        """Writes down those that the checkpointer has seen whole."""
        for step, (seconds, bytes_) in self._checkpointer.take_committed().items():
            self._log.happened("committed", step, seconds=seconds, bytes=bytes_)

    def wait(self, step: int) -> None:
        """For the one under way, after this step."""
        with self._phases("checkpoint", step):
            self._checkpointer.wait()
        self.look()
        self.add_seconds(step)

    @contextmanager
    def are_whole(self, step: Callable[[], int]) -> Iterator[None]:
        """Where an error ends the run, as it does on all processes at one place, the
        save under way is waited for while there is a log that says so."""
        try:
            yield
        except ValueError as error:
            try:
                self.wait(step())
            except OSError as failure:
                error.add_note(str(failure))
            raise

    def add_seconds(self, step: int) -> None:
        """Of saves and validations to the last row, that of this step; the next row
        has those of a step that was taken before this start."""
        if step > self._first_step:
            self._log.add_seconds(self._phases.take("checkpoint", "validation"))
