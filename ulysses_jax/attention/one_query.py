"""Attention of one query a row over cached keys, its own key and value beside them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def one_query_attention(
    q: Float[Array, "B 1 N H"],
    cached: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    own: tuple[Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    *,
    seen: Bool[Array, "B S"],
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B 1 N H"]:
    """softmax(scale q k^T) v over the cached keys that are seen and the query's own.

    Args:
      q, cached, own: local arrays; query head n reads KV head n // (N/K). Cached keys
        are read where they lie: the own one is not put among them.
      scale: None is H**-0.5.
      sinks: logits of one more key a head, whose value is 0.

    Returns:
      As q; the softmax is in float32. No gradient.
    """
    batch, _, num_heads, size = q.shape
    num_kv_heads = own[0].shape[2]
    scale = 1 / math.sqrt(size) if scale is None else scale
    queries = q.reshape(batch, num_kv_heads, -1, size)

    def logits_of(k: Array) -> Array:
        to = dict(preferred_element_type=jnp.float32)
        return jnp.einsum("BKGH,BSKH->BKGS", queries, k, **to) * scale

    logits = jnp.where(seen[:, None, None], logits_of(cached[0]), -jnp.inf)
    parts = [logits, logits_of(own[0])]
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1)
        parts.append(jnp.broadcast_to(column, (batch, *column.shape)))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1)
    num_keys = logits.shape[-1]
    out = jnp.zeros(queries.shape, jnp.float32)
    ends = (weights[..., :num_keys], weights[..., num_keys : num_keys + 1])
    for its_weights, v in zip(ends, (cached[1], own[1]), strict=True):
        its_weights = its_weights.astype(v.dtype)
        to = dict(preferred_element_type=jnp.float32)
        out += jnp.einsum("BKGS,BSKH->BKGH", its_weights, v, **to)
    return out.reshape(batch, 1, num_heads, size).astype(q.dtype)
