"""Do rows of several lengths learn as well as one stream cut into rows, and sooner?

    .venv/bin/python benchmarks/decomposition.py [--json FILE] [--quick]

A small Llama, trained by `train.py` on the same number of tokens of the source text of
Python's standard library: as a stream cut into rows of 2,048 (whose documents see each
other, or not), and by `data.lengths` with each curriculum. All validate on the same
rows of a stream. Then, by formula, what a step of Llama-3-8B on 8 H100 would take with
longer rows of the same documents: matrix products and attention alone.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax.config import Config
from ulysses_jax.config_file import load
from ulysses_jax.costs.predict import step_flops
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.data.corpus import find_documents
from ulysses_jax.data.decomposition import buckets
from ulysses_jax.data.rows import Rows
from ulysses_jax.data.split import shuffled, split
from ulysses_jax.data.stream import ByteStream
from ulysses_jax.placement import place

ROOT = Path(__file__).parents[1]
SMALL = (
    "--run.simulated-cpu-devices=1 --mesh.data=1 --mesh.seq=1 --model.width=32 "
    "--model.num-layers=1 --model.feed-forward-width=128 --training.batch-size=2 "
    "--training.sequence-tokens=2048 --training.learning-rate=1e-2 "
    "--training.warmup-steps=10 --training.checkpoint-interval-steps=100000 "
    "--training.validation-interval-steps=0 --training.validation-batches=16 --quiet"
).split()
LENGTHS = [64, 128, 256, 512, 1024, 2048]
STREAM, SEEING = "stream", "stream, documents see each other"
RUNS = {
    STREAM: [],
    f"{STREAM}, another seed": ["--run.seed=1"],
    SEEING: ["--data.mask-documents=false"],
    "uniform": ["--data.curriculum=uniform"],
    "grow-linear": ["--data.curriculum=grow-linear"],
    "grow-p2": ["--data.curriculum=grow-p2"],
    "grow-p2, another seed": ["--data.curriculum=grow-p2", "--run.seed=1"],
    "grow-p2, 8 cycles": ["--data.curriculum=grow-p2"],
    "grow-p2, 8 cycles, another seed": ["--data.curriculum=grow-p2", "--run.seed=1"],
}
LONGEST = [8192, 32768, 131072]


def trained(name: str, num_steps: int) -> dict[str, Any]:
    """What a run came to."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", "configs/tiny.yaml"]
        command += [*SMALL, *RUNS[name], f"--training.num-steps={num_steps}"]
        if not name.startswith(STREAM):
            command += ["--data.lengths", *map(str, LENGTHS)]
        if "cycles" in name:
            command += [f"--data.cycle-steps={num_steps // 8}"]
        command += [f"--run.folder={folder}/run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        config = load(Path(folder) / "run" / "config.yaml")
    rows = [json.loads(line) for line in lines]
    lengths = [row.get("sequence_tokens", 2048) for row in rows]
    flops = sum(flops_of(config, length) for length in lengths)
    if name.startswith(STREAM) and name != SEEING:
        flops = num_steps * flops_of(config, 2048, visible(2048))
    return {
        "run": name,
        "steps": len(rows),
        "steps by length": {n: lengths.count(n) for n in sorted(set(lengths))},
        "validation_loss": rows[-1]["validation_loss"],
        "training_loss": float(np.mean([row["loss"] for row in rows[-20:]])),
        "flops": flops,
    }


def stream() -> ByteStream:
    documents, _ = find_documents("stdlib")
    return ByteStream(shuffled(split(documents, 0.05)[0], 0))


def visible(length: int) -> float:
    """Of the pairs of a row, the part that documents of a stream's rows see."""
    rows = Rows(stream(), length, mask_documents=True)
    pairs = [(rows.lengths(row).astype(float) ** 2).sum() for row in range(len(rows))]
    return float(np.mean(pairs)) / length**2


def parts_of(config: Config, length: int, seen: float = 1) -> tuple[float, float]:
    """FLOPs of a step with rows of one length, by formula: products, attention."""
    tokens = config.training.batch_size * config.training.sequence_tokens
    of_length = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, mask_documents=False),
        training=dataclasses.replace(
            config.training, sequence_tokens=length, batch_size=tokens // length
        ),
    )
    flops = step_flops(of_length, length)
    again = flops["matmul_recompute"], flops["attention_recompute"]
    return flops["matmul"] + again[0], seen * (flops["attention"] + again[1])


def flops_of(config: Config, length: int, seen: float = 1) -> float:
    return sum(parts_of(config, length, seen))


def predicted(longest: int) -> dict[str, Any]:
    """Seconds of a step of Llama-3-8B on 8 H100, in the mean over the data."""
    target = TARGETS["h100"]
    config = load(ROOT / "configs/llama3_8b.yaml")
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training,
            sequence_tokens=longest,
            batch_size=2**20 // longest,
            accumulation_steps=1,
        ),
    )
    degrees = dict(data=1, fsdp=1, ring=1, seq=8, tensor=1)
    config = place(config, degrees)
    peak = 8 * target.peak_flops_per_second(config.model.compute_dtype)

    def seconds(length: int, seen: float = 1) -> float:
        products, attention = parts_of(config, length, seen)
        return (
            products / target.matmul_efficiency
            + attention / target.attention_efficiency
        ) / peak

    lengths = [2**k for k in range(8, longest.bit_length())]
    rows = buckets(stream().ends, lengths).num_rows
    tokens = {length: length * n for length, n in rows.items()}
    total = sum(tokens.values())
    mean = sum(n / total * seconds(length) for length, n in tokens.items())
    seen = visible(longest)
    return {
        "longest": longest,
        "tokens in longest rows": tokens[longest] / total,
        "stream, documents see each other": seconds(longest),
        "stream": seconds(longest, seen),
        "lengths": mean,
        "lengths to stream, seeing": mean / seconds(longest),
        "lengths to stream": mean / seconds(longest, seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="8 steps")
    options = parser.parse_args()
    num_steps = 8 if options.quick else 100
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    names = [STREAM, "grow-p2"] if options.quick else list(RUNS)
    runs = [
        trained(name, num_steps)
        for name in track(names, transient=True, console=Console(stderr=True))
    ]
    table = Table(title=f"{num_steps} steps of 4,096 tokens", box=None)
    headers = (
        "run",
        "validation loss",
        "steps by length",
        "TFLOP, predicted",
        "s a step",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "run" else "right")
    for row in runs:
        counts = row["steps by length"]
        table.add_row(
            row["run"],
            f"{row['validation_loss']:.4f}",
            ", ".join(f"{length}: {n}" for length, n in counts.items()),
            f"{row['flops'] / 1e12:.2f}",
        )
    console.print(table)
    steps = [predicted(longest) for longest in LONGEST]
    table = Table(title="Llama-3-8B, 2^20 tokens a step, 8 H100: predicted s", box=None)
    for name in steps[0]:
        table.add_column(name, justify="right")
    for row in steps:
        table.add_row(
            *(f"{x:,}" if isinstance(x, int) else f"{x:.3f}" for x in row.values())
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"runs": runs, "steps": steps}, indent=1))


if __name__ == "__main__":
    main()
