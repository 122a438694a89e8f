"""Attention under a strategy: the best local attention, and the mask that it needs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JAXTypeError
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from ulysses_jax.attention.mask import Mask, Places
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.select import (
    PARTS,
    attention_parts,
    check_attention,
    local_attention,
)
from ulysses_jax.mesh import device_of
from ulysses_jax.parallel.all_gather import all_gather
from ulysses_jax.parallel.hybrid import hybrid
from ulysses_jax.parallel.megatron import megatron
from ulysses_jax.parallel.ulysses import LocalAttention, ulysses
from ulysses_jax.parallel.zigzag import half_block_tokens, seen_steps, zigzag_index
from ulysses_jax.strategies import (
    Strategy,
    check_head_chunks,
    check_strategy,
    num_members,
    strategy_of,
)

# Those that attend block by block, with an attention taken apart.
BY_BLOCKS: dict[Strategy, Callable[..., Any]] = {
    "ring": hybrid,
    "hybrid": hybrid,
    "all_gather": all_gather,
}


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mesh: Mesh | AbstractMesh,
    mask: Mask,
    strategy: Strategy | None = None,
    attention: LocalAttention | Parts | str = "auto",
    zigzag: bool = False,
    scale: float | Float[Array, ""] | None = None,
    head_chunks: int = 1,
    return_logsumexp: bool = False,
    sinks: Float[Array, "N"] | None = None,
) -> Any:
    """Attends over a sequence that is spread over the mesh, by any strategy.

    Args:
      q, k, v: global; B over (data, fsdp), T over (ring, seq), N over tensor; for
        megatron T whole, N over (tensor, seq).
      mask: its arrays are global, in the order in which the tokens lie.
      strategy: None: hybrid or ring where the mesh has a ring, else ulysses.
      attention: a name of `model.attention`, or what a device computes:
        `f(q, k, v, mask=..., scale=...)`; block by block, a `Parts`.
      zigzag: tokens lie in zigzag order (`parallel.zigzag`) over the members that
        attend block by block.
      scale: None: H**-0.5; an array, which may be learned, is multiplied into q.
      head_chunks: groups of heads that are exchanged and attended by themselves.
      return_logsumexp: return a pair, whose second is float32; not for all_gather and
        megatron.
      sinks: global, float: logits of one more key a head, whose value is 0.

    Returns:
      `[B, T, N, H]`, sharded as q; with `return_logsumexp` also `[B, T, N]`.

    Raises:
      ValueError: a strategy that the mesh does not carry; zigzag without a causal mask;
        a name that there is not; an attention that has no parts, or no sinks; dims that
        do not fit.
    """
    ring, seq, tensor = (
        dict(mesh.shape).get(axis, 1) for axis in ("ring", "seq", "tensor")
    )
    if strategy is None:
        strategy = strategy_of(ring, seq)
    check_strategy(strategy, ring, seq)
    device = device_of(mesh)
    attention = _checked(attention)
    if sinks is not None:
        _check_sinks(sinks, q, attention)
        sinks = sinks.astype(jnp.float32)  # its gradient is a sum over devices
    if isinstance(scale, jax.Array):
        q = (q.astype(jnp.float32) * scale.astype(jnp.float32)).astype(q.dtype)
        scale = 1.0
    members = num_members(strategy, ring, seq)
    options: dict = dict(mesh=mesh, mask=mask, scale=scale, sinks=sinks)
    if mask.layout is not None:
        mask.layout.check(q.shape[2], q.shape[1], k.shape[1])
        if mask.q_positions is None:  # else what the mask shows is not known
            mask.layout.tiles(causal=mask.causal, window=mask.window)
        options["by_head"] = mask.layout.num_heads > 1
        if isinstance(attention, Parts) and attention not in PARTS.values():
            attention = attention.by_layout()
    if return_logsumexp:
        if strategy in ("all_gather", "megatron"):
            raise ValueError(
                f"strategy {strategy} returns no logsumexp: use strategy ulysses"
            )
        options["with_logsumexp"] = True
    if members == 1:
        run = partial(ulysses, head_chunks=head_chunks)
        if strategy == "megatron":
            check_head_chunks(strategy, head_chunks, k.shape[2], tensor=tensor, seq=seq)
            run = megatron
        if return_logsumexp or (sinks is not None and attention != "reference"):
            if isinstance(attention, str):
                attention = attention_parts(attention, device, q, k, mask)
            elif not isinstance(attention, Parts):
                raise ValueError(
                    "a function given as attention returns no logsumexp: give a "
                    "ulysses_jax.attention.parts.Parts, or leave attention out"
                )
            whole = attention_of(attention, with_logsumexp=return_logsumexp)
        elif isinstance(attention, Parts):
            raise ValueError(
                f"attention is Parts, but over ring={ring} a device attends to whole "
                "rows: give f(q, k, v, mask=..., scale=...)"
            )
        elif isinstance(attention, str):
            whole = local_attention(attention, device, q, k, mask)
        else:
            whole = attention
        return run(q, k, v, attention=whole, **options)
    if zigzag and not mask.causal:
        raise ValueError(
            f"zigzag order shares out a causal mask over {members} members, but this "
            "mask is not causal: use causal=True, or the sequence's own order, or "
            f"strategy ulysses with ring=1, seq={ring * seq} or with ring=1, seq="
            f"{seq if ring > 1 else 1}"
        )
    if zigzag:
        for x in (q, k):
            half_block_tokens(x.shape[1], members)  # else refused
    if strategy != "all_gather":
        options |= dict(head_chunks=head_chunks, seen_steps=None)
        if mask.q_positions is None:
            options["seen_steps"] = seen_steps(
                q.shape[1],
                k.shape[1],
                members,
                causal=mask.causal,
                window=mask.window,
                zigzag=zigzag,
            )
    if mask.layout is not None:
        mask = _with_places(mask, q, k, members, zigzag)
    options["mask"] = mask = _with_positions(mask, q, k, members if zigzag else 1)
    if isinstance(attention, str):
        # It is called on a member's tokens, in zigzag order on half-blocks too.
        num_blocks = members * (2 if zigzag else 1)

        def part(x: Array) -> Any:
            tokens = x.shape[1] // num_blocks
            return jax.ShapeDtypeStruct((len(x), tokens, *x.shape[2:]), x.dtype)

        attention = attention_parts(attention, device, part(q), part(k), mask)
    elif not isinstance(attention, Parts):
        raise ValueError(
            f"over {members} members a device attends to a block of keys at a time, "
            f"and joins blocks: give attention as ulysses_jax.attention.parts.Parts, "
            f"not as a function, or use ring=1, seq={ring * seq}"
        )
    check_head_chunks(strategy, head_chunks, k.shape[2], tensor=tensor, seq=seq)
    return BY_BLOCKS[strategy](q, k, v, parts=attention, zigzag=zigzag, **options)


def _checked(attention: LocalAttention | Parts | str) -> LocalAttention | Parts | str:
    """A name that there is, or a user's function or Parts, whose misuse is told."""
    if isinstance(attention, str):
        check_attention(attention)
        return attention
    if isinstance(attention, Parts):
        if attention in PARTS.values():
            return attention
        forward = _told("f(q, k, v, mask=..., scale=...)", attention.forward)
        called = "f(q, k, v, out, logsumexp, dout, mask=..., scale=...)"
        gradients = _told(called, attention.gradients)
        return attention._replace(forward=forward, gradients=gradients)
    if not callable(attention):
        raise ValueError(
            "attention is a function f(q, k, v, mask=..., scale=...), a "
            f"ulysses_jax.attention.parts.Parts, or None, not {attention!r}"
        )
    return _told("f(q, k, v, mask=..., scale=...)", attention)


