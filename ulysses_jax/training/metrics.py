"""What a run shows while it goes and leaves behind: lines, rows, events, a picture."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from tensorboardX import SummaryWriter

_PLAIN_INTERVAL_SECONDS = 10.0


class RunLog:
    """Shows a run's progress and writes it to `folder`; a context manager.

    `metrics.jsonl` has one row a step, on disk as soon as the step is logged:
    `step, loss, tokens_per_second, seconds`, whatever else was given, and
    `validation_loss` where measured. `tensorboard/` has the same numbers; `finish`
    adds `loss.png`. Costs: a line written a step.

    Args:
      folder: the run's; its last part is the run's name. Made when missing.
      num_steps: of the whole run.
      quiet: plain lines, at most one in 10 seconds, instead of a live bar. So it is
        too where standard output is not a terminal.
      first_step: steps taken before, 0 in a new run. What an interrupted run logged
        after that step is cut off, so that each step appears once.
      is_main: whether this is process 0; the others show and write nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        quiet: bool,
        first_step: int = 0,
        is_main: bool,
    ):
        self.folder = folder
        self._num_steps = num_steps
        self._is_main = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _cut_rows(self._path, after=first_step)
        self._file = open(self._path, "r+b")
        self._row_start = self._file.seek(0, 2)
        self._row: dict[str, float] = {"step": first_step}
        self._events = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10
        )
        self._clock: tuple[int, float] | None = None  # the first step logged, and when
        self._last_line = -math.inf
        console = Console(highlight=False)
        self._bar = None if quiet or not console.is_terminal else _make_bar(console)
        if self._bar is not None:
            self._task = self._bar.add_task(
                folder.name, total=num_steps, completed=first_step, text=""
            )
            self._bar.start()

    def log_step(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        seconds: float,
        **extra: float,
    ) -> None:
        """Logs a training step.

        Args:
          step: steps taken, this one included; more than at the last call.
          loss: nats a token.
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
        numbers = dict(
            loss=loss, tokens_per_second=tokens_per_second, seconds=seconds, **extra
        )
        self._row_start = self._file.seek(0, 2)
        self._row = {"step": step}
        self._add({name: float(value) for name, value in numbers.items()})
        self._show()

    def log_validation(self, step: int, validation_loss: float) -> None:
        """Logs the loss on validation data, in nats a token, into the row of its step.

        Raises:
          ValueError: the last row is of another step.
        """
        if not self._is_main:
            return
        if step != self._row["step"] or "loss" not in self._row:
            raise ValueError(f"validation at step {step} comes after log_step({step})")
        self._add({"validation_loss": float(validation_loss)})
        self._show()

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._is_main:
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.console.print(text, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """Draws `loss.png` over all rows, resumed ones too, and says where all is."""
        if not self._is_main:
            return
        self._stop()
        rows = read_rows(self._path)
        if not rows:
            self.say(f"{self.folder}: no step was taken")
            return
        draw_loss(rows, self.folder / "loss.png", title=self.folder.name)
        measured = [row for row in rows if "validation_loss" in row]
        best = min(measured, key=lambda row: row["validation_loss"], default=None)
        validation = (
            ""
            if best is None
            else (
                f", best validation loss {best['validation_loss']:.4f} at step "
                f"{best['step']}"
            )
        )
        self.say(
            f"{self.folder}: final loss {rows[-1]['loss']:.4f} at step "
            f"{rows[-1]['step']}{validation}; see loss.png, metrics.jsonl, tensorboard/"
        )

    def close(self) -> None:
        """Gives the terminal back and closes the files."""
        if self._is_main:
            self._stop()
            self._file.close()
            self._events.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def _add(self, numbers: dict[str, float]) -> None:
        """Writes the row of this step, over itself: it only ever grows."""
        self._row |= numbers
        self._file.seek(self._row_start)
        self._file.write(json.dumps(self._row).encode() + b"\n")
        self._file.flush()  # a killed run keeps the row
        for name, value in numbers.items():
            self._events.add_scalar(name, value, int(self._row["step"]))

    def _show(self) -> None:
        step, now = int(self._row["step"]), time.monotonic()
        if self._clock is None:
            self._clock = step, now  # the first step compiles: it predicts nothing
        loss = f"loss {self._row['loss']:.4f}"
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
    """The rows of a `metrics.jsonl`; a line that a killed run left half is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def draw_loss(rows: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Draws training loss, raw and smoothed, and validation loss over steps, as PNG."""
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows])
    finite = np.isfinite(loss)
    measured = [row for row in rows if "validation_loss" in row]

    # The object interface: pyplot would keep figures and a backend in global state.
    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    blue, orange, grey = "#2f6fb0", "#d9622b", "#5a5a5a"
    axes.plot(steps, loss, color=blue, linewidth=0.6, alpha=0.35)
    axes.plot(
        steps[finite],
        _smooth(loss[finite]),
        color=blue,
        linewidth=1.8,
        label="training",
        marker="o" if len(steps) == 1 else None,
    )
    if measured:
        axes.plot(
            [row["step"] for row in measured],
            [row["validation_loss"] for row in measured],
            color=orange,
            linewidth=0.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="validation",
        )
    axes.set_title(title, loc="left", fontsize=13, pad=10)
    axes.set_xlabel("step", color=grey)
    axes.set_ylabel("loss (nats per token)", color=grey)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.015)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color="#c8c8c8", labelcolor=grey)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c8c8c8")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def _smooth(loss: np.ndarray) -> np.ndarray:
    """The mean over a centred window of a 30th of the run, as far as there is one.

    The start falls steeply, so the window narrows there on both sides.
    """
    half = len(loss) // 60
    at = np.arange(len(loss))
    first = at - np.minimum(half, at)
    last = np.minimum(at + np.minimum(half, at), len(loss) - 1)
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _cut_rows(path: Path, *, after: int) -> None:
    """Keeps the rows up to a step; by rename, so that a kill here loses none."""
    rows = read_rows(path) if path.exists() else []
    kept = "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= after)
    new = path.with_suffix(".new")
    new.write_text(kept)
    new.replace(path)


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
