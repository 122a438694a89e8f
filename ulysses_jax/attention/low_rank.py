"""Attention to a few mixtures of the keys, whose weights the tokens themselves give."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Reduce = Callable[[Array], Array]


def low_rank(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    projection: Float[Array, "B T K R"],
    *,
    scale: float,
    sum_over: Reduce,
    max_over: Reduce,
) -> Float[Array, "B T N V"]:
    """What this device's tokens read of the R mixtures of all tokens; float32 inside.

    Args:
      sum_over, max_over: of an array `[B, ...]`, over the devices that have the others
        of its rows' tokens.
    """
    k, v, logits = (x.astype(jnp.float32) for x in (k, v, projection))
    most = max_over(jnp.max(jax.lax.stop_gradient(logits), axis=1, keepdims=True))
    weights = jnp.exp(logits - most)
    # One array, so that it is one sum over the devices: keys, values, weights.
    ones = jnp.ones((*v.shape[:3], 1), jnp.float32)
    tokens = jnp.concatenate((k, v, ones), axis=-1)
    sums = sum_over(jnp.einsum("BTKR,BTKH->BKRH", weights, tokens))
    mixtures = sums[..., :-1] / sums[..., -1:]
    keys, values = jnp.split(mixtures, [k.shape[-1]], axis=-1)
    grouped = q.astype(jnp.float32).reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = scale * jnp.einsum("BTKGH,BKRH->BTKGR", grouped, keys)
    out = jnp.einsum("BTKGR,BKRV->BTKGV", jax.nn.softmax(scores, axis=-1), values)
    return out.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)
