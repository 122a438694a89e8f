"""Gathered keys and values: the dense oracle's results, one gather, one scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but_for
from strategy_cases import (
    MASKS,
    SMALL_TILES,
    TOLERANCE,
    B,
    H,
    T,
    assert_close,
    counts,
    inputs,
    mesh_of,
    oracle,
    out_and_gradients,
    pairs_computed,
    programs,
    sent,
    spread_results,
)

from ulysses_jax.attend import attend
from ulysses_jax.attention.mask import Mask
from ulysses_jax.parallel import all_gather as module
from ulysses_jax.parallel.blocks import Blocks
from ulysses_jax.parallel.bytes import received_bytes


@pytest.mark.parametrize(
    "heads, seq, zigzag",
    slow_but_for(
        [((6, 2), 8, False), ((7, 7), 4, True)],
        [(4, 4), (6, 2), (7, 7)],
        [2, 4, 8],
        [False, True],
    ),
)
def test_equals_the_oracle(heads, seq, zigzag):
    got = spread_results("all_gather", "causal", *heads, zigzag=zigzag, seq=seq)
    assert_close(got, oracle("causal", *heads))


@pytest.mark.parametrize(
    "mask",
    slow_but_for(["segments and window"], [name for name in MASKS if name != "causal"]),
)
def test_masks_in_zigzag_order(mask):
    got = spread_results("all_gather", mask, 4, 2, zigzag=True, seq=4)
    assert_close(got, oracle(mask, 4, 2))


@pytest.mark.parametrize("seq", [2, 4, 8])
def test_one_gather_and_one_scatter_of_the_bytes_of_the_formula(seq):
    forward, both = programs("all_gather", 8, 2, seq=seq)
    gather, scatter = ("all-gather", "seq"), ("reduce-scatter", "seq")
    assert counts(forward) == {gather: 1}
    assert counts(both) == {gather: 1, scatter: 1}
    sizes = dict(tokens=T, num_heads=8, num_kv_heads=2, head_size=H)
    formula = received_bytes("all_gather", **sizes, itemsize=4, ring=1, seq=seq)
    assert sent(both) == {
        gather: B * formula[gather][0],
        scatter: B * formula[scatter][1],
    }
    # By hand: k and v of every other device.
    assert sent(forward)[gather] == B * 2 * 2 * H * T * (seq - 1) / seq * 4


def test_what_a_causal_mask_hides_is_not_computed():
    seq, block = 4, T // 4
    own = block * (block + 1) // 2
    natural = pairs_computed("all_gather", zigzag=False, seq=seq)
    assert natural == [own + member * block**2 for member in range(seq)]
    zigzag = pairs_computed("all_gather", zigzag=True, seq=seq)
    assert zigzag == [own + (seq - 1) * block**2 // 2] * seq
    assert sum(zigzag) == sum(natural) == T * (T + 1) // 2


@pytest.mark.parametrize("fault", ["another's block", "unscattered", "unmerged"])
def test_faults_are_seen(monkeypatch, fault):
    parts = SMALL_TILES
    if fault == "another's block":
        source = Blocks.source
        monkeypatch.setattr(
            Blocks, "source", lambda self, q, step: source(self, q, step + 1)
        )
    elif fault == "unscattered":
        first = lambda x, axis: x[jax.lax.axis_index(axis)]  # noqa: E731
        monkeypatch.setattr(module.lax, "psum_scatter", first)
    else:
        parts = parts._replace(join=lambda old, new: old)
    attention = functools.partial(
        attend,
        mesh=mesh_of(seq=4),
        mask=Mask(causal=True),
        strategy="all_gather",
        attention=parts,
    )
    got = out_and_gradients(attention, *inputs(4, 2))
    want = oracle("causal", 4, 2)
    wrong = [
        np.abs(a - b).max() > 10 * TOLERANCE for a, b in zip(got, want, strict=True)
    ]
    assert wrong == [fault != "unscattered", fault != "unscattered", True, True]


def test_bad_input_is_refused_with_numbers():
    q, k, v, _ = inputs(4, 2)
    run = functools.partial(attend, q, k, v, mask=Mask(causal=True))
    with pytest.raises(
        ValueError,
        match="all_gather .* ring=2, seq=2: use ring=1, seq=4 or ring=1, seq=2",
    ):
        run(mesh=mesh_of(ring=2, seq=2), strategy="all_gather")
    with pytest.raises(
        ValueError, match="head_chunks 2 .* all_gather .* head_chunks 1"
    ):
        run(mesh=mesh_of(seq=2), strategy="all_gather", head_chunks=2)
    odd = jnp.zeros((B, 18, 4, H))
    with pytest.raises(ValueError, match="18, does not divide over seq degree 4"):
        attend(odd, odd, odd, mask=Mask(), mesh=mesh_of(seq=4), strategy="all_gather")
