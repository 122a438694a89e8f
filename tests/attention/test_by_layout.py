"""Block-sparse attention: equal to the dense one where the layout shows, and no more
work than its tiles."""

import functools

import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from attention_cases import assert_close, both, out_and_gradients
from slow import slow_but_for

from ulysses_jax.attention import mosaic
from ulysses_jax.attention.block_layout import BlockLayout
from ulysses_jax.attention.blockwise import blockwise_attention
from ulysses_jax.attention.by_layout import _Blocks
from ulysses_jax.attention.layouts import bigbird, fixed, strided
from ulysses_jax.attention.mask import Mask, Places
from ulysses_jax.attention.parts import Parts, attention_of
from ulysses_jax.attention.reference import dense_mask, reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.costs.flops import STEPS, matmul_flops
from ulysses_jax.costs.hlo import parse

B, T, N, K, H, BLOCK = 2, 24, 4, 2, 8, 4
BLOCKS = T // BLOCK

PACKED = both("segment_ids", np.repeat([[1, 2, 3], [1, 1, 2]], (9, 11, 4), axis=1))
SHUFFLED = both("positions", np.random.default_rng(0).permuted([range(T)] * B, axis=1))
RESTARTED = both(
    "positions", [[*range(9), *range(11), *range(4)], [*range(20), *range(4)]]
)
STRANGERS = dict(
    q_segment_ids=np.repeat([[1, 2], [5, 5]], T // 2, axis=1),
    kv_segment_ids=np.repeat([[1, 2], [6, 7]], T // 2, axis=1),
)
FIXED = fixed(BLOCKS, block_tokens=BLOCK, local_blocks=2)
BY_HEAD = fixed(BLOCKS, block_tokens=BLOCK, local_blocks=2, num_heads=N)
# Of each head another number of tiles.
UNEVEN = bigbird(BLOCKS, block_tokens=BLOCK, local_blocks=2, num_heads=N).blocks.copy()
UNEVEN[1] = np.tri(BLOCKS)
UNEVEN[2] = np.eye(BLOCKS)
UNEVEN = BlockLayout(UNEVEN, block_tokens=BLOCK)
RANDOM = np.random.default_rng(1).random((BLOCKS, BLOCKS)) < 0.4
FULL = BlockLayout(RANDOM | np.eye(BLOCKS, dtype=bool), block_tokens=BLOCK)
HOLES = BlockLayout(
    ~np.eye(BLOCKS, k=-1, dtype=bool) & ~np.eye(BLOCKS, k=-3, dtype=bool),
    block_tokens=BLOCK,
)
CROSS = BlockLayout(np.tri(2, BLOCKS, 3), block_tokens=BLOCK)

CASES = {
    "fixed": dict(causal=True, layout=FIXED),
    "strided": dict(
        causal=True, layout=strided(BLOCKS, block_tokens=BLOCK, local_blocks=3)
    ),
    "by head, uneven": dict(causal=True, layout=UNEVEN),
    "not causal": dict(layout=FULL),
    "causal over what is not": dict(causal=True, layout=FULL),
    "by head, segments": dict(layout=BY_HEAD, **PACKED),
    "by head, uneven, documents": dict(causal=True, layout=UNEVEN, **PACKED),
    "documents, positions, window": dict(
        causal=True, window=3, layout=FULL, **PACKED, **RESTARTED
    ),
    "a row whose keys none sees": dict(layout=FULL, **STRANGERS),
    "window": dict(causal=True, window=6, layout=FIXED),
    "window on both sides": dict(window=6, layout=FULL),
    "positions": dict(causal=True, layout=FULL, **SHUFFLED),
    "cross": dict(layout=CROSS),
    "cross causal": dict(causal=True, layout=CROSS),
}


def kernel(name, monkeypatch):
    if name == "mosaic":
        mosaic_stand_in.use(monkeypatch)
        monkeypatch.setattr(mosaic, "BLOCK_TOKENS", BLOCK)
        monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 3)
    parts = attention_of(PARTS["blockwise" if name == "blockwise" else "mosaic"])
    return blockwise_attention if name == "blockwise" else parts


def problem(case):
    arrays = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in CASES[case].items()
    }
    mask = Mask(**arrays)
    assert mask.layout
    tokens, keys = mask.layout.num_tokens
    rng = np.random.default_rng(3)
    shapes = (B, tokens, N, H), (B, keys, K, H), (B, keys, K, H), (B, tokens, N, H)
    q, k, v, weights = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return mask, tuple(map(jnp.asarray, (q, k, v, weights)))


QUICK = {
    "blockwise": (
        "by head, uneven",
        "positions",
        "cross causal",
        "documents, positions, window",
    ),
    "mosaic": ("by head, uneven, documents",),
}


