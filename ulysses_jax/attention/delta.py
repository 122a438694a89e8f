"""The gated delta rule, in chunks: exact, causal, O(T) time and memory."""

import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ulysses_jax.attention.chunks import (
    Chunks,
    Shard,
    decays_of,
    merge_heads,
    over_chunks,
)
from ulysses_jax.attention.tiling import product

NAME = "gated_delta_rule"  # as `linear.NAME`
CHUNK_TOKENS = 64

apply = operator.matmul  # what `Shard` calls so


def delta_shard(
    q: Float[Array, "B t K H"] | None,
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t N V"],
    log_decay: Float[Array, "B t N"],
    beta: Float[Array, "B t N"],
    begins: Bool[Array, "B t"],
    *,
    scale: float,
    chunk_tokens: int = CHUNK_TOKENS,
    is_alone: bool = False,
    start: Float[Array, "B N H V"] | None = None,
) -> Shard:
    """`S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T`, `o_t = scale S_t^T q_t`.

    Args:
      q, k: local, of K heads, which divides N; head n reads n // (N/K). No q: nothing
        is read, `out` and `reads` are None.
      log_decay: float32, log a_t, at most 0.
      beta: float32, b_t: how much of what the state has for a key is replaced.
      begins: where a document begins: S_(t-1) is 0 there.
      is_alone: there are no other tokens: `reads` and `change` are None.
      start: float32, the state that the first token finds; None: 0.

    Returns:
      With the change the product of all a_t (I - b_t k_t k_t^T), `[B, N, H, H]`; it is
      0 where a document begins in between.

    In a chunk `S_i` is `g_i S_0 + sum over j <= i of g_ij k_j u_j^T`, with decays g and
    `u_i = b_i (v_i - a_i S_(i-1)^T k_i)`: a triangular system for the u, solved in
    float32. The change is what the rule makes of the identity as a state, with values
    of 0: H more columns of the same states and systems, and what is read of them is
    `reads`.

    Source: Gated Delta Networks, arXiv 2412.06464; the WY form of DeltaNet, arXiv
    2406.06484, section 3.2. There the state before a chunk is taken out of the system,
    so that it can be solved for all chunks at once; here chunks come one by one, and it
    is on the system's right-hand side.
    """
    batch, num_tokens, num_shared, size = k.shape
    num_values = v.shape[-1]
    chunks = Chunks(num_tokens, v.shape[2], num_shared, chunk_tokens)

    def one_chunk(state, inputs):
        q, k, v, log_decay, beta, begins = inputs
        decays = decays_of(log_decay, begins)
        alike = product("BKiH,BKjH->BKij", k, k)[:, :, None] * decays.pairs
        k32, v = (x.astype(jnp.float32) for x in (k, v))
        v = jnp.pad(v, [(0, 0)] * 4 + [(0, state.shape[-1] - num_values)])
        since = decays.since_start[..., None]
        known = jnp.einsum("BKiH,BKGHV->BKGiV", k32, state) * since
        u = solve(alike * beta[..., None], (v - known) * beta[..., None])
        out = None
        if q is not None:
            found = jnp.einsum("BKiH,BKGHV->BKGiV", q.astype(jnp.float32), state)
            scores = product("BKiH,BKjH->BKij", q, k)[:, :, None] * decays.pairs
            read = jnp.einsum("BKGij,BKGjV->BKGiV", scores, u)
            out = (found * since + read) * scale
        left = jnp.einsum("BKjH,BKGjV->BKGHV", k32, u * decays.to_end[..., None])
        return state * since[..., -1:, :] + left, out

    state = chunks.state_at(start, (batch, size, num_values))
    if not is_alone:
        same = jnp.broadcast_to(jnp.eye(size), (*state.shape[:-1], size))
        state = jnp.concatenate((state, same), axis=-1)
    inputs = (
        *map(chunks.of_shared, (q, k)),
        *map(chunks.of_heads, (v, log_decay, beta)),
        chunks.of_tokens(begins),
    )
    state, out = over_chunks(one_chunk, state, inputs)
    out, state = chunks.join(out), merge_heads(state)
    change = None if is_alone else state[..., num_values:]
    state = state[..., :num_values]
    if out is None:
        return Shard(None, None, change, state)
    reads = None if is_alone else out[..., num_values:]
    return Shard(out[..., :num_values], reads, change, state)


@jax.custom_vjp
def solve(a: Float[Array, "... C C"], b: Float[Array, "... C V"]):
    """x of `(I + strictly lower part of a) x = b`."""
    return _forward(a, b)[0]


def _forward(a, b):
    inverse = _inverse(jnp.tril(a, -1))
    x = inverse @ b
    return x, (inverse, x)


def _backward(residuals, dx):
    inverse, x = residuals
    db = inverse.mT @ dx
    return -jnp.tril(db @ x.mT, -1), db


solve.defvjp(_forward, _backward)


def _inverse(a: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """Of I + a, a strictly lower: those of blocks on the diagonal, twice as large in
    every round, by products alone.

    Powers of a would be fewer products, but grow far beyond the inverse; and XLA's
    triangular_solve on CPU (jax 0.10.2) takes 30 times as long at 64 tokens.
    """
    tokens = a.shape[-1]
    size = 2 ** (tokens - 1).bit_length()
    widths = [(0, 0)] * (a.ndim - 2) + [(0, size - tokens)] * 2
    a, batch = jnp.pad(a, widths), a.shape[:-2]
    blocks = jnp.ones((*batch, size, 1, 1), a.dtype)
    for width in (2**n for n in range((tokens - 1).bit_length())):
        count = size // (2 * width)
        pairs = a.reshape(*batch, count, 2 * width, count, 2 * width)
        pairs = jnp.moveaxis(jnp.diagonal(pairs, axis1=-4, axis2=-2), -1, -3)
        upper, lower = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        between = -lower @ pairs[..., width:, :width] @ upper
        top = jnp.concatenate((upper, jnp.zeros_like(between)), axis=-1)
        low = jnp.concatenate((between, lower), axis=-1)
        blocks = jnp.concatenate((top, low), axis=-2)
    return blocks[..., 0, :tokens, :tokens]


def unit_length(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """Every head's vector over its length, in float32; as given, where it is short."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt((x32 * x32).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)
