"""Attention through Hopper's kernels, with plain functions in their place."""

import functools

import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from attention_cases import CASES, PACKED, SHUFFLED, Case, both, out_and_gradients

from ulysses_jax.attention import mosaic
from ulysses_jax.attention.by_tiles import tiles_of
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import attention_of
from ulysses_jax.attention.ranges import KeyRanges, key_ranges
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.attention.tiling import HIDDEN

# Of those whose keys lie in order; tests/parallel/test_kernels_and_masks.py has others.
AT_THE_EDGES = [
    "window of one",
    "two rows, two blocks",
    "scale",
    "cross, few keys",
    "cross causal, few queries",
    "cross window, few queries",
    "blind by window",
    "blind by position",
    "blind at the ends of int32",
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    mosaic_stand_in.use(monkeypatch)
    monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 3)


@pytest.mark.parametrize("name", AT_THE_EDGES)
def test_equals_the_reference(name):
    """The kernels' products round to float32 here: the tolerance is the reference's."""
    case = CASES[name]
    options = dict(mask=case.mask, scale=case.scale)
    attend = functools.partial(attention_of(PARTS["mosaic"]), **options)
    got = out_and_gradients(attend, *case.inputs())
    want = out_and_gradients(
        functools.partial(reference_attention, **options), *case.inputs()
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_query_that_sees_nothing_has_no_logsumexp():
    case = CASES["blind by segment"]
    q, k, v, _ = case.inputs()
    out, logsumexp = mosaic.mosaic_statistics(q, k, v, mask=case.mask)
    blind = ~np.asarray(case.mask.visible(0, case.T, 0, case.S)).any(axis=2)
    assert blind.any()
    assert (np.asarray(logsumexp.sum(axis=0)).swapaxes(1, 2)[blind] == HIDDEN).all()
    assert not np.asarray(out)[blind].any()


def test_keys_out_of_order_are_not_attended_in_silence():
    arrays = both("segment_ids", [[1] * 4 + [2] * 5 + [1] * 4, [1] * 4 + [2] * 9])
    case = Case(causal=True, arrays=arrays)
    q, k, v, weights = case.inputs()
    attend = functools.partial(attention_of(PARTS["mosaic"]), mask=case.mask)
    out, *_ = out_and_gradients(attend, q, k, v, weights)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize("window", [None, 5])
def test_only_tiles_with_a_visible_pair_are_computed(monkeypatch, window):
    """Of a row of documents its own: as many as hold a pair, rounded up to a call."""
    tokens, block = 48, 4
    lengths = [6, 17, 20, 5], [24, 8, 16, 0]
    segments = np.stack([np.repeat([1, 2, 3, 0], each) for each in lengths])
    ids = jnp.asarray(segments, jnp.int32)
    mask = Mask(causal=True, window=window, q_segment_ids=ids, kv_segment_ids=ids)
    seen = np.asarray(mask.visible(0, tokens, 0, tokens))
    seen = seen.reshape(2, 12, block, 12, block).any(axis=(2, 4))
    holds = np.zeros((24, 24), bool)  # a block of a row and one of another: none
    holds[:12, :12], holds[12:, 12:] = seen
    tiles = tiles_of(key_ranges(mask, 2, tokens, tokens), block, 12)
    count = int(tiles.number)
    assert count == holds.sum() < seen.size / 3
    listed = {(int(i), int(j)) for i, j in zip(tiles.q, tiles.kv, strict=True)}
    assert {pair for pair in zip(*np.nonzero(holds), strict=True)} <= listed

    calls = []
    backward = mosaic._backward

    def counted(*arrays, scale):
        jax.debug.callback(lambda q: calls.append(1), arrays[0][:1, :1, :1])
        return backward(*arrays, scale=scale)

    monkeypatch.setattr(mosaic, "_backward", counted)
    q, k = (jnp.ones((2, tokens, n, 8)) for n in (4, 2))
    attend = functools.partial(attention_of(PARTS["mosaic"]), mask=mask)
    jax.block_until_ready(out_and_gradients(attend, q, k, k, jnp.ones(q.shape)))
    jax.effects_barrier()
    assert len(calls) == -(-count // 3) * 3


def test_queries_that_see_nothing_have_no_tiles():
    """In a block of others, and a block of them."""
    start = jnp.asarray([[0, 8, 0, 9, 0, 0, 0, 0]])
    stop = jnp.asarray([[0, 10, 0, 12, 0, 0, 0, 0]])
    tiles = tiles_of(KeyRanges(start, stop, jnp.ones(1, bool)), 4, 4)
    assert (int(tiles.number), int(tiles.q[0]), int(tiles.kv[0])) == (1, 0, 2)


@pytest.mark.parametrize("fault", ["scale", "a key too few"])
def test_the_tolerance_catches_faults(monkeypatch, fault):
    case = CASES["causal segments"]
    q, k, v, weights = case.inputs()
    want = out_and_gradients(
        functools.partial(reference_attention, mask=case.mask), q, k, v, weights
    )
    scale = None
    if fault == "scale":
        scale = 1.001 * case.H**-0.5
    else:

        def short(*args):
            ranges = key_ranges(*args)
            return ranges._replace(stop=jnp.maximum(ranges.stop - 1, ranges.start))

        monkeypatch.setattr(mosaic, "key_ranges", short)
    attend = functools.partial(
        attention_of(PARTS["mosaic"]), mask=case.mask, scale=scale
    )
    for a, b in zip(out_and_gradients(attend, q, k, v, weights), want, strict=True):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_positions_that_are_shuffled_are_no_ranges():
    mask = Mask(causal=True, **SHUFFLED)
    assert not key_ranges(mask, 2, 13, 13).in_order.any()
    assert key_ranges(Mask(causal=True, **PACKED), 2, 13, 13).in_order.all()
