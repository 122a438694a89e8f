"""Does a sequence that is spread over devices remember as one on one device does?

    .venv/bin/python benchmarks/recall.py [--json FILE] [--png FILE] [--quick]

A row is a haystack of filler with 16 needles, a key and its value each, and then asks
for the value of every key. A model of two layers learns it on short rows on one device,
then on rows of up to 4,096 tokens under seq=8: with Ulysses' exchange, and without it,
where each device attends to its own tokens. The accuracy by a needle's depth is
measured on rows that neither has seen.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.config import Rope
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.inference.picture import draw_recall
from ulysses_jax.inference.scoring import make_score
from ulysses_jax.training.loss import cross_entropy
from ulysses_jax.training.step import batch_spec

NUM_KEYS, NUM_VALUES, NUM_FILLERS = 32, 32, 32
NEEDLES, QUESTIONS, SHARDS = 16, 64, 8
# The first layer shows each value the key before it; half of a head's features are not
# turned by RoPE, so that a key is found at any distance. Normed queries and keys make
# 100 steps of what took more than 500.
MODEL = Model(
    vocab_size=NUM_KEYS + NUM_VALUES + NUM_FILLERS,
    width=64,
    num_layers=2,
    num_heads=8,
    head_size=16,
    feed_forward_width=64,
    pattern=("window", "full"),
    window=2,
    rope=Rope(base=10_000.0, fraction=0.5),
    query_key_norm=True,
    attention_scale=0.5,
    tied_embeddings=True,
    compute_dtype="float32",
)
# Tokens of a row, rows of a batch, steps.
SHORT = ((32, 64, 100), (128, 16, 60))
# And the peak of the rate, which rises and decays in each.
LONG = (
    (((1024, 2, 30), (4096, 1, 30)), 2e-3),
    (((4096, 1, 60),), 2e-3),
    (((4096, 1, 60),), 2e-3),
    (((4096, 1, 40),), 5e-4),
)
LENGTHS = (1024, 4096)
SHORT_RATE = 5e-3


def rows(
    rng: np.random.Generator, num: int, num_tokens: int, *, evenly: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels (the values asked for), and each label's needle.

    A row begins with filler: what has no token before it lies apart from all else.

    Args:
      evenly: needle i of n lies at depth i / (n - 1); else anywhere.
    """
    needles = min(NEEDLES, num_tokens // 8)
    questions = needles if evenly else min(QUESTIONS, num_tokens // 4)
    hay = num_tokens - 2 * questions
    fillers = NUM_KEYS + NUM_VALUES, MODEL.vocab_size
    tokens = rng.integers(*fillers, (num, num_tokens), np.int32)
    labels = np.full((num, num_tokens), IGNORED, np.int32)
    which = np.zeros((num, num_tokens), np.int32)
    for i in range(num):
        keys = rng.permutation(NUM_KEYS)[:needles]
        values = NUM_KEYS + rng.integers(0, NUM_VALUES, needles)
        between = 4 + 2 * rng.permutation(hay // 2 - 3)[: needles - 2]
        at = np.array([2, hay - 2, *between])  # no depth is rare
        if evenly:
            at = 2 * np.round(np.linspace(1, hay // 2 - 1, needles)).astype(int)
        tokens[i, at], tokens[i, at + 1] = keys, values
        rounds = [rng.permutation(needles) for _ in range(questions // needles + 1)]
        asked = np.concatenate(rounds)[:questions]
        question = hay + 2 * np.arange(questions)
        tokens[i, question], tokens[i, question + 1] = keys[asked], values[asked]
        labels[i, question], which[i, question] = values[asked], asked
    return tokens, labels, which


def batch_of(
    tokens: np.ndarray, labels: np.ndarray, *, exchanged: bool
) -> dict[str, np.ndarray]:
    """As the trainer's, of one part; without the exchange each shard is a segment."""
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "labels": labels, "positions": place}
    if not exchanged:
        batch["segment_ids"] = place // (tokens.shape[1] // SHARDS) + 1
    return {name: values[None] for name, values in batch.items()}


def lengthened(
    model: Any, plan: Any, peak: float, *, exchanged: bool = True, seed: int = 0
) -> tuple[Any, float]:
    """The model after the steps of a plan, on the mesh that is set, and its loss."""
    graph, parameters = nnx.split(model)
    num_steps = sum(steps for _, _, steps in plan)
    warmup = min(30, num_steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0, peak, warmup, num_steps, peak / 10)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01)
    )
    state = optimizer.init(parameters)

    def loss(parameters: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, parameters)
        ids = {name: values[0] for name, values in batch.items()}
        labels = ids.pop("labels")
        total = cross_entropy(model.features(**ids), model.head, labels, 1024)
        return total / jnp.sum(labels != IGNORED)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, batch)
        changes, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, changes), state, value

    rng, value = np.random.default_rng(seed), float("nan")
    for num_tokens, num_rows, steps in plan:
        started = time.monotonic()
        for number in range(1, steps + 1):
            tokens, labels, _ = rows(rng, num_rows, num_tokens)
            batch = batch_of(tokens, labels, exchanged=exchanged)
            parameters, state, value = step(parameters, state, batch)
            if number % 25 == 0 or number == steps:
                say = f"{num_tokens} tokens, step {number}: loss {float(value):.4f}"
                print(f"{say}, {time.monotonic() - started:.0f} s", flush=True)
    return nnx.merge(graph, parameters), float(value)


def accuracy(
    model: Any, num_tokens: int, num_rows: int, *, exchanged: bool
) -> list[float]:
    """By depth of the needle, on the mesh that is set."""
    score, mesh = make_score(model), jax.sharding.get_mesh()
    lie = NamedSharding(mesh, batch_spec(mesh))
    rng = np.random.default_rng(10**6 + num_tokens)
    right = np.zeros(NEEDLES)
    for _ in range(num_rows):
        tokens, labels, which = rows(rng, 1, num_tokens, evenly=True)
        batch = batch_of(tokens, labels, exchanged=exchanged)
        placed = {name: jax.device_put(each, lie) for name, each in batch.items()}
        scores = score(placed)
        asked = scores.counts
        np.add.at(right, which[asked], scores.likeliest[asked] == labels[asked])
    return (right / num_rows).tolist()


def on_mesh(model: Any) -> Any:
    """The same parameters, lying as the mesh that is set says."""
    new = Transformer(MODEL, rngs=nnx.Rngs(0))
    graph, state = nnx.split(new)
    values = nnx.state(model)
    state = jax.tree.map(
        lambda old, x: jax.device_put(np.asarray(x), old.sharding), state, values
    )
    return nnx.merge(graph, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a few steps: no recall")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SHARDS)
    short, long, lengths, num_rows = SHORT, LONG, LENGTHS, 200
    if args.quick:
        short, long, lengths, num_rows = (
            ((32, 32, 10),),
            ((((512, 1, 4),), 2e-3),),
            (512,),
            2,
        )
    started = time.monotonic()
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        model, _ = lengthened(Transformer(MODEL, rngs=nnx.Rngs(0)), short, SHORT_RATE)
    found: list[dict[str, Any]] = []
    for exchanged in (True, False):
        with jax.set_mesh(make_mesh(seq=SHARDS)):
            longer, loss = on_mesh(model), float("nan")
            for seed, (plan, rate) in enumerate(long, 1):
                longer, loss = lengthened(
                    longer, plan, rate, exchanged=exchanged, seed=seed
                )
            by_length = [
                accuracy(longer, each, num_rows, exchanged=exchanged)
                for each in lengths
            ]
        found.append(
            {
                "exchanged": exchanged,
                "loss": loss,
                "rows": num_rows,
                "lengths": lengths,
                "depths": np.linspace(0, 1, NEEDLES).tolist(),
                "accuracy": np.transpose(by_length).tolist(),
            }
        )
    table = Table(title="Answers right", box=None)
    for header in ("shards", "tokens", "least of all depths", "mean"):
        table.add_column(header, justify="right")
    for row in found:
        for column, length in enumerate(row["lengths"]):
            shares = np.asarray(row["accuracy"])[:, column]
            name = "exchanged" if row["exchanged"] else "not exchanged"
            table.add_row(
                name, f"{length:,}", f"{shares.min():.1%}", f"{shares.mean():.1%}"
            )
    Console(highlight=False).print(table)
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.png:
        panels = [
            ("exchanged" if row["exchanged"] else "not exchanged", row["accuracy"])
            for row in found
        ]
        picture = draw_recall(panels, found[0]["depths"], list(lengths))
        args.png.write_bytes(picture)


if __name__ == "__main__":
    main()
