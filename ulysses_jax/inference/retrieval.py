"""Whether a model finds what stands far before: answers right, by depth and length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, get_mesh
from jaxtyping import Float64, Int32

from ulysses_jax.data.tokenizer import IGNORED
from ulysses_jax.inference.scoring import make_score
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.training.step import batch_spec


@allow_promotion()
def retrieve(
    model: Any,
    rows: Callable[
        [int, float, np.random.Generator],
        tuple[Int32[np.ndarray, "T"], Int32[np.ndarray, "T"]],
    ],
    shapes: dict[int, tuple[int, int]],
    depths: Sequence[float],
    *,
    num_trials: int,
    seed: int,
    on_cell: Callable[[int, float, float], None] = lambda length, depth, share: None,
) -> Float64[np.ndarray, "depths lengths"]:
    """The share of rows of which each answer's each token is the likeliest.

    Given the true tokens before it: for a row that is right throughout, what greedy
    decoding writes.

    Args:
      model: on the mesh that is set.
      rows: `f(num_tokens, depth, rng)`, tokens and labels, as `needles.Haystack.row`.
      shapes: by length: (rows, tokens) of a batch (`opening.batch_shape`).
      on_cell: told length, depth and share.
    """
    score, mesh = make_score(model), get_mesh()
    lie = NamedSharding(mesh, batch_spec(mesh))
    found = np.empty((len(depths), len(shapes)))
    for column, (length, (batch, padded)) in enumerate(shapes.items()):
        for place, depth in enumerate(depths):
            right = 0
            for first in range(0, num_trials, batch):
                num = min(batch, num_trials - first)
                arrays = {
                    "tokens": np.zeros((1, batch, padded), np.int32),
                    "labels": np.full((1, batch, padded), IGNORED, np.int32),
                    "positions": np.zeros((1, batch, padded), np.int32),
                }
                arrays["positions"][..., :length] = np.arange(length)
                for i in range(num):
                    rng = np.random.default_rng([seed, length, place, first + i])
                    tokens, labels = rows(length, depth, rng)
                    arrays["tokens"][0, i, :length] = tokens
                    arrays["labels"][0, i, :length] = labels
                scores = score(
                    {name: _placed(array, lie) for name, array in arrays.items()}
                )
                wrong = scores.counts & (scores.likeliest != scores.labels)
                right += int((~wrong.any(axis=1))[:num].sum())
            found[place, column] = right / num_trials
            on_cell(length, depth, float(found[place, column]))
    return found


def _placed(array: np.ndarray, lie: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, lie, lambda index: array[index])
