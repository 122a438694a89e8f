"""Ring attention: blocks of keys and values go round a mesh axis, queries stay."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

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
    seen_steps: tuple[int, ...] | None = None,
    with_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
    axis_name: str = "ring",
) -> Array | tuple[Array, Array]:
    """Attention over tokens that lie over a mesh axis; call it inside `jax.shard_map`.

    The block of keys and values that a device attends to comes from its neighbour
    while it attended to the one before: R blocks, R - 1 hops; under a window fewer, and
    a hop passes over blocks that nobody sees. Results are joined in float32 by their
    logsumexp. The backward pass goes round once more, with float32 accumulators of dk
    and dv that travel with their block and end at its owner.

    Args:
      q, k, v: local arrays: member i of the axis has block i of the tokens.
      mask: `causal`, `q_positions`, and `between(...)` as
        `ulysses_jax.attention.mask.Mask` has them; its arrays are of whole rows, in the
        order in which the tokens lie over the axis. A window needs positions.
      scale: of the logits; None: H**-0.5.
      parts: the attention of one block: `statistics`, `gradients`, `join`, and sinks
        (`ulysses_jax.attention.parts.Parts`).
      zigzag: the tokens are in zigzag order (`parallel.zigzag`). Only under a causal
        mask by index does this matter here: all members then work equally.
      seen_steps: in step s a member attends to the keys of the one s before it; those
        steps, of 1 to R - 1, in which some member sees a key
        (`parallel.zigzag.seen_steps`). None: all.
      with_logsumexp: returns a pair, whose second is the float32 logsumexp `[B, N, t]`.
      sinks: local float32, of the heads of q; their gradient is this member's part.
      axis_name: of degree R.

    Returns:
      `[B, t, N, H]` in q's dtype. Kept for the backward pass under the names
      "attention_out" and "attention_logsumexp".

    Cost: for n steps, R - 1 without a window, receives n blocks of k and v forward, of
    which one is kept; n - 1, and n in float32, backward. What a causal mask hides of
    another's block is not computed: half of all, in zigzag order by every member alike.

    Source: Ring Attention, arXiv 2310.01889; zigzag order as in
    github.com/zhuzilin/ring-flash-attention.
    """
    blocks = Blocks(parts, scale, axis_name, zigzag, with_logsumexp=with_logsumexp)
    steps = range(1, blocks.degree) if seen_steps is None else seen_steps
    mask = jax.tree.map(jnp.asarray, mask)
    return _attend(blocks, _stations(steps), q, k, v, sinks, mask)


class _Station(NamedTuple):
    """A step: how many members its block has come on from the last, and goes on to the
    next; None where it goes no further."""

    step: int | Array
    came: int
    goes: int | None


def _stations(steps: Sequence[int]) -> tuple[_Station, ...]:
    came = [step - before for before, step in pairwise((0, *steps))]
    return tuple(map(_Station, steps, came, (*came[1:], None)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(blocks: Blocks, stations, q, k, v, sinks, mask):
    return _forward(blocks, stations, q, k, v, sinks, mask)[0]


def _forward(blocks: Blocks, stations, q, k, v, sinks, mask):
    kv = jnp.stack((k, v))  # which hop as one
    q, kv = (checkpoint_name(x, "attention_inputs") for x in (q, kv))
    # Each hop stands before the attention that it runs under.
    first = _hop(blocks, kv, stations[0].came) if stations else None
    if first is not None:
        first = checkpoint_name(first, "attention_inputs")
    so_far = blocks.own(q, kv, mask)

    def one_step(carry, at):
        so_far, kv = carry
        coming = _hop(blocks, kv, at.goes)
        return blocks.add(so_far, q, kv, mask, at.step), coming

    so_far, _ = _go_round(one_step, (so_far, first), stations)
    out, logsumexp = blocks.parts.with_sinks(so_far, sinks)
    out = checkpoint_name(out.astype(q.dtype), "attention_out")
    logsumexp = checkpoint_name(logsumexp.sum(axis=0), "attention_logsumexp")
    # The backward round starts with the block that came first.
    results = (out, logsumexp) if blocks.with_logsumexp else out
    return results, (q, kv, first, sinks, mask, out, logsumexp)


def _backward(blocks: Blocks, stations, residuals, upstream):
    q, kv, first, sinks, mask, *statistics = residuals
    upstream = upstream if blocks.with_logsumexp else (upstream,)
    whole = (*statistics, *upstream)
    dq, own = blocks.own_gradients(q, kv, mask, whole)

    def one_step(carry, at):
        dq, dkv, kv = carry
        coming = _hop(blocks, kv, at.goes)
        # A block's gradients so far are still where it was a step before.
        arriving = _hop(blocks, dkv, at.came)
        part, dkv_part = blocks.gradients(q, kv, mask, at.step, whole)
        dkv = dkv_part if arriving is None else arriving + dkv_part
        return dq + part, dkv, coming

    if stations:
        carry = one_step((dq, None, first), stations[0])
        dq, dkv, _ = _go_round(one_step, carry, stations[1:])
        own += _hop(blocks, dkv, blocks.degree - stations[-1].step)
    dk, dv = own.astype(kv.dtype)
    dsinks = blocks.parts.sinks_gradient(sinks, *whole)
    return dq.astype(q.dtype), dk, dv, dsinks, None


_attend.defvjp(_forward, _backward)


def _hop(blocks: Blocks, x: Array | None, members: int | None) -> Any:
    """To the member that many further round the ring; nothing goes nowhere."""
    if x is None or members is None:
        return None
    size = blocks.degree
    pairs = [(i, (i + members) % size) for i in range(size)]
    return lax.ppermute(x, blocks.axis_name, pairs)


def _go_round(one_step: Callable, carry: Any, stations: Sequence[_Station]) -> Any:
    """Steps of the same hops in a loop, so that a program grows no longer with the
    ring."""
    for hops, alike in groupby(stations, key=lambda at: at[1:]):
        steps = [at.step for at in alike]
        if len(steps) == 1:
            carry = one_step(carry, _Station(steps[0], *hops))
            continue

        def body(carry, step, hops=hops):
            return one_step(carry, _Station(step, *hops)), None

        # They are as far apart as their hops are long.
        numbers = jnp.arange(steps[0], steps[-1] + 1, hops[0])
        carry, _ = lax.scan(body, carry, numbers)
    return carry