def _check_sinks(sinks: Any, q: Array, attention: LocalAttention | Parts | str) -> None:
    shape = getattr(sinks, "shape", type(sinks).__name__)
    if shape != q.shape[2:3]:
        raise ValueError(
            f"sinks is a global array of a logit a query head, {q.shape[2:3]} for a q "
            f"of shape {q.shape}, not {shape}"
        )
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks are logits in float32 or bfloat16, not {sinks.dtype}: cast them"
        )
    if not isinstance(attention, str | Parts):
        raise ValueError(
            "a function given as attention has no sinks: give a "
            "ulysses_jax.attention.parts.Parts, to which they are joined, or leave "
            "attention or sinks out"
        )


def _told(called: str, attention: Callable) -> Callable:
    """Says how it is called where it cannot be."""

    def call(*arrays, **options):
        try:
            return attention(*arrays, **options)
        except (TypeError, AttributeError) as error:
            if isinstance(error, JAXTypeError):
                raise
            raise ValueError(
                f"the function given as attention raised {type(error).__name__}: "
                f"{error}. It is called as {called}, with scale a number or None and "
                "mask a ulysses_jax.attention.mask.Mask: data (mask.causal, "
                "mask.window, mask.layout, ...), not an array. Wrap it in one that "
                "takes these"
            ) from error

    return call


def _with_places(mask: Mask, q: Array, k: Array, members: int, zigzag: bool) -> Mask:
    """With the order of the layout's blocks, of which each part must have whole ones.

    Raises:
      ValueError: they are cut.
    """
    assert mask.layout is not None
    size, parts = mask.layout.block_tokens, members * (2 if zigzag else 1)
    for what, x in (("query", q), ("key", k)):
        tokens = x.shape[1] // parts
        if x.shape[1] % parts == 0 and tokens % size:
            fits = [n for n in range(size, 0, -1) if tokens % n == 0]
            raise ValueError(
                f"the layout's blocks of {size} tokens are cut: {x.shape[1]} {what} "
                f"tokens over {members} members{' in zigzag order' * zigzag} are parts "
                f"of {tokens}; use a layout of blocks of {fits[0]}, or strategy "
                "ulysses with ring=1"
            )
    q_blocks, kv_blocks = (_order(x, members if zigzag else 1, size) for x in (q, k))
    places = Places(q_blocks=q_blocks, kv_blocks=kv_blocks)
    return dataclasses.replace(mask, places=places)


def _with_positions(mask: Mask, q: Array, k: Array, members: int) -> Mask:
    """With the tokens' order as positions where whole blocks do not decide a pair."""
    by_blocks = not mask.causal or q.shape[1] == k.shape[1]
    by_blocks &= mask.window is None and mask.layout is None
    if mask.q_positions is not None or by_blocks:
        return mask
    return dataclasses.replace(
        mask, q_positions=_order(q, members), kv_positions=_order(k, members)
    )


def _order(like: Array, members: int, size: int = 1) -> Array:
    """Int32 `[B, T / size]`, the sequence's number of every block of `size` tokens."""
    first = jnp.arange(0, like.shape[1], size, dtype=jnp.int32)
    number = zigzag_index(first, like.shape[1], members) // size
    return jnp.broadcast_to(number, (len(like), len(first)))
