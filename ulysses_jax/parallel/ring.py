"""Ring attention: blocks of keys and values go round a mesh axis, queries stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax.parallel.blocks import Blocks


def ring_attention(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    *,
    mask: Any,
    scale: float | None = None,
    parts: Any,
    zigzag: bool = False,
    axis_name: str = "ring",
) -> Float[Array, "B t N H"]:
    """Attention over tokens that lie over a mesh axis; call it inside `jax.shard_map`.

    The block of keys and values that a device attends to comes from its neighbour
    while it attended to the one before: R blocks, R - 1 hops. Results are joined in
    float32 by their logsumexp. The backward pass goes round once more, with float32
    accumulators of dk and dv that travel with their block and end at its owner.

    Args:
      q, k, v: local arrays: member i of the axis has block i of the tokens.
      mask: `causal`, `q_positions`, and `between(...)` as
        `ulysses_jax.attention.mask.Mask` has them; its arrays are of whole rows, in the
        order in which the tokens lie over the axis. A window needs positions.
      scale: of the logits; None: H**-0.5.
      parts: the attention of one block: `statistics`, `gradients`, `join`
        (`ulysses_jax.attention.parts.Parts`).
      zigzag: the tokens are in zigzag order (`spreading.zigzag_order`). Only under a
        causal mask by index does this matter here: all members then work equally.
      axis_name: of degree R.

    Returns:
      `[B, t, N, H]` in q's dtype. Kept for the backward pass under the names
      "attention_out" and "attention_logsumexp".

    Cost: receives R - 1 blocks of k and v forward, of which one is kept; R - 2, and
    R - 1 in float32, backward. What a causal mask hides of another's block is not
    computed: half of all, in zigzag order by every member alike.

    Source: Ring Attention, arXiv 2310.01889; zigzag order as in
    github.com/zhuzilin/ring-flash-attention.
    """
    blocks = Blocks(parts, scale, axis_name, zigzag)
    return _attend(blocks, q, k, v, jax.tree.map(jnp.asarray, mask))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q, k, v, mask):
    return _forward(blocks, q, k, v, mask)[0]


def _forward(blocks: Blocks, q, k, v, mask):
    degree, kv = blocks.degree, jnp.stack((k, v))  # which hop as one
    # Each hop stands before the attention that it runs under.
    first = _hop(blocks, kv)
    so_far = blocks.own(q, kv, mask)

    def one_step(carry, step):
        so_far, kv = carry
        coming = _hop(blocks, kv)
        return blocks.add(so_far, q, kv, mask, step), coming

    if degree > 1:
        so_far, last = _repeat(one_step, (so_far, first), range(1, degree - 1))
        so_far = blocks.add(so_far, q, last, mask, degree - 1)
    out = checkpoint_name(so_far[0].astype(q.dtype), "attention_out")
    logsumexp = checkpoint_name(so_far[1].sum(axis=0), "attention_logsumexp")
    # The backward round starts with the block that came first.
    return out, (q, kv, first, mask, out, logsumexp)


def _backward(blocks: Blocks, residuals, dout):
    q, kv, first, mask, *statistics = residuals
    degree, whole = blocks.degree, (*statistics, dout)
    first = _after(first, statistics[1])
    dq, own = blocks.own_gradients(q, kv, mask, whole)

    def add(dq, dkv, kv, step):
        """A block's gradients to those so far, `dkv`, which are still a hop behind."""
        arriving = None if dkv is None else _hop(blocks, dkv)
        part, dkv_part = blocks.gradients(q, kv, mask, step, whole)
        return dq + part, dkv_part if arriving is None else arriving + dkv_part

    def one_step(carry, step):
        dq, dkv, kv = carry
        coming = _hop(blocks, kv)
        return *add(dq, dkv, kv, step), coming

    if degree > 1:
        carry = dq, None, first
        if degree > 2:
            carry = _repeat(one_step, one_step(carry, 1), range(2, degree - 1))
        dq, dkv, last = carry
        dq, dkv = add(dq, dkv, last, degree - 1)
        own += _hop(blocks, dkv)
    dk, dv = own.astype(kv.dtype)
    return dq.astype(q.dtype), dk, dv, None


_attend.defvjp(_forward, _backward)


def _after(x: Array, earlier: Array) -> Array:
    """x, once `earlier` is computed; NaN if that is.

    Hops that do not wait for one another run in no fixed order in a program that XLA
    on CPU loads from a compilation cache (jax 0.10.2): it then mixes up their blocks,
    or aborts ("id < num_threads", "Termination timeout"). A barrier would not do: XLA
    takes it away before it orders what runs.
    """
    return jnp.where(jnp.isnan(earlier.ravel()[0]), jnp.nan, x)


def _hop(blocks: Blocks, x: Array) -> Array:
    """To the next member of the ring."""
    size = blocks.degree
    if size == 1:
        return x
    return lax.ppermute(x, blocks.axis_name, [(i, (i + 1) % size) for i in range(size)])


def _repeat(one_step: Callable, carry: Any, steps: range) -> Any:
    """In a loop, so that a program grows no longer with the ring."""
    if not steps:
        return carry
    numbers = jnp.arange(steps.start, steps.stop)
    return lax.scan(lambda carry, step: (one_step(carry, step), None), carry, numbers)[
        0
    ]
