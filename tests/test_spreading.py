"""Formulas, the choice by them, and meshes that a strategy does not fit."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.spreading import (
    STRATEGIES,
    check_strategy,
    num_members,
    received_bytes,
    seen_steps,
    strategy_of,
    total_bytes,
    zigzag_index,
    zigzag_order,
)
from ulysses_jax.training.preflight import architecture


def bytes_of(strategy, *, heads=32, kv_heads=8, ring=1, seq=1):
    sizes = dict(num_heads=heads, num_kv_heads=kv_heads, head_size=128, itemsize=2)
    sizes["width"] = heads * 128
    return received_bytes(strategy, tokens=2**20, **sizes, ring=ring, seq=seq)


def test_the_table_of_forward_bytes():
    """As the facts have it: g = N/K, mu = (P-1)/P, in units of T D e."""
    unit, g, p = 2**20 * 32 * 128 * 2, 4, 8
    mu = (p - 1) / p

    def forward(strategy, **degrees):
        return sum(there for there, _ in bytes_of(strategy, **degrees).values()) / unit

    assert forward("ulysses", seq=8) == (2 + 2 / g) / p * mu
    # P > K: each KV head repeated P/K times, never to N.
    assert forward("ulysses", seq=16) == (2 / 16 + 2 / 32) * 15 / 16
    assert forward("ring", ring=8) == forward("all_gather", seq=8) == 2 / g * mu
    assert forward("megatron", seq=8) == 4 * mu
    for r, u in ((2, 4), (4, 2)):
        by_hand = ((2 + 2 / g) * (u - 1) / u + 2 / g * (r - 1)) / p
        assert forward("hybrid", ring=r, seq=u) == by_hand


def test_backward_gradients_are_float32():
    block = 2 * 8 * 128 * 2**20 / 8
    ((there, back),) = bytes_of("ring", ring=8).values()
    assert (there, back) == (7 * block * 2, 6 * block * 2 + 7 * block * 4)
    gathered = bytes_of("all_gather", seq=8)
    assert gathered["reduce-scatter", "seq"] == (
        0,
        2 * gathered["all-gather", "seq"][0],
    )


@pytest.mark.parametrize("g, than_ring, than_gather", [(1, 2, 2), (4, 3, 4), (8, 5, 7)])
def test_crossover(g, than_ring, than_gather):
    """The fewest devices from which Ulysses receives less; P <= K."""

    def total(strategy, **degrees):
        heads = dict(heads=64 * g, kv_heads=64)
        return total_bytes(bytes_of(strategy, **heads, **degrees))

    counts = range(2, 20)
    rings = [p for p in counts if total("ulysses", seq=p) < total("ring", ring=p)]
    gathers = [
        p for p in counts if total("ulysses", seq=p) < total("all_gather", seq=p)
    ]
    assert (rings[0], gathers[0]) == (than_ring, than_gather)
    assert than_gather == int(2 / 3 * (g + 1)) + 1


def placed(*, memory=None, data=1, fsdp=1, ring=1, seq=1, tensor=1, tokens=64, **model):
    config = configs.Config(
        model=configs.Model(**dict(num_heads=8, num_kv_heads=2) | model),
        training=configs.Training(batch_size=data * fsdp, sequence_tokens=tokens),
        memory=configs.Memory(**memory or {}),
    )
    config = complete(config, name="test")
    degrees = dict(data=data, fsdp=fsdp, ring=ring, seq=seq, tensor=tensor)
    return placement.place(config, degrees)


@pytest.mark.parametrize(
    "options, strategy, zigzag",
    [
        (dict(data=8), "ulysses", False),
        (dict(seq=8), "ulysses", False),
        (dict(ring=8), "ring", True),
        (dict(ring=2, seq=4), "hybrid", True),
        (dict(seq=2), "all_gather", True),  # g = 4
        (dict(seq=2, num_kv_heads=8), "ulysses", False),
        (dict(seq=2, memory=dict(head_chunks=2)), "ulysses", False),
        (dict(seq=2, window=8), "ulysses", False),
        (dict(seq=2, window=8, pattern=("full", "window")), "ulysses", False),
        (dict(seq=2, pattern=("full", "full")), "all_gather", True),
        (dict(seq=2, attention="reference"), "ulysses", False),
        (dict(seq=4, strategy="all_gather"), "all_gather", True),
        (dict(ring=4, zigzag=False), "ring", False),
    ],
    ids=str,
)
def test_auto_takes_what_the_mesh_carries_and_the_fewest_bytes(
    options, strategy, zigzag
):
    model = placed(**options).model
    assert (model.strategy, model.zigzag) == (strategy, zigzag)


@pytest.mark.parametrize(
    "options, tokens",
    [
        (dict(seq=4, tokens=65), 68),
        (dict(ring=4, tokens=65), 80),  # eight half-blocks of ten
        (dict(ring=4, tokens=65, zigzag=False), 72),  # four blocks of eighteen
        (dict(ring=2, seq=3, tokens=65), 72),  # lcm(6, 8)
        (dict(seq=2, tokens=65), 72),  # all_gather
    ],
    ids=str,
)
def test_padding_to_half_blocks(options, tokens):
    assert placed(**options).padded_tokens() == tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ring, seq", [(1, 1), (1, 4), (4, 1), (2, 4), (3, 5)])
def test_a_refusal_names_two_meshes_that_work(strategy, ring, seq):
    try:
        check_strategy(strategy, ring, seq)
    except ValueError as error:
        text = str(error)
    else:
        assert strategy in (strategy_of(ring, seq), "all_gather", "megatron")
        return
    assert f"strategy {strategy} " in text and f"ring={ring}, seq={seq}: use " in text
    words = text.split(": use ")[1].split(", or strategy ")[0].split(" or ")
    assert len(set(words)) == 2
    for words_of_mesh in words:
        r, s = (int(part.split("=")[1]) for part in words_of_mesh.split(", "))
        check_strategy(strategy, r, s)
        # Of the devices that are there, but where so few carry no two of them.
        assert ring * seq % (r * s) == 0 or ring * seq < 8 and r * s <= 8 * ring * seq


def test_members():
    found = {name: num_members(name, 2, 4) for name in STRATEGIES}
    assert found == {
        "ulysses": 1,
        "ring": 2,
        "hybrid": 2,
        "all_gather": 4,
        "megatron": 1,
    }


REFUSALS = [
    (
        dict(tensor=2, seq=4, num_kv_heads=4),
        "mesh.tensor 2 x mesh.seq 4, and model.num_kv_heads 4 do not divide by 8: "
        "use mesh.fsdp 2, mesh.seq 2, mesh.tensor 2; or mesh.fsdp 2, mesh.seq 4, "
        "mesh.tensor 1; or strategy ulysses",
    ),
    (
        dict(fsdp=2, seq=8, feed_forward_width=28),
        "model.num_kv_heads 2, model.feed_forward_width 28 do not divide by 8: use "
        "mesh.fsdp 8, mesh.seq 2, mesh.tensor 1; or strategy ulysses",
    ),
    (dict(seq=8, num_kv_heads=1), "do not divide by 8: use strategy ulysses"),
    (
        dict(ring=2, seq=2),
        "megatron .* ring=2, seq=2: use ring=1, seq=4 or ring=1, seq=2",
    ),
    (
        dict(seq=2, memory=dict(sequence_chunk_tokens=8)),
        "sequence_chunk_tokens cuts up the strategy ulysses, not megatron: use .* or "
        "no chunks",
    ),
    (
        dict(seq=2, memory=dict(head_chunks=2)),
        "head_chunks 2 .* megatron exchanges no heads",
    ),
]


@pytest.mark.parametrize("options, message", REFUSALS, ids=str)
def test_what_megatron_cannot_cut_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        placed(strategy="megatron", **options)
    fits = re.search(r"use mesh.fsdp (\d+), mesh.seq (\d+), mesh.tensor (\d+)", message)
    if fits:
        names = ("fsdp", "seq", "tensor")
        degrees = dict(zip(names, map(int, fits.groups()), strict=True))
        before = [options.get(name, 1) for name in names]
        assert math.prod(before) == math.prod(degrees.values())
        placed(strategy="megatron", **options | degrees)


def test_the_bytes_of_megatron_need_a_width():
    sizes = dict(num_heads=8, num_kv_heads=2, head_size=8, itemsize=2)
    with pytest.raises(ValueError, match="give their width"):
        received_bytes("megatron", tokens=64, ring=1, seq=2, **sizes)


@pytest.mark.parametrize(
    "options",
    [dict(seq=4), dict(seq=2, strategy="megatron"), dict(strategy="ulysses")],
    ids=str,
)
def test_zigzag_order_without_members_is_refused(options):
    with pytest.raises(ValueError, match="model.zigzag true .* has none") as error:
        placed(zigzag=True, **options)
    meshes = re.findall(r"mesh.ring (\d+), mesh.seq (\d+)", str(error.value))[1:]
    assert len(set(meshes)) == 2
    for ring, seq in meshes:
        assert placed(zigzag=True, ring=int(ring), seq=int(seq)).model.zigzag


def test_a_checkpoint_goes_on_under_another_strategy():
    one, other = (placed(**degrees).model for degrees in (dict(seq=8), dict(ring=8)))
    assert one != other
    assert architecture(one) == architecture(other)
    assert "strategy" in dataclasses.asdict(one)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "queries, keys, members", [(32, 32, 4), (24, 48, 3), (48, 16, 4)]
)
def test_steps_in_which_a_window_shows_a_key(queries, keys, members, causal, zigzag):
    """Against every pair of tokens."""
    order = dict(causal=causal, zigzag=zigzag)
    q, k = (zigzag_order(n, members if zigzag else 1) for n in (queries, keys))
    away = q[:, None] - k
    for window in range(1, max(queries, keys) + 2):
        seen = (np.abs(away) < window) & ((away >= 0) | (not causal))
        blocks = seen.reshape(members, queries // members, members, keys // members)
        i, j = np.nonzero(blocks.any(axis=(1, 3)))
        want = tuple(sorted({int(step) for step in (i - j) % members} - {0}))
        assert seen_steps(queries, keys, members, window=window, **order) == want


def test_steps_without_a_window():
    order = dict(causal=True, zigzag=True)
    assert seen_steps(32, 32, 4, window=None, **order) == (1, 2, 3)
    assert seen_steps(32, 32, 1, window=3, **order) == ()


def test_zigzag_order_is_the_same_in_a_program():
    for tokens, members in ((40, 1), (32, 4), (60, 5)):
        index = jax.jit(zigzag_index, static_argnums=(1, 2))
        got = index(jnp.arange(tokens, dtype=jnp.int32), tokens, members)
        np.testing.assert_array_equal(got, zigzag_order(tokens, members))
        assert got.dtype == jnp.int32


@pytest.mark.parametrize(
    "degrees, message",
    [
        (
            dict(ring=2, seq=4),
            "head_chunks 3 does not divide what a device has of 8 key/value heads / "
            "seq 4 = 2 key/value heads: over ring .* use one of .1, 2.",
        ),
        (
            dict(ring=2, seq=2, tensor=2),
            "8 key/value heads / tensor 2 / seq 2 = 2 key/value heads: over",
        ),
        (
            dict(ring=2, seq=8, tensor=2),
            "8 key/value heads / tensor 2 / seq 8 = 1 key/value heads, rounded up: ",
        ),
    ],
    ids=str,
)
def test_a_refusal_shows_its_sum(degrees, message):
    with pytest.raises(ValueError, match=message):
        placed(num_kv_heads=8, memory=dict(head_chunks=3), **degrees)


def test_a_vocabulary_that_tensor_does_not_divide():
    """Refused, with remedies that work."""
    with pytest.raises(ValueError) as refusal:
        placed(fsdp=2, tensor=2, vocab_size=50257)
    assert str(refusal.value) == (
        "model.vocab_size 50257 does not divide over mesh.tensor 2: use mesh.tensor 1, "
        "mesh.fsdp 4; or a vocab_size of 50258, where no token has the last ids; "
        "training.batch_size must divide over mesh.data x mesh.fsdp"
    )
    placed(fsdp=4, vocab_size=50257)
    placed(fsdp=2, tensor=2, vocab_size=50258)


def test_names_of_no_strategy():
    sizes = dict(tokens=8, num_heads=2, num_kv_heads=2, head_size=4, itemsize=2)
    for call in (
        lambda name: check_strategy(name, 1, 2),
        lambda name: num_members(name, 1, 2),
        lambda name: received_bytes(name, **sizes, ring=1, seq=2),
    ):
        with pytest.raises(ValueError, match="no strategy 'Ring': use one of 'ulysses"):
            call("Ring")
