"""What a run shows while it goes and leaves behind: lines, rows, events, a picture."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from ulysses_jax.outside import objects_in_lines
from ulysses_jax.training.events import Events
from ulysses_jax.training.journal import Journal
from ulysses_jax.training.phases import whole_seconds
from ulysses_jax.training.picture import Losses, draw_loss
from ulysses_jax.training.wandb_run import WandbRun

_PLAIN_INTERVAL_SECONDS = 10.0
_MOST_WAITED = 0.05  # of the time, of which nothing is said


class RunLog:
    """Shows a run's progress and writes it to `folder`; a context manager.

    `metrics.jsonl` has one row a step, on disk as soon as the step is logged:
    `step, loss, tokens_per_second, seconds, unix_seconds` (when it was logged),
    whatever else was given, and `validation_loss` where measured. `tensorboard/` has
    the same numbers; `events.jsonl` what else happened (`journal.Journal`), the end by
    an error among it;
    `loss.png` is drawn at every validation and at the end, however that comes. Costs: a
    line written a step, and 16 bytes held; a picture takes a part of a second.

    Args:
      folder: the run's; its last part is the run's name. Made when missing.
      num_steps: of the whole run.
      quiet: plain lines, at most one in 10 seconds, instead of a live bar. So it is
        too where standard output is not a terminal.
      first_step: steps taken before, 0 in a new run. What an interrupted run logged
        after that step is cut off, so that each step appears once.
      is_main: whether this is process 0; the others show and write nothing.
      wandb: what is given all rows too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        quiet: bool,
        first_step: int = 0,
        is_main: bool,
        wandb: WandbRun | None = None,
    ):
        self.folder = folder
        self._wandb = wandb
        self._num_steps, self._first_step = num_steps, first_step
        self._is_main = is_main
        if not is_main:
            return
        self._name = Path(os.path.abspath(folder)).name
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._row: dict[str, float] = {"step": first_step}
        self._losses, self._seconds, self._waited = Losses(), 0.0, 0.0
        with self._on_disk():
            last, self._lost = self._cut_rows(after=first_step)
            self._journal = Journal(folder)
            self._file = open(self._path, "r+b")
            self._row_start = self._file.seek(0, 2)
            # The last step's may have its validation still to come.
            if last.get("step") == first_step:
                self._row = last
                self._row_start -= len(_line(last))
            self._events = Events(folder / "tensorboard", first_step=first_step + 1)
        self._is_drawn = True
        self._clock: tuple[int, float] | None = None  # the first step logged, and when
        self._last_line = -math.inf
        console = Console(highlight=False)
        self._bar = None if quiet or not console.is_terminal else _make_bar(console)
        if self._bar is not None:
            self._task = self._bar.add_task(
                escape(self._name), total=num_steps, completed=first_step, text=""
            )
            self._bar.start()

    def started(self, at: float, **fields: Any) -> None:
        """Logs that the run started, at `time.time()`; and what it takes again."""
        if self._is_main:
            steps, seconds = self._lost
            fields |= {"lost_steps": steps, "lost_seconds": seconds}
            self.happened("started", int(self._row["step"]), at=at, **fields)

    def happened(self, event: str, step: int, **fields: Any) -> None:
        """Logs an event, as `Journal.add`."""
        if self._is_main:
            with self._on_disk():
                self._journal.add(event, step, **fields)

    def log_step(
        self,
        step: int,
        loss: float | None,
        tokens_per_second: float,
        seconds: float,
        **extra: float,
    ) -> None:
        """Logs a training step.

        Args:
          step: steps taken, this one included; more than at the last call.
          loss: nats a token; None: none of the step's tokens counts, which is said, or
            the step was skipped. The row has no loss then.
          tokens_per_second: of all devices together.
          seconds: that the step took.
          extra: other numbers, such as gradient_norm and learning_rate.

        Raises:
          ValueError: a step that was logged before.
        """
        if not self._is_main:
            return
        if step <= self._row["step"]:
            raise ValueError(f"step {step} comes after step {self._row['step']}")
        numbers = dict(tokens_per_second=tokens_per_second, seconds=seconds, **extra)
        numbers["unix_seconds"] = time.time()
        if loss is None:
            if not extra.get("skipped"):
                self.say(f"step {step}: none of its tokens counts, so it has no loss")
        else:
            numbers = {"loss": loss, **numbers}
        self._row_start = self._file.seek(0, 2)
        self._row = {"step": step}
        self._is_drawn = False
        self._add(
            {
                name: value if isinstance(value, int) else float(value)
                for name, value in numbers.items()
            }
        )
        self._count(self._row)
        self._show()

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Adds to the seconds of the last row, which was validated or saved since;
        nothing where this start has logged none."""
        if self._is_main and seconds and self._row["step"] > self._first_step:
            row = self._row
            self._add({name: row.get(name, 0.0) + x for name, x in seconds.items()})

    def log_validation(self, step: int, validation_loss: float) -> None:
        """Logs the loss on validation data, in nats a token, into the row of its step.

        Raises:
          ValueError: the last row is of another step.
        """
        if not self._is_main:
            return
        if step != self._row["step"] or "seconds" not in self._row:
            raise ValueError(f"validation at step {step} comes after log_step({step})")
        self._is_drawn = False
        self._add({"validation_loss": float(validation_loss)})
        self._losses.add_validation(step, validation_loss)
        self._show()
        self._draw()

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._is_main:
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.console.print(text, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """Says where all is, and how it came out."""
        if not self._is_main:
            return
        self._stop()
        losses = self._losses
        if not losses.num_rows():
            self.say(f"{self.folder}: no step was taken")
            return
        self._draw()
        best = min(losses.validation, key=lambda each: each[1], default=None)
        validation = (
            ""
            if best is None
            else f", best validation loss {best[1]:.4f} at step {best[0]}"
        )
        last = losses.last()
        final = (
            "no step has a loss"
            if last is None
            else f"final loss {last[1]:.4f} at step {last[0]}"
        )
        if self._waited > max(_MOST_WAITED * self._seconds, 1.0):
            self.say(
                f"{self._waited:,.1f} of the steps' {self._seconds:,.1f} s were waits "
                "for data: use a faster disk, or prepare it (python -m "
                "ulysses_jax.data prepare)"
            )
        self.say(
            f"{self.folder}: {final}{validation}; see loss.png, metrics.jsonl, "
            "tensorboard/"
        )

    def close(self) -> None:
        """Draws what was not drawn, gives the terminal back and closes the files."""
        if self._is_main and not self._file.closed:
            self._stop()
            self._draw()
            with self._on_disk():
                self._file.close()
                self._events.close()
                self._journal.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        step = int(self._row["step"]) if self._is_main else 0
        try:
            try:
                if isinstance(error, KeyboardInterrupt):
                    self.happened("stopped", step)
                elif error is not None:
                    self.happened("failed", step, why=str(error) or repr(error))
            finally:
                self.close()
        except OSError:
            if error is None:  # else that one is to be read
                raise

    def _add(self, numbers: dict[str, float]) -> None:
        """Writes the row of this step, over itself. Killed in the middle, it leaves a
        row, and at most a piece of the one before, which is none."""
        self._row |= numbers
        with self._on_disk():
            self._file.seek(self._row_start)
            self._file.write(_line(self._row))
            self._file.truncate()
            self._file.flush()  # a killed run keeps the row
            for name, value in numbers.items():
                if name != "unix_seconds":  # TensorBoard has its own
                    self._events.add(name, value, int(self._row["step"]))
        if self._wandb is not None:
            self._wandb.add({"step": self._row["step"], **numbers})

    def _count(self, row: Mapping[str, float]) -> None:
        """What is held of a row."""
        self._losses.add(row)
        self._seconds += row.get("seconds", 0.0)
        self._waited += row.get("data_seconds", 0.0)

    def _cut_rows(self, *, after: int) -> tuple[dict[str, float], tuple[int, float]]:
        """Keeps the rows up to a step; by rename, so that a kill here loses none.

        Returns:
          The last row kept, empty where none is; how many are cut off, and their
          seconds.
        """
        last, steps, seconds = {}, 0, 0.0
        self._path.touch()
        new = self._path.with_suffix(".new")
        with open(new, "wb") as kept:
            for row in rows_in(self._path):  # one at a time: a million take 2 GB
                if row["step"] <= after:
                    kept.write(_line(row))
                    self._count(row)
                    last = row
                else:
                    steps, seconds = steps + 1, seconds + whole_seconds(row)
        new.replace(self._path)
        return last, (steps, seconds)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the metrics of step {self._row['step']} could not be written to "
                f"{self.folder}: {error}; the same command resumes from the last "
                "checkpoint, if there is one"
            ) from error

    def _draw(self) -> None:
        """`loss.png` over all rows, resumed ones too; that it fails ends no run."""
        if self._is_drawn:
            return
        self._is_drawn = True
        path = self.folder / "loss.png"
        try:
            draw_loss(self._losses, path, title=self._name)
        except Exception as error:
            self.say(f"{path} could not be drawn: {error}")

    def _show(self) -> None:
        step, now = int(self._row["step"]), time.monotonic()
        if self._clock is None:
            self._clock = step, now  # the first step compiles: it predicts nothing
        loss = f"loss {self._row['loss']:.4f}" if "loss" in self._row else "no loss"
        rest = f"{self._row['tokens_per_second']:,.0f} tokens/s"
        if step > self._clock[0]:
            pace = (now - self._clock[1]) / (step - self._clock[0])
            rest += f"  {_duration(pace * (self._num_steps - step))} left"
        if "validation_loss" in self._row:
            loss += f"  validation loss {self._row['validation_loss']:.4f}"
            self.say(f"step {step}/{self._num_steps}  {loss}")
        elif self._bar is not None:
            self._bar.update(self._task, completed=step, text=f"{loss}  {rest}")
        elif now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            self.say(f"step {step}/{self._num_steps}  {loss}  {rest}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, without other tools' rows and broken lines."""
    return list(rows_in(path))


