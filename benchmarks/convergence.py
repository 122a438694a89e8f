"""Does a sharded run learn as an unsharded one does? The paper's convergence figure.

    .venv/bin/python benchmarks/convergence.py [--json FILE] [--plot FILE] [--quick]

A small GPT in float32, trained by `train.py` for 300 steps on the source text of
Python's standard library: on one device, and with seq=4 x fsdp=2 under ZeRO 1, 2 and 3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
GPT = (
    "--model.norm=layer --model.feed-forward=gelu --model.positions=learned "
    "--model.max-positions=512 --model.biases=True --model.tied-embeddings=True "
    "--model.num-kv-heads=4 --model.feed-forward-width=512 "
    "--training.sequence-tokens=512 --training.batch-size=8"
).split()
UNSHARDED = "unsharded"
RUNS = {
    UNSHARDED: ["--run.simulated-cpu-devices=1", "--mesh.data=1", "--mesh.seq=1"],
    **{
        f"seq=4, ZeRO {stage}": [
            "--mesh.data=1",
            "--mesh.fsdp=2",
            "--mesh.seq=4",
            f"--training.zero-stage={stage}",
        ]
        for stage in (1, 2, 3)
    },
}


def losses(name: str, num_steps: int) -> list[float]:
    """The loss of every step, in nats a byte."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/tiny.yaml"]
        command += [*GPT, *RUNS[name], f"--training.num-steps={num_steps}"]
        command += ["--training.validation-batches=0", f"--run.folder={folder}/run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()
    rows = (json.loads(line) for line in text.splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def plot(curves: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 5, "color": "#b9cfe6"},
        {},
        {"linestyle": "--"},
        {"linestyle": ":", "linewidth": 2.5},
    )
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        axes.plot(range(1, len(curve) + 1), curve, label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a byte)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="20 steps")
    args = parser.parse_args()
    num_steps = 20 if args.quick else 300
    curves = {
        name: losses(name, num_steps)
        for name in track(RUNS, transient=True, console=Console(stderr=True))
    }
    want = np.asarray(curves[UNSHARDED])
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        apart = np.abs(np.asarray(curve) / want - 1)
        rows.append(
            {
                "run": name,
                "steps": len(curve),
                "last_loss": curve[-1],
                "largest_difference": float(apart.max()),
                "at_step": int(apart.argmax()) + 1,
                "losses": curve,
            }
        )
    table = Table(title="Relative difference of the loss", box=None)
    for header in ("run", "steps", "last loss", "largest difference", "at step"):
        table.add_column(header, justify="left" if header == "run" else "right")
    for row in rows:
        table.add_row(
            row["run"],
            str(row["steps"]),
            f"{row['last_loss']:.5f}",
            f"{row['largest_difference']:.1e}",
            str(row["at_step"]),
        )
    Console(highlight=False).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
