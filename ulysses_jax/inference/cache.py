"""The cache of keys and values: heads over (tensor, seq), a window's last tokens alone.

A layer's keys, and its values, are global `[B, S, slots, H]`, B over (data, fsdp), the
slots of `exchange.head_layout` over (tensor, seq), S whole: each device has all cached
tokens of its own heads, as Ulysses attends to them. Position p lies at place p % S.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.one_query import one_query_attention
from ulysses_jax.config import Model
from ulysses_jax.parallel.exchange import HeadLayout, head_layout, seq_to_heads
from ulysses_jax.sharding import ACTIVATION, ONE_TOKEN, Table, activation

KeysValues = tuple[Array, Array]


def layer_tokens(cache_tokens: int, window: int | None) -> int:
    """S of a layer: it keeps no more than a query sees."""
    return cache_tokens if window is None else min(cache_tokens, window)


def cache_bytes(model: Model, num_rows: int, cache_tokens: int) -> int:
    """Of a device, on the mesh that is set: of the layers that attend; others have
    `states.states_bytes`.

    Args:
      model: completed.
      num_rows: B, global.
    """
    assert model.head_size
    slots = heads_over_seq(model).num_kv_slots // layout.degree("seq")
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    kinds = model.attending_kinds()
    windows = (model.window if kind == "window" else None for kind in kinds)
    tokens = sum(layer_tokens(cache_tokens, window) for window in windows)
    rows = num_rows // layout.degree("data", "fsdp")
    return 2 * rows * tokens * slots * model.head_size * itemsize


def kept_from_prompt(
    model: Model,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    num_places: int,
) -> KeysValues:
    """What a layer's cache starts with, of a prompt's keys and values.

    Args:
      k, v: global, T over seq, K over tensor.
      lengths: of each row's prompt; what comes after is not kept.
      num_places: S.

    Cost: an all-to-all of k and of v over seq.
    """
    heads = heads_over_seq(model)

    def local(k: Array, v: Array, lengths: Array) -> KeysValues:
        positions = positions_at(lengths, num_places)
        wanted = jnp.maximum(positions, 0)[:, :, None, None]

        def kept(x: Array) -> Array:
            x = heads.spread_kv(x)
            if layout.degree("seq") > 1:
                x = seq_to_heads(x)
            x = jnp.take_along_axis(x, wanted, axis=1)
            return jnp.where(positions[:, :, None, None] >= 0, x, 0)

        return kept(k), kept(v)

    lies, rows = specs(ACTIVATION)
    place = place_spec()
    return layout.over_devices(local, (lies, lies, rows), (place, place))(k, v, lengths)


def attend_to_cache(
    model: Model,
    q: Float[Array, "B 1 N H"],
    own: KeysValues,
    cached: KeysValues,
    lengths: Int[Array, "B"],
    *,
    window: int | None,
    scale: float | None,
    sinks: Float[Array, "N"] | None,
) -> tuple[Float[Array, "B 1 N H"], KeysValues]:
    """Attention of the tokens at positions `lengths` over all before and themselves.

    Args:
      q, own: of these tokens, global, heads over tensor.
      cached: of the tokens before.

    Returns:
      As q; and the tokens' keys and values, lying as the cache's.

    Cost: an all-gather of the result over seq.
    """
    heads, seq = heads_over_seq(model), layout.degree("seq")

    def local(q: Array, k: Array, v: Array, cached: Any, lengths: Array, sinks: Any):
        own = my_slots(heads.spread_kv(k)), my_slots(heads.spread_kv(v))
        positions = positions_at(lengths, cached[0].shape[1])
        seen = positions >= 0
        if window is not None:
            seen &= positions > lengths[:, None] - window
        if sinks is not None:
            sinks = my_slots(heads.spread_q(sinks[None, None, :, None])).reshape(-1)
        out = one_query_attention(
            my_slots(heads.spread_q(q)),
            cached,
            own,
            seen=seen,
            scale=scale,
            sinks=sinks,
        )
        if seq > 1:
            out = layout.all_gather(out, ("seq",), 2)
        return heads.gather_q(out), own

    lies, rows = specs(ONE_TOKEN)
    sinks_lie = None if sinks is None else activation("N", layout.axes())
    place = place_spec()
    given = (lies, lies, lies, (place, place), rows, sinks_lie)
    return layout.over_devices(local, given, (lies, (place, place)))(
        q, *own, cached, lengths, sinks
    )


def written(
    cached: KeysValues, own: KeysValues, lengths: Int[Array, "B"], *, stacked: bool
) -> KeysValues:
    """The cache with the tokens at positions `lengths`, of all layers of a stack.

    Args:
      stacked: arrays have a leading dim, of layers.
    """

    def local(cached: KeysValues, own: KeysValues, lengths: Array) -> KeysValues:
        rows = jnp.arange(len(lengths))

        def put(x: Array, token: Array) -> Array:
            place = lengths % x.shape[-3]
            if stacked:
                return x.at[:, rows, place].set(token[:, :, 0])
            return x.at[rows, place].set(token[:, 0])

        return put(cached[0], own[0]), put(cached[1], own[1])

    _, rows = specs(ONE_TOKEN)
    place = P(*((None,) if stacked else ()), *place_spec())
    pair = (place, place)
    return layout.over_devices(local, (pair, pair, rows), pair)(cached, own, lengths)


def my_slots(x: Float[Array, "B 1 slots H"]) -> Float[Array, "B 1 some H"]:
    """Of the slots of all of seq, this device's."""
    seq = layout.degree("seq")
    if seq == 1:
        return x
    parts = x.reshape(*x.shape[:2], seq, -1, x.shape[-1])
    index = layout.axis_index("seq")
    return lax.dynamic_index_in_dim(parts, index, axis=2, keepdims=False)


def positions_at(lengths: Int[Array, "B"], num_places: int) -> Int[Array, "B S"]:
    """Which position lies at each place, of rows of these lengths; none: below 0."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(num_places)) % num_places


def heads_over_seq(model: Model) -> HeadLayout:
    """Of a device's part of tensor, over seq."""
    assert model.num_kv_heads
    tensor = layout.degree("tensor")
    heads, kv_heads = model.num_heads // tensor, model.num_kv_heads // tensor
    return head_layout(heads, kv_heads, layout.degree("seq"))


def specs(table: Table) -> tuple[P, P]:
    """Of queries, keys and values, and of a number a row."""
    axes = layout.axes()
    return activation("BTNH", axes, table), activation("B", axes)


def place_spec() -> P:
    rows = activation("B", layout.axes())[0]
    return P(rows, None, layout.present(("tensor", "seq")) or None, None)
