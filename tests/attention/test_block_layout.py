"""Layouts of blocks: what each of the presets shows, and what is no layout."""

import jax
import numpy as np
import pytest

from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.layouts import (
    bigbird,
    fixed,
    layout_of,
    longformer,
    random,
    strided,
)
from ulysses_jax.attention.mask import Mask
from ulysses_jax.config import Model


def drawn(layout, head=0):
    return [
        "".join("x" if seen else "." for seen in row) for row in layout.blocks[head]
    ]


def test_fixed():
    layout = fixed(6, block_tokens=1, local_blocks=3)
    assert drawn(layout) == ["x.....", "xx....", "xxx...", "..xx..", "..xxx.", "..xxxx"]
    by_head = fixed(6, block_tokens=1, local_blocks=3, num_heads=4)
    assert drawn(by_head) == drawn(layout) == drawn(by_head, 3)
    assert drawn(by_head, 1)[3:] == [".x.x..", ".x.xx.", ".x.xxx"]
    both = fixed(4, block_tokens=1, local_blocks=2, causal=False)
    assert drawn(both) == ["xx.x", "xx.x", ".xxx", ".xxx"]
    two = fixed(8, block_tokens=1, local_blocks=4, global_blocks=2, num_heads=2)
    assert drawn(two)[5:] == ["..xxxx..", "..xxxxx.", "..xxxxxx"]
    assert drawn(two, 1)[5:] == ["xx..xx..", "xx..xxx.", "xx..xxxx"]


def test_strided():
    layout = strided(6, block_tokens=1, local_blocks=2)
    assert drawn(layout) == ["x.....", "xx....", "xxx...", ".xxx..", "x.xxx.", ".x.xxx"]


def test_longformer():
    layout = longformer(5, block_tokens=1, local_blocks=2)
    assert drawn(layout) == ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]
    both = longformer(5, block_tokens=1, local_blocks=2, causal=False)
    assert drawn(both) == ["xxxxx", "xxx..", "xxxx.", "x.xxx", "x..xx"]
    two = longformer(5, block_tokens=1, local_blocks=1, global_blocks=2, causal=False)
    assert drawn(two) == ["xxxxx", "xxxxx", "xxx..", "xx.x.", "xx..x"]


OF_A_MODEL = dict(block_tokens=4, local_blocks=6)


@pytest.mark.parametrize(
    "sparse, by_head, want",
    [
        ("fixed", True, fixed(24, global_blocks=2, num_heads=3, **OF_A_MODEL)),
        ("strided", False, strided(24, **OF_A_MODEL)),
        ("longformer", False, longformer(24, global_blocks=2, **OF_A_MODEL)),
        (
            "bigbird",
            False,
            bigbird(24, global_blocks=2, random_blocks=3, **OF_A_MODEL),
        ),
    ],
)
def test_a_models_numbers_are_the_layouts(sparse, by_head, want):
    model = Model(
        vocab_size=8,
        width=24,
        num_layers=1,
        num_heads=3,
        sparse=sparse,
        sparse_block_tokens=4,
        sparse_local_blocks=6,
        sparse_global_blocks=2,
        sparse_random_blocks=3,
        sparse_by_head=by_head,
    )
    assert layout_of(model, 96) == want


@pytest.mark.parametrize("causal", [True, False])
def test_bigbird(causal):
    options = dict(block_tokens=1, local_blocks=2, random_blocks=2, causal=causal)
    layout = bigbird(12, num_heads=3, **options)
    base = longformer(12, block_tokens=1, local_blocks=2, causal=causal).blocks[0]
    more = layout.blocks & ~base
    assert (layout.blocks | ~base).all()
    hidden = np.triu(np.ones((12, 12), bool), 1) if causal else np.zeros((12, 12), bool)
    free = (~base & ~hidden).sum(axis=-1)
    assert (more.sum(axis=-1) == np.minimum(free, 2)).all()
    assert len({head.tobytes() for head in layout.blocks}) == 3
    assert layout == bigbird(12, num_heads=3, **options)
    assert layout != bigbird(12, num_heads=3, seed=1, **options)


