"""The exchange: tokens sharded and heads whole <-> tokens whole and heads sharded."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def seq_to_heads(
    x: Shaped[Array, "B t N H"], axis_name: str = "seq"
) -> Shaped[Array, "B T n H"]:
    """Exchanges a shard of the tokens for a shard of the heads.

    `[B, T/P, N, H] -> [B, T, N/P, H]`, to be called inside `jax.shard_map`: device i of
    the axis ends with all the tokens, in order, of heads `[i N/P, (i+1) N/P)`. Its
    transpose, and its inverse, is `heads_to_seq`.

    Args:
      x: local array, any dtype; tokens are sharded in order over `axis_name`.
      axis_name: the mesh axis of degree P; at P = 1 nothing is sent.

    Returns:
      The local array `[B, T, N/P, H]`.

    Raises:
      ValueError: P does not divide N.

    Costs one all-to-all: each device sends and receives (P-1)/P of its array.
    Source: DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1.
    """
    degree = lax.axis_size(axis_name)
    if x.shape[2] % degree:
        raise ValueError(
            f"seq_to_heads: {x.shape[2]} heads do not divide over {axis_name!r} degree "
            f"{degree}: use a degree that divides them, or ulysses_attention, which "
            "pads heads"
        )
    batch, tokens, heads, size = x.shape
    x = x.reshape(batch, tokens, degree, heads // degree, size)
    x = _all_to_all(jnp.moveaxis(x, 2, 0), axis_name)  # [P, B, t, n, H]
    return jnp.moveaxis(x, 0, 1).reshape(batch, degree * tokens, -1, size)


def heads_to_seq(
    x: Shaped[Array, "B T n H"], axis_name: str = "seq"
) -> Shaped[Array, "B t N H"]:
    """Exchanges a shard of the heads for a shard of the tokens.

    `[B, T, N/P, H] -> [B, T/P, N, H]`, to be called inside `jax.shard_map`: device i of
    the axis ends with all the heads, in order, of tokens `[i T/P, (i+1) T/P)`. Its
    transpose, and its inverse, is `seq_to_heads`.

    Args:
      x: local array, any dtype; heads are sharded in order over `axis_name`.
      axis_name: the mesh axis of degree P; at P = 1 nothing is sent.

    Returns:
      The local array `[B, T/P, N, H]`.

    Raises:
      ValueError: P does not divide T.

    Costs one all-to-all: each device sends and receives (P-1)/P of its array.
    Source: DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1.
    """
    degree = lax.axis_size(axis_name)
    if x.shape[1] % degree:
        raise ValueError(
            f"heads_to_seq: {x.shape[1]} tokens do not divide over {axis_name!r} "
            f"degree {degree}: pad the sequence to "
            f"{-(-x.shape[1] // degree) * degree} tokens"
        )
    batch, tokens, heads, size = x.shape
    x = x.reshape(batch, degree, tokens // degree, heads, size)
    x = _all_to_all(jnp.moveaxis(x, 1, 0), axis_name)
    return jnp.moveaxis(x, 0, 2).reshape(batch, -1, degree * heads, size)


def own_slots(x: Shaped[Array, "slots"], axis_name: str = "seq") -> Shaped[Array, "n"]:
    """Of one number a query slot, those of the slots that `seq_to_heads` leaves here.

    To be called inside `jax.shard_map`; x is whole on every device of the axis.
    """
    # Tied to x: an index alone is hoisted out of a scan over layers, see
    # `parallel.blocks.Blocks.member`.
    index, x = lax.optimization_barrier((lax.axis_index(axis_name), x))
    x = x.reshape(lax.axis_size(axis_name), -1)
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _all_to_all(x: Shaped[Array, "P ..."], axis_name: str) -> Shaped[Array, "P ..."]:
    """Piece i goes to device i. A dim of its own for the devices, outermost, is how an
    exchange lies in memory: what makes x can write it so, without a copy."""
    if lax.axis_size(axis_name) == 1:
        return x
    return lax.all_to_all(x, axis_name, 0, 0, tiled=True)


@dataclass(frozen=True)
class HeadLayout:
    """How N query and K key/value heads are laid out for an exchange over P devices.

    Every KV head is repeated `repeats` times and its G = N/K query heads are dealt out
    to the copies, `group` to a copy; then KV slots are padded to a multiple of P. So
    the slots are `num_kv_slots` for keys and values and `num_kv_slots * group` for
    queries, P divides both, and query slot i belongs to KV slot i // group on every
    device alike.
    """

    num_heads: int
    num_kv_heads: int
    repeats: int
    group: int
    num_kv_slots: int

    @property
    def num_slots(self) -> int:
        return self.num_kv_slots * self.group

    def spread_q(self, q: Shaped[Array, "B t N H"]) -> Shaped[Array, "B t slots H"]:
        """Query heads to query slots; padding slots are zero."""
        if self.num_slots == self.num_heads:
            return q  # slots are then the heads themselves, in order
        batch, tokens, _, size = q.shape
        per_kv_head = self.num_heads // self.num_kv_heads
        q = q.reshape(batch, tokens, self.num_kv_heads, per_kv_head, size)
        q = _pad(q, 3, self.repeats * self.group)
        q = q.reshape(batch, tokens, -1, self.group, size)
        return _pad(q, 2, self.num_kv_slots).reshape(batch, tokens, -1, size)

    def spread_kv(self, k: Shaped[Array, "B t K H"]) -> Shaped[Array, "B t slots H"]:
        """KV heads to KV slots: repeated, then padded with zeros."""
        batch, tokens, _, size = k.shape
        if self.repeats > 1:
            shape = (batch, tokens, self.num_kv_heads, self.repeats, size)
            k = jnp.broadcast_to(k[:, :, :, None], shape)
            k = k.reshape(batch, tokens, -1, size)
        return _pad(k, 2, self.num_kv_slots)

    def gather_q(self, out: Shaped[Array, "B t slots H"]) -> Shaped[Array, "B t N H"]:
        """The inverse of `spread_q`: drops the padding slots."""
        if self.num_slots == self.num_heads:
            return out
        batch, tokens, _, size = out.shape
        out = out[:, :, : self.num_kv_heads * self.repeats * self.group]
        out = out.reshape(batch, tokens, self.num_kv_heads, -1, size)
        out = out[:, :, :, : self.num_heads // self.num_kv_heads]
        return out.reshape(batch, tokens, self.num_heads, size)


def head_layout(num_heads: int, num_kv_heads: int, degree: int) -> HeadLayout:
    """The cheapest layout of heads over `degree` devices.

    The fewest query slots win (attention's compute, and the exchange of queries and
    outputs, grow as slots / N), then the fewest KV slots. Where P divides N and K
    nothing is padded or repeated; where K divides P every KV head is repeated P/K
    times, never to N, and query slots are N rounded up to a multiple of P.

    Raises:
      ValueError: K does not divide N.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}: each "
            "key/value head serves the same number of query heads"
        )
    per_kv_head = num_heads // num_kv_heads

    def layout(repeats: int) -> HeadLayout:
        kv_slots = -(-num_kv_heads * repeats // degree) * degree
        group = -(-per_kv_head // repeats)
        return HeadLayout(num_heads, num_kv_heads, repeats, group, kv_slots)

    layouts = map(layout, range(1, per_kv_head + 1))
    return min(layouts, key=lambda each: (each.num_slots, each.num_kv_slots))


def _pad(x: jax.Array, dim: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, size - x.shape[dim])
    return x if size == x.shape[dim] else jnp.pad(x, widths)
