"""Ulysses: exchange, local attention, exchange; the paper's strategy in one file."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from ulysses_jax.parallel.exchange import (
    HeadLayout,
    head_layout,
    heads_to_seq,
    own_slots,
    seq_to_heads,
)
from ulysses_jax.parallel.spread import check_arrays, own_heads, spread
from ulysses_jax.strategies import shared_out

LocalAttention = Callable[..., Any]


def ulysses(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    attention: LocalAttention,
    mask: Any,
    scale: float | None = None,
    head_chunks: int = 1,
    with_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
    by_head: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention over a sequence that is sharded over the mesh axis `seq`.

    `[B, T/P, N, H] -> exchange -> [B, T, N/P, H] -> attention -> exchange back`, all
    inside one `jax.shard_map` over `mesh`.

    Args:
      q, k, v: global arrays; the batch is sharded over (data, fsdp), tokens over
        (ring, seq), heads over tensor, whichever of these axes the mesh has.
      mesh: a mesh; over axes that are not of this library's the arrays are whole.
      attention: `f(q, k, v, mask=..., scale=...)`, called inside `jax.shard_map` on
        local heads and all tokens; over `ring`, on those of a member of the ring.
      mask: a pytree of arrays `[B, global length]`, handed to `attention` with the
        local part of the batch and all tokens.
      scale: handed to `attention`.
      head_chunks: the local heads are exchanged and attended in this many groups, so
        that one group's exchange can run under another's attention.
      with_logsumexp: `attention` returns a pair, whose second is `[B, N/P, T]`.
      sinks: global float32; handed to `attention`, as sinks, where there are any:
        those of its heads.
      by_head: the mask differs by head: `attention` gets `mask.of_heads(numbers)`, of
        its query heads.

    Returns:
      The attended values, global, sharded as q should be; on a mesh with Explicit axes
      with q's own type, where that lies alike. `with_logsumexp` a pair: that, and
      `[B, T, N]`.

    Raises:
      ValueError: shapes that do not fit each other or the mesh; the message has the
        numbers and what would fit.
    """
    axes = check_arrays(q, k, v, mesh)
    degree = axes.get("seq", 1)
    tensor = axes.get("tensor", 1)
    layout = head_layout(q.shape[2] // tensor, k.shape[2] // tensor, degree)
    kv_chunks, group_chunks = split_head_chunks(
        head_chunks, layout, tensor=tensor, seq=degree
    )

    there, back, own = seq_to_heads, heads_to_seq, own_slots
    if degree == 1:  # the mesh may have no such axis
        there = back = own = lambda x: x

    def results_of(q, k, v, sinks, heads, mask):
        """Of the local attention, all as `[B, T, n, ...]`."""
        q, k, v = (checkpoint_name(x, "attention_inputs") for x in (q, k, v))
        options = {} if sinks is None else {"sinks": sinks.reshape(-1)}
        if heads is not None:
            mask = mask.of_heads(heads.reshape(-1))
        out = attention(q, k, v, mask=mask, scale=scale, **options)
        more = ()
        if with_logsumexp:
            out, logsumexp = out
            more = (logsumexp.transpose(0, 2, 1)[..., None],)
        if getattr(out, "shape", None) != q.shape:
            what = getattr(out, "shape", type(out).__name__)
            raise ValueError(
                f"attention returned {what} for a q of {q.shape}: it must return an "
                "array of q's shape"
            )
        return out, *more

    def own_of(x):
        """Of a number a query head: [KV slot of this device, query of the slot]."""
        if x is None:
            return None
        slots = layout.spread_q(x[None, None, :, None])
        return own(slots.reshape(-1)).reshape(-1, layout.group)

    def local(q, k, v, sinks, mask):
        heads = own_of(own_heads(q, mesh) if by_head else None)
        sinks = own_of(sinks)
        q = layout.spread_q(q)
        k, v = layout.spread_kv(k), layout.spread_kv(v)
        # Slots as [device, KV slot of the device, query of the slot].
        q = q.reshape(*q.shape[:2], degree, -1, layout.group, q.shape[-1])
        k = k.reshape(*k.shape[:2], degree, -1, k.shape[-1])
        v = v.reshape(*v.shape[:2], degree, -1, v.shape[-1])
        rows = []
        for q_row, k_row, v_row, sinks_row, heads_row in zip(
            jnp.split(q, kv_chunks, axis=3),
            jnp.split(k, kv_chunks, axis=3),
            jnp.split(v, kv_chunks, axis=3),
            _split_slots(sinks, kv_chunks, axis=0),
            _split_slots(heads, kv_chunks, axis=0),
            strict=True,
        ):
            # Each KV slot is exchanged once, however many chunks read it.
            k_all = there(_merge_heads(k_row))
            v_all = there(_merge_heads(v_row))
            cells = []
            for q_cell, its_sinks, its_heads in zip(
                jnp.split(q_row, group_chunks, axis=4),
                _split_slots(sinks_row, group_chunks, axis=1),
                _split_slots(heads_row, group_chunks, axis=1),
                strict=True,
            ):
                q_all = there(_merge_heads(q_cell))
                results = results_of(q_all, k_all, v_all, its_sinks, its_heads, mask)
                cells.append([back(x).reshape(*q_cell.shape[:-1], -1) for x in results])
            rows.append(_joined(cells, axis=4))
        results = [layout.gather_q(_merge_heads(x)) for x in _joined(rows, axis=3)]
        return (results[0], results[1][..., 0]) if with_logsumexp else results[0]

    return spread(
        local, q, k, v, mask, mesh, with_logsumexp=with_logsumexp, sinks=sinks
    )


def split_head_chunks(
    head_chunks: int, layout: HeadLayout, *, tensor: int, seq: int
) -> tuple[int, int]:
    """Chunks over a device's KV slots, and over the queries of each: their product.

    Args:
      layout: of a part of tensor, over seq.
    """
    num_kv, group = layout.num_kv_slots // seq, layout.group
    kv_chunks = math.gcd(head_chunks, num_kv)
    group_chunks = head_chunks // kv_chunks
    if head_chunks < 1 or group % group_chunks:
        raise ValueError(
            f"head_chunks {head_chunks} does not divide what a device has of "
            + shared_out(
                layout.num_heads * tensor,
                "query heads",
                num_kv * group,
                tensor=tensor,
                seq=seq,
            )
            + f" ({num_kv} KV heads x {group}): use one of "
            f"{head_chunk_counts(num_kv, group)}"
        )
    return kv_chunks, group_chunks


def head_chunk_counts(num_kv: int, group: int) -> list[int]:
    """All that `split_head_chunks` can split into."""
    counts = range(1, num_kv * group + 1)
    return [n for n in counts if group % (n // math.gcd(n, num_kv)) == 0]


def _joined(results: list[list[Array]], axis: int) -> list[Array]:
    return [jnp.concatenate(each, axis=axis) for each in zip(*results, strict=True)]


def _split_slots(x: Array | None, number: int, axis: int) -> list[Any]:
    return [None] * number if x is None else jnp.split(x, number, axis=axis)


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
