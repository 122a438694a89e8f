"""What does a token find, and what does it cost, where it reads a part of the cache?

    .venv/bin/python benchmarks/context.py [--json FILE] [--quick]

The model of benchmarks/recall.py learns, on one device, to find 16 keys in rows of up
to 1,024 tokens. Then the hay is read at once under seq=8 and the questions token by
token, over all of the cache, over context memories, and over a window alone; which
needles are found. Then attention of one token in a layer with Llama-3-8B's heads, in
bfloat16 on one CPU device: times are of one run, and their ratio is what to read.
"""

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import recall
from flax import nnx
from rich.console import Console
from rich.table import Table

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.complete import complete_model
from ulysses_jax.inference import ContextMemory
from ulysses_jax.inference.cache import attend_to_cache
from ulysses_jax.inference.context import Remembered, attend_to_remembered
from ulysses_jax.inference.decode import read_prompt, read_token
from ulysses_jax.inference.generation import turned
from ulysses_jax.mesh import simulate_cpu_devices
from ulysses_jax.weights.whole import unbind

TOKENS, PLAN = 1024, ((256, 4, 30), (1024, 2, 30))
# Initial tokens, window, a block's tokens, blocks, representatives.
MEMORIES = {
    "all": None,
    "8 blocks, 16 representatives": ContextMemory(16, 64, 16, 8, 16),
    "8 blocks, 4 representatives": ContextMemory(16, 64, 16, 8, 4),
    "1 block, 4 representatives": ContextMemory(16, 64, 16, 1, 4),
    "the window alone": ContextMemory(16, 64, 16, 0, 4),
}
LLAMA_3_8B = Model(width=4096, num_layers=1, num_heads=32, num_kv_heads=8)
CACHES, REPEATS = [16_384, 65_536, 262_144], 7


def trained(short: Any, plan: Any) -> Any:
    """A model that finds keys, on one device."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        model = Transformer(recall.MODEL, rngs=nnx.Rngs(0))
        model, _ = recall.lengthened(model, short, recall.SHORT_RATE)
        return recall.lengthened(model, plan, 2e-3)[0] if plan else model


def found(
    model: Any, context: ContextMemory | None, num_tokens: int, num_rows: int
) -> list[float]:
    """Of each needle, by depth, how often it is found, on the mesh that is set."""
    (module, values), size = unbind(model), complete_model(model.model)
    rng, right = np.random.default_rng(7), np.zeros(recall.NEEDLES)
    tokens, labels, which = recall.rows(rng, num_rows, num_tokens, evenly=True)
    hay = num_tokens - 2 * recall.NEEDLES
    lengths = np.full(num_rows, hay, np.int32)
    prompt = np.zeros((num_rows, -(-hay // 64) * 64), np.int32)
    prompt[:, :hay] = tokens[:, :hay]
    positions = np.broadcast_to(np.arange(prompt.shape[1]), prompt.shape)
    angles = turned(size, positions, lengths)
    _, cache = read_prompt(module, num_tokens, context, values, prompt, lengths, angles)
    for at in range(hay, num_tokens):
        angles = turned(size, lengths[:, None], lengths + 1)
        logits, cache = read_token(
            module, context, values, cache, tokens[:, at], lengths, angles
        )
        lengths = lengths + 1
        asked = labels[:, at] >= 0
        likeliest = np.asarray(logits).argmax(axis=-1)
        np.add.at(right, which[asked, at], (likeliest == labels[:, at])[asked])
    return (right / num_rows).tolist()


def timed(cache_tokens: int, context: ContextMemory) -> dict[str, Any]:
    """Milliseconds of a token's attention in one layer."""
    model, rng = complete_model(LLAMA_3_8B), np.random.default_rng(0)

    def some(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    q, own = some(1, 1, 32, 128), (some(1, 1, 8, 128), some(1, 1, 8, 128))
    kept = some(1, cache_tokens, 8, 128), some(1, cache_tokens, 8, 128)
    blocks = some(1, cache_tokens // context.block_tokens, 32, 128)
    sums = some(1, context.ring_tokens, 32, dtype=jnp.float32)
    lengths = jnp.asarray([cache_tokens - 1])
    options: Any = dict(scale=None, sinks=None)
    whole = jax.jit(partial(attend_to_cache, model, window=None, **options))
    part = jax.jit(partial(attend_to_remembered, model, context, **options))
    times: list[list[float]] = [[], []]
    for repeat in range(REPEATS + 1):
        for each, (attend, cache) in zip(
            times, [(whole, kept), (part, Remembered(kept, sums, blocks))], strict=True
        ):
            began = time.perf_counter()
            jax.block_until_ready(attend(q, own, cache, lengths))
            if repeat:
                each.append(time.perf_counter() - began)
    all_seconds, seconds = map(statistics.median, times)
    return {
        "cache_tokens": cache_tokens,
        "read_tokens": context.read_tokens,
        "all_seconds": all_seconds,
        "seconds": seconds,
        "ratio": all_seconds / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a few steps: no recall")
    args = parser.parse_args()
    simulate_cpu_devices(recall.SHARDS)
    num_tokens, short, plan, num_rows = TOKENS, recall.SHORT, PLAN, 20
    if args.quick:
        num_tokens, short, plan, num_rows = 256, ((32, 8, 2),), (), 1
    model, console = trained(short, plan), Console(width=110, highlight=False)
    with jax.set_mesh(make_mesh(seq=recall.SHARDS)):
        model = recall.on_mesh(model)
        shares = {
            name: found(model, context, num_tokens, num_rows)
            for name, context in MEMORIES.items()
        }
    table = Table(title=f"of {num_tokens:,} tokens, seq 8: needles found", box=None)
    for name in ("a token reads", "tokens", "all needles", "the first half of the row"):
        table.add_column(name, justify="left" if name == "a token reads" else "right")
    for name, each in shares.items():
        context = MEMORIES[name]
        read = context.read_tokens if context else num_tokens
        half = np.mean(each[: len(each) // 2])
        table.add_row(name, f"{read:,}", f"{np.mean(each):.0%}", f"{half:.0%}")
    console.print(table)
    context = ContextMemory()
    times = [timed(tokens, context) for tokens in CACHES[: 1 if args.quick else None]]
    table = Table(title=f"one CPU device, jax {jax.__version__}", box=None)
    for name in ("cache, tokens", "read", "all, ms", "context memory, ms", "ratio"):
        table.add_column(name, justify="right")
    for row in times:
        table.add_row(
            f"{row['cache_tokens']:,}",
            f"{row['read_tokens']:,}",
            f"{row['all_seconds'] * 1e3:,.1f}",
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['ratio']:,.1f}",
        )
    console.print(table)
    if args.json:
        memory = dataclasses.asdict(context)
        result = {"found": shares, "times": times, "memory": memory}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
