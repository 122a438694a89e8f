"""Linear attention with decay, in chunks: exact, causal, O(T) time and memory."""

import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ulysses_jax.attention.chunks import (
    Chunks,
    Shard,
    decays_of,
    merge_heads,
    over_chunks,
)
from ulysses_jax.attention.tiling import product

NAME = "linear_attention"  # of what a program calls so, and a plan looks for
CHUNK_TOKENS = 128

apply = operator.mul  # what `Shard` calls so


def linear_shard(
    q: Float[Array, "B t K H"] | None,
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t N V"],
    log_decay: Float[Array, "B t N"],
    begins: Bool[Array, "B t"],
    *,
    scale: float,
    chunk_tokens: int = CHUNK_TOKENS,
    is_alone: bool = False,
    start: Float[Array, "B N H V"] | None = None,
) -> Shard:
    """`S_t = a_t S_(t-1) + k_t v_t^T`, `o_t = scale S_t^T q_t`, of local arrays.

    Args:
      q, k: of K heads, which divides N; head n reads n // (N/K). No q: nothing is read,
        `out` and `reads` are None.
      log_decay: float32, log a_t, at most 0.
      begins: where a document begins: S_(t-1) is 0 there.
      is_alone: there are no other tokens: `reads` and `change` are None.
      start: float32, the state that the first token finds; None: 0.

    Returns:
      With the change a_1 ... a_t, `[B, N, 1, 1]`, 0 where a document begins in between.

    Products of queries, keys and values take their factors in the inputs' dtype and sum
    in float32; those with states are float32.

    Source: the chunked form of Lightning attention, arXiv 2401.04658; decays that
    differ from token to token as in Mamba-2, arXiv 2405.21060, section 6.
    """
    batch, num_tokens, num_shared, size = k.shape
    num_heads = v.shape[2]
    chunks = Chunks(num_tokens, num_heads, num_shared, chunk_tokens)

    def one_chunk(carry, inputs):
        state, total = carry
        q, k, v, log_decay, begins = inputs
        decays = decays_of(log_decay, begins)
        out = None
        if q is not None:
            scores = product("BKiH,BKjH->BKij", q, k)[:, :, None] * decays.pairs
            out = product("BKGij,BKGjV->BKGiV", scores.astype(v.dtype), v)
            found = jnp.einsum("BKiH,BKGHV->BKGiV", q.astype(jnp.float32), state)
            out = (out + found * decays.since_start[..., None]) * scale
        k, v = (x.astype(jnp.float32) for x in (k, v))
        left = jnp.einsum("BKjH,BKGjV->BKGHV", k, v * decays.to_end[..., None])
        state = state * decays.since_start[..., -1, None, None] + left
        so_far = total[..., None] * decays.since_start
        return (state, so_far[..., -1]), (out, None if out is None else so_far)

    groups = (batch, *chunks.heads)
    carry = (
        chunks.state_at(start, (batch, size, v.shape[-1])),
        jnp.ones(groups, jnp.float32),
    )
    inputs = (
        *map(chunks.of_shared, (q, k)),
        *map(chunks.of_heads, (v, log_decay)),
        chunks.of_tokens(begins),
    )
    (state, total), (out, so_far) = over_chunks(one_chunk, carry, inputs)
    change = None if is_alone else merge_heads(total)[..., None, None]
    out, state = chunks.join(out), merge_heads(state)
    reads = None
    if q is not None and not is_alone:
        each = jnp.repeat(q.astype(jnp.float32), num_heads // num_shared, axis=2)
        reads = each * (chunks.join(so_far) * scale)[..., None]
    return Shard(out, reads, change, state)
