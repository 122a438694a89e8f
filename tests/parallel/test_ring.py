"""Ring attention is the dense oracle's, forward and every gradient, and sends R - 1
blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mosaic_stand_in import H100
from slow import slow_but_for
from strategy_cases import (
    MASKS,
    POSITIONS,
    SMALL_TILES,
    TOLERANCE,
    B,
    H,
    T,
    assert_close,
    collectives,
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

from ulysses_jax import attend as attend_module
from ulysses_jax import ulysses_attention
from ulysses_jax.attend import attend
from ulysses_jax.attention import select
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.parts import Parts
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.attention.select import PARTS
from ulysses_jax.parallel import ring as ring_module
from ulysses_jax.parallel.bytes import received_bytes
from ulysses_jax.parallel.hybrid import hybrid


@pytest.mark.parametrize(
    "heads, ring, zigzag",
    slow_but_for(
        [((6, 2), 8, True), ((7, 7), 4, False), ((4, 4), 2, True), ((6, 2), 4, True)],
        [(4, 4), (6, 2), (7, 7)],
        [2, 4, 8],
        [False, True],
    ),
)
def test_equals_the_oracle(heads, ring, zigzag):
    got = spread_results("ring", "causal", *heads, zigzag=zigzag, ring=ring)
    assert_close(got, oracle("causal", *heads))


@pytest.mark.parametrize(
    "mask, zigzag",
    slow_but_for(
        [("window", True)], [name for name in MASKS if name != "causal"], [False, True]
    ),
)
def test_masks_over_several_hops(mask, zigzag):
    got = spread_results("ring", mask, 4, 2, zigzag=zigzag, ring=4)
    assert_close(got, oracle(mask, 4, 2))


@pytest.mark.parametrize("zigzag", [False, True])
def test_a_window_over_more_members_than_it_reaches(zigzag):
    """In zigzag order three members on each side, and a hop over the one opposite."""
    got = spread_results("ring", "window", 4, 2, zigzag=zigzag, ring=8)
    assert_close(got, oracle("window", 4, 2))


def test_a_ring_of_one_sends_nothing():
    mesh, mask = mesh_of(ring=1), MASKS["segments"]
    attention = functools.partial(hybrid, mesh=mesh, mask=mask, parts=SMALL_TILES)
    got = out_and_gradients(attention, *inputs(4, 2))
    assert_close(got, oracle("segments", 4, 2))
    text = jax.jit(attention).lower(*inputs(4, 2)[:3]).compile().as_text()
    assert "collective-permute" not in text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_under_checkpoint_and_scan_with_other_axes(axis_type):
    mesh = mesh_of(axis_type, data=2, ring=2, tensor=2)
    q, k, v, weights = inputs(4, 4)

    def three_layers(attention, q, k, v):
        @jax.checkpoint
        def layer(x, _):
            return x + attention(x, k, v), None

        return jax.lax.scan(layer, q, None, length=3)[0]

    dense = functools.partial(reference_attention, mask=Mask(causal=True))
    want = out_and_gradients(functools.partial(three_layers, dense), q, k, v, weights)
    with jax.set_mesh(mesh):
        if axis_type == AxisType.Explicit:
            put = NamedSharding(mesh, P("data", "ring", "tensor"))
            q, k, v, weights = (jax.device_put(x, put) for x in (q, k, v, weights))
        spread = functools.partial(three_layers, ulysses_attention)
        got = out_and_gradients(spread, q, k, v, weights)
    assert_close(got, want)


@pytest.mark.parametrize(
    "ring, dtype",
    slow_but_for(
        [(2, jnp.float32), (4, jnp.bfloat16), (8, jnp.float32)],
        [2, 4, 8],
        [jnp.float32, jnp.bfloat16],
    ),
)
def test_hops_and_their_bytes(ring, dtype):
    """k and v hop R - 1 times forward and R - 2 backward, where the first block is
    there; their float32 gradients R - 1 times."""
    forward, both = programs("ring", 8, 2, dtype=dtype, ring=ring)
    hops = ("collective-permute", "ring")
    assert counts(forward) == {hops: ring - 1}
    assert counts(both) == {hops: 3 * ring - 4}
    block = B * (T // ring) * 2 * H
    itemsize = 4  # CPU devices send bfloat16 as float32
    assert sent(forward) == {hops: 2 * (ring - 1) * block * itemsize}
    if dtype == jnp.float32:
        sizes = dict(tokens=T, num_heads=8, num_kv_heads=2, head_size=H)
        formula = received_bytes("ring", **sizes, itemsize=4, ring=ring, seq=1)
        there, back = formula[hops]
        assert sent(forward)[hops] == B * there
        assert sent(both)[hops] == B * (there + back)


# 32 tokens over 4: blocks of 8, half-blocks of 4; and the steps that are left.
WINDOWS = {
    "none but its own": (Mask(causal=True, window=1), False, ()),
    "the one before": (Mask(causal=True, window=9), False, (1,)),
    "two before": (Mask(causal=True, window=10), False, (1, 2)),
    "both sides": (Mask(window=9), False, (1, 3)),
    "both sides in zigzag order": (Mask(causal=True, window=5), True, (1, 3)),
    "all": (Mask(causal=True, window=6), True, (1, 2, 3)),
    "positions of the caller's": (
        Mask(causal=True, window=2, **POSITIONS),
        False,
        (1, 2, 3),
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_only_blocks_that_a_window_shows_are_sent(name):
    mask, zigzag, steps = WINDOWS[name]
    ring, n = 4, len(steps)
    forward, both = programs("ring", 8, 2, mask=mask, zigzag=zigzag, ring=ring)
    hops = ("collective-permute", "ring")
    assert counts(forward) == ({hops: n} if n else {})
    # Of two hops XLA sees in this program, of both passes, that the second is the same.
    shared = n == 2
    assert counts(both) == ({hops: 3 * n - 1 - shared} if n else {})
    sizes = dict(tokens=T, num_heads=8, num_kv_heads=2, head_size=H, itemsize=4)
    if mask.causal and mask.q_positions is None:
        order = dict(window=mask.window, zigzag=zigzag)
        formula = received_bytes("ring", **sizes, ring=ring, seq=1, **order)
        there, back = (B * each for each in formula[hops])
        assert sent(forward).get(hops, 0) == there
        block = B * (T // ring) * 2 * 2 * H * 4
        assert sent(both).get(hops, 0) == there + back - shared * block


@pytest.mark.parametrize("zigzag", [False, True])
def test_the_order_of_tokens_is_computed(zigzag):
    """A program of a million tokens is no longer than one of a thousand."""
    mesh, mask = mesh_of(ring=4), Mask(causal=True, window=7)

    def length(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, H), jnp.float32)
        attention = functools.partial(attend, mesh=mesh, mask=mask, zigzag=zigzag)
        return len(jax.jit(attention).lower(x, x, x).as_text())

    assert length(2**20) < 1.1 * length(2**10)


def test_half_blocks_that_are_not_whole_are_refused():
    x = jnp.zeros((1, 12, 1, H))
    with pytest.raises(ValueError, match="12 tokens are not 8 half-blocks .* to 16"):
        attend(x, x, x, mesh=mesh_of(ring=4), mask=Mask(causal=True), zigzag=True)


@pytest.mark.parametrize(
    "strategy, degrees",
    [
        ("ring", dict(ring=4)),
        ("hybrid", dict(ring=4, seq=2)),
        ("all_gather", dict(seq=4)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "tokens, zigzag, name",
    [
        (32, False, "cudnn"),
        (32, True, "cudnn"),
        (24, False, "cudnn"),
        (24, True, "mosaic"),  # half-blocks of 3, which cuDNN does not pull back
        (12, False, "mosaic"),  # blocks of 3
    ],
)
def test_an_attention_is_chosen_for_what_it_is_called_on(
    monkeypatch, strategy, degrees, tokens, zigzag, name
):
    def chosen(*_, parts, **options):
        return parts

    monkeypatch.setattr(attend_module, "device_of", lambda mesh: H100)
    monkeypatch.setattr(select, "tokamax_lacks", lambda: None)
    monkeypatch.setitem(attend_module.BY_BLOCKS, strategy, chosen)
    x = jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.bfloat16)
    parts = attend(
        x,
        x,
        x,
        mesh=mesh_of(**degrees),
        mask=Mask(causal=True),
        strategy=strategy,
        zigzag=zigzag,
    )
    assert parts is PARTS[name]


def test_what_a_causal_mask_hides_is_not_computed():
    """In the sequence's own order the last member does most; in zigzag order all do
    the same; together they do what is visible, and no more."""
    ring, block = 4, T // 4
    own = block * (block + 1) // 2
    assert pairs_computed("ring", zigzag=False, ring=ring) == [
        own + member * block**2 for member in range(ring)
    ]
    zigzag = pairs_computed("ring", zigzag=True, ring=ring)
    assert zigzag == [own + (ring - 1) * block**2 // 2] * ring
    assert sum(zigzag) == T * (T + 1) // 2


def test_rematerialisation_keeps_out_and_logsumexp_and_nothing_of_a_step():
    mesh, mask = mesh_of(ring=4), Mask(causal=True)
    q, k, v, weights = inputs(4, 2)

    def program(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(q, k, v):
            out = attend(jnp.sin(q), k, v, mesh=mesh, mask=mask)
            return jnp.sin(out)

        def weighted(q, k, v):
            return jnp.sum(layer(q, k, v) * weights)

        kept = jax.eval_shape(lambda *x: jax.vjp(layer, *x)[1], q, k, v)
        step = jax.value_and_grad(weighted, argnums=(0, 1, 2))
        hops = sum(each.count for each in collectives(step, mesh, q, k, v))
        return sorted(x.size for x in jax.tree.leaves(kept) if x.size), hops

    policies = jax.checkpoint_policies
    names = ("attention_out", "attention_logsumexp")
    kept, attention = program(policies.save_only_these_names(*names))
    arguments = [q.size, k.size, v.size]
    statistics = [q.size, B * 4 * T]
    assert kept == sorted(arguments + statistics)
    kept, full = program(policies.nothing_saveable)
    assert kept == sorted(arguments)

    # Forward 3, backward 2 and 3. With out and logsumexp kept, one hop of the second
    # forward round is left: the block that the backward pass starts with.
    assert attention == 3 + 1 + 2 + 3
    assert full == 3 + 3 + 2 + 3


def faulty(monkeypatch, fault):
    parts, options = SMALL_TILES, {}
    if fault == "a skipped rotation":
        monkeypatch.setattr(ring_module, "_hop", lambda blocks, x, members: x)
    elif fault == "a wrong scale":
        parts = Parts(
            functools.partial(rescaled, parts.forward),
            functools.partial(rescaled, parts.gradients),
        )
    elif fault == "an unmerged block":
        parts = parts._replace(join=lambda old, new: new)
    elif fault == "weights of one":
        parts = parts._replace(join=lambda a, b: (a[0] + b[0], b[1]))
    else:
        assert fault == "zigzag of the wrong tokens"
        options = dict(zigzag=True)
    return functools.partial(
        attend,
        mesh=mesh_of(ring=4),
        mask=Mask(causal=True),
        attention=parts,
        **options,
    )


def rescaled(function, *args, mask, scale):
    return function(*args, mask=mask, scale=1.01 * H**-0.5)


@pytest.mark.parametrize(
    "fault",
    [
        "a skipped rotation",
        "a wrong scale",
        "an unmerged block",
        "weights of one",
        "zigzag of the wrong tokens",
    ],
)
def test_faults_are_seen(monkeypatch, fault):
    got = out_and_gradients(faulty(monkeypatch, fault), *inputs(4, 2))
    want = oracle("causal", 4, 2)
    wrong = [
        np.abs(a - b).max() > 10 * TOLERANCE for a, b in zip(got, want, strict=True)
    ]
    assert wrong[0] and any(wrong[1:])


def test_gradients_that_do_not_travel_are_seen(monkeypatch):
    """In bfloat16 the gradients alone are float32 on their way."""
    hop = ring_module._hop
    monkeypatch.setattr(
        ring_module,
        "_hop",
        lambda blocks, x, members: (
            x if x is None or x.dtype == jnp.float32 else hop(blocks, x, members)
        ),
    )
    arrays = inputs(4, 2, dtype=jnp.bfloat16)
    mask = Mask(causal=True)
    attention = functools.partial(attend, mesh=mesh_of(ring=4), mask=mask)
    dense = functools.partial(reference_attention, mask=mask)
    got, want = (out_and_gradients(f, *arrays) for f in (attention, dense))
    wrong = [np.abs(a - b).max() > 0.5 for a, b in zip(got, want, strict=True)]
    assert wrong == [False, False, True, True]


def test_bad_input_is_refused_with_numbers():
    q, k, v, _ = inputs(4, 2)
    mesh = mesh_of(ring=2, seq=2)
    run = functools.partial(attend, q, k, v, mesh=mesh)
    with pytest.raises(
        ValueError,
        match="strategy ring .* ring=2, seq=2: use ring=4, seq=1 or ring=2, seq=1, or "
        "strategy hybrid",
    ):
        run(mask=Mask(causal=True), strategy="ring")
    with pytest.raises(ValueError, match="ring=1, seq=4: use ring=4, seq=1 or ring=2"):
        attend(q, k, v, mesh=mesh_of(seq=4), mask=Mask(causal=True), strategy="ring")
    with pytest.raises(ValueError, match="zigzag .* 2 members, .* not causal"):
        run(mask=Mask(), zigzag=True)
    with pytest.raises(ValueError, match="a function, or use ring=1, seq=4"):
        ulysses_attention(q, k, v, mesh=mesh, attention=reference_attention)
    with pytest.raises(ValueError, match="Parts, but .* whole rows"):
        ulysses_attention(q, k, v, mesh=mesh_of(seq=2), attention=PARTS["blockwise"])
    with pytest.raises(ValueError, match="reference cannot attend to some keys"):
        run(mask=Mask(causal=True), attention="reference")
    with pytest.raises(ValueError, match="call seq_to_heads and heads_to_seq there"):
        with jax.set_mesh(mesh_of(ring=2)):
            spec = P(None, "ring")
            jax.shard_map(
                lambda x: ulysses_attention(x, x, x), in_specs=spec, out_specs=spec
            )(q)