@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(name, case, marks=[] if case in QUICK[name] else pytest.mark.slow)
        for name in QUICK
        for case in CASES
        if (name, case) != ("mosaic", "positions")  # it takes keys in order alone
    ],
)
def test_equals_the_reference(monkeypatch, name, case):
    mask, arrays = problem(case)
    want = out_and_gradients(functools.partial(reference_attention, mask=mask), *arrays)
    attend = functools.partial(kernel(name, monkeypatch), mask=mask)
    assert_close(out_and_gradients(attend, *arrays), want)


@pytest.mark.parametrize("which", ["alike", "by head"])
def test_several_tiles_at_once(which):
    """Which may be of one block of queries, and whose last step is not full; by head,
    those of a device that has two of the layout's four heads, and not the first."""
    num_blocks, block = 5, 48
    heads = np.random.default_rng(5).random((N, num_blocks, num_blocks)) < 0.5
    heads |= np.eye(num_blocks, dtype=bool)
    if which == "alike":
        mask = Mask(causal=True, layout=BlockLayout(heads[1], block_tokens=block))
        here = mask
    else:
        layout = BlockLayout(heads, block_tokens=block)
        mask = Mask(causal=True, layout=layout)
        here = mask.of_heads(jnp.asarray([3, 0]))
    num_heads = N if which == "alike" else 2
    rng = np.random.default_rng(4)
    shape = 1, num_blocks * block
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((*shape, n, H), np.float32))
        for n in (num_heads, 1, 1, num_heads)
    )
    blocks = _Blocks(q, k, here)
    tiles = blocks.tiles()
    at_once = blocks.at_once(tiles, 1024)
    assert at_once == 3 and len(tiles.q) % at_once
    attend = functools.partial(blockwise_attention, mask=here)
    want = functools.partial(reference_attention, mask=here)
    arrays = q, k, v, weights
    assert_close(out_and_gradients(attend, *arrays), out_and_gradients(want, *arrays))


@pytest.mark.parametrize("keys", slow_but_for([[0, 2, 1]], [[0, 2, 1], [3, 4, 5]]))
def test_a_part_of_a_sequence(keys):
    """Blocks 3 to 5 of queries, and their own keys, or others, whose order they have
    from the layout alone, as in layers in pieces."""
    queries = [3, 4, 5]
    at_q, at_kv = (
        np.concatenate([np.arange(BLOCK) + BLOCK * i for i in blocks])
        for blocks in (queries, keys)
    )
    _, arrays = problem("fixed")
    q, k, v, weights = (x[:, at_q] for x in arrays)
    k, v = (x[:, at_kv] for x in arrays[1:3])
    ids = jnp.asarray(PACKED["q_segment_ids"])
    mask = Mask(
        causal=True,
        window=10,
        q_segment_ids=ids[:, at_q],
        kv_segment_ids=ids[:, at_kv],
        layout=HOLES,
        places=Places(None, *(jnp.asarray([x] * B) for x in (queries, keys))),
    )
    seen = HOLES.blocks[:, queries][..., keys]
    assert not seen.all()
    whole = Mask(
        causal=True,
        window=10,
        q_segment_ids=ids[:, at_q],
        kv_segment_ids=ids[:, at_kv],
        q_positions=jnp.asarray([at_q] * B),
        kv_positions=jnp.asarray([at_kv] * B),
        layout=BlockLayout(seen, block_tokens=BLOCK),
    )
    attend = functools.partial(blockwise_attention, mask=mask)
    want = functools.partial(reference_attention, mask=whole)
    arrays = q, k, v, weights
    assert_close(out_and_gradients(attend, *arrays), out_and_gradients(want, *arrays))
    tiles = _Blocks(q, k, mask).tiles()
    assert int(tiles.number) == holds_a_pair(whole).sum()


