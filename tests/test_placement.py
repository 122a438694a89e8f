"""A config on its mesh: the strategy that it takes, and what does not divide."""

import dataclasses
import math
import re

import pytest

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.training.preflight import architecture


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
