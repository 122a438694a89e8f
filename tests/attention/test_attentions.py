"""What every local attention promises: the reference's output and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, assert_close, out_and_gradients

from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.cudnn import through_jax_nn
from ulysses_jax.attention.exact import exact_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.attention.tiling import HIDDEN

ATTENTIONS = {
    "blockwise": blockwise_attention,
    "blockwise in tiles": functools.partial(blockwise_attention, block_q=4, block_kv=4),
    "blockwise in uneven tiles": functools.partial(
        blockwise_attention, block_q=3, block_kv=8
    ),
    # cuDNN runs on GPUs alone; what it is asked for is the same with XLA's attention.
    "jax.nn": functools.partial(through_jax_nn, implementation="xla"),
}
WHICH = {
    "blockwise": ["causal segments"],
    "blockwise in tiles": list(CASES),
    "blockwise in uneven tiles": [
        "all at once",
        "cross causal, few queries",
        "blind by window",
    ],
    "jax.nn": [
        name
        for name, case in CASES.items()
        if case.mask.is_by_index and (case.window is None or case.T <= case.S)
    ],
}
PAIRS = [(attention, name) for attention in ATTENTIONS for name in WHICH[attention]]


@functools.cache
def reference(name):
    case = CASES[name]
    attend = functools.partial(reference_attention, mask=case.mask, scale=case.scale)
    return out_and_gradients(attend, *case.inputs())


@pytest.mark.parametrize("attention, name", PAIRS)
def test_equals_the_reference(attention, name):
    case = CASES[name]
    attend = functools.partial(ATTENTIONS[attention], mask=case.mask, scale=case.scale)
    got = out_and_gradients(attend, *case.inputs())
    assert_close(got, reference(name))
    assert [x.dtype for x in got] == [jnp.float32] * 4
    if name.startswith("blind"):
        blind = ~np.asarray(case.mask.visible(0, case.T, 0, case.S)).any(axis=2)
        blind = np.broadcast_to(blind, (case.B, case.T))
        assert blind.any()
        for x in got[:2]:
            assert not np.asarray(x)[blind].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_tolerance_catches_faults(attention):
    case = CASES["causal"]
    inputs, want = case.inputs(), reference("causal")
    tokens = jnp.broadcast_to(jnp.arange(case.T), (case.B, case.T))
    shifted = Mask(causal=True, q_positions=tokens - 1, kv_positions=tokens)
    wrong_scale = functools.partial(
        ATTENTIONS[attention], mask=case.mask, scale=1.001 * case.H**-0.5
    )
    faults = [out_and_gradients(wrong_scale, *inputs)]
    if attention != "jax.nn":
        off_by_one = functools.partial(ATTENTIONS[attention], mask=shifted, scale=None)
        faults.append(out_and_gradients(off_by_one, *inputs))
    for got in faults:
        for i in range(4):
            with pytest.raises(AssertionError):
                np.testing.assert_allclose(got[i], want[i], rtol=2e-5, atol=2e-5)


def test_sums_over_many_tiles_are_float32():
    """Off by what one rounding of results and of products' factors leaves; a sum over
    tiles that is rounded at each of them is off by several times that."""
    tokens, tile = 4096, 128
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((1, tokens, 1, 8)), jnp.bfloat16)
        for _ in range(4)
    )
    attend = functools.partial(
        blockwise_attention, mask=Mask(), block_q=tile, block_kv=tile
    )
    got = out_and_gradients(attend, q, k, v, weights)
    want = exact_attention(q, k, v, weights, np.True_)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = np.square(np.asarray(a, np.float64) - b).mean() ** 0.5
        assert error < 0.004 * np.square(b).mean() ** 0.5, name


WITH_LOGSUMEXP = attention_of(
    Parts(
        *(functools.partial(f, block_q=4, block_kv=4) for f in PARTS["blockwise"][:2])
    ),
    with_logsumexp=True,
)


def dense_with_logsumexp(q, k, v, *, mask, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeated = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, repeated) * scale
    seen = mask.visible(0, q.shape[1], 0, k.shape[1])[:, None]
    logsumexp = jax.nn.logsumexp(logits, axis=-1, where=seen)
    logsumexp = jnp.where(seen.any(axis=-1), logsumexp, HIDDEN)
    return reference_attention(q, k, v, mask=mask, scale=scale), logsumexp


@pytest.mark.parametrize(
    "name", ["causal", "scale", "causal segments", "multi-query", "blind by segment"]
)
def test_logsumexp_and_its_gradient(name):
    case = CASES[name]
    q, k, v, weights = case.inputs()
    row_weights = weights[..., 0].transpose(0, 2, 1)

    def run(attend):
        def weighted(q, k, v):
            out, logsumexp = attend(q, k, v, mask=case.mask, scale=case.scale)
            live = jnp.where(logsumexp == HIDDEN, 0, logsumexp)
            return (out * weights).sum() + (live * row_weights).sum(), logsumexp

        return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)

    (got, logsumexp), (want, want_logsumexp) = (
        run(WITH_LOGSUMEXP),
        run(dense_with_logsumexp),
    )
    assert logsumexp.dtype == jnp.float32
    assert logsumexp.shape == (case.B, case.N, case.T)
    np.testing.assert_allclose(logsumexp, want_logsumexp, rtol=2e-5, atol=2e-5)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_parts_of_the_keys_merge_to_the_whole():
    """What ring attention does with the logsumexp: its gradient is needed."""
    inputs = CASES["full"].inputs()

    def in_two_parts(q, k, v):
        outs, sums = zip(
            *(
                WITH_LOGSUMEXP(q, k[:, part], v[:, part], mask=Mask())
                for part in (slice(0, 6), slice(6, None))
            ),
            strict=True,
        )
        share = jax.nn.softmax(jnp.stack(sums), axis=0)
        return jnp.einsum("pBNT,pBTNH->BTNH", share, jnp.stack(outs))

    got = out_and_gradients(in_two_parts, *inputs)
    assert_close(got, reference("full"))


@pytest.mark.parametrize("attend", [reference_attention, blockwise_attention])
def test_masks_of_another_shape_are_refused(attend):
    q, k, v, _ = CASES["cross, few queries"].inputs()
    ids = jnp.ones((2, 5), jnp.int32)
    mask = Mask(q_segment_ids=ids, kv_segment_ids=ids)
    with pytest.raises(ValueError, match=r"kv_segment_ids .*\(2, 5\).*\(2, 17\)"):
        attend(q, k, v, mask=mask)


def test_a_mask_may_be_made_of_numpy_arrays():
    case = CASES["causal segments"]
    q, k, v, _ = case.inputs()
    mask = Mask(causal=True, **case.arrays)
    got = blockwise_attention(q, k, v, mask=mask, block_q=4, block_kv=4)
    want = reference_attention(q, k, v, mask=case.mask)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_what_makes_no_mask_is_refused():
    with pytest.raises(ValueError, match="window 0 hides every key"):
        Mask(window=0)
    with pytest.raises(ValueError, match="window 2147483648 .*: use window=None"):
        Mask(window=2**31)
    with pytest.raises(ValueError, match="both q_positions and kv_positions"):
        Mask(q_positions=jnp.zeros((1, 4), jnp.int32))
