"""What does attention cost by its mask, and what do recurrences in its place?

    .venv/bin/python benchmarks/attention.py [--json FILE] [--quick | --tokens 16384]
                                             [--without-masks]

Forward and backward on one CPU device, two heads of 16, float32, causal, 1K to 64K
tokens: of the blockwise kernel, whose work should follow the visible pairs, and of
linear attention, the gated delta rule and attention to 64 mixtures of all keys (which
is not causal), whose should follow the tokens. The block-sparse layout shows a block of
256 queries its own and random earlier ones, an eighth of the pairs. All rows of a
length take turns: `seconds` is the median of a row's calls, and `times_dense` that of
its ratios to the dense call of the same round, which a machine that slows down for a
while leaves alike. The exponent is that of the tokens by which the seconds grow, from
the shortest length to the longest. temp_bytes are XLA's, of the same program.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ulysses_jax import gated_delta_rule, linear_attention, low_rank_attention
from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.layouts import random
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import attention_of
from ulysses_jax.attention.select import PARTS

NUM_HEADS, HEAD_SIZE = 2, 16
BLOCK, DENSITY = 256, 1 / 8
WINDOW = DOCUMENT = 1024
RANK = 64
TOKENS = [1024 * 2**n for n in range(7)]

with_sinks = attention_of(PARTS["blockwise"])


def packed(tokens: int) -> Mask:
    ids = (jnp.arange(tokens, dtype=jnp.int32) // DOCUMENT)[None]
    return Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids)


def sparse(tokens: int) -> Mask:
    layout = random(tokens // BLOCK, block_tokens=BLOCK, density=DENSITY)
    return Mask(causal=True, layout=layout)


def packed_sparse(tokens: int) -> Mask:
    return dataclasses.replace(packed(tokens), layout=sparse(tokens).layout)


DENSE, SINKS = "dense", "sinks"
MASKS: dict[str, Callable[[int], Mask]] = {
    DENSE: lambda tokens: Mask(causal=True),
    f"window {WINDOW:,}": lambda tokens: Mask(causal=True, window=WINDOW),
    f"documents of {DOCUMENT:,}": packed,
    f"block-sparse, {DENSITY:.1%}": sparse,
    f"block-sparse, documents of {DOCUMENT:,}": packed_sparse,
    SINKS: lambda tokens: Mask(causal=True),
}
LINEAR, DELTA = "linear, decay by token", "gated delta rule"
LOW_RANK = f"low-rank, {RANK} mixtures"
KINDS = (LINEAR, DELTA, LOW_RANK)
ROWS = (*MASKS, *KINDS)
ONE_DEVICE = jax.sharding.get_abstract_mesh()


def rows_of(
    tokens: int, names: tuple[str, ...] = ROWS, rounds: int = 5
) -> list[dict[str, Any]]:
    """These rows at one length, dense among them."""
    programs = {name: program(name, tokens) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (run, arguments) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, (run, _) in programs.items():
        ratios = [x / d for x, d in zip(seconds[name], seconds[DENSE], strict=True)]
        stats = run.memory_analysis()
        assert stats is not None
        rows.append(
            {
                "attention": name,
                "tokens": tokens,
                "seconds": statistics.median(seconds[name]),
                "times_dense": statistics.median(ratios),
                "temp_bytes": stats.temp_size_in_bytes,
            }
        )
    return rows


def program(name: str, tokens: int) -> tuple[Any, tuple[Any, ...]]:
    """One row's, compiled and run once, and its arguments."""
    shape = (1, tokens, NUM_HEADS, HEAD_SIZE)
    q, k, v, upstream, gates = (
        jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 5)
    )
    log_decay, beta = -jax.nn.softplus(gates[..., 0]), jax.nn.sigmoid(gates[..., 1])
    projection = jax.random.normal(jax.random.key(1), (*shape[:3], RANK))
    more = {
        LINEAR: (log_decay,),
        DELTA: (log_decay, beta),
        LOW_RANK: (projection,),
        SINKS: (jnp.ones(2),),
    }
    mask = MASKS[name](tokens) if name in MASKS else None

    def both_ways(q, k, v, more, upstream, mask):
        attend = partial(ATTENTIONS.get(name, masked), mask)
        out, pullback = jax.vjp(attend, q, k, v, *more)
        return out, pullback(upstream)

    arguments = q, k, v, more.get(name, ()), upstream, mask
    run = jax.jit(both_ways).lower(*arguments).compile()
    jax.block_until_ready(run(*arguments))
    return run, arguments


def masked(mask, q, k, v):
    return blockwise_attention(q, k, v, mask=mask)


def sinking(mask, q, k, v, sinks):
    return with_sinks(q, k, v, mask=mask, sinks=sinks)


def linear(_, q, k, v, log_decay):
    return linear_attention(q, k, v, mesh=ONE_DEVICE, log_decay=log_decay)


def delta(_, q, k, v, log_decay, beta):
    return gated_delta_rule(q, k, v, mesh=ONE_DEVICE, log_decay=log_decay, beta=beta)


def low_rank(_, q, k, v, projection):
    return low_rank_attention(q, k, v, mesh=ONE_DEVICE, projection=projection)


ATTENTIONS = {SINKS: sinking, LINEAR: linear, DELTA: delta, LOW_RANK: low_rank}


def exponent(found: dict[Any, Any], name: str, lengths: list[int]) -> float:
    """Of the tokens, by which a row's seconds grow; NaN: of one length."""
    short, long = lengths[0], lengths[-1]
    if short == long:
        return math.nan
    grown = found[name, long]["seconds"] / found[name, short]["seconds"]
    return math.log(grown) / math.log(long / short)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds, and how many times faster than dense."""
    lengths = sorted({each["tokens"] for each in rows})
    found = {(each["attention"], each["tokens"]): each for each in rows}
    table = Table(title="Milliseconds of attention, forward and backward, on a CPU")
    table.add_column("attention")
    for tokens in lengths:
        table.add_column(f"{tokens // 1024}K", justify="right")
    table.add_column("exponent", justify="right")
    table.add_column("MiB at most", justify="right")
    for name in dict.fromkeys(each["attention"] for each in rows):
        cells = []
        for tokens in lengths:
            seconds = found[name, tokens]["seconds"]
            faster = f" ({1 / found[name, tokens]['times_dense']:.2f}x)"
            cells.append(f"{seconds * 1e3:,.1f}{faster * (name != DENSE)}")
        first, last = (
            found[name, each]["seconds"] for each in (lengths[0], lengths[-1])
        )
        grown = math.log(lengths[-1] / lengths[0]) if len(lengths) > 1 else math.inf
        cells.append(f"{math.log(last / first) / grown:.2f}")
        most = max(found[name, tokens]["temp_bytes"] for tokens in lengths)
        table.add_row(name, *cells, f"{most / 2**20:.1f}")
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows")
    parser.add_argument("--quick", action="store_true", help="to 8K tokens")
    parser.add_argument(
        "--tokens", type=int, choices=TOKENS, metavar="N", help="of one length alone"
    )
    parser.add_argument(
        "--without-masks", action="store_true", help="dense and the kinds beside it"
    )
    options = parser.parse_args()
    names = (DENSE, *KINDS) if options.without_masks else ROWS
    lengths = TOKENS[:4] if options.quick else TOKENS
    lengths = [options.tokens] if options.tokens else lengths
    rows: list[dict[str, Any]] = []
    for tokens in track(lengths, console=Console(stderr=True)):
        rows += rows_of(tokens, names)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
