"""A context memory: a new token reads the cache's first tokens, its last ones, and the
blocks between them that matter to it (InfLLM, arXiv 2402.04617)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ulysses_jax import layout
from ulysses_jax.attention.one_query import one_query_attention
from ulysses_jax.config import Model
from ulysses_jax.inference.cache import (
    KeysValues,
    heads_over_seq,
    kept_from_prompt,
    my_slots,
    place_spec,
    positions_at,
    specs,
    written,
)
from ulysses_jax.parallel.exchange import seq_to_heads
from ulysses_jax.sharding import ACTIVATION, ONE_TOKEN, activation


@dataclass(frozen=True)
class ContextMemory:
    """What a token reads of the cache of a layer of kind full.

    The cache behind `initial_tokens` is cut into blocks. A block lies in the window
    until all of its tokens come before the `window_tokens` + 1 last ones; then its
    `representatives` stand for it: of each query head, the keys that the queries of
    the next `window_tokens` tokens had the largest sums of products with. A block's
    score is the sum over query heads of the products of the new query with their mean;
    the `num_blocks` blocks with the largest are read, the same by all heads.

    It is exact, as without it, while all that came before is initial, in the window,
    or in no more than num_blocks blocks. Keys keep their positions: it is for a model
    that was trained to the length. (The paper gives all tokens behind the window one
    position, so that a model trained on short rows reads longer ones, and reads the
    prompt so, too; here the prompt is read whole, under Ulysses.)

    Attributes:
      initial_tokens: the first ones, always read; whole blocks.
      window_tokens: the last ones, always read.
      block_tokens: of a block.
      num_blocks: read by score; 0: initial tokens and window alone.
      representatives: keys of a block.
    """

    initial_tokens: int = 128
    window_tokens: int = 4096
    block_tokens: int = 128
    num_blocks: int = 16
    representatives: int = 4

    @property
    def read_tokens(self) -> int:
        """The most that a token reads: a block of the window is read until it is out
        of it whole."""
        blocks = self.num_blocks + 1
        return self.initial_tokens + self.window_tokens + blocks * self.block_tokens

    @property
    def ring_tokens(self) -> int:
        """Those whose sums of products still grow, or are about to be read."""
        return self.window_tokens + self.block_tokens


class Remembered(NamedTuple):
    """Of a layer. slots: of the queries, over (tensor, seq).

    kept: the keys and values of all tokens.
    sums: float32 `[B, ring, slots]`, each of a key with its next queries; position p
      at place p % ring.
    blocks: `[B, S // block, slots, H]`, the mean of each block's representatives.
    """

    kept: KeysValues
    sums: Array
    blocks: Array


class Step(NamedTuple):
    """What a token leaves: its key and value, the sums after it, and the mean of the
    block that the next token finds out of the window, if there is one."""

    own: KeysValues
    sums: Array
    block: Array


def remembered_from_prompt(
    model: Model,
    context: ContextMemory,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    num_places: int,
) -> Remembered:
    """What a layer starts with, of a prompt's queries, keys and values.

    Args: as of `cache.kept_from_prompt`; q as k, with query heads.

    Cost: an all-to-all of q, k and v over seq.
    """
    kept = kept_from_prompt(model, k, v, lengths, num_places)
    heads = heads_over_seq(model)

    def local(q: Array, keys: Array, lengths: Array) -> tuple[Array, Array]:
        q = heads.spread_q(q)
        if layout.degree("seq") > 1:
            q = seq_to_heads(q)
        alive = jnp.arange(q.shape[1]) < lengths[:, None]
        q = jnp.where(alive[:, :, None, None], q, 0)
        sums = _sums_of_prompt(q, keys, context.window_tokens)
        at = positions_at(lengths, context.ring_tokens)
        ring = jnp.take_along_axis(sums, jnp.maximum(at, 0)[:, :, None], axis=1)
        ring = jnp.where(at[:, :, None] >= 0, ring, 0)
        return ring, _means(sums, keys, context, q.shape[2])

    lies, rows = specs(ACTIVATION)
    place = place_spec()
    sums, blocks = layout.over_devices(
        local, (lies, place, rows), (_sums_spec(), place)
    )(q, kept[0], lengths)
    return Remembered(kept, sums, blocks)


def attend_to_remembered(
    model: Model,
    context: ContextMemory,
    q: Float[Array, "B 1 N H"],
    own: KeysValues,
    remembered: Remembered,
    lengths: Int[Array, "B"],
    *,
    scale: float | None,
    sinks: Float[Array, "N"] | None,
) -> tuple[Float[Array, "B 1 N H"], Step]:
    """As `cache.attend_to_cache`, over what the context memory lets be read.

    Cost: an all-gather of the result over seq; an all-reduce of a float32 number a
    block and row over (tensor, seq).
    """
    heads = heads_over_seq(model)
    window, block = context.window_tokens, context.block_tokens

    def local(
        q: Array, k: Array, v: Array, its: Remembered, lengths: Array, sinks: Any
    ):
        own = my_slots(heads.spread_kv(k)), my_slots(heads.spread_kv(v))
        queries = my_slots(heads.spread_q(q))
        keys = its.kept[0]
        # The window begins where its first block does.
        begin = _blocks_out(lengths, context) * block
        begin = jnp.maximum(begin, context.initial_tokens)[:, None]
        recent = positions_at(lengths, context.ring_tokens)
        first = jnp.arange(context.initial_tokens)[None]
        first = jnp.broadcast_to(first, (len(lengths), first.shape[1]))
        parts = [
            (first, first < lengths[:, None]),
            (recent, recent >= begin),
            _chosen(queries, its.blocks, begin, context),
        ]
        places, seen = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        places = jnp.clip(places, 0, keys.shape[1] - 1)[:, :, None, None]
        read = [jnp.take_along_axis(x, places, axis=1) for x in its.kept]
        if sinks is not None:
            sinks = my_slots(heads.spread_q(sinks[None, None, :, None])).reshape(-1)
        out = one_query_attention(
            queries, (read[0], read[1]), own, seen=seen, scale=scale, sinks=sinks
        )
        if layout.degree("seq") > 1:
            out = layout.all_gather(out, ("seq",), 2)

        # The block that the next token finds out of the window, if there is one; its
        # sums grow no more.
        left = _blocks_out(lengths + 1, context) - 1
        its_places = jnp.maximum(left, 0)[:, None] * block + jnp.arange(block)
        ring_places = (its_places % context.ring_tokens)[:, :, None]
        mean = _means(
            jnp.take_along_axis(its.sums, ring_places, axis=1),
            jnp.take_along_axis(keys, its_places[:, :, None, None], axis=1),
            context,
            queries.shape[2],
        )
        near = slice(context.initial_tokens, context.initial_tokens + recent.shape[1])
        more = _products(queries, read[0][:, near])
        grows = (recent >= 0) & (recent >= lengths[:, None] - window)
        sums = its.sums + jnp.where(grows[:, :, None], more, 0)
        rows = jnp.arange(len(lengths))
        sums = sums.at[rows, lengths % context.ring_tokens].set(0)
        return heads.gather_q(out), Step(own, sums, mean)

    lies, rows = specs(ONE_TOKEN)
    sinks_lie = None if sinks is None else activation("N", layout.axes())
    place: Any = place_spec()
    its_specs = Remembered((place, place), _sums_spec(), place)
    out_specs = (lies, Step((place, place), _sums_spec(), place))
    return layout.over_devices(
        local, (lies, lies, lies, its_specs, rows, sinks_lie), out_specs
    )(q, *own, remembered, lengths, sinks)


def written_remembered(
    context: ContextMemory,
    remembered: Remembered,
    step: Step,
    lengths: Int[Array, "B"],
    *,
    stacked: bool,
) -> Remembered:
    """After the tokens at positions `lengths`, as `cache.written`."""
    kept = written(remembered.kept, step.own, lengths, stacked=stacked)

    def local(blocks: Array, block: Array, lengths: Array) -> Array:
        out = _blocks_out(lengths + 1, context)
        due = (out > 0) & (
            (lengths - context.window_tokens) % context.block_tokens == 0
        )
        # Past the last block nothing is written.
        index = jnp.where(due, out - 1, blocks.shape[-3])
        rows = jnp.arange(len(lengths))
        if stacked:
            return blocks.at[:, rows, index].set(block[:, :, 0], mode="drop")
        return blocks.at[rows, index].set(block[:, 0], mode="drop")

    _, rows = specs(ONE_TOKEN)
    place = P(*((None,) if stacked else ()), *place_spec())
    blocks = layout.over_devices(local, (place, place, rows), place)(
        remembered.blocks, step.block, lengths
    )
    return Remembered(kept, step.sums, blocks)


def remembered_bytes(
    model: Model, context: ContextMemory, num_rows: int, cache_tokens: int
) -> int:
    """Of a device, beside `cache.cache_bytes`: sums, and means of blocks."""
    assert model.head_size
    slots = heads_over_seq(model).num_slots // layout.degree("seq")
    rows = num_rows // layout.degree("data", "fsdp")
    num_layers = model.kinds().count("full")
    size = model.head_size * jnp.dtype(model.compute_dtype).itemsize
    means = cache_tokens // context.block_tokens * size
    return num_layers * rows * slots * (4 * context.ring_tokens + means)


def _blocks_out(lengths: Int[Array, "B"], context: ContextMemory) -> Int[Array, "B"]:
    """How many blocks, from the first token on, have left the window of the tokens at
    these positions."""
    before = jnp.maximum(lengths - 1 - context.window_tokens, 0)
    return before // context.block_tokens


def _chosen(
    queries: Float[Array, "B 1 n H"],
    means: Float[Array, "B blocks n H"],
    begin: Int[Array, "B 1"],
    context: ContextMemory,
) -> tuple[Int[Array, "B chosen"], Bool[Array, "B chosen"]]:
    """Places of the tokens of the best blocks between the initial tokens and `begin`,
    and which of them are such."""
    wide = dict(preferred_element_type=jnp.float32)
    scores = jnp.einsum("BnH,BbnH->Bb", queries[:, 0], means, **wide)
    scores = layout.psum(scores, layout.present(("tensor", "seq")))
    size, first = (
        context.block_tokens,
        jnp.arange(means.shape[1]) * context.block_tokens,
    )
    there = (first >= context.initial_tokens) & (first + size <= begin)
    scores = jnp.where(there, scores, -jnp.inf)
    best, index = lax.top_k(scores, min(context.num_blocks, means.shape[1]))
    places = index[:, :, None] * size + jnp.arange(size)
    seen = jnp.broadcast_to((best > -jnp.inf)[:, :, None], places.shape)
    return places.reshape(len(places), -1), seen.reshape(len(seen), -1)


def _sums_of_prompt(
    q: Float[Array, "B T n H"], keys: Float[Array, "B S K H"], window: int
) -> Float[Array, "B S n"]:
    """Of each key its products with the next `window` queries, summed.

    Queries are summed over a window by what is left of its first chunk of `window`
    tokens and what begins its second: sums over the whole prompt would lose digits.
    """
    num_places = keys.shape[1]
    window = min(window, num_places)
    chunks = -(-num_places // window)

    def cut(x: Array, length: int) -> Array:
        x = jnp.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1])), *_NO_PAD))
        return jnp.moveaxis(x.reshape(len(x), -1, window, *x.shape[2:]), 1, 0)

    queries = cut(q[:, :num_places], (chunks + 1) * window)

    def one(chunk: tuple[Array, Array, Array]) -> Array:
        here, after, its_keys = chunk
        here, after = (jnp.cumsum(x.astype(jnp.float32), axis=1) for x in (here, after))
        return _products(here[:, -1:] - here + after, its_keys)

    sums = lax.map(one, (queries[:-1], queries[1:], cut(keys, chunks * window)))
    return jnp.moveaxis(sums, 0, 1).reshape(len(q), -1, q.shape[2])[:, :num_places]


_NO_PAD = ((0, 0), (0, 0))


def _products(
    q: Float[Array, "B t n H"], keys: Float[Array, "B L K H"]
) -> Float[Array, "B L n"]:
    """Of each key with the query of its place, or with the one that there is."""
    batch, num_queries, num_heads, size = q.shape
    queries = q.reshape(batch, num_queries, keys.shape[2], -1, size)
    return jnp.sum(
        queries.astype(jnp.float32) * keys[:, :, :, None].astype(jnp.float32), axis=-1
    ).reshape(batch, keys.shape[1], num_heads)


def _means(
    sums: Float[Array, "B T n"],
    keys: Float[Array, "B T K H"],
    context: ContextMemory,
    num_heads: int,
) -> Float[Array, "B blocks n H"]:
    """Of each whole block the mean of its representatives."""
    size, (batch, _, num_kv_heads, width) = context.block_tokens, keys.shape
    num_blocks = keys.shape[1] // size
    whole = num_blocks * size
    sums = sums[:, :whole].reshape(batch, num_blocks, size, num_kv_heads, -1)
    best = jnp.moveaxis(sums, 2, -1)  # [B, blocks, K, n / K, size]
    _, index = lax.top_k(best, context.representatives)
    index = index.reshape(batch, num_blocks, num_kv_heads, -1, 1)
    keys = keys[:, :whole].reshape(batch, num_blocks, size, num_kv_heads, width)
    found = jnp.take_along_axis(jnp.moveaxis(keys, 2, 3), index, axis=3)
    found = found.reshape(batch, num_blocks, num_heads, context.representatives, width)
    return found.astype(jnp.float32).mean(axis=3).astype(keys.dtype)


def _sums_spec() -> Any:
    return P(*place_spec()[:3])
