"""Pairs that packed rows leave: the formulas beside rows that are really packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax import config as configs
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.by_layout import _Blocks
from ulysses_jax.attention.by_tiles import tiles_of
from ulysses_jax.attention.layouts import bigbird, fixed
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.ranges import key_ranges
from ulysses_jax.complete import complete
from ulysses_jax.costs.kernels import attention_of_kinds, tile_products
from ulysses_jax.costs.pairs import Pairs, pairs_of
from ulysses_jax.mesh import Device
from ulysses_jax.placement import place


def test_of_a_layout():
    """Tiles before a query's own are whole; a document's share by how far they are."""
    layout = fixed(8, block_tokens=4, local_blocks=2)
    lower = np.tril(layout.blocks[0], -1).sum()
    assert Pairs((layout,)).visible(32) == lower * 16 + 8 * 16 / 2
    apart = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))[
        np.tril(layout.blocks[0], -1)
    ]
    own = 8 * Pairs((None,), 20).visible(4)
    far = 16 * np.exp(-4 * apart / 20).sum()
    assert Pairs((layout,), 20).visible(32) == pytest.approx(own + far)


def packed_rows(tokens, mean, rows=400):
    """Segment ids of rows in which documents end anywhere with chance 1 / mean."""
    ends = np.random.default_rng(0).random((rows, tokens)) < 1 / mean
    return np.cumsum(ends, axis=1).astype(np.int32)


@pytest.mark.parametrize("window", [None, 40, 700])
@pytest.mark.parametrize("mean", [25, 300])
def test_of_random_documents(mean, window):
    tokens, block = 512, 32
    ids = jnp.asarray(packed_rows(tokens, mean))
    mask = Mask(causal=True, window=window, q_segment_ids=ids, kv_segment_ids=ids)
    ranges = key_ranges(mask, len(ids), tokens, tokens)
    seen = np.asarray(ranges.stop - ranges.start).sum(axis=1)
    pairs = Pairs((window,), mean)
    counted = seen.mean() - tokens / 2  # a token's own pair counts as half
    assert pairs.visible(tokens) == pytest.approx(counted, rel=0.04)
    assert pairs.fraction(tokens) == pairs.visible(tokens) / tokens**2
    tiles = int(tiles_of(ranges, block, 16).number) / len(ids)
    assert pairs.tiles(16, block) == pytest.approx(tiles, rel=0.04)


@pytest.mark.parametrize("rows", [1, 3])
def test_tiles_of_a_layout(rows):
    """Computed are those that a query of any of these rows sees."""
    tokens, block, mean = 512, 16, 60
    layout = bigbird(tokens // block, block_tokens=block, random_blocks=3, num_heads=2)
    pairs, longest = Pairs((layout,), mean), max(map(len, layout.tiles(causal=True)))
    q, k = (jnp.zeros((rows, tokens, n, 4)) for n in (2, 1))

    def number(ids):
        mask = Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids, layout=layout)
        return _Blocks(q, k, mask).tiles().number

    ids = jnp.asarray(packed_rows(tokens, mean, 300 * rows)).reshape(300, rows, tokens)
    counted = np.asarray(jax.jit(jax.vmap(number))(ids)).mean() / 2
    assert pairs.layout_tiles(rows) == pytest.approx(counted, rel=0.03)
    assert pairs.layout_fraction(rows) == pairs.layout_tiles(rows) / longest < 0.7
    assert Pairs((layout,)).layout_tiles(rows) == longest


def test_heads_have_as_many_tiles_as_the_one_with_the_most():
    """Of one document a row. Among short ones a block meets its neighbour at most: of
    the two heads, in the mean, 4 and three halves."""
    uneven = BlockLayout(np.stack([np.tri(4), np.eye(4)]), block_tokens=8)
    assert Pairs((uneven,)).layout_tiles(1) == 10
    assert Pairs((uneven,)).layout_fraction(1) == 1
    apart = Pairs((uneven,), 1e-3)
    assert (apart.layout_tiles(1), apart.layout_fraction(1)) == (5.5, 0.55)


def test_without_documents():
    assert Pairs((None,)).visible(100) == 100 * 100 / 2
    assert Pairs((100,)).visible(1024) == 100 * 1024 - 100 * 100 / 2
    assert Pairs((5000,)).visible(100) == Pairs((None,)).visible(100)
    assert Pairs((None,)).tiles(4, 8) == 10  # half of 16, and the diagonal
    assert Pairs((8,)).tiles(4, 8) == 7  # its own, and but for the first the one before
    # The first query of a block reaches 8 or 9 keys back.
    assert (Pairs((9,)).tiles(4, 8), Pairs((10,)).tiles(4, 8)) == (7, 9)
    assert Pairs((None, 8)).tiles(4, 8) == 8.5
    assert Pairs((None, 10)).visible(100) == 5000 + 950
    # A document much longer than a row is one.
    assert Pairs((None,), 10**9).visible(1000) == pytest.approx(500_000, rel=1e-4)


LAYOUTS = [
    fixed(32, block_tokens=16, local_blocks=4),
    bigbird(32, block_tokens=16, random_blocks=3, num_heads=2),
]


@pytest.mark.parametrize("layer", [None, 16, 100, *LAYOUTS], ids=str)
@pytest.mark.parametrize("mean", [None, 60])
def test_the_last_members_share(layer, mean):
    span, members = 512, 4
    apart = np.subtract.outer(np.arange(span), np.arange(span))
    # That two are of one document, where one ends at each token with chance 1 / mean.
    seen = np.tril((1 - 1 / mean if mean else 1.0) ** np.maximum(apart, 0))
    if isinstance(layer, BlockLayout):
        seen = seen * layer.visible().mean(axis=0)
    elif layer:
        seen *= apart < layer
    of_members = (seen.sum(1) - 0.5).reshape(members, -1).sum(1)
    want = of_members[-1] / of_members.mean()
    assert Pairs((layer,), mean).most(span, members) == pytest.approx(want, rel=0.02)
    if layer is None and not mean:
        assert want == 2 - 1 / members


def run(model=None, batch_size=8, **data):
    config = configs.Config(
        model=model
        or configs.Model(
            vocab_size=512,
            width=256,
            num_layers=3,
            num_heads=8,
            positions="rope",
            pattern=("window", "full"),
            window=100,
        ),
        data=configs.Data(**data),
        training=configs.Training(batch_size=batch_size, sequence_tokens=4096),
        mesh=configs.Mesh(seq=8),
    )
    config = complete(config, name="run")
    return place(config, dataclasses.asdict(config.mesh))


H100 = Device("gpu", "NVIDIA H100 80GB HBM3")


def test_the_kernel_of_every_kind(monkeypatch):
    monkeypatch.setattr("ulysses_jax.attention.select.tokamax_lacks", lambda: None)
    rows = attention_of_kinds(run(mask_documents=False), H100)
    assert [row["kernel"] for row in rows] == ["cudnn", "cudnn"]
    assert [(row["kind"], row["layers"]) for row in rows] == [
        ("window", 2),
        ("full", 1),
    ]
    assert rows[1]["pairs_fraction"] == 0.5
    assert tile_products(run(mask_documents=False), rows) == 0

    config = run(document_tokens=512)
    rows = attention_of_kinds(config, H100)
    assert [row["kernel"] for row in rows] == ["mosaic", "mosaic"]
    assert rows[0]["pairs_fraction"] < rows[1]["pairs_fraction"] < 0.11
    pairs = Pairs((100, 100, None), 512)
    beyond = 7 * 3 * pairs.tiles(4, 1024) * 1024**2 - 5 * pairs.visible(4096)
    assert tile_products(config, rows) == pytest.approx(beyond)

    ampere = Device("gpu", "NVIDIA A100-SXM4-40GB")
    slow = attention_of_kinds(config, ampere)
    assert {row["kernel"] for row in slow} == {"blockwise"}
    assert all("no Hopper" in row["why"] for row in slow)


def test_products_of_a_layouts_tiles(monkeypatch):
    """Nine of all pairs of a tile, of those that hold a visible pair of two rows."""
    monkeypatch.setattr("ulysses_jax.attention.select.tokamax_lacks", lambda: None)
    model = configs.Model(
        vocab_size=512,
        width=256,
        num_layers=3,
        num_heads=8,
        positions="rope",
        sparse="longformer",
    )
    config = run(model, batch_size=2, document_tokens=512)
    rows = attention_of_kinds(config, H100)
    assert [row["kernel"] for row in rows] == ["mosaic"]
    pairs = pairs_of(config, ("sparse",))
    assert pairs.layout_tiles(1) < pairs.layout_tiles(2) < pairs.layout_tiles(9)
    size = config.model.sparse_block_tokens
    beyond = 9 * pairs.layout_tiles(2) * size**2 - 7 * pairs.visible(4096)
    assert tile_products(config, rows) == pytest.approx(3 * beyond)


def test_a_window_goes_by_index_where_rows_are_whole(monkeypatch):
    """Cut into parts it compares positions, which cuDNN does not."""
    monkeypatch.setattr("ulysses_jax.attention.select.tokamax_lacks", lambda: None)
    config = run(mask_documents=False)
    for memory, kernel in (
        (dict(head_chunks=1), "cudnn"),
        (dict(sequence_chunk_tokens=512), "cudnn"),  # all of a device's
        (dict(sequence_chunk_tokens=128), "mosaic"),
    ):
        narrow = dataclasses.replace(config, memory=configs.Memory(**memory))
        assert attention_of_kinds(narrow, H100)[0]["kernel"] == kernel
    model = dataclasses.replace(config.model, strategy="ring", zigzag=True)
    mesh = dataclasses.replace(config.mesh, ring=8, seq=1)
    ring = dataclasses.replace(config, model=model, mesh=mesh)
    assert attention_of_kinds(ring, H100)[0]["kernel"] == "mosaic"
    assert attention_of_kinds(ring, H100)[1]["kernel"] == "cudnn"


def test_documents_that_see_each_other_are_one():
    assert (
        pairs_of(run(mask_documents=False, document_tokens=64)).document_tokens is None
    )
    assert pairs_of(run(document_tokens=64)).document_tokens == 64
