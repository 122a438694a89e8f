"""A layer in pieces, attention and feed-forward together, with a backward pass of its
own."""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.config import Memory
from ulysses_jax.memory.passes import backward, forward
from ulysses_jax.memory.take_apart import take_apart
from ulysses_jax.sharding import activation
from ulysses_jax.weights.whole import (
    Unbound,
    Values,
    gradient_specs,
    laid_as,
    scatter,
    specs_of,
)

# As every flash attention of this library names what its backward pass needs.
ATTENTION = ("attention_out", "attention_logsumexp")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def layer_in_pieces(
    layer: Unbound,
    memory: Memory,
    x: Float[Array, "B T D"],
    values: Values,
    angles: Any,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """A `models.Layer`, for `sequence_chunk_tokens` of a device's tokens at a time.

    First the keys and values of all chunks; then for each chunk, `head_chunks` times,
    queries and their attention over the keys before; then the projection and the
    feed-forward, for `mlp_tile_tokens` at a time. The backward pass does the same
    again, then pulls each chunk back.

    Args:
      x: global, compute dtype, B over (data, fsdp), T over seq.
      values: of the layer's parameters, global float32, sharded as
        `sharding.parameter` says.
      angles: of the rotary embedding, sharded as x's tokens; empty without.
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
    return _run_forward(layer, memory, x, values, angles, segment_ids, keep=False)[0]


def _forward(layer, memory, x, values, angles, segment_ids):
    keep = memory.remat == "attention"
    y, attended = _run_forward(layer, memory, x, values, angles, segment_ids, keep=keep)
    if attended is not None:
        out, logsumexps = attended
        logsumexps = tuple(checkpoint_name(each, ATTENTION[1]) for each in logsumexps)
        attended = checkpoint_name(out, ATTENTION[0]), logsumexps
    return y, (x, values, angles, segment_ids, attended)


def _backward(layer, memory, residuals, dy):
    x, values, angles, segment_ids, attended = residuals
    specs = _specs(layer, values, angles, segment_ids)
    x_spec, value_specs, *_ = specs

    def local(x, values, angles, segment_ids, attended, dy):
        pieces, leaves = take_apart(layer, memory, x, values, value_specs, segment_ids)
        dx, sums = backward(pieces, leaves, x, angles, attended, dy)
        return dx, scatter(layer, sums, value_specs)

    dx, gradients = layout.over_devices(
        local,
        (*specs, _attended_specs(attended), x_spec),
        (x_spec, gradient_specs(value_specs)),
    )(x, values, angles, segment_ids, attended, dy)
    return dx, laid_as(values, gradients), None, None


layer_in_pieces.defvjp(_forward, _backward)


def _run_forward(layer, memory, x, values, angles, segment_ids, *, keep):
    specs = _specs(layer, values, angles, segment_ids)

    def local(x, values, angles, segment_ids):
        pieces, leaves = take_apart(layer, memory, x, values, specs[1], segment_ids)
        return forward(pieces, leaves, x, angles, keep=keep)

    return layout.over_devices(local, specs, (specs[0], _attended_specs(keep or None)))(
        x, values, angles, segment_ids
    )


def _specs(layer, values, angles, segment_ids):
    axes = layout.axes()
    return (
        activation("BTD", axes),
        specs_of(layer, values),
        jax.tree.map(lambda _: activation("BT", axes), angles),
        jax.tree.map(lambda _: activation("B", axes), segment_ids),
    )


def _attended_specs(attended: Any):
    """Of attention's output, and one for the logsumexps `[c, P, B, n, t]` of all
    groups: heads lie over tensor, then seq."""
    if attended is None:
        return None
    rows, heads = layout.present(("data", "fsdp")), layout.present(("tensor", "seq"))
    logsumexps = P(None, None, rows or None, heads or None, None)
    return activation("BTNH", layout.axes()), logsumexps