def holds_a_pair(mask):
    """bool `[heads, blocks, blocks]`: tiles in which any row of the batch has one."""
    tokens, keys = mask.layout.num_tokens
    seen = np.asarray(dense_mask(mask, tokens, keys))
    seen = seen.reshape(*seen.shape[:2], -1, BLOCK, keys // BLOCK, BLOCK)
    return seen.any(axis=(0, 3, 5))


@pytest.mark.parametrize("window", [None, 6])
def test_where_positions_decide_the_order_of_tokens_hides_no_tile(window):
    """Those above the diagonal hold pairs, and those that are far from it."""
    positions = jax.tree.map(jnp.asarray, SHUFFLED)
    mask = Mask(causal=True, window=window, layout=FULL, **positions)
    _, arrays = problem("fixed")
    tiles = _Blocks(*arrays[:2], mask).tiles()
    computed = np.zeros((BLOCKS, BLOCKS), bool)
    computed[tiles.q[: tiles.number], tiles.kv[: tiles.number]] = True
    (holds,) = holds_a_pair(mask)
    assert np.triu(holds, 1).any() and np.tril(holds, -3).any()
    assert not (holds & ~computed).any()


@pytest.mark.parametrize("layout", slow_but_for([UNEVEN], [FIXED, UNEVEN]))
def test_tiles_of_documents_that_do_not_meet_are_not_computed(layout):
    """Those that a query of any row sees, forward and backward, and no others."""
    mask = Mask(causal=True, layout=layout, **jax.tree.map(jnp.asarray, PACKED))
    holds = holds_a_pair(mask)
    assert 0 < holds.sum() < sum(map(len, layout.tiles(causal=True)))
    _, arrays = problem("fixed")
    tiles = _Blocks(*arrays[:2], mask).tiles()
    assert int(tiles.number) == holds.sum()
    calls = []

    def counted(function):
        def call(*arrays, mask, scale=None):
            jax.debug.callback(lambda x: calls.append(len(x)), arrays[0][:, 0, 0, 0])
            return function(*arrays, mask=mask, scale=scale)

        return call

    forward, gradients = map(counted, PARTS["blockwise"][:2])
    parts = Parts(forward, gradients).by_layout()
    attend = functools.partial(attention_of(parts), mask=mask)
    out_and_gradients(attend, *arrays)
    jax.effects_barrier()
    # A tile is a row of a call for every row of the batch.
    assert sum(calls) == 2 * B * holds.sum()


def program_of(layout, *, packed=False):
    tokens, _ = layout.num_tokens
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, H), jnp.float32) for n in (N, K))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32) if packed else None

    def total(q, k, v, ids):
        mask = Mask(causal=True, layout=layout, q_segment_ids=ids, kv_segment_ids=ids)
        return blockwise_attention(q, k, v, mask=mask).sum()

    return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, ids).compile()


@pytest.mark.parametrize("num_heads", [1, N])
def test_flops_are_those_of_the_tiles(num_heads):
    """Of the compiled program: two products a tile forward, five backward."""
    num_blocks, block = 64, 32
    for local in (2, 8, 32):
        layout = fixed(
            num_blocks, block_tokens=block, local_blocks=local, num_heads=num_heads
        )
        module = parse(program_of(layout).as_text())
        entry = module.computations[module.entry]
        flops = sum(matmul_flops(module, entry, each) for each in entry.instructions)
        tiles = layout.blocks.sum() * (N // num_heads)
        wanted = 7 * 2 * tiles * block**2 * H
        assert wanted <= flops <= 1.02 * wanted, flops / wanted


def test_a_program_says_how_many_steps_documents_may_leave():
    """Of the loops over tiles, whose trips it does not know, forward and backward."""
    layout = fixed(8, block_tokens=32, local_blocks=2)
    module = parse(program_of(layout, packed=True).as_text())
    found = [
        STEPS.search(each.op_name)
        for _, each in module.top_level()
        if each.opcode == "while" and each.name in module.unknown_trips
    ]
    steps = -(-layout.blocks.sum() // 2)  # of two tiles
    assert [x.groups() for x in found if x] == [(str(steps), "1")] * 2


def test_memory_is_of_the_tokens_and_the_tiles():
    def temp_bytes(num_blocks):
        layout = fixed(num_blocks, block_tokens=32, local_blocks=4)
        return program_of(layout).memory_analysis().temp_size_in_bytes

    assert temp_bytes(256) < 4.2 * temp_bytes(64)


def test_layers_in_a_scan_make_nothing_of_all_tiles():
    """What follows from the layout alone is not made before the scan, for all steps of
    the loop over tiles at once: the largest array is of what layers keep."""
    layout = fixed(32, block_tokens=64, local_blocks=4)
    tokens, _ = layout.num_tokens
    x = jax.ShapeDtypeStruct((1, tokens, N, H), jnp.float32)
    mask = Mask(causal=True, layout=layout)

    @jax.checkpoint
    def layer(x, _):
        return blockwise_attention(x, x, x, mask=mask), None

    def total(x):
        return jax.lax.scan(layer, x, length=3)[0].sum()

    assert max(sizes(jax.make_jaxpr(jax.grad(total))(x).jaxpr)) == 3 * x.size


def sizes(jaxpr):
    """Of every array that a program makes."""
    for each in jaxpr.eqns:
        yield from (made.aval.size for made in each.outvars)
        for inner in jax.tree.leaves(list(each.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from sizes(inner)
