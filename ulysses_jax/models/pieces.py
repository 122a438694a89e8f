"""A transformer's layer in pieces: attention and feed-forward together."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import attention_parts, join
from ulysses_jax.config import Memory, Model
from ulysses_jax.memory.passes import backward, forward
from ulysses_jax.memory.pieces import Pieces
from ulysses_jax.memory.remat import ATTENTION
from ulysses_jax.mesh import platform_of
from ulysses_jax.models.gathered import gather, gradient_specs, scatter, specs_of
from ulysses_jax.models.layers import Block
from ulysses_jax.parallel.exchange import head_layout, heads_to_seq, seq_to_heads
from ulysses_jax.parallel.ulysses import split_head_chunks
from ulysses_jax.sharding import activation

# [c, P, B, n, t]: heads lie over tensor, then seq.
_LOGSUMEXP = P(None, None, ("data", "fsdp"), ("tensor", "seq"), None)


@dataclass(frozen=True)
class Layer:
    """What of a layer is not an array."""

    graph: Any
    model: Model
    memory: Memory


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_in_pieces(
    layer: Layer,
    x: Float[Array, "B T D"],
    parameters: Any,
    angles: Any,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """A `Block`, for `sequence_chunk_tokens` of a device's tokens at a time.

    First the keys and values of all chunks; then for each chunk, `head_chunks` times,
    queries and their attention over the keys before; then the projection and the
    feed-forward, for `mlp_tile_tokens` at a time. The backward pass does the same
    again, then pulls each chunk back.

    Args:
      x: global, compute dtype, B over (data, fsdp), T over seq.
      parameters: of one layer, global float32, sharded as `sharding.parameter` says.
      angles: of the rotary embedding, sharded as x's tokens; None without.
      segment_ids: global, tokens whole.

    Returns:
      As x.

    Cost: keeps x alone (and, named for `memory.remat` attention, attention's output
    and logsumexp). Forward: x, which becomes the result, and the sequence's keys and
    values of a device's heads. Backward: also dx, and keys' and values' gradients in
    float32. Weights are gathered once a pass. Exchanges are those of the whole, a chunk
    and a group of heads at a time; keys and values are exchanged once.

    Source: sequence chunks as in FPDT, arXiv 2408.16978; attention and feed-forward of
    a block of queries together as in Blockwise Parallel Transformer, arXiv 2305.19370;
    groups of heads as in UPipe.
    """
    return _run_forward(layer, x, parameters, angles, segment_ids, keep=False)[0]


def _forward(layer, x, parameters, angles, segment_ids):
    keep = layer.memory.remat == "attention"
    y, attended = _run_forward(layer, x, parameters, angles, segment_ids, keep=keep)
    if attended is not None:
        out, logsumexps = attended
        logsumexps = tuple(checkpoint_name(each, ATTENTION[1]) for each in logsumexps)
        attended = checkpoint_name(out, ATTENTION[0]), logsumexps
    return y, (x, parameters, angles, segment_ids, attended)


def _backward(layer, residuals, dy):
    x, parameters, angles, segment_ids, attended = residuals
    specs = _specs(x, parameters, angles, segment_ids)
    x_spec, parameter_specs, *_ = specs

    def local(x, parameters, angles, segment_ids, attended, dy):
        pieces, leaves = _take_apart(layer, x, parameters, parameter_specs, segment_ids)
        dx, sums = backward(pieces, leaves, x, angles, attended, dy)
        return dx, scatter(sums, parameter_specs)

    dx, gradients = jax.shard_map(
        local,
        in_specs=(*specs, _attended_specs(attended is not None), x_spec),
        out_specs=(x_spec, gradient_specs(parameter_specs)),
        check_vma=False,
    )(x, parameters, angles, segment_ids, attended, dy)
    return dx, gradients, None, None


layer_in_pieces.defvjp(_forward, _backward)


def _run_forward(layer, x, parameters, angles, segment_ids, *, keep):
    specs = _specs(x, parameters, angles, segment_ids)

    def local(x, parameters, angles, segment_ids):
        pieces, leaves = _take_apart(layer, x, parameters, specs[1], segment_ids)
        return forward(pieces, leaves, x, angles, keep=keep)

    return jax.shard_map(
        local,
        in_specs=specs,
        out_specs=(specs[0], _attended_specs(keep)),
        check_vma=False,
    )(x, parameters, angles, segment_ids)


def _specs(x, parameters, angles, segment_ids):
    axes = get_abstract_mesh().shape
    return (
        activation("BTD", axes),
        specs_of(parameters),
        jax.tree.map(lambda _: activation("BT", axes), angles),
        jax.tree.map(lambda _: activation("B", axes), segment_ids),
    )


def _attended_specs(keep: bool):
    if not keep:
        return None
    # One spec for the logsumexps of all groups.
    return activation("BTNH", get_abstract_mesh().shape), _LOGSUMEXP


def _take_apart(layer, x, parameters, specs, segment_ids) -> tuple[Pieces, Any]:
    """The layer as pieces, inside shard_map, and what their gradients are taken of."""
    model, memory = layer.model, layer.memory
    assert model.num_kv_heads
    if get_abstract_mesh().shape["ring"] > 1 or model.strategy not in (
        "auto",
        "ulysses",
    ):
        raise ValueError(
            f"layers in pieces exchange over seq, as ulysses does, not {model.strategy}"
            " over a ring: `placement.place` refuses this mesh"
        )
    leaves, weights = gather(parameters, specs, x.dtype)

    def block(leaves) -> Block:
        return nnx.merge(layer.graph, weights(leaves))

    axes = get_abstract_mesh().shape
    tensor, degree = axes["tensor"], axes["seq"]
    layout = head_layout(
        model.num_heads // tensor, model.num_kv_heads // tensor, degree
    )

    kv_chunks, group_chunks = split_head_chunks(
        memory.head_chunks or 1, layout, tensor=tensor, seq=degree
    )
    # Query slots as [device, row of KV slots, KV slot, cell of its queries, query].
    slots = (
        degree,
        kv_chunks,
        layout.num_kv_slots // degree // kv_chunks,
        group_chunks,
        layout.group // group_chunks,
    )

    tokens, window = x.shape[1], model.window
    chunk_tokens = min(memory.sequence_chunk_tokens or tokens, tokens)
    # A chunk is P blocks of the sequence, one from each device; all of it is one block.
    num_blocks = degree if chunk_tokens < tokens else 1
    size = chunk_tokens * degree // num_blocks

    def exchange(x: Float[Array, "B t N H"]) -> Float[Array, "P B t n H"]:
        x = seq_to_heads(x)
        x = x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def keys_values(leaves, x, angles):
        layer = block(leaves)
        keys = layer.attention.keys_values(layer.attention_norm(x), angles)
        k, v = map(layout.spread_kv, keys)
        return exchange(k), exchange(v)

    def queries(leaves, x, angles, g):
        layer = block(leaves)
        row, cell = divmod(g, group_chunks)

        def heads(w: Float[Array, "... N H"]) -> Float[Array, "... n H"]:
            """Of a weight or a bias: those slots of every device that group g has."""
            spread = layout.spread_q(w.reshape(1, -1, *w.shape[-2:]))
            cells = spread.reshape(-1, *slots, w.shape[-1])[:, :, row, :, cell]
            return cells.reshape(*w.shape[:-2], -1, w.shape[-1])

        q = layer.attention.queries(layer.attention_norm(x), angles, heads)
        return exchange(q)

    def back(outs):
        def one(out: Float[Array, "P B t n H"]) -> Float[Array, "B t P kv group H"]:
            out = jnp.moveaxis(out, 0, 1)
            out = heads_to_seq(out.reshape(out.shape[0], -1, *out.shape[3:]))
            return out.reshape(*out.shape[:2], degree, slots[2], slots[4], -1)

        rows = [
            jnp.stack([one(out) for out in outs[start : start + group_chunks]], axis=4)
            for start in range(0, len(outs), group_chunks)
        ]
        out = jnp.stack(rows, axis=3)
        out = out.reshape(*out.shape[:2], layout.num_slots, -1)
        return layout.gather_q(out)

    def finish(leaves, x, out):
        layer = block(leaves)
        return layer.add_feed_forward(x + layer.attention.project_out(out))

    def mask(q_block, kv_block, is_own) -> Mask:
        def ids(block):
            assert segment_ids is not None
            return lax.dynamic_slice_in_dim(segment_ids, block * size, size, axis=1)

        def positions(block):
            return jnp.broadcast_to(block * size + jnp.arange(size), (x.shape[0], size))

        packed = segment_ids is not None
        narrow = window is not None and size < tokens * degree  # else by index
        return Mask(
            causal=is_own,
            window=window,
            q_segment_ids=ids(q_block) if packed else None,
            kv_segment_ids=ids(kv_block) if packed else None,
            q_positions=positions(q_block) if narrow else None,
            kv_positions=positions(kv_block) if narrow else None,
        )

    def parts(q, k, mask):
        platform = platform_of(get_abstract_mesh())
        return attention_parts(model.attention, platform, q, k, mask)

    def attend(q, k, v, *where):
        seen = mask(*where)
        return parts(q, k, seen).statistics(q, k, v, mask=seen, scale=None)

    def gradients(q, k, v, out, logsumexp, dout, *where):
        seen = mask(*where)
        pull = parts(q, k, seen).gradients
        return pull(q, k, v, out, logsumexp, dout, mask=seen)

    def first_block(q_block):
        if window is None:
            return 0
        return jnp.maximum((q_block * size - window + 1) // size, 0)

    return Pieces(
        keys_values=keys_values,
        queries=queries,
        back=back,
        finish=finish,
        attend=attend,
        gradients=gradients,
        join=join,
        first_block=first_block,
        key_slots=tuple(
            slice(row * slots[2], (row + 1) * slots[2])
            for row in range(kv_chunks)
            for _ in range(group_chunks)
        ),
        chunk_tokens=chunk_tokens,
        tile_tokens=memory.mlp_tile_tokens or chunk_tokens * x.shape[0],
        keys_on_host="keys" in memory.offload,
    ), leaves
