"""Rows of a table, by ids: the embedding of tokens, or of positions."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.sharding import activation, zero_cut
from ulysses_jax.weights.gathered import (
    Gathered,
    as_cotangent,
    gradient_spec,
    slot_of,
    spec_of,
    value_of,
)
from ulysses_jax.weights.whole import sum_gradient


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "V D"] | Gathered, ids: Int[Array, "B T"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Rows of a sharded table; the gradient is summed in float32 and arrives sharded.

    Args:
      table: global float32 parameter, V over tensor, D whole or over the ZeRO axes, or
        one `Gathered`.
      ids: global, B over (data, fsdp), T over (ring, seq).
      dtype: the compute dtype.

    Returns:
      `[B, T, D]`, global, in the compute dtype.

    Costs an all-gather of the table over the axes of its D forward, a reduce-scatter of
    its float32 gradient, or an all-reduce, backward; an all-reduce of the result over
    tensor.
    """
    spec = spec_of(table, "VD")

    def local(table, ids):
        table = layout.all_gather(table.astype(dtype), *zero_cut(spec))
        ids, mine = _local_ids(ids, table.shape[0])
        return layout.psum(jnp.where(mine[..., None], table[ids], 0), ("tensor",))

    axes = layout.axes()
    return layout.over_devices(
        local, (spec, activation("BT", axes)), activation("BTD", axes)
    )(value_of(table), ids)


def _embed_forward(table, ids, dtype):
    return embed(table, ids, dtype), (table, ids)


def _embed_backward(dtype, residuals, dy):
    table, ids = residuals
    rows, width = value_of(table).shape
    rows //= layout.degree("tensor")
    spec = gradient_spec(table, "VD")

    def local(ids, dy):
        ids, mine = _local_ids(ids, rows)
        dy = jnp.where(mine[..., None], dy.astype(jnp.float32), 0)
        gradient = jnp.zeros((rows, width), jnp.float32)
        return sum_gradient(gradient.at[ids].add(dy), spec)

    axes = layout.axes()
    gradient = layout.over_devices(
        local, (activation("BT", axes), activation("BTD", axes)), spec
    )(ids, dy)
    return as_cotangent(table, layout.lay_like(gradient, slot_of(table))), None


embed.defvjp(_embed_forward, _embed_backward)


def _local_ids(ids: Array, rows: int) -> tuple[Array, Array]:
    """Ids within this device's rows of the vocabulary, and which of them it has."""
    local = ids - layout.axis_index("tensor") * rows
    mine = (local >= 0) & (local < rows)
    return jnp.where(mine, local, 0), mine
