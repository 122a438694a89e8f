"""An attention over some keys at a time is that over all of them, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from mosaic_stand_in import H100
from slow import slow_but_for

from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import join
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS, attention_parts
from ulysses_jax.attention.tiling import HIDDEN
from ulysses_jax.mesh import Device

CUTS = (0, 4, 5, 9)  # where the keys are cut: parts of unlike sizes, one of one key


def parts_of(case, k, v):
    """Keys, values and mask of each part; indices become positions."""
    mask, size = case.mask, case.S
    q_positions, kv_positions = mask.q_positions, mask.kv_positions
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(case.T), (case.B, case.T))
        kv_positions = jnp.broadcast_to(jnp.arange(size), (case.B, size))
    for start, end in zip(CUTS, (*CUTS[1:], size), strict=True):
        if start >= min(end, size):
            continue
        segments = mask.kv_segment_ids
        yield (
            k[:, start:end],
            v[:, start:end],
            Mask(
                causal=case.causal,
                window=case.window,
                q_segment_ids=mask.q_segment_ids,
                kv_segment_ids=None if segments is None else segments[:, start:end],
                q_positions=q_positions,
                kv_positions=kv_positions[:, start:end],
            ),
        )


@pytest.mark.parametrize(
    "name",
    slow_but_for(
        ["causal window", "all at once", "cross causal, few keys", "blind by segment"],
        CASES,
    ),
)
def test_parts_are_the_whole(name):
    case, parts = CASES[name], PARTS["blockwise"]
    blocks = dict(scale=case.scale, block_q=4, block_kv=3)

    @jax.jit
    def by_parts(q, k, v, upstream):
        pieces = list(parts_of(case, k, v))
        out, logsumexp = functools.reduce(
            join, (parts.forward(q, k, v, mask=mask, **blocks) for k, v, mask in pieces)
        )
        whole = out, logsumexp.sum(axis=0), upstream
        gradients = [
            parts.gradients(q, k, v, *whole, mask=mask, **blocks)
            for k, v, mask in pieces
        ]
        dqs, dks, dvs = zip(*gradients, strict=True)
        return out, sum(dqs), jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1)

    @jax.jit
    def at_once(q, k, v, upstream):
        attend = functools.partial(
            reference_attention, mask=case.mask, scale=case.scale
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(upstream)

    arrays = case.inputs()
    for got, want in zip(by_parts(*arrays), at_once(*arrays), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("size", [1, 100, 2000])
def test_joined_weights_add_up_however_large_the_logits(size):
    rng = np.random.default_rng(0)
    logsumexps = size + rng.standard_normal((2, 1, 2, 9)).astype(np.float32)
    outs, upstream = rng.standard_normal((2, 1, 9, 2, 3)), np.ones((1, 9, 2, 3))
    logsumexps[:, :, :, 0] = HIDDEN  # a query that sees no key of either
    outs[:, :, 0] = 0
    logsumexps[1, :, :, 1] = HIDDEN
    outs[1, :, 1] = 0
    outs = outs.astype(np.float32)

    def joined(outs, logsumexps):
        pairs = jnp.stack((logsumexps, jnp.zeros_like(logsumexps)), axis=1)
        out, logsumexp = join(*zip(outs, pairs, strict=True))
        return (out * upstream).sum(), (out, logsumexp)

    gradients, (out, logsumexp) = jax.jit(jax.grad(joined, (0, 1), has_aux=True))(
        outs, logsumexps
    )
    a, b = logsumexps.astype(np.float64)
    weights = np.exp([a, b] - np.logaddexp(a, b))
    weights[:, a == b] = 0.5
    spread = weights.swapaxes(2, 3)[..., None]
    np.testing.assert_allclose(out, (spread * outs).sum(axis=0), atol=1e-6)
    exact = np.asarray(logsumexp, np.float64).sum(axis=0)
    np.testing.assert_allclose(exact, np.logaddexp(a, b), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(gradients[0], spread * upstream, atol=1e-6)
    apart = (upstream * (outs[0] - outs[1])).sum(axis=3).swapaxes(1, 2)
    slope = weights[0] * weights[1] * apart
    np.testing.assert_allclose(gradients[1], [slope, -slope], atol=1e-6)


def test_by_name():
    q, mask = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), Mask(causal=True)
    cpu = Device("cpu", "cpu")
    assert attention_parts("auto", cpu, q, q, mask) is PARTS["blockwise"]
    assert attention_parts("auto", H100, q, q, mask) is PARTS["cudnn"]
    assert attention_parts("blockwise", H100, q, q, mask) is PARTS["blockwise"]
    with pytest.raises(ValueError, match="reference .* use auto, cudnn or mosaic or b"):
        attention_parts("reference", cpu, q, q, mask)
