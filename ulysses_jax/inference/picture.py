"""Pictures of an evaluation: loss by position, and recall by depth and length."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ulysses_jax.inference.evaluate import Evaluated

Panel = tuple[str, Sequence[Sequence[float]]]
"""A title, and the share of right answers: a row a depth, a column a length."""


def draw_by_position(evaluated: Evaluated, *, title: str) -> bytes:
    """The mean loss of tokens over how many stand before them, as PNG."""
    figure, (axes,) = _figure(1, (7, 4))
    buckets = evaluated.by_position
    middles = [(bucket.first * bucket.last) ** 0.5 for bucket in buckets]
    losses = [bucket.loss for bucket in buckets]
    axes.plot(middles, losses, color="#2f6fb0", marker="o", markersize=4)
    axes.axhline(evaluated.loss, color="#9a9a9a", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("tokens before it")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(_plain(title), loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    return _png(figure)


def draw_recall(
    panels: Sequence[Panel], depths: Sequence[float], lengths: Sequence[int]
) -> bytes:
    """Heat maps side by side, as PNG: from no answer right, red, to all, green."""
    size = (1.5 + len(panels) * max(2.6, 0.7 * len(lengths)), 1.6 + 0.3 * len(depths))
    figure, places = _figure(len(panels), size)
    images = []
    for axes, (title, accuracy) in zip(places, panels, strict=True):
        images.append(
            axes.imshow(accuracy, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        )
        for y, row in enumerate(accuracy):
            for x, value in enumerate(row):
                axes.text(
                    x,
                    y,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if 0.15 < value < 0.85 else "white",
                )
        axes.set_xticks(range(len(lengths)), [f"{each:,}" for each in lengths])
        axes.set_yticks(range(len(depths)), [f"{each:.0%}" for each in depths])
        axes.tick_params(length=0, labelsize=8)
        axes.set_xlabel("tokens of the row")
        axes.set_title(_plain(title), loc="left", fontsize=10, parse_math=False)
    places[0].set_ylabel("depth of the needle")
    figure.colorbar(images[0], ax=list(places), label="answers right", format="{x:.0%}")
    return _png(figure)


def _figure(num: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    # The object interface: pyplot would keep figures and a backend in global state.
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, num, squeeze=False)[0]


def _plain(title: str) -> str:
    return title.encode(errors="replace").decode()


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
