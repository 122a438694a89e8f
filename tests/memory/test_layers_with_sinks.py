"""Sinks and a gate: on every mesh, whole and in pieces, as on one device."""

import functools

import pytest
from memory_cases import assert_same, loss_and_gradients, make_config

OWN = dict(sinks=True, attention_gate=True)
UNEVEN = dict(num_heads=6, num_kv_heads=2)  # keys are repeated, 8 query slots
PIECES = dict(sequence_chunk_tokens=7)


@functools.cache
def one_device(**shape):
    config = make_config("llama", model=dict(OWN, **shape), remat="none")
    return loss_and_gradients(config)


@pytest.mark.parametrize(
    "shape, degrees, model, memory",
    [
        (UNEVEN, dict(seq=4), {}, PIECES),
        ({}, dict(data=2, ring=2, seq=2), {}, dict(remat="attention")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({}, dict(fsdp=2, seq=2, tensor=2), {}, PIECES | dict(head_chunks=2)),
                ({}, {}, {}, PIECES | dict(remat="attention")),
                (UNEVEN, dict(seq=4, tensor=2), {}, PIECES | dict(remat="attention")),
                ({}, dict(data=2, seq=4), {}, dict(head_chunks=2, remat="full")),
                ({}, dict(data=2, seq=4), dict(strategy="all_gather"), {}),
                ({}, dict(seq=2, tensor=2), dict(strategy="megatron"), {}),
                ({}, dict(ring=4), {}, dict(remat="full")),
            )
        ),
    ],
    ids=str,
)
def test_same_loss_and_gradients(shape, degrees, model, memory):
    model = dict(OWN, **shape, **model)
    config = make_config("llama", degrees, model=model, **memory)
    assert_same(loss_and_gradients(config), one_device(**shape))
