"""Both passes over a layer that is attention alone, whose leaves are sinks, or None:
float64's out, dq, dk, dv and dsinks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.select import PARTS
from ulysses_jax.memory.block_attention import Pieces, attend_group, pull_group
from ulysses_jax.memory.passes import backward, forward

H = 4


def split(x):
    """q, k, v: two query heads and one of keys and values."""
    heads = x.reshape(*x.shape[:2], 4, H)
    return jnp.split(heads, (2, 3), axis=2)


def join(q, k, v):
    return jnp.concatenate((q, k, v), axis=2).reshape(*q.shape[:2], 4 * H)


def attention_alone(chunk_tokens):
    """x is q, k and v side by side, and what comes out has out in q's place."""

    def attend(q, k, v, g, q_block, kv_block, is_own):
        mask = Mask(causal=is_own)
        return PARTS["blockwise"].statistics(q, k, v, mask=mask, scale=None)

    def gradients(*arrays_and_blocks):
        *arrays, _, _, _, is_own = arrays_and_blocks
        return PARTS["blockwise"].gradients(*arrays, mask=Mask(causal=is_own))

    def finish(leaves, x, out):
        return join(out, *split(jnp.zeros_like(x))[1:])

    return Pieces(
        keys_values=lambda leaves, x, angles: tuple(
            each[None] for each in split(x)[1:]
        ),
        queries=lambda leaves, x, angles, g: (split(x)[0][None], leaves),
        back=lambda outs: outs[0][0],
        finish=finish,
        statistics=attend,
        gradients=gradients,
        join=PARTS["blockwise"].join,
        with_sinks=PARTS["blockwise"].with_sinks,
        sinks_gradient=PARTS["blockwise"].sinks_gradient,
        first_block=lambda q_block: 0,
        key_slots=(slice(None),),
        chunk_tokens=chunk_tokens,
        tile_tokens=chunk_tokens,
        keys_on_host=False,
    )


def inputs(tokens, dtype):
    rng = np.random.default_rng(0)
    x, upstream = rng.standard_normal((2, 1, tokens, 4 * H), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(upstream, dtype)


@functools.partial(jax.jit, static_argnums=2)
def out_and_gradients(x, upstream, chunk_tokens, sinks=None):
    pieces = attention_alone(chunk_tokens)
    y, attended = forward(pieces, sinks, x, None, keep=True)
    dx, dsinks = backward(pieces, sinks, x, None, attended, upstream)
    return split(y)[0], *split(dx), *([] if dsinks is None else [dsinks])


def exact(x, upstream, sinks=None):
    seen = np.tri(x.shape[1], dtype=bool)
    return exact_attention(*split(x), split(upstream)[0], seen, sinks=sinks)


@pytest.mark.parametrize("size, tolerance", [(1, 1e-6), (100, 3e-5), (2000, 1e-3)])
def test_large_logits(size, tolerance):
    """What is left is the rounding of a logit itself."""
    x, upstream = inputs(16, jnp.float32)
    q, k, v = split(x)
    x = join(q.at[..., 0].set(H**0.5), k.at[..., 0].set(size), v)
    sinks = size + jnp.array([-1.0, 2.0])
    got = out_and_gradients(x, upstream, 4, sinks)
    want = exact(x, upstream, sinks)
    names = "out", "dq", "dk", "dv", "dsinks"
    for name, a, b in zip(names, got, want, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < tolerance, name


def test_two_pieces_of_a_chunk_add_up():
    """As a chunk has of every member of seq: each gives a part of dk, dv and dsinks."""
    pieces = attention_alone(4)

    def cut(x):
        return jnp.stack(jnp.split(x, 2, axis=1))

    def joined(x):
        return jnp.concatenate(tuple(x), axis=1)

    @jax.jit
    def run(x, upstream, sinks):
        q, *keys = map(cut, split(x))
        keys = tuple(k[None] for k in keys)
        out, logsumexp = attend_group(pieces, q, sinks, keys, 0, 0)
        given = out, logsumexp, cut(split(upstream)[0])
        zeros = jax.tree.map(jnp.zeros_like, keys)
        (dq, dsinks), dkeys = pull_group(pieces, q, sinks, keys, *given, zeros, 0, 0)
        return joined(out), joined(dq), *(joined(k[0]) for k in dkeys), dsinks

    arrays = *inputs(8, jnp.float32), jnp.array([-1.0, 2.0])
    for a, b in zip(run(*arrays), exact(*arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_sums_over_chunks_are_float32():
    """As near as one rounding of each leaves them: 64 chunks add to the first keys."""
    x, upstream = inputs(256, jnp.bfloat16)
    got, want = out_and_gradients(x, upstream, 4), exact(x, upstream)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = np.square(np.asarray(a, np.float64) - b).mean() ** 0.5
        assert error < 0.004 * np.square(b).mean() ** 0.5, name
