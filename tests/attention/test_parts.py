"""An attention over some keys at a time is that over all of them, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from slow import slow_but_for

from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import PARTS, attention_parts, join
from ulysses_jax.attention.reference import reference_attention

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
    q, k, v, weights = case.inputs()
    pieces = list(parts_of(case, k, v))
    blocks = dict(scale=case.scale, block_q=4, block_kv=3)

    (out, logsumexp), *others = (
        parts.forward(q, k, v, mask=mask, **blocks) for k, v, mask in pieces
    )
    for other in others:
        out, logsumexp = join((out, logsumexp), other)
    want, pullback = jax.vjp(
        lambda q, k, v: reference_attention(q, k, v, mask=case.mask, scale=case.scale),
        q,
        k,
        v,
    )
    np.testing.assert_allclose(out, want, atol=2e-6)

    gradients = [
        parts.gradients(q, k, v, out, logsumexp, weights, mask=mask, **blocks)
        for k, v, mask in pieces
    ]
    dq = sum(each[0] for each in gradients)
    dk, dv = (jnp.concatenate([each[i] for each in gradients], 1) for i in (1, 2))
    for got, expected in zip((dq, dk, dv), pullback(weights), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


def test_by_name():
    q, mask = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), Mask(causal=True)
    assert attention_parts("auto", "cpu", q, q, mask) is PARTS["blockwise"]
    assert attention_parts("auto", "gpu", q, q, mask) is PARTS["cudnn"]
    assert attention_parts("blockwise", "gpu", q, q, mask) is PARTS["blockwise"]
    with pytest.raises(ValueError, match="reference .* use auto, blockwise or cudnn"):
        attention_parts("reference", "cpu", q, q, mask)
