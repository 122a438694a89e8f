"""The loss token by token, and the likeliest ids: what an evaluation is made of."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.memory.tiles import over_tiles
from ulysses_jax.sharding import activation, zero_cut
from ulysses_jax.training.loss import (
    against_labels,
    check_labels,
    is_valid,
    whole_width,
)
from ulysses_jax.weights.gathered import Gathered, spec_of, value_of


def token_scores(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Gathered,
    labels: Int[Array, "B T"],
    tile_tokens: int,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """What `cross_entropy` sums, token by token, and the likeliest ids.

    Arguments: as `cross_entropy`.

    Returns:
      Nats, float32, 0 where there is no label; and the ids of the highest logits, the
      first of equal ones: what a greedy decoder takes. Both lie as labels.

    Cost: as `cross_entropy`, undifferentiated, and 8 bytes a token.
    """
    axes = layout.axes()
    head_spec, spec = spec_of(head, "VD"), activation("BT", axes)
    check_labels(labels, value_of(head).shape[0])
    return layout.over_devices(
        partial(
            _local_scores,
            tile_tokens=tile_tokens,
            vocab_size=value_of(head).shape[0],
            head_cut=zero_cut(head_spec),
        ),
        (activation("BTD", axes), head_spec, spec),
        (spec, spec),
    )(x, value_of(head), labels)


def _local_scores(x, head, labels, *, tile_tokens, vocab_size, head_cut):
    head, first = whole_width(head, x, head_cut)

    def tile(sums, tokens, _):
        labels, x = tokens
        logits, logsumexp, _, label_logit = against_labels(x, head, labels - first)
        nats = jnp.where(is_valid(labels, vocab_size), logsumexp - label_logit, 0)
        own = logits.max(axis=-1)
        is_highest = own == layout.pmax(own, ("tensor",))
        ids = jnp.where(is_highest, first + logits.argmax(axis=-1), vocab_size)
        return sums, (nats, -layout.pmax(-ids, ("tensor",)))

    nothing = jnp.zeros(labels.size, jnp.float32), jnp.zeros(labels.size, jnp.int32)
    tokens = labels.reshape(-1), x.reshape(labels.size, -1)
    _, scores = over_tiles(tile, None, tokens, nothing, tile_tokens=tile_tokens)
    nats, ids = scores
    return nats.reshape(labels.shape), ids.reshape(labels.shape)
