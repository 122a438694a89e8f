"""The loss of a model on rows of text, and how it falls as the context grows."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, get_mesh
from jaxtyping import Float64, Int64

from ulysses_jax.data.loader import validation_batches
from ulysses_jax.data.rows import Rows
from ulysses_jax.inference.scoring import Scores, make_score
from ulysses_jax.mesh import allow_promotion
from ulysses_jax.training.step import batch_spec


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tokens by how many stand before them, of their row or, where documents do not see
    each other, of their document: from `first` to `last`."""

    first: int
    last: int
    tokens: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What rows cost a model.

    Attributes:
      loss: nats a token: the sum over all tokens that count, divided by their number.
      tokens: that count: all but the first of each document.
      by_position: of those buckets that have tokens.
    """

    loss: float
    tokens: int
    by_position: list[Bucket]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}


@allow_promotion()
def evaluate(
    model: Any,
    rows: Rows,
    shape: tuple[int, int],
    *,
    on_batch: Callable[[int, float], None] = lambda rows, loss: None,
) -> Evaluated:
    """The loss of all rows, on the mesh that is set.

    The result does not depend on the batch, on padding or on the mesh, but for the
    rounding of a token's own loss: these are float32, and summed in float64.

    Args:
      model: a `Transformer` on that mesh.
      shape: (rows, tokens) of a batch, that the mesh divides (`opening.batch_shape`).
      on_batch: told the number of rows that are done, and their loss.

    Raises:
      ValueError: no token counts, or a loss that is not finite.
    """
    score = make_score(model)
    mesh = get_mesh()
    batch, tokens = shape
    batches = validation_batches(
        rows,
        (1, batch, tokens),
        NamedSharding(mesh, batch_spec(mesh)),
        num_batches=math.ceil(len(rows) / batch),
    )
    # Bucket i holds the tokens with 2^i to 2^(i + 1) - 1 before them.
    num_buckets = rows.sequence_tokens.bit_length()
    nats = np.zeros(num_buckets)
    counts = np.zeros(num_buckets, np.int64)
    for number, arrays in enumerate(batches, 1):
        more = _by_bucket(score(arrays), num_buckets)
        nats, counts = nats + more[0], counts + more[1]
        done = min(number * batch, len(rows))
        if not math.isfinite(nats.sum()):
            raise ValueError(
                f"the loss of rows {(number - 1) * batch} to {done - 1} is not finite: "
                "the model's weights are broken, or overflow in its compute dtype: try "
                "--compute-dtype float32"
            )
        on_batch(done, float(nats.sum()) / max(int(counts.sum()), 1))
    if not counts.sum():
        raise ValueError(
            f"none of {rows.num_tokens:,} tokens counts, because each is a document of "
            "its own: give longer documents"
        )
    return Evaluated(
        loss=float(nats.sum() / counts.sum()),
        tokens=int(counts.sum()),
        by_position=[
            Bucket(
                first=2**i,
                last=min(2 ** (i + 1) - 1, rows.sequence_tokens),
                tokens=int(counts[i]),
                loss=float(nats[i] / counts[i]),
            )
            for i in range(num_buckets)
            if counts[i]
        ],
    )


def _by_bucket(
    scores: Scores, num_buckets: int
) -> tuple[Float64[np.ndarray, "b"], Int64[np.ndarray, "b"]]:
    """Sums of nats, and how many tokens count."""
    counts = scores.counts
    before = scores.positions[counts] + 1
    bucket = np.frexp(before)[1] - 1  # exact: the place of the highest bit
    nats = np.bincount(bucket, scores.nats[counts], minlength=num_buckets)
    return nats, np.bincount(bucket, minlength=num_buckets)
