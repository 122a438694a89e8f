"""The peak memory of a step against the length of the sequence: is it linear?

    .venv/bin/python benchmarks/memory.py [--json FILE] [--quick]

Compiles the trainer's own step for a small model on 8 simulated CPU devices, one
sequence over all of them, and reads the temporary memory of a device off the program.
Each rung of the memory stack adds to the one before; the last row is a control that
must not be linear. `slope` is that of log bytes over log tokens; `exponent` is fitted
to how much memory grows when the tokens double, so that the constant part (weights,
gradients, tiles) cannot flatten it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from jax.sharding import AxisType
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax import make_mesh
from ulysses_jax.complete import complete
from ulysses_jax.config import Config
from ulysses_jax.config_file import from_dict
from ulysses_jax.mesh import simulate_cpu_devices
from ulysses_jax.placement import place
from ulysses_jax.plan.compile import compile_on

K = 1024
LENGTHS = [8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K]
QUICK = LENGTHS[2:5]
# What each rung changes in the one before. Tiles are shorter than the shortest shard.
RUNGS: dict[str, dict[str, Any]] = {
    "nothing": {"remat": "none", "loss_tile_tokens": 2**31 - 1},
    "remat full": {"remat": "full"},
    "+ tiled feed-forward": {"mlp_tile_tokens": 256},
    "+ tiled loss": {"loss_tile_tokens": 256},
    "+ sequence chunks": {"sequence_chunk_tokens": 256},
    "+ head chunks": {"head_chunks": 2},
}
FULL_STACK = list(RUNGS)[-1]
# [T, T] in memory, on the stack before layers run in pieces, which it has not.
CONTROL, CONTROL_STACK = "dense attention", "+ tiled loss"
# Machine code that never runs need not be fast; buffers are assigned before it is made.
UNOPTIMISED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def options_of(rung: str) -> dict[str, Any]:
    """The section `memory` of a rung."""
    options: dict[str, Any] = {}
    for name, changes in RUNGS.items():
        options |= changes
        if name == (CONTROL_STACK if rung == CONTROL else rung):
            break
    return options


def make_config(rung: str, tokens: int) -> Config:
    """A model so small that activations outweigh weights from 8K tokens on."""
    values = {
        "model": {
            "vocab_size": 512,
            "width": 64,
            "num_layers": 2,
            "num_heads": 16,
            "num_kv_heads": 8,
            "feed_forward_width": 256,
            "attention": "reference" if rung == CONTROL else "blockwise",
            "compute_dtype": "float32",  # a CPU has no other: XLA would widen it
        },
        "training": {"batch_size": 1, "sequence_tokens": tokens},
        "mesh": {"seq": 8},
        "memory": options_of(rung),
    }
    return complete(from_dict(Config, values), name="memory")


def temp_bytes(rung: str, tokens: int) -> int:
    """Temporary memory of a device in a step of one sequence, in bytes, compiled."""
    mesh = make_mesh(seq=8, axis_type=AxisType.Explicit)
    config = place(make_config(rung, tokens), dict(mesh.shape))
    program = compile_on(config, mesh, compiler_options=UNOPTIMISED)
    return program.stats["temp_size"]


def exponent(points: dict[int, int]) -> float:
    """The least-squares slope, in logarithms, of how much bytes grow over tokens.

    Args:
      points: bytes by tokens, each length twice the one before, three or more. Of a +
        b T^n bytes the growth from T to 2T is b (2^n - 1) T^n: a cancels out.
    """
    lengths = sorted(points)
    if len(lengths) < 3 or any(b != 2 * a for a, b in _pairs(lengths)):
        raise ValueError(f"the slope needs three or more doublings, not {lengths}")
    growth = {a: points[b] - points[a] for a, b in _pairs(lengths)}
    if min(growth.values()) <= 0:
        raise ValueError(f"more tokens take no more memory: {points}")
    return slope(growth)


def slope(points: dict[int, int]) -> float:
    """The least-squares slope of the logarithm of bytes over that of tokens."""
    x = [math.log(tokens) for tokens in points]
    y = [math.log(size) for size in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def bytes_a_token(points: dict[int, int]) -> float:
    """Of a device, for one more token of the sequence, at the longest lengths."""
    before, last = sorted(points)[-2:]
    return (points[last] - points[before]) / (last - before)


def _pairs(values: list[int]) -> list[tuple[int, int]]:
    return list(zip(values, values[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="three rungs and lengths")
    args = parser.parse_args()
    simulate_cpu_devices(8)
    lengths = QUICK if args.quick else LENGTHS
    rungs = [*RUNGS, CONTROL]
    if args.quick:
        rungs = [rungs[0], FULL_STACK, CONTROL]
    rows = [
        {"rung": rung, "tokens": tokens, "temp_bytes": temp_bytes(rung, tokens)}
        for rung, tokens in track(
            [(rung, tokens) for rung in rungs for tokens in lengths],
            transient=True,
            console=Console(stderr=True),
        )
    ]
    title = "MiB of temporary memory a device, 8 devices; the last row is the control"
    table = Table(title=title, box=None)
    table.add_column("tokens")
    for tokens in lengths:
        table.add_column(f"{tokens // K}K", justify="right")
    for name in ("bytes a token", "slope", "exponent"):
        table.add_column(name, justify="right")
    exponents = {}
    for rung in rungs:
        points = {r["tokens"]: r["temp_bytes"] for r in rows if r["rung"] == rung}
        exponents[rung] = exponent(points)
        table.add_row(
            rung,
            *(f"{points[tokens] / 2**20:,.1f}" for tokens in lengths),
            f"{bytes_a_token(points):,.0f}",
            f"{slope(points):.3f}",
            f"{exponents[rung]:.3f}",
        )
    Console(width=130, highlight=False).print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"rows": rows, "exponents": exponents}, indent=1)
        )


if __name__ == "__main__":
    main()
