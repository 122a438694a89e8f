"""The picture of a run: its losses over its steps."""

import io
import math
from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class Losses:
    """What the picture shows of a run's rows, in 16 bytes a row.

    Attributes:
      validation: (step, loss) of those that have one.
    """

    def __init__(self):
        self._steps, self._loss = array("q"), array("d")
        self.validation: list[tuple[int, float]] = []

    def add(self, row: Mapping[str, float]) -> None:
        self._steps.append(int(row["step"]))
        self._loss.append(row.get("loss", math.nan))
        if "validation_loss" in row:
            self.add_validation(int(row["step"]), row["validation_loss"])

    def add_validation(self, step: int, loss: float) -> None:
        self.validation.append((step, loss))

    def num_rows(self) -> int:
        return len(self._steps)

    def last(self) -> tuple[int, float] | None:
        """The last step that has a loss."""
        there = (at for at, loss in enumerate(reversed(self._loss)) if loss == loss)
        at = next(there, None)
        return None if at is None else (self._steps[-1 - at], self._loss[-1 - at])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the loss of each, NaN where it has none."""
        return np.array(self._steps), np.array(self._loss)


def draw_loss(losses: Losses, path: Path, *, title: str) -> None:
    """Draws training loss, raw and smoothed, and validation loss over steps, as PNG."""
    steps, loss = losses.arrays()
    finite = np.isfinite(loss)

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
    if losses.validation:
        axes.plot(
            *zip(*losses.validation, strict=True),
            color=orange,
            linewidth=0.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="validation",
        )
    # A name is no TeX, whatever dollars it has; fonts take no halves of surrogates.
    title = title.encode(errors="replace").decode()
    axes.set_title(title, loc="left", fontsize=13, pad=10, parse_math=False)
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
    picture = io.BytesIO()  # a picture that cannot be drawn spoils no file
    figure.savefig(picture)
    path.write_bytes(picture.getvalue())


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
