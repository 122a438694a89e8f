"""Documents in a row see only themselves, bit for bit, under every strategy."""

import functools

import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from slow import slow_but_for
from strategy_cases import (
    MASKS,
    SMALL_TILES,
    assert_close,
    compiled,
    inputs,
    mesh_of,
    oracle,
    spread_results,
)

from ulysses_jax.attend import attend
from ulysses_jax.attention import mosaic
from ulysses_jax.attention.parts import PARTS, attention_of

SPREAD = {
    "ulysses": dict(strategy="ulysses", data=2, seq=2),
    "ring": dict(strategy="ring", ring=4),
    "ring in zigzag order": dict(strategy="ring", ring=4, zigzag=True),
    "hybrid in zigzag order": dict(strategy="hybrid", ring=2, seq=2, zigzag=True),
    "all_gather": dict(strategy="all_gather", seq=4),
    "all_gather in zigzag order": dict(strategy="all_gather", seq=4, zigzag=True),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    mosaic_stand_in.use(monkeypatch)
    monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 5)
    monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 2)


def attention_under(strategy, kernel):
    """By blocks its parts, else the whole."""
    parts = SMALL_TILES if kernel == "blockwise" else PARTS[kernel]
    return attention_of(parts) if strategy == "ulysses" else parts


@pytest.mark.parametrize(
    "spread, mask",
    slow_but_for(
        [
            ("ulysses", "segments and window"),
            ("hybrid in zigzag order", "segments and window"),
        ],
        SPREAD,
        ["causal", "window", "segments", "segments and window"],
    ),
)
def test_ranges_of_keys_under_every_strategy(spread, mask):
    options = dict(SPREAD[spread])
    strategy = options.pop("strategy")
    attention = attention_under(strategy, "mosaic")
    got = spread_results(strategy, mask, 4, 2, attention=attention, **options)
    assert_close(got, oracle(mask, 4, 2))


@pytest.mark.parametrize(
    "kernel, spread",
    slow_but_for(
        [("mosaic", "ulysses"), ("blockwise", "ring")],
        ["mosaic", "blockwise"],
        ["ulysses", "ring", "all_gather"],
    ),
)
def test_another_document_changes_no_bit(kernel, spread):
    """Of a document's outputs and gradients, when all of another's arrays do."""
    options = dict(SPREAD[spread])
    strategy = options.pop("strategy")
    mask = MASKS["segments"]
    run = compiled(
        functools.partial(
            attend,
            mesh=mesh_of(**options),
            mask=mask,
            strategy=strategy,
            attention=attention_under(strategy, kernel),
        )
    )
    arrays = inputs(4, 2)
    before = run(*arrays)
    changed = np.asarray(mask.q_segment_ids) == 2
    after = run(*(jnp.where(changed[..., None, None], -3 * x, x) for x in arrays))
    for a, b in zip(before, after, strict=True):
        assert (a[~changed] == b[~changed]).all()
        assert (a[changed] != b[changed]).any(axis=(1, 2)).all()
