"""Batches through a model: each token's loss and the likeliest id, on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int, Int32

from ulysses_jax import layout
from ulysses_jax.config import Memory
from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.training.token_scores import token_scores


class Scores(NamedTuple):
    """Of every token of a batch, the same on every process."""

    nats: Float32[np.ndarray, "B T"]
    """-log p(label), 0 where there is none."""
    likeliest: Int32[np.ndarray, "B T"]
    labels: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]

    @property
    def counts(self) -> np.ndarray:
        return self.labels != IGNORED


def make_score(model: Any) -> Callable[[dict[str, Int[Array, "1 B T"]]], Scores]:
    """Makes the function of a model and the mesh that is set; compiled once a shape.

    It takes a batch of `data.loader`: tokens, labels, positions and, where documents
    do not see each other, segment_ids.

    Cost: logits of `Memory.loss_tile_tokens` tokens a device at a time, and 16 bytes a
    token of the batch on every device.
    """
    graph, state = nnx.split(model)
    tile_tokens = Memory().loss_tile_tokens

    @jax.jit
    def run(state: Any, batch: dict[str, Array]) -> tuple[Array, ...]:
        model = nnx.merge(graph, state)
        ids = {name: values[0] for name, values in batch.items()}
        x = model.features(ids["tokens"], ids["positions"], ids.get("segment_ids"))
        scores = token_scores(x, model.head, ids["labels"], tile_tokens)
        given = ids["labels"], ids["positions"]
        return tuple(layout.lay(each, P(None, None)) for each in (*scores, *given))

    def score(batch: dict[str, Array]) -> Scores:
        return Scores(*map(np.asarray, run(state, batch)))

    return score
