"""What fills a GPU, and what does each part of the memory stack take away?

    .venv-plan/bin/python benchmarks/gpu_memory.py [--json FILE] [--plot FILE] [--quick]

Rows are Llama-3-8B at 524,288 tokens on 8 H100, a part more in each, read
off programs compiled for them; what XLA does not see is estimated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax.config_file import load
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan.picture import COLORS
from ulysses_jax.plan.plan import Cluster, make_plan
from ulysses_jax.plan.report import GIB, PARTS

CONFIG = Path(__file__).parents[1] / "configs" / "llama3_8b.yaml"
TOKENS = 524_288
NOT_TILED = f"--memory.loss-tile-tokens={TOKENS}"
# One document a sequence, and no option but the rung's.
PLAIN = ["--data.no-mask-documents", "--memory.no-auto"]
RUNGS = {
    "remat full": [NOT_TILED],
    "+ loss tiles": [],
    "+ feed-forward tiles": ["--memory.mlp-tile-tokens=8192"],
    "+ inputs offloaded": ["--memory.mlp-tile-tokens=8192", "--memory.offload=inputs"],
    "in chunks, inputs offloaded": [
        "--memory.sequence-chunk-tokens=8192",
        "--memory.offload=inputs",
    ],
}


def row(rung: str) -> dict[str, Any]:
    one = ["--training.batch-size=1", f"--training.sequence-tokens={TOKENS}"]
    config = load(CONFIG, [*one, *PLAIN, *RUNGS[rung]])
    plan = make_plan(config, Cluster(TARGETS["h100"], 1, 8))
    memory = plan["memory"]
    parts = {name: memory[key] for name, key in PARTS.items()}
    return {"rung": rung, "limit_bytes": memory["limit_bytes"], "parts_bytes": parts}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, each in enumerate(rows):
        left = 0.0
        for part, color in zip(PARTS, COLORS, strict=True):
            width = each["parts_bytes"][part] / GIB
            label = part if y == 0 else None
            axes.barh(y, width, left=left, color=color, height=0.6, label=label)
            left += width
        inside = left > 70  # else it would stand beyond the limit
        x, side = (left - 0.7, "right") if inside else (left + 0.7, "left")
        axes.text(x, y, f"{left:.1f}", va="center", ha=side, fontsize=8)
    limit = rows[0]["limit_bytes"] / GIB
    axes.axvline(limit, color="#333333", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [each["rung"] for each in rows])
    axes.invert_yaxis()
    axes.set_title(
        f"Llama-3-8B at {TOKENS:,} tokens: GiB of an H100 (dashed: its limit)",
        loc="left",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(0.92, 0))
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="two rows")
    args = parser.parse_args()
    rungs = list(RUNGS)[: 2 if args.quick else None]
    console = Console(stderr=True)
    rows = [row(rung) for rung in track(rungs, transient=True, console=console)]
    table = Table(title=f"GiB of an H100, {TOKENS:,} tokens on 8", box=None)
    table.add_column("with")
    for part in (*PARTS, "all"):
        table.add_column(part, justify="right")
    for each in rows:
        sizes = [*each["parts_bytes"].values()]
        table.add_row(each["rung"], *(f"{n / GIB:.1f}" for n in (*sizes, sum(sizes))))
    Console(width=110, highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
