"""A transformer's layer over chunks of tokens: attention and feed-forward together."""

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
from ulysses_jax.memory.remat import ATTENTION
from ulysses_jax.memory.sequence_chunks import Pieces, backward, forward
from ulysses_jax.mesh import platform_of
from ulysses_jax.models.layers import Block
from ulysses_jax.models.linear import Gathered, all_gather, sum_gradient
from ulysses_jax.parallel.exchange import head_layout, heads_to_seq, seq_to_heads
from ulysses_jax.sharding import ZERO, activation

# [c, P, B, n, t]: heads lie over tensor, then seq.
_LOGSUMEXP = P(None, None, ("data", "fsdp"), ("tensor", "seq"), None)


@dataclass(frozen=True)
class Layer:
    """What of a layer is not an array."""

    graph: Any
    model: Model
    memory: Memory


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    parameters: Any,
    angles: Any,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """A `Block`, for `sequence_chunk_tokens` of a device's tokens at a time.

    First the keys and values of all chunks; then for each chunk its queries, their
    attention over the keys before, the projection, the feed-forward. The backward pass
    does the same again, then pulls each chunk back.

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
    at a time.

    Source: sequence chunks as in FPDT, arXiv 2408.16978; attention and feed-forward of
    a block of queries together as in Blockwise Parallel Transformer, arXiv 2305.19370.
    """
    return _run_forward(layer, x, parameters, angles, segment_ids, keep=False)[0]


def _forward(layer, x, parameters, angles, segment_ids):
    keep = layer.memory.remat == "attention"
    y, attended = _run_forward(layer, x, parameters, angles, segment_ids, keep=keep)
    if attended is not None:
        attended = tuple(map(checkpoint_name, attended, ATTENTION))
    return y, (x, parameters, angles, segment_ids, attended)


def _backward(layer, residuals, dy):
    x, parameters, angles, segment_ids, attended = residuals
    specs = _specs(x, parameters, angles, segment_ids)
    x_spec, parameter_specs, *_ = specs

    def local(x, parameters, angles, segment_ids, attended, dy):
        pieces, weights = _take_apart(
            layer, x, parameters, parameter_specs, segment_ids
        )
        dx, sums = backward(
            pieces, weights, x, angles, attended, dy, _chunk_tokens(layer, x)
        )
        return dx, jax.tree.map(_sum_gradient, sums, parameter_specs)

    dx, gradients = jax.shard_map(
        local,
        in_specs=(*specs, _attended_specs(attended is not None), x_spec),
        out_specs=(x_spec, parameter_specs),
        check_vma=False,
    )(x, parameters, angles, segment_ids, attended, dy)
    return dx, gradients, None, None


chunked_layer.defvjp(_forward, _backward)


def _run_forward(layer, x, parameters, angles, segment_ids, *, keep):
    specs = _specs(x, parameters, angles, segment_ids)

    def local(x, parameters, angles, segment_ids):
        pieces, weights = _take_apart(layer, x, parameters, specs[1], segment_ids)
        return forward(pieces, weights, x, angles, _chunk_tokens(layer, x), keep=keep)

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
        jax.tree.map(lambda w: jax.typeof(w).sharding.spec, parameters),
        jax.tree.map(lambda _: activation("BT", axes), angles),
        jax.tree.map(lambda _: activation("B", axes), segment_ids),
    )


def _attended_specs(keep: bool):
    if not keep:
        return None
    return activation("BTNH", get_abstract_mesh().shape), _LOGSUMEXP


def _chunk_tokens(layer: Layer, x: Float[Array, "B t D"]) -> int:
    assert layer.memory.sequence_chunk_tokens
    return min(layer.memory.sequence_chunk_tokens, x.shape[1])


def _take_apart(layer, x, parameters, specs, segment_ids) -> tuple[Pieces, Any]:
    """The layer as pieces, inside shard_map, and what their gradients are asked of.

    Matrices are gathered here, once. The pieces take a tree of float32 arrays in their
    place, which are not read but whose cotangents are the gradients; vectors (norms,
    biases) are taken as they are.
    """
    model, dtype = layer.model, x.dtype
    assert model.num_kv_heads
    values = jax.tree.map(lambda w, spec: _gather(w, spec, dtype), parameters, specs)
    weights = jax.tree.map(
        lambda value, w: w if value is None else jnp.zeros(value.shape, jnp.float32),
        values,
        parameters,
        is_leaf=lambda leaf: leaf is None,
    )

    def block(weights) -> Block:
        both = jax.tree.map(
            lambda value, w: w if value is None else Gathered(value, w),
            values,
            weights,
            is_leaf=lambda leaf: leaf is None,
        )
        return nnx.merge(layer.graph, both)

    axes = get_abstract_mesh().shape
    tensor, degree = axes["tensor"], axes["seq"]
    layout = head_layout(
        model.num_heads // tensor, model.num_kv_heads // tensor, degree
    )

    def exchange(x: Float[Array, "B t N H"]) -> Float[Array, "P B t n H"]:
        x = seq_to_heads(x)
        x = x.reshape(x.shape[0], degree, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def keys_values(weights, x, angles):
        layer = block(weights)
        keys = layer.attention.keys_values(layer.attention_norm(x), angles)
        k, v = map(layout.spread_kv, keys)
        return exchange(k), exchange(v)

    def queries(weights, x, angles):
        layer = block(weights)
        q = layer.attention.queries(layer.attention_norm(x), angles)
        return exchange(layout.spread_q(q))

    def back(out):
        out = jnp.moveaxis(out, 0, 1)
        out = heads_to_seq(out.reshape(out.shape[0], -1, *out.shape[3:]))
        return layout.gather_q(out)

    def finish(weights, x, out):
        layer = block(weights)
        return layer.add_feed_forward(x + layer.attention.project_out(out))

    size, window = _chunk_tokens(layer, x), model.window

    def mask(q_block, kv_block, is_own) -> Mask:
        def ids(block):
            assert segment_ids is not None
            return lax.dynamic_slice_in_dim(segment_ids, block * size, size, axis=1)

        def positions(block):
            return jnp.broadcast_to(block * size + jnp.arange(size), (x.shape[0], size))

        packed, narrow = segment_ids is not None, window is not None
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
        return parts(q, k, seen).forward(q, k, v, mask=seen)

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
        keys_on_host="keys" in layer.memory.offload,
    ), weights


def _zero(spec: P) -> tuple[tuple[str, ...], int]:
    """The axes over which a parameter's D is cut, and the dim; none for a vector."""
    for dim, axes in enumerate(spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if names and set(names) <= set(ZERO):
            return tuple(names), dim
    return (), 0


def _gather(w: Array, spec: P, dtype) -> Array | None:
    """A matrix whole in D, in the compute dtype; None for a vector."""
    zero, dim = _zero(spec)
    return all_gather(w.astype(dtype), zero, dim=dim) if zero else None


def _sum_gradient(gradient: Array, spec: P) -> Array:
    return sum_gradient(gradient, *_zero(spec))