def test_two_of_the_same_content_are_one():
    seen = np.tri(4)
    layout = BlockLayout(seen, block_tokens=8)
    assert layout == BlockLayout(seen > 0, block_tokens=np.int64(8))
    assert hash(layout) == hash(BlockLayout(seen, block_tokens=8))
    assert layout != BlockLayout(seen, block_tokens=4)
    assert layout != BlockLayout(seen.T, block_tokens=8)
    seen[:] = 1  # the layout is its own
    with pytest.raises(ValueError, match="read-only"):
        layout.blocks[0, 0, 1] = True
    # As many blocks, cut otherwise: of each its own tiles.
    square, wide = (BlockLayout(np.ones(x), block_tokens=8) for x in ((4, 4), (2, 8)))
    assert square != wide
    assert [len(np.unique(x.tiles()[0][:, 0])) for x in (square, wide)] == [4, 2]
    assert layout.density(causal=False) == 10 / 16
    assert "4 x 4 blocks of 8 tokens, 62.5%" in repr(layout)


def test_density_and_tiles():
    layout = BlockLayout(np.tri(4), block_tokens=8)
    assert layout.density(causal=True) == 1
    half = BlockLayout(np.eye(4), block_tokens=8)
    assert half.density(causal=True) == 2 / 8
    everything = BlockLayout(np.ones((4, 4)), block_tokens=8)
    # The nearest tokens of blocks d apart are 8 (d - 1) + 1 apart.
    for window, reach in ((1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3)):
        (tiles,) = everything.tiles(causal=True, window=window)
        assert tiles.tolist() == [
            [i, j] for i in range(4) for j in range(i + 1) if i - j <= reach
        ]
        (tiles,) = everything.tiles(causal=False, window=window)
        assert len(tiles) == sum(
            abs(i - j) <= reach for i in range(4) for j in range(4)
        )


def test_what_the_mask_alone_leaves_nothing_may_be_blind():
    """16 queries on 8 keys: past the window of the last key none is seen."""
    everything = BlockLayout(np.ones((4, 2)), block_tokens=4)
    (tiles,) = everything.tiles(causal=True, window=2)
    assert tiles.tolist() == [[0, 0], [1, 0], [1, 1], [2, 1]]
    with pytest.raises(ValueError, match="block 0 of .* no block that the mask shows"):
        BlockLayout(np.eye(4, k=1) + np.eye(4, k=-3), block_tokens=4).tiles(causal=True)


@pytest.mark.parametrize(
    "blocks, block_tokens, message",
    [
        (np.ones(4), 8, r"not \(4,\)"),
        (np.ones((0, 4)), 8, r"not \(0, 4\)"),
        ([[1], [1, 0]], 8, "an array of bools"),
        (np.ones((4, 4)) * 0.5, 8, "of bools, or 0 and 1, not float64"),
        (np.ones((4, 4)), 0, "block_tokens 0: use 1 or more"),
        (np.ones((4, 4)), True, "block_tokens is a number, not True"),
        (np.eye(4, k=1), 8, r"block 3 of the layout's queries sees no block of keys"),
        (np.stack([np.eye(4), np.eye(4, k=1)]), 8, "block 3 .* queries of head 1 sees"),
    ],
)
def test_what_is_no_layout(blocks, block_tokens, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(blocks, block_tokens=block_tokens)


def test_an_array_that_is_not_known_yet():
    with pytest.raises(ValueError, match="known before the program is compiled"):
        jax.jit(lambda x: Mask(layout=BlockLayout(x, block_tokens=1)))(np.ones((4, 4)))


@pytest.mark.parametrize(
    "make, options",
    [
        (fixed, dict(local_blocks=3, global_blocks=2)),
        (strided, dict(local_blocks=0)),
        (longformer, dict(local_blocks=0)),
        (fixed, dict(num_heads=0)),
        (bigbird, dict(num_heads=0)),
    ],
)
def test_numbers_that_cannot_be(make, options):
    with pytest.raises(ValueError, match="use 1 or more|does not divide"):
        make(4, block_tokens=1, **options)
    with pytest.raises(ValueError, match="num_blocks 0: use 1 or more"):
        make(0, block_tokens=1)


def test_random_blocks_of_a_density():
    layout = random(256, block_tokens=4, density=1 / 8)
    assert layout.density(causal=True) == pytest.approx(1 / 8, rel=0.02)
    assert layout.blocks[0].diagonal().all()
    assert not np.triu(layout.blocks[0], 1).any()
    assert random(4, block_tokens=4, density=1 / 8).density(causal=True) < 0.5
