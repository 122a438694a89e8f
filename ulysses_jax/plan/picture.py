"""A plan as a picture: memory by what it holds, and the predicted time of a step."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ulysses_jax.plan.report import GIB, PARTS, TIMES

COLORS = ("#2f6fb0", "#7fb0dc", "#3f9a6b", "#d9622b", "#c9a24a", "#8a6fb0", "#9a9a9a")


def plot_plan(plan: dict[str, Any], path: Path) -> None:
    """Draws memory by what it holds against the limit, and the predicted time."""
    figure = Figure(figsize=(9, 4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    memory, predicted = plan["memory"], plan["predicted"]
    _stack(left, {k: memory[v] / GIB for k, v in PARTS.items()}, "GiB")
    limit = memory["limit_bytes"] / GIB
    left.axhline(limit, color="#333333", linestyle="--", linewidth=1)
    left.set_ylim(0, 1.12 * max(limit, left.get_ylim()[1]))
    left.text(0.98, limit, f"limit {limit:.1f}", ha="right", va="bottom", fontsize=8)
    left.set_title("memory a GPU (GiB)", loc="left", fontsize=10)
    times = {n.replace("_", " "): predicted[f"{n}_seconds"] for n in TIMES}
    _stack(right, times, "s")
    right.set_title("a step (seconds, predicted)", loc="left", fontsize=10)
    verb = "fits" if plan["fits"] else "does not fit"
    figure.suptitle(
        f"{plan['tokens']:,} tokens on {plan['gpus']}: {verb}", x=0.02, ha="left"
    )
    figure.savefig(path, format="png")


def _stack(axes: Any, parts: dict[str, float], unit: str) -> None:
    bottom = 0.0
    for (label, value), color in zip(parts.items(), COLORS, strict=False):
        text = f"{label}  {value:.2f} {unit}"
        axes.bar([0], [value], bottom=bottom, color=color, width=0.5, label=text)
        bottom += value
    axes.set_xlim(-0.4, 1.6)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(0.38, 0.45),
        reverse=True,
    )
