"""A short causal convolution of every feature by itself, inside documents."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NAME = "short_convolution"  # as `linear.NAME`


def convolve(
    x: Float[Array, "B w+t N H"],
    weights: Float[Array, "W N H"],
    segment_ids: Int[Array, "B w+t"] | None,
) -> Float[Array, "B t N H"]:
    """`out_t = sum over d < W of weights[W-1-d] x_(t-d)`, of a token's document alone.

    Args:
      x: local, after the W - 1 = w tokens that come before.
      weights: the last are the token's own.
      segment_ids: a document begins where they change; None: all is one.

    Returns:
      In x's dtype; sums are float32.
    """
    before = len(weights) - 1
    num_tokens = x.shape[1] - before
    if segment_ids is None:
        document = jnp.zeros((1, x.shape[1]), jnp.int32)
    else:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        document = jnp.pad(jnp.cumsum(changes, axis=1), [(0, 0), (1, 0)])

    def reach(x: Array, tap: int) -> Array:
        return x[:, tap : tap + num_tokens]

    out = jnp.zeros((), jnp.float32)
    for tap, weight in enumerate(weights.astype(jnp.float32)):
        seen = reach(document, tap) == reach(document, before)
        there = jnp.where(seen[..., None, None], reach(x, tap), 0)
        out += there.astype(jnp.float32) * weight
    return out.astype(x.dtype)
