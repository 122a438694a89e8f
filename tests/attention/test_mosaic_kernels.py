"""Attention through tokamax's own kernels, traced: what they take of every mask.

Needs tokamax. Nothing runs: `tests/plan/test_gpu_kernels.py` compiles a step of them.
"""

import jax
import jax.numpy as jnp
import pytest
from mosaic_stand_in import H100

from ulysses_jax.attention.layouts import fixed
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.mosaic import tokamax_lacks
from ulysses_jax.attention.parts import attention_of
from ulysses_jax.attention.select import ATTENTIONS, PARTS, choose

pytest.importorskip("tokamax")

B, T, N, K = 2, 1537, 4, 2  # more than a tile of the backward pass
BLOCK = 128


def ids(tokens=T):
    return jax.ShapeDtypeStruct((B, tokens), jnp.int32)


SEGMENTS = dict(q_segment_ids=ids(), kv_segment_ids=ids())
LAYOUTS = {
    heads: fixed(T // BLOCK, block_tokens=BLOCK, local_blocks=4, num_heads=heads)
    for heads in (1, N)
}
BLOCKS = dict(
    q_segment_ids=ids(T // BLOCK * BLOCK), kv_segment_ids=ids(T // BLOCK * BLOCK)
)
MASKS = {
    "causal": Mask(causal=True),
    "segments": Mask(causal=True, **SEGMENTS),
    "segments, window, sinks": Mask(causal=True, window=300, **SEGMENTS),
    "positions": Mask(causal=True, window=300, q_positions=ids(), kv_positions=ids()),
    "layout": Mask(causal=True, layout=LAYOUTS[1], **BLOCKS),
    "layout by head, sinks": Mask(causal=True, layout=LAYOUTS[N], **BLOCKS),
}


def shapes(mask, size, dtype):
    """q, k and v: whole blocks of a layout, else an odd number of tokens."""
    tokens = T if mask.layout is None else T // BLOCK * BLOCK
    return [
        jax.ShapeDtypeStruct((B, tokens, heads, size), dtype) for heads in (N, K, K)
    ]


def test_the_kernels_are_those_that_are_called():
    assert tokamax_lacks() is None
    q, k, _ = shapes(MASKS["segments"], 64, jnp.bfloat16)
    assert choose("auto", H100, q, k, MASKS["segments"]).name == "mosaic"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_outputs_and_gradients_are_as_the_inputs(size, name):
    mask = MASKS[name]
    arrays = shapes(mask, size, jnp.float16 if name == "causal" else jnp.bfloat16)
    sinks = [jax.ShapeDtypeStruct((N,), jnp.float32)] if "sinks" in name else []

    def run(mask, q, k, v, *sinks):
        def attend(q, k, v, *sinks):
            options = dict(sinks=sinks[0]) if sinks else {}
            return ATTENTIONS["mosaic"](q, k, v, mask=mask, **options)

        out, pullback = jax.vjp(attend, q, k, v, *sinks)
        return out, *pullback(out)

    got = jax.eval_shape(run, mask, *arrays, *sinks)
    for each, like in zip(got, (arrays[0], *arrays, *sinks), strict=True):
        assert (each.shape, each.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize("size", [64, 256])
def test_parts_of_keys_give_float32_to_be_summed(size):
    """As a ring does, with fewer keys than queries; and a logsumexp with a gradient."""
    q, *_ = shapes(MASKS["positions"], size, jnp.bfloat16)
    k = jax.ShapeDtypeStruct((B, 700, K, size), jnp.bfloat16)
    mask = Mask(causal=True, q_positions=ids(), kv_positions=ids(700))
    parts, rows = PARTS["mosaic"], jax.ShapeDtypeStruct((B, N, T), jnp.float32)

    def run(mask, q, k, v, logsumexp):
        out, _ = parts.statistics(q, k, v, mask=mask, scale=None)
        whole = out.astype(q.dtype), logsumexp, q
        return out, *parts.gradients(q, k, v, *whole, mask=mask)

    got = jax.eval_shape(run, mask, q, k, k, rows)
    assert [x.shape for x in got] == [x.shape for x in (q, q, k, k)]
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float32)}

    def of_both(mask, q, k, v):
        attend = attention_of(parts, with_logsumexp=True)
        results, pullback = jax.vjp(lambda *x: attend(*x, mask=mask), q, k, v)
        return results, pullback(results)

    (out, logsumexp), got = jax.eval_shape(of_both, mask, q, k, k)
    assert (out.shape, logsumexp.shape) == (q.shape, rows.shape)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in (q, k, k)]
