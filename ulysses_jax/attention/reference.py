"""Dense float32 attention: the oracle that every other file is tested against."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ulysses_jax.attention.mask import Mask


def dense_mask(mask: Mask, num_q: int, num_kv: int) -> Bool[Array, "B N T S"]:
    """What every query sees, of a layout too; B and N are 1 where all see alike."""
    seen = mask.without_layout().visible(0, num_q, 0, num_kv)[:, None]
    if mask.layout is None:
        return seen
    shown = jnp.asarray(mask.layout.visible())
    if len(shown) > 1 and mask.places.heads is not None:
        shown = shown[mask.places.heads]
    return seen & shown


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v over the visible keys, in float32, with [T, S] in memory.

    Args:
      q, k, v: local arrays; query head n reads KV head n // (N/K).
      mask: which keys a query sees.
      scale: None is H**-0.5.
      sinks: local, logits of one more key a head, whose value is 0.

    Returns:
      `[B, T, N, H]` in q's dtype; a query that sees no key gives 0.
    """
    mask.check(q, k)
    batch, num_q, num_heads, size = q.shape
    num_kv_heads = k.shape[2]
    scale = 1 / math.sqrt(size) if scale is None else scale
    grouped = (batch, num_q, num_kv_heads, num_heads // num_kv_heads, size)
    q32 = q.astype(jnp.float32).reshape(grouped)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q32, k.astype(jnp.float32)) * scale
    seen = dense_mask(mask, num_q, k.shape[1])
    # By KV head, and query of it; one for all where all see alike.
    each = num_kv_heads if seen.shape[1] > 1 else 1
    seen = seen.reshape(len(seen), each, -1, *seen.shape[2:])
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)
        column = jnp.broadcast_to(column, (*logits.shape[:-1], 1))
        logits = jnp.concatenate((logits, column), axis=-1)
        seen = jnp.pad(seen, [(0, 0)] * 4 + [(0, 1)], constant_values=True)
        v = jnp.pad(v, [(0, 0), (0, 1), (0, 0), (0, 0)])
    # Hidden logits are replaced before and after exp: a row without a visible key is
    # then 0 / 1 and its gradient 0, not NaN.
    highest = jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-1e30)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - highest, 0)), 0)
    sums = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(sums == 0, 1, sums)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
