"""What does a token cost over a cache, beside all tokens computed anew?

    .venv/bin/python benchmarks/generate.py [--json FILE] [--quick]

A small Llama on one CPU device: the median time of a step over a cache that holds a
prompt, beside that of a forward pass over the prompt, which is what a token would take
without a cache; times are of one run, and their ratio is what to read. Then the bytes
that a step of Llama-3-8B receives a device, in bfloat16, by formula; the tests hold the
formula against compiled programs.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, use_abstract_mesh
from rich.console import Console
from rich.table import Table

from ulysses_jax import Model, Transformer
from ulysses_jax.complete import complete_model
from ulysses_jax.inference.cache import cache_bytes
from ulysses_jax.inference.generation import stream
from ulysses_jax.inference.request import Request
from ulysses_jax.inference.sent import token_bytes
from ulysses_jax.mesh import AXES, simulate_cpu_devices

SMALL = Model(width=256, num_heads=8, num_kv_heads=2, compute_dtype="float32")
LLAMA_3_8B = Model(
    vocab_size=128_256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    feed_forward_width=14_336,
)
LENGTHS = [512, 2048, 8192]
MESHES: list[dict[str, int]] = [
    dict(seq=8),
    dict(seq=16),
    dict(fsdp=2, seq=8),
    dict(seq=2, tensor=4),
    dict(tensor=8),
]
TOKENS, REPEATS = 16, 3


def timed(model: Transformer, prompt_tokens: int) -> dict[str, Any]:
    """Seconds of the prompt, and of each token after it."""
    prompt = np.random.default_rng(0).integers(0, 256, prompt_tokens).tolist()
    prompts, tokens = [], []
    for repeat in range(REPEATS + 1):
        at = [time.perf_counter()]
        for _ in stream(model, [prompt], Request(max_tokens=TOKENS)):
            at.append(time.perf_counter())
        if repeat:  # the first compiles
            prompts.append(at[1] - at[0])
            tokens += [b - a for a, b in zip(at[1:], at[2:], strict=False)]
    seconds = statistics.median(prompts), statistics.median(tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "anew_seconds": seconds[0],
        "token_seconds": seconds[1],
        "ratio": seconds[0] / seconds[1],
    }


def sent(degrees: dict[str, int], cache_tokens: int) -> dict[str, Any]:
    """Of Llama-3-8B, one row a data-parallel part."""
    sizes = {axis: degrees.get(axis, 1) for axis in AXES}
    model = complete_model(dataclasses.replace(LLAMA_3_8B, compute_dtype="bfloat16"))
    with use_abstract_mesh(AbstractMesh(tuple(sizes.values()), tuple(sizes))):
        rows = sizes["data"] * sizes["fsdp"]
        return {
            "mesh": degrees,
            "received_bytes": token_bytes(model, 1),
            "cache_bytes": cache_bytes(model, rows, cache_tokens),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="the shortest prompt")
    args = parser.parse_args()
    simulate_cpu_devices(1)
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    times = [timed(model, tokens) for tokens in LENGTHS[: 1 if args.quick else None]]
    sends = [sent(degrees, 2**20) for degrees in MESHES]
    console = Console(width=110, highlight=False)
    table = Table(title=f"one CPU device, jax {jax.__version__}", box=None)
    for name in ("prompt tokens", "all anew, ms", "a token, ms", "ratio"):
        table.add_column(name, justify="right")
    for row in times:
        table.add_row(
            f"{row['prompt_tokens']:,}",
            f"{row['anew_seconds'] * 1e3:,.1f}",
            f"{row['token_seconds'] * 1e3:,.1f}",
            f"{row['ratio']:,.1f}",
        )
    console.print(table)
    table = Table(title="Llama-3-8B, a device, a row: predicted", box=None)
    table.add_column("mesh")
    for name in ("cache of 1M tokens, GiB", *sends[0]["received_bytes"], "KB in all"):
        table.add_column(name, justify="right")
    for row in sends:
        received = row["received_bytes"].values()
        table.add_row(
            ", ".join(f"{axis} {n}" for axis, n in row["mesh"].items()),
            f"{row['cache_bytes'] / 2**30:,.1f}",
            *(f"{each / 1e3:,.0f}" for each in (*received, sum(received))),
        )
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"times": times, "sent": sends}, indent=1))


if __name__ == "__main__":
    main()
