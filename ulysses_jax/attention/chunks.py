"""Recurrences in chunks of tokens: a loop whose carry is a state, decays within one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

SCOPE = "over_chunks"  # as a program names the loop
COARSE = 2.0**10  # of log decays: sums of its multiples are exact to 2^14
LEAST = -(2.0**7)  # of log decays: below it, too, float32's exp is 0


class Shard(NamedTuple):
    """What a recurrence makes of tokens that find a state of 0, all float32.

    Had they found the state S, `[B, N, H, V]`, their output were `out + reads S`, and
    they left `apply(change, S) + state`, of the recurrence's own `apply`. `out` and
    `state` are those of the state that they were given as `start`.

    Attributes:
      out: `[B, t, N, V]`, or None.
      reads: `[B, t, N, H]`, or None.
      change: a number or a matrix for every head, or None; `apply(after, before)` is
        the one that is both.
      state: `[B, N, H, V]`.
    """

    out: Float[Array, "B t N V"] | None
    reads: Float[Array, "B t N H"] | None
    change: Array | None
    state: Float[Array, "B N H V"]


class Decays(NamedTuple):
    """Of a chunk of C tokens, by head; 0 across the beginning of a document.

    Attributes:
      pairs: `[B, K, G, i, j]`, what of the state that token j left is there at token i;
        0 where j comes after i.
      since_start: `[B, K, G, i]`, what is there of the state before the chunk.
    """

    pairs: Float[Array, "B K G C C"]
    since_start: Float[Array, "B K G C"]

    @property
    def to_end(self) -> Float[Array, "B K G C"]:
        """What of every token's state is there at the last one."""
        return self.pairs[..., -1, :]


def decays_of(log_decay: Float[Array, "B K G C"], begins: Bool[Array, "B C"]) -> Decays:
    """The decays of a chunk.

    Args:
      log_decay: float32, at most 0: of the state, at each token.
      begins: whether a document begins at a token: nothing reaches it from before.

    A sum over the tokens between two is the difference of two sums, each of as many
    tokens as the document has here. After a strong decay both are large, and as one
    float32 number each would have lost the digits of the weak ones. So they are two:
    multiples of 1/1024, whose sums are exact, and what is left. Decays of other
    documents are added as 0: no bit depends on them, where all are finite.
    """
    log_decay = jnp.maximum(log_decay, LEAST)
    document = jnp.cumsum(begins, axis=1)
    tokens = begins.shape[1]
    seen = document[:, :, None] == document[:, None, :]
    seen &= jnp.tri(tokens, dtype=bool)
    weights = seen[:, None, None].astype(jnp.float32)
    coarse = lax.stop_gradient(jnp.round(log_decay * COARSE) / COARSE)
    since = [
        jnp.einsum("BKGij,BKGj->BKGi", weights, x, precision=lax.Precision.HIGHEST)
        for x in (coarse, log_decay - coarse)
    ]
    between = sum(x[..., :, None] - x[..., None, :] for x in since)
    seen = seen[:, None, None]
    pairs = jnp.exp(jnp.where(seen, between, -jnp.inf))
    from_before = (document == 0)[:, None, None]
    return Decays(pairs, jnp.where(from_before, jnp.exp(since[0] + since[1]), 0))


class Chunks:
    """Cuts tokens into chunks of one size, and joins them; the last may be padded.

    Arrays of N heads come as `[B, K, G, C, ...]`, G = N/K; of K heads without G. In
    the place of an array None stays None.
    """

    def __init__(self, num_tokens: int, num_heads: int, num_shared: int, size: int):
        self.num_tokens = num_tokens
        self.size = min(size, num_tokens)
        self.num = math.ceil(num_tokens / self.size)
        self.heads = num_shared, num_heads // num_shared

    def of_tokens(self, x: Array) -> Array:
        """`[B, t] -> [chunks, B, C]`"""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, self.num * self.size - self.num_tokens)
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(len(x), self.num, self.size, *x.shape[2:]), 1, 0)

    def of_shared(self, x: Array | None) -> Array | None:
        """`[B, t, K, H] -> [chunks, B, K, C, H]`"""
        return None if x is None else jnp.moveaxis(self.of_tokens(x), 2, 3)

    def of_heads(self, x: Array) -> Array:
        """`[B, t, N, ...] -> [chunks, B, K, G, C, ...]`"""
        x = self.of_tokens(x)
        x = x.reshape(*x.shape[:3], *self.heads, *x.shape[4:])
        return jnp.moveaxis(x, 2, 4)

    def state_at(self, start: Array | None, sizes: tuple[int, int, int]) -> Array:
        """`[B, N, H, V] -> [B, K, G, H, V]`, float32; zeros of (B, H, V) for None."""
        batch, *last = sizes
        shape = (batch, *self.heads, *last)
        return jnp.zeros(shape, jnp.float32) if start is None else start.reshape(shape)

    def join(self, x: Array | None) -> Any:
        """`[chunks, B, K, G, C, ...] -> [B, t, N, ...]`"""
        if x is None:
            return None
        x = jnp.moveaxis(x, (0, 4), (1, 2))  # [B, chunks, C, K, G, ...]
        x = x.reshape(len(x), self.num * self.size, -1, *x.shape[5:])
        return x[:, : self.num_tokens]


def over_chunks(one_chunk: Callable[..., Any], start: Any, inputs: Any) -> Any:
    """`lax.scan`, of whose carries the backward pass keeps about `2 sqrt(chunks)`.

    Chunks go in groups of as many as there are groups. Of a group the carry that it
    finds is kept; the others are computed again, and then in each chunk what it
    computes.
    """
    (num,) = {len(x) for x in jax.tree.leaves(inputs)}
    size = math.isqrt(num)
    grouped = num // size * size
    one_chunk = jax.checkpoint(one_chunk, prevent_cse=False)

    @partial(jax.checkpoint, prevent_cse=False)
    def one_group(carry: Any, group: Any) -> Any:
        return lax.scan(one_chunk, carry, group)

    def cut(x: Array) -> Array:
        return x[:grouped].reshape(-1, size, *x.shape[1:])

    with jax.named_scope(SCOPE):
        carry, out = lax.scan(one_group, start, jax.tree.map(cut, inputs))
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        if grouped == num:
            return carry, out
        rest = jax.tree.map(lambda x: x[grouped:], inputs)
        carry, last = one_group(carry, rest)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x), out, last)


def merge_heads(x: Array) -> Array:
    """`[B, K, G, ...] -> [B, N, ...]`"""
    return x.reshape(len(x), -1, *x.shape[3:])
