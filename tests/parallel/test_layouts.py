"""Block-sparse layouts under every strategy: each device's own heads and blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from strategy_cases import (
    MASKS,
    SMALL_TILES,
    T,
    assert_close,
    inputs,
    mesh_of,
    out_and_gradients,
)

from ulysses_jax import ulysses_attention
from ulysses_jax.attend import attend
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.layouts import fixed
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.parallel.zigzag import zigzag_order
from ulysses_jax.strategies import num_members

BLOCK = 2


@functools.cache
def layout_of(name, heads):
    """By head: each sees others, and another number of blocks."""
    blocks = T // BLOCK
    if name == "alike":
        return fixed(blocks, block_tokens=BLOCK, local_blocks=4)
    random = np.random.default_rng(heads).random((heads, blocks, blocks))
    seen = random < np.linspace(0.15, 0.6, heads)[:, None, None]
    return BlockLayout(seen | np.eye(blocks, dtype=bool), block_tokens=BLOCK)


@functools.cache
def oracle(mask, layout, heads):
    seen = dataclasses.replace(MASKS[mask], layout=layout_of(layout, heads[0]))
    attention = functools.partial(reference_attention, mask=seen)
    return out_and_gradients(attention, *inputs(*heads))


def spread_results(
    strategy,
    heads,
    mask,
    layout,
    *,
    zigzag=False,
    head_chunks=1,
    axis_type=AxisType.Auto,
    **degrees,
):
    """In the sequence's own order; tokens go in as they must lie."""
    members = num_members(strategy, *(degrees.get(x, 1) for x in ("ring", "seq")))
    order = zigzag_order(T, members) if zigzag else np.arange(T)
    seen = jax.tree.map(lambda ids: ids[:, order], MASKS[mask])
    seen = dataclasses.replace(seen, layout=layout_of(layout, heads[0]))
    run = functools.partial(
        attend,
        mesh=mesh_of(axis_type, **degrees),
        mask=seen,
        strategy=strategy,
        zigzag=zigzag,
        head_chunks=head_chunks,
        attention=SMALL_TILES if members > 1 else attention_of(SMALL_TILES),
    )
    results = out_and_gradients(run, *(x[:, order] for x in inputs(*heads)))
    return tuple(x[:, np.argsort(order)] for x in results)


EXPLICIT = dict(axis_type=AxisType.Explicit)
QUICK = [
    # Keys are repeated, and slots are padded.
    ("ulysses", (6, 3), "segments", "by head", dict(seq=4)),
    ("ulysses", (8, 4), "causal", "by head", dict(seq=2, tensor=2, head_chunks=2)),
    ("all_gather", (4, 2), "window", "alike", dict(seq=4, tensor=2)),
    ("megatron", (8, 4), "causal", "by head", dict(seq=2, tensor=2)),
]
MORE = [
    ("ulysses", (4, 2), "positions", "alike", dict(data=2, seq=4)),
    ("ulysses", (8, 2), "window", "by head", dict(fsdp=2, seq=4) | EXPLICIT),
    ("ring", (4, 2), "segments and window", "by head", dict(ring=4, tensor=2)),
    ("ring", (4, 2), "positions", "alike", dict(ring=4)),
    ("ring", (4, 2), "causal", "alike", dict(ring=4, zigzag=True)),
    ("hybrid", (8, 2), "segments", "by head", dict(ring=2, seq=4, zigzag=True)),
    ("hybrid", (8, 8), "window", "alike", dict(ring=2, seq=2, head_chunks=2)),
    ("all_gather", (4, 2), "segments", "by head", dict(seq=4, zigzag=True)),
]


@pytest.mark.parametrize(
    "strategy, heads, mask, layout, options",
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=str,
)
def test_equals_the_oracle(strategy, heads, mask, layout, options):
    got = spread_results(strategy, heads, mask, layout, **options)
    assert_close(got, oracle(mask, layout, heads))


@pytest.mark.parametrize("options", [dict(seq=2), dict(ring=2)], ids=str)
def test_parts_of_ones_own_need_not_know_of_layouts(options):
    def forward(q, k, v, *, mask, scale):
        assert mask.layout is None
        return PARTS["blockwise"].forward(q, k, v, mask=mask, scale=scale)

    def gradients(*arrays, mask, scale):
        assert mask.layout is None
        return PARTS["blockwise"].gradients(*arrays, mask=mask, scale=scale)

    own = Parts(forward, gradients)

    def attention(q, k, v):
        results = ulysses_attention(
            q,
            k,
            v,
            mesh=mesh_of(**options),
            attention=own,
            layout=layout_of("by head", 4),
            return_logsumexp=True,
        )
        return results[0]

    got = out_and_gradients(attention, *inputs(4, 2))
    assert_close(got, oracle("causal", "by head", (4, 2)))


@pytest.mark.parametrize("fault", ["heads of others", "order"])
def test_faults_are_seen(monkeypatch, fault):
    if fault == "order":
        monkeypatch.setattr("ulysses_jax.attend.zigzag_index", lambda place, *_: place)
        case = ("all_gather", (4, 2), "window", "alike", dict(seq=4, zigzag=True))
    else:
        monkeypatch.setattr(
            "ulysses_jax.parallel.ulysses.own_heads",
            lambda q, mesh: jnp.arange(q.shape[2], dtype=jnp.int32),
        )
        case = ("ulysses", (8, 4), "causal", "by head", dict(seq=2, tensor=2))
    strategy, heads, mask, layout, options = case
    got = spread_results(strategy, heads, mask, layout, **options)
    with pytest.raises(AssertionError):
        assert_close(got, oracle(mask, layout, heads), 0.05)


def test_the_public_function_and_what_it_refuses():
    heads = (4, 2)
    q, k, v, _ = inputs(*heads)
    layout = layout_of("by head", 4)
    mesh = mesh_of(seq=4)
    out = ulysses_attention(q, k, v, mesh=mesh, layout=layout)
    np.testing.assert_allclose(out, oracle("causal", "by head", heads)[0], atol=2e-5)
    wrong = {
        "is of 3 heads, but q has 4": BlockLayout(layout.blocks[:3], block_tokens=2),
        r"16 x 16 blocks of 4 tokens, 64 x 64, but there are 32 .*of 8 x 8 blocks": (
            BlockLayout(layout.blocks, block_tokens=4)
        ),
        "layout is a ulysses_jax.attention.block_layout.BlockLayout, not ndarray": (
            layout.blocks
        ),
        "block 0 of the layout's queries sees no block that the mask shows it": (
            BlockLayout(
                ~np.tri(16, dtype=bool) | np.eye(16, k=-1, dtype=bool), block_tokens=2
            )
        ),
    }
    for message, each in wrong.items():
        with pytest.raises(ValueError, match=message):
            ulysses_attention(q, k, v, mesh=mesh, layout=each)
    wide = fixed(4, block_tokens=8, local_blocks=2)
    with pytest.raises(ValueError, match="blocks of 8 tokens are cut.*of blocks of 4"):
        attend(
            q,
            k,
            v,
            mesh=mesh_of(ring=4),
            mask=dataclasses.replace(MASKS["causal"], layout=wide),
            zigzag=True,
        )
