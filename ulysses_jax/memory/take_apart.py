"""A transformer's layer taken apart, inside shard_map: which heads, which tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int, Shaped

from ulysses_jax import layout
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.mask import Mask, Places
from ulysses_jax.attention.select import PARTS, attention_parts
from ulysses_jax.config import Memory
from ulysses_jax.memory.block_attention import Pieces
from ulysses_jax.mesh import device_of
from ulysses_jax.parallel.exchange import (
    HeadLayout,
    head_layout,
    heads_to_seq,
    own_slots,
    seq_to_heads,
)
from ulysses_jax.parallel.ulysses import split_head_chunks
from ulysses_jax.weights.whole import Unbound, Values, gather


@dataclass(frozen=True)
class _Heads:
    """Which heads a device has after the exchange, in groups attended by themselves.

    Query slots are [device, row of KV slots, KV slot, cell of its queries, query]; a
    group is one row and one cell of every device.
    """

    layout: HeadLayout
    degree: int
    kv_chunks: int
    group_chunks: int

    @property
    def slots(self) -> tuple[int, int, int, int, int]:
        kv_slots = self.layout.num_kv_slots // self.degree // self.kv_chunks
        queries = self.layout.group // self.group_chunks
        return self.degree, self.kv_chunks, kv_slots, self.group_chunks, queries

    @property
    def key_slots(self) -> tuple[slice, ...]:
        """The key/value slots of a device that each group reads."""
        size = self.slots[2]
        return tuple(
            slice(row * size, (row + 1) * size)
            for row in range(self.kv_chunks)
            for _ in range(self.group_chunks)
        )

    def of_group(self, w: Float[Array, "... N H"], g: int) -> Float[Array, "... n H"]:
        """Of a weight or a bias: those slots of every device that group g has."""
        row, cell = divmod(g, self.group_chunks)
        spread = self.layout.spread_q(w.reshape(1, -1, *w.shape[-2:]))
        cells = spread.reshape(-1, *self.slots, w.shape[-1])[:, :, row, :, cell]
        return cells.reshape(*w.shape[:-2], -1, w.shape[-1])

    def here(self, x: Shaped[Array, "N"], g: int) -> Shaped[Array, "n"]:
        """Those of the query slots that this device has of group g."""
        of_group = self.of_group(x[:, None], g)[:, 0]
        return own_slots(of_group) if self.degree > 1 else of_group

    def there(self, x: Float[Array, "B t N H"]) -> Float[Array, "B T n H"]:
        return seq_to_heads(x) if self.degree > 1 else x

    def back(self, outs: tuple[Float[Array, "B T n H"], ...]) -> Array:
        """The outputs of all groups, exchanged back and in order, `[B, t, N, H]`."""
        _, _, kv_slots, _, queries = self.slots

        def one(out: Array) -> Float[Array, "B t P kv group H"]:
            out = heads_to_seq(out) if self.degree > 1 else out
            return out.reshape(*out.shape[:2], self.degree, kv_slots, queries, -1)

        cells = [one(out) for out in outs]
        rows = [
            jnp.stack(cells[start : start + self.group_chunks], axis=4)
            for start in range(0, len(cells), self.group_chunks)
        ]
        out = jnp.stack(rows, axis=3)
        out = out.reshape(*out.shape[:2], self.layout.num_slots, -1)
        return self.layout.gather_q(out)


@dataclass(frozen=True)
class _Chunks:
    """Which tokens are attended at a time: P blocks of the sequence a chunk, one from
    each device; of a sequence that is one chunk, all of it as one block."""

    number: int
    size: int
    window: int | None
    is_whole: bool
    layout: BlockLayout | None

    def split(self, x: Float[Array, "B T n H"]) -> Float[Array, "P B t n H"]:
        x = x.reshape(x.shape[0], self.number, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def joined(self, x: Float[Array, "P B t n H"]) -> Float[Array, "B T n H"]:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def mask(
        self,
        rows: int,
        segment_ids: Int[Array, "B T"] | None,
        heads: Int[Array, "n"] | None,
        q_block: Array,
        kv_block: Array,
        is_own: bool,
    ) -> Mask:
        """Of a block of queries and one of keys, of `rows` of the batch.

        Args:
          heads: the query heads' numbers, where the layout differs by head.
        """

        def ids(block):
            assert segment_ids is not None
            start = block * self.size
            return lax.dynamic_slice_in_dim(segment_ids, start, self.size, axis=1)

        def positions(block):
            index = block * self.size + jnp.arange(self.size)
            return jnp.broadcast_to(index, (rows, self.size))

        def places(block):
            if self.layout is None or self.is_whole:
                return None
            size = self.layout.block_tokens
            index = block * (self.size // size) + jnp.arange(self.size // size)
            return jnp.broadcast_to(index, (rows, self.size // size))

        packed = segment_ids is not None
        narrow = self.window is not None and not self.is_whole  # else by index
        return Mask(
            causal=is_own,
            window=self.window,
            q_segment_ids=ids(q_block) if packed else None,
            kv_segment_ids=ids(kv_block) if packed else None,
            q_positions=positions(q_block) if narrow else None,
            kv_positions=positions(kv_block) if narrow else None,
            layout=self.layout,
            places=Places(heads, places(q_block), places(kv_block)),
        )


def take_apart(
    layer: Unbound,
    memory: Memory,
    x: Float[Array, "B t D"],
    values: Values,
    specs: tuple[Any, ...],
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Pieces, list[Array | None]]:
    """A `models.Layer` as pieces, and what their gradients are taken of.

    Args:
      x: local, of which only shape and dtype are read.
      values, specs: local; `weights.whole.specs_of` the global ones.
      segment_ids: local rows, all tokens.

    Raises:
      ValueError: the layer's strategy is not ulysses, or the mesh has a ring.
    """
    leaves, bound = gather(layer, values, specs, x.dtype)
    attention = bound(leaves).attention
    model, degree = attention.model, layout.degree("seq")
    if layout.degree("ring") > 1 or model.strategy not in ("auto", "ulysses"):
        raise ValueError(
            f"layers in pieces exchange over seq, as ulysses does, not {model.strategy}"
            " over a ring: `placement.place` refuses this mesh"
        )
    tensor = layout.degree("tensor")
    assert model.num_kv_heads
    head_slots = head_layout(
        model.num_heads // tensor, model.num_kv_heads // tensor, degree
    )
    heads = _Heads(
        head_slots,
        degree,
        *split_head_chunks(
            memory.head_chunks or 1, head_slots, tensor=tensor, seq=degree
        ),
    )
    rows, tokens = x.shape[:2]
    chunk_tokens = min(memory.sequence_chunk_tokens or tokens, tokens)
    is_whole = chunk_tokens == tokens
    number = 1 if is_whole else degree
    layout_of_blocks = attention.layout(tokens * degree)
    blocks = _Chunks(
        number,
        chunk_tokens * degree // number,
        attention.window,
        is_whole,
        layout_of_blocks,
    )
    by_head = layout_of_blocks is not None and layout_of_blocks.num_heads > 1
    seen_blocks = Mask(
        causal=True,
        window=attention.window,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
    ).block_bounds(blocks.size, blocks.size)

    def exchange(x: Float[Array, "B t N H"]) -> Float[Array, "P B t n H"]:
        return blocks.split(heads.there(x))

    def keys_values(leaves, x, angles):
        layer = bound(leaves)
        keys = layer.attention.keys_values(layer.attention_norm(x), angles)
        k, v = map(heads.layout.spread_kv, keys)
        return exchange(k), exchange(v)

    def queries(leaves, x, angles, g):
        layer = bound(leaves)
        attention = layer.attention
        of_heads = [(attention, "q"), (attention, "q_bias")]
        if attention.q_adapter is not None:
            of_heads.append((attention.q_adapter, "b"))
        for owner, name in of_heads:
            w = getattr(owner, name)
            if w is not None:
                of_group = jax.tree.map(lambda a: heads.of_group(a, g), w[...])
                setattr(owner, name, w.copy(of_group))
        sinks = attention.sinks
        if sinks is not None:
            sinks = heads.here(sinks[...], g)
        return exchange(attention.queries(layer.attention_norm(x), angles)), sinks

    def back(outs):
        return heads.back(tuple(map(blocks.joined, outs)))

    def finish(leaves, x, out):
        layer = bound(leaves)
        gates = layer.attention.gates(layer.attention_norm(x))
        attended = layer.attention.project_out(out, *gates)
        return layer.add_feed_forward(layer.add_attention(x, attended))

    def parts(q, k, g, *where):
        numbers = None
        if by_head:
            numbers = jnp.arange(head_slots.num_heads, dtype=jnp.int32)
            if tensor > 1:  # tied to q, as `parallel.blocks.Blocks.member` is
                index = lax.axis_index("tensor"), q[:1, :1]
                numbers += lax.optimization_barrier(index)[0] * head_slots.num_heads
            numbers = heads.here(numbers, g)
        seen = blocks.mask(rows, segment_ids, numbers, *where)
        device = device_of(get_abstract_mesh())
        return attention_parts(model.attention, device, q, k, seen), seen

    def first_block(q_block):
        kv_blocks = jnp.arange(tokens * degree // blocks.size)
        return jnp.argmax(seen_blocks.tiles(q_block, kv_blocks))

    def statistics(q, k, v, *where):
        attention, seen = parts(q, k, *where)
        return attention.statistics(q, k, v, mask=seen, scale=model.attention_scale)

    def gradients(q, k, v, out, logsumexp, dout, *where):
        attention, seen = parts(q, k, *where)
        return attention.gradients(
            q, k, v, out, logsumexp, dout, mask=seen, scale=model.attention_scale
        )

    alike = PARTS["blockwise"]  # in this, whichever attends to a block
    return Pieces(
        keys_values=keys_values,
        queries=queries,
        back=back,
        finish=finish,
        statistics=statistics,
        gradients=gradients,
        join=alike.join,
        with_sinks=alike.with_sinks,
        sinks_gradient=alike.sinks_gradient,
        first_block=first_block,
        key_slots=heads.key_slots,
        chunk_tokens=chunk_tokens,
        tile_tokens=memory.mlp_tile_tokens or chunk_tokens * rows,
        keys_on_host="keys" in memory.offload,
    ), leaves
