"""The loop of a run: its steps, and where it validates, saves and stops."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax

from ulysses_jax.config import Config
from ulysses_jax.data.loader import validation_batches
from ulysses_jax.data.open import RunData
from ulysses_jax.training.by_length import (
    Split,
    Steps,
    relaid,
    rows_of_steps,
    training_batches,
)
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.in_flight import InFlight, check_finite, one_behind
from ulysses_jax.training.metrics import RunLog
from ulysses_jax.training.model import MakeModel
from ulysses_jax.training.phases import Phases
from ulysses_jax.training.profile import Profile
from ulysses_jax.training.saves import Saves
from ulysses_jax.training.signals import Stopped, told_to_stop
from ulysses_jax.training.spikes import Spikes
from ulysses_jax.training.state import TrainState
from ulysses_jax.training.step import make_validation_step
from ulysses_jax.training.together import Together
from ulysses_jax.training.use import Use, peak_bytes_by_device


def validates_at(step: int, config: Config) -> bool:
    """Whether a run that validates does so after this step."""
    training = config.training
    every = training.validation_interval_steps or training.num_steps
    return step == training.num_steps or (step > 0 and step % every == 0)


class Loop:
    """Takes a run from one step to its last; made once, and run once.

    A step is in flight while the numbers of the one before are read; where it is
    validated or saved, its own are read first.

    Args:
      split: of the longest rows, whose mesh is set.
      splits, steps: of each length.
      state: after `first_step`; it is given up.
      meta, restored: of the checkpoints, and of the one that it goes on from.
      owes_validation: whether `first_step` was saved before it was validated.
      log: open.
      interrupted: as `training.train`'s.
    """

    def __init__(
        self,
        split: Split,
        splits: dict[int, Split],
        steps: Steps,
        make_model: MakeModel,
        *,
        data: RunData,
        validates: bool,
        state: TrainState,
        first_step: int,
        checkpointer: Checkpointer,
        meta: dict[str, Any],
        restored: dict[str, Any],
        owes_validation: bool,
        log: RunLog,
        interrupted: Callable[[], Any] | None,
    ):
        self.config: Config = split.config
        self.state = state
        self.number = first_step
        self._first_step = first_step
        self._layout = split.layout()
        self._splits, self._steps = splits, steps
        self._data, self._validates = data, validates
        self._validate = jax.jit(make_validation_step(split.config, make_model))
        self._checkpointer, self._meta = checkpointer, meta
        self._owes_validation = owes_validation
        self._log, self._interrupted = log, interrupted
        training = split.config.training
        saved = jax.tree.leaves(state.without_frozen())
        num_bytes = sum(x.nbytes for x in saved)
        self._phases = Phases(training.hang_minutes, saved_bytes=num_bytes)
        self._saves = Saves(
            checkpointer, log, self._phases, first_step=first_step, num_bytes=num_bytes
        )
        self._in_flight = InFlight(
            training.batch_size * training.sequence_tokens,
            self._log_row,
            self._phases,
            most_skipped=training.skipped_steps,
            on_skipped=self._skipped,
            on_last=self._not_finite,
        )
        self._spikes = Spikes(training.spike_nats, restored)
        self._streams = ExitStack()
        self._profile = Profile(
            split.config.profile, log.folder / "profile", self._profiled
        )
        self._use = Use(splits, make_model)
        self._together = Together()
        self._met: set[int] = set()  # lengths of rows

    def run(self) -> bool:
        """Returns whether it was told to stop in its last step, which is saved.

        Raises:
          Stopped: it was told to stop before.
          ValueError: a number of a step is not finite.
          OSError: the disk cannot be read or written.
        """
        training, phases, stops = self.config.training, self._phases, False
        watched = self._interrupted is not None
        watch = phases.watched() if watched else nullcontext()
        told = told_to_stop(self._told, self._interrupted)
        if self._profile.is_past(self.number):
            what = " ".join(map(str, self.config.profile))
            self._log.say(f"profile {what}: nothing is traced after step {self.number}")
        phases.take()  # a row has what is from here on
        self._read_from(self.number)
        with (
            self._streams,
            self._together,
            watch,
            told,
            self._saves.are_whole(lambda: self.number),
            self._profile,
        ):
            if self._owes_validation:
                stops = self._stops_in_validation()
            while not stops and self.number < training.num_steps:
                if stops := self._stops():
                    break
                self._step_in_profile()
                if self._validates and validates_at(self.number, self.config):
                    self._settle()
                    if stops := self._stops_in_validation():
                        break
                last = self.number == training.num_steps
                if last or self._checkpointer.due(self.number):
                    self._save()
                self._saves.look()
            self._saves.wait(self.number)
            if stops:
                where = ": it is saved" if self.number > self._first_step else ""
                what = (
                    f"stopped at step {self.number}; the same command goes on from "
                    f"there{where}"
                )
                self._log.say(what)
                raise Stopped(what)
            self._log.happened(
                "done", self.number, device_peak_bytes=peak_bytes_by_device()
            )
            return self._together.asked_to_stop()

    def _read_from(self, step: int) -> None:
        """Batches from those of step + 1 on."""
        self._streams.close()
        stream = training_batches(self._data, self._splits, start_step=step)
        self._stream = self._streams.enter_context(closing(stream))

    def _step_in_profile(self) -> None:
        profile = self._profile
        if profile.begins_at(self.number + 1):
            self._settle()
            profile.begin()
        with profile.step(self.number + 1):
            self._step()
        if profile.ends_at(self.number):
            self._settle()
            profile.end()

    def _profiled(self, folder: Path) -> None:
        self._log.happened("profiled", self.number, folder=str(folder))
        self._log.say(f"traced up to step {self.number}: {folder}")

    def _step(self) -> None:
        self.number += 1
        started = time.monotonic()
        with self._phases("data", self.number):
            batch = next(self._stream)
        if is_new := (tokens := batch["tokens"].shape[2]) not in self._met:
            self._phases.unlike(self.number)
        self._met.add(tokens)
        with self._phases("dispatch", self.number, is_one_wait=False):
            self.state, metrics = self._steps(self.state, batch, self._log.say)
        if is_new:
            seconds = self._steps.seconds[tokens]
            self._log.happened(
                "compiled", self.number, seconds=seconds, sequence_tokens=tokens
            )
        if self._data.by_length is not None:
            metrics |= {"sequence_tokens": tokens}
        self._in_flight.add(self.number, metrics, started)
        self._after_reading()

    def _settle(self) -> None:
        self._in_flight.settle()
        self._after_reading()

    def _log_row(self, number: int, *, seconds: float, **row: Any) -> None:
        row |= self._use.row(seconds, row.get("sequence_tokens"))
        self._log.log_step(number, seconds=seconds, **row)
        self._spikes.see(number, row["loss"])

    def _not_finite(self, number: int, row: Mapping[str, Any]) -> None:
        rows = self._rows(number - 1, number)
        self._log.happened("not_finite", number, **row, of_rows=rows)

    def _skipped(self, number: int, why: str) -> None:
        rows = self._rows(number - 1, number)
        self._log.happened("skipped", number, why=why, of_rows=rows)
        self._log.say(f"step {number} is skipped: {why}; its rows: {_few(rows)}")

    def _rows(self, after: int, last: int) -> list[int]:
        """The numbers of the rows that these steps read."""
        order = rows_of_steps(self._data, self._splits)
        return [int(n) for step in range(after, last) for n in order(step)[1]]

    def _after_reading(self) -> None:
        """Goes back to the last checkpoint, and on past the batch, from a spike."""
        if (spike := self._spikes.take()) is None:
            return
        number, what = spike
        self._log.happened("spike", number, why=what)
        with self._phases("checkpoint", number):
            self._checkpointer.wait()
            self._saves.look()
            if self._checkpointer.newest is None:
                self._log.say(f"{what}; there is no checkpoint to go back to")
                return
            self._in_flight.forget()
            frozen = self.state.frozen
            del self.state  # there is no room for two
            shapes = self._steps.shapes[max(self._splits)].without_frozen()
            restored = self._checkpointer.restore(shapes, on_skipped=self._log.say)
        assert restored is not None
        step, state, meta = restored
        self._spikes.went_back(step, meta)
        self.state = dataclasses.replace(state, frozen=frozen)
        self.number = number
        self._read_from(number)
        rows = self._rows(step, number)
        self._log.happened("rolled_back", number, to_step=step, of_rows=rows)
        self._log.say(
            f"{what}: back to the state of step {step}, and on after step {number}; "
            f"rows passed over: {_few(rows)}"
        )
        self._saves.add_seconds(self.number)

    def _stops_in_validation(self) -> bool:
        """Validates, and logs it; whether it was told to stop before its end."""
        with self._phases("validation", self.number, is_one_wait=False):
            if (loss := self._validation_loss()) is not None:
                if not math.isfinite(loss):
                    self._log.happened("not_finite", self.number, validation_loss=loss)
                check_finite(self.number, {"validation_loss": loss})
                self._log.log_validation(self.number, loss)
        self._saves.add_seconds(self.number)
        return loss is None

    def _validation_loss(self) -> float | None:
        """None: told to stop before its end."""
        total, count, stops = 0.0, 0, False
        assert self._data.validation is not None
        shape, sharding, members = self._layout
        validation = validation_batches(
            self._data.validation,
            shape,
            sharding,
            num_batches=self.config.training.validation_batches,
            zigzag_members=members,
        )
        lie = self._steps.shapes[max(self._splits)].all_parameters()
        parameters = relaid(self.state.all_parameters(), lie)

        def parts() -> Iterator[Any]:
            nonlocal stops
            for batch in validation:
                if stops := self._stops():
                    return  # who waits for the end may not wait for long
                yield self._validate(parameters, batch)

        for part, tokens in one_behind(parts()):
            with self._phases("validation", self.number):
                total, count = total + float(part), count + int(tokens)
        if stops:
            return None
        return total / count  # more than 0: `refuse_uncounted` let it pass

    def _save(self) -> None:
        self._settle()
        state = self.state.without_frozen()
        said = self._saves.save(self.number, state, self._meta | self._spikes.meta())
        self._spikes.saved(self.number)
        if said is not None and self.number < self.config.training.num_steps:
            self._log.say(said)

    def _stops(self) -> bool:
        """Before a program: saves, where all processes do so here; whether to stop."""
        minutes = (time.monotonic() - self._saves.at) / 60
        is_due = minutes >= self.config.training.checkpoint_interval_minutes
        if jax.process_index() == 0 and is_due and self.number > self._saves.step:
            self._together.ask("save")
        while act := self._together.before_a_program():
            if self.number > self._first_step:
                self._save()
            if act == "stop":
                return True
        return False

    def _told(self, signal: str) -> None:
        self._together.ask("stop")
        with suppress(OSError):  # a full disk ends the run, and not the ear for signals
            self._log.happened("told", self.number, signal=signal)
        seconds = self._in_flight.seconds_left()
        ends = (
            "goes to its end" if seconds is None else f"should end in {seconds:.0f} s"
        )
        said = (
            f"{signal}: step {self.number} {ends}; then the run is saved and ends; the "
            "same again ends it at once"
        )
        self._log.say(said) if jax.process_index() == 0 else print(said, flush=True)


def _few(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown} and {len(rows) - 8} more" if len(rows) > 8 else shown
