"""A profile of some steps of a run, for XProf and Perfetto."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profile:
    """Traces the steps `first` to `last`; a context manager, which ends the trace.

    Each process writes into `folder`, of several each into its own folder there:
    `plugins/profile/<when>/` has `*.xplane.pb` for XProf, and `perfetto_trace.json.gz`
    for Perfetto (ui.perfetto.dev).

    Args:
      steps: (first, last); empty: none.
      written: `f(folder)`, called with the one that has the trace's files when it is
        written, also where the run ends within the steps.
    """

    def __init__(
        self, steps: tuple[int, ...], folder: Path, written: Callable[[Path], Any]
    ):
        self._first, self._last = steps or (0, -1)
        self._written = written
        several = jax.process_count() > 1
        self.folder = folder / f"process_{jax.process_index()}" if several else folder
        self._is_on = False

    def is_past(self, step: int) -> bool:
        """Whether a run that goes on after this step has none of the steps to trace."""
        return self._first > 0 and step >= self._last

    def begins_at(self, step: int) -> bool:
        """The step before it must have ended. Where a run is resumed within
        the steps, the rest of them is traced."""
        return not self._is_on and self._first <= step <= self._last

    def begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # else its events crowd out the devices'
        jax.profiler.start_trace(
            self.folder, create_perfetto_trace=True, profiler_options=options
        )
        self._is_on = True

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Around a step: names it in the trace."""
        if not self._is_on:
            return nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def ends_at(self, step: int) -> bool:
        """It must have ended."""
        return self._is_on and step >= self._last

    def end(self) -> None:
        self._is_on = False
        jax.profiler.stop_trace()
        found = (self.folder / "plugins" / "profile").glob("*")
        newest = max(found, key=lambda each: each.stat().st_mtime, default=self.folder)
        self._written(newest)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: Any, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_on:
            self.end()