def rows_in(path: Path) -> Iterator[dict[str, float]]:
    """`read_rows`, one after another."""
    return filter(_is_row, objects_in_lines(path))


def lacks_validation(folder: Path, step: int) -> bool:
    """Whether a run's last row is of this step, and has no validation's loss: it was
    saved within its validation. On a pod it is process 0 that looks, for all."""
    path = folder / "metrics.jsonl"
    lacks = False
    if jax.process_index() == 0 and path.exists():
        rows = [row for row in rows_in(path) if row["step"] == step]
        lacks = any("validation_loss" not in row for row in rows[-1:])
    if jax.process_count() == 1:
        return lacks
    return bool(multihost_utils.broadcast_one_to_all(np.int32(lacks)))


def _line(row: dict[str, float]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _is_row(value: dict[str, Any]) -> TypeGuard[dict[str, float]]:
    return (
        "step" in value
        and ("loss" in value or value.get("counted_tokens") == 0 or "skipped" in value)
        and type(value["step"]) is int
        and {*map(type, value.values())} <= {int, float}
        and not any(type(x) is int and abs(x) >= 2**63 for x in value.values())
    )


def _make_bar(console: Console) -> Progress:
    columns: list[ProgressColumn] = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[text]}"),
    ]
    return Progress(*columns, console=console, refresh_per_second=4)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
