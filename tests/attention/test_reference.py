"""The oracle itself, against loops over pairs in float64 that share nothing with it."""

import functools
import math

import numpy as np
import pytest
from attention_cases import CASES, Case, assert_close, out_and_gradients

from ulysses_jax.attention.reference import reference_attention


def sees(case: Case, b: int, t: int, s: int) -> bool:
    arrays = case.arrays
    q_position = arrays["q_positions"][b][t] if "q_positions" in arrays else t
    kv_position = arrays["kv_positions"][b][s] if "kv_positions" in arrays else s
    if case.causal and kv_position > q_position:
        return False
    if case.window is not None and not (
        kv_position - case.window < q_position < kv_position + case.window
    ):
        return False
    if "q_segment_ids" in arrays:
        return arrays["q_segment_ids"][b][t] == arrays["kv_segment_ids"][b][s]
    return True


def in_float64(case: Case, q, k, v, weights):
    """Output and gradients, one query of one head at a time."""
    q, k, v, weights = (np.asarray(x, np.float64) for x in (q, k, v, weights))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale = 1 / math.sqrt(case.H) if case.scale is None else case.scale
    for b, t, n in np.ndindex(case.B, case.T, case.N):
        kv_head = n // (case.N // case.K)
        keys = [s for s in range(case.S) if sees(case, b, t, s)]
        if not keys:
            continue
        key, value = k[b, keys, kv_head], v[b, keys, kv_head]
        probabilities = np.exp(scale * key @ q[b, t, n])
        probabilities /= probabilities.sum()
        out[b, t, n] = probabilities @ value
        upstream = weights[b, t, n]
        dlogits = probabilities * (value @ upstream - out[b, t, n] @ upstream) * scale
        dq[b, t, n] = dlogits @ key
        dk[b, keys, kv_head] += np.outer(dlogits, q[b, t, n])
        dv[b, keys, kv_head] += np.outer(probabilities, upstream)
    return out, dq, dk, dv


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case = CASES[name]
    inputs = case.inputs()
    attend = functools.partial(reference_attention, mask=case.mask, scale=case.scale)
    assert_close(out_and_gradients(attend, *inputs), in_float64(case, *inputs))


def test_some_queries_are_blind():
    for name in ("blind by window", "blind by segment", "blind by position"):
        out = in_float64(CASES[name], *CASES[name].inputs())[0]
        blind = (out == 0).all(axis=(2, 3))
        assert blind.any() and not blind.all(), name
