"""Tiles: the empty ones are skipped, the others never; memory is linear in T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES

from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.tiling import Tiles

TOKENS = 24


def pair(name, ids):
    ids = jnp.asarray(ids, jnp.int32)
    return {f"q_{name}": ids, f"kv_{name}": ids}


def contiguous(*lengths_of_rows):
    """Segments 1, 2, ... of these lengths, a row each."""
    return [
        np.repeat(np.arange(len(lengths)) + 1, lengths) for lengths in lengths_of_rows
    ]


PACKED = pair("segment_ids", contiguous((8, 11, 5), (16, 8), (8, 16)))
EXACT = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(window=5),
    "causal window": Mask(causal=True, window=7),
    "segments": Mask(**PACKED),
    "causal segments": Mask(causal=True, **PACKED),
}


def random_mask(seed):
    rng = np.random.default_rng(seed)
    segments = pair("segment_ids", rng.integers(0, 4, (3, TOKENS)))
    positions = pair("positions", rng.permuted([range(TOKENS)] * 3, axis=1))
    return Mask(causal=True, window=6, **segments, **positions)


def tiles_and_truth(mask, block_q, block_kv):
    """Which tiles are computed, and which have a visible pair, both `[q, kv]`."""
    num_q, num_kv = TOKENS // block_q, TOKENS // block_kv
    bounds = mask.block_bounds(block_q, block_kv)
    q, kv = jnp.arange(num_q), jnp.arange(num_kv)
    # As the loops ask: one block of queries against all keys, and the other way round.
    tiles = jax.jit(lambda: jax.lax.map(lambda i: bounds.tiles(i, kv), q))()
    columns = jax.jit(lambda: jax.lax.map(lambda j: bounds.tiles(q, j), kv))()
    np.testing.assert_array_equal(columns.T, tiles)
    seen = np.asarray(mask.visible(0, TOKENS, 0, TOKENS)).any(axis=0)
    truth = seen.reshape(num_q, block_q, num_kv, block_kv).any(axis=(1, 3))
    return np.asarray(tiles), truth


# With 3 rows and 3 blocks a mix-up of rows and blocks keeps the shapes.
@pytest.mark.parametrize("blocks", [(8, 8), (4, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_bounds_are_exact(name, blocks):
    tiles, truth = tiles_and_truth(EXACT[name], *blocks)
    np.testing.assert_array_equal(tiles, truth)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [(8, 8), (2, 3)], ids=str)
def test_no_visible_pair_is_dropped(seed, blocks):
    tiles, truth = tiles_and_truth(random_mask(seed), *blocks)
    assert (tiles | ~truth).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 7, np.int64(2**31 - 1)])
def test_positions_that_are_further_apart_than_int32_can_say(window, causal):
    ends = np.iinfo(np.int32)
    near = np.arange(TOKENS // 4)
    places = [ends.min + near, -near, near, ends.max - near]
    positions = pair("positions", [np.concatenate(places)])
    mask = Mask(causal=causal, window=window, **positions)
    q, kv = (np.asarray(x, np.int64)[0] for x in positions.values())
    apart = q[:, None] - kv
    seen = (np.abs(apart) < window) & ((apart >= 0) | (not causal))
    np.testing.assert_array_equal(mask.visible(0, TOKENS, 0, TOKENS)[0], seen)
    tiles, truth = tiles_and_truth(mask, 6, 3)
    assert (tiles | ~truth).all() and not tiles.all()


@pytest.mark.parametrize("name", ["causal", "causal window", "causal segments"])
def test_only_these_tiles_are_computed(name, monkeypatch):
    """Counts what runs, once forward and once backward a tile."""
    computed = []
    plain = Tiles.logits

    def counting(self, query, key, i, j):
        jax.debug.callback(lambda i, j: computed.append((int(i), int(j))), i, j)
        return plain(self, query, key, i, j)

    monkeypatch.setattr(Tiles, "logits", counting)
    q = jnp.ones((3, TOKENS, 1, 4))

    def total(q):
        mask = EXACT[name]
        return blockwise_attention(q, q, q, mask=mask, block_q=4, block_kv=3).sum()

    jax.block_until_ready(total(q))
    jax.effects_barrier()
    _, truth = tiles_and_truth(EXACT[name], 4, 3)
    wanted = sorted(zip(*np.nonzero(truth), strict=True))
    assert sorted(computed) == wanted
    computed.clear()
    jax.block_until_ready(jax.grad(total)(q))
    jax.effects_barrier()
    assert sorted(computed) == sorted(wanted * 2)


def temp_bytes(attend, tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)

    def total(q, k, v):
        return attend(q, k, v, mask=Mask(causal=True)).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_tokens():
    tiled = functools.partial(blockwise_attention, block_q=64, block_kv=64)
    assert temp_bytes(tiled, 4096) < 4.4 * temp_bytes(tiled, 1024)
    # What the bound is there to catch.
    dense = reference_attention
    assert temp_bytes(dense, 1024) > 10 * temp_bytes(dense, 256)


def test_a_policy_that_keeps_the_results_runs_no_second_forward_pass():
    case = CASES["causal"]
    q, k, v, _ = case.inputs()

    def loops(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            return jnp.sin(blockwise_attention(q * 2, k, v, mask=case.mask, block_q=4))

        def total(q, k, v):
            return layer(q, k, v).sum()

        step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
        return step.lower(q, k, v).compile().as_text().count(" while(")

    policies = jax.checkpoint_policies
    keep = policies.save_only_these_names("attention_out", "attention_logsumexp")
    everything = policies.everything_saveable
    assert loops(keep) == loops(everything) < loops(policies.nothing_saveable)
