"""A model with sparse layers, on every mesh, whole and in pieces, is the dense one."""

import dataclasses
import functools
import re

import pytest
from memory_cases import assert_same, loss_and_gradients, make_config

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict

SPARSE = dict(
    sparse="fixed",
    sparse_block_tokens=7,
    sparse_local_blocks=2,
    sparse_by_head=True,
    num_layers=1,
)
UNEVEN = dict(num_heads=6, num_kv_heads=2)  # keys are repeated, 8 query slots
PIECES = dict(sequence_chunk_tokens=7)


@functools.cache
def dense(**shape):
    model = SPARSE | dict(attention="reference") | shape
    return loss_and_gradients(make_config("llama", model=model, remat="none"))


@pytest.mark.parametrize(
    "shape, degrees, model, memory",
    [
        ({}, {}, {}, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({}, dict(seq=2, tensor=2), {}, PIECES),
                ({}, {}, dict(num_layers=2, pattern=("sparse", "full")), {}),
                (UNEVEN, dict(seq=4), {}, PIECES),
                ({}, dict(seq=2, tensor=2), {}, dict(head_chunks=2, remat="attention")),
                ({}, dict(data=2, ring=2, seq=2), {}, dict(remat="attention")),
                ({}, dict(fsdp=2, seq=2, tensor=2), {}, PIECES | dict(head_chunks=2)),
                (UNEVEN, dict(seq=4, tensor=2), {}, PIECES | dict(remat="attention")),
                ({}, dict(data=2, seq=4), dict(strategy="all_gather"), {}),
                ({}, dict(seq=2, tensor=2), dict(strategy="megatron"), {}),
            )
        ),
    ],
    ids=str,
)
def test_same_loss_and_gradients(shape, degrees, model, memory):
    config = make_config("llama", degrees, model=SPARSE | shape | model, **memory)
    kinds = {k: v for k, v in model.items() if k != "strategy"}
    assert_same(loss_and_gradients(config), dense(**shape, **kinds))


@pytest.mark.parametrize(
    "degrees, message",
    [
        ({}, "16 does not divide the 56 tokens of a sequence: use a sequence of 64 "),
        (dict(ring=4), "divide the 56 tokens of a sequence in 4 parts: use a sequence"),
    ],
    ids=str,
)
def test_blocks_that_are_cut_are_refused(degrees, message):
    model = SPARSE | dict(sparse_block_tokens=16)
    with pytest.raises(ValueError, match=message) as error:
        make_config("llama", degrees, model=model)
    fits = re.search(r"of (\d+) tokens, or blocks of (\d+)", str(error.value))
    assert fits
    tokens, blocks = map(int, fits.groups())
    make_config("llama", degrees, model=model, tokens=tokens)
    make_config("llama", degrees, model=SPARSE | dict(sparse_block_tokens=blocks))


def test_keys_are_not_gathered_where_parts_would_cut_blocks():
    """As they would be, in zigzag order, of one key head."""
    model = dict(num_kv_heads=1, zigzag=None)
    assert make_config("llama", dict(seq=2), model=model).model.strategy == "all_gather"
    sparse = make_config("llama", dict(seq=2), model=SPARSE | model)
    assert sparse.model.strategy == "ulysses"


def test_a_chunk_that_cuts_blocks_is_refused():
    model = SPARSE | dict(sparse_block_tokens=4)
    with pytest.raises(ValueError, match="4 does not divide .*chunk_tokens 7.*of 1,"):
        make_config("llama", dict(seq=2), model=model, **PIECES)


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(pattern=["sparse"]), "model.sparse does not say which blocks"),
        (dict(sparse="fixed", pattern=["full"]), "has none: put sparse into"),
        (dict(sparse="fixed", window=8), "say in model.pattern which come when"),
        (
            dict(sparse="fixed", sparse_global_blocks=3),
            "not divide model.sparse_l",
        ),
        (dict(sparse="strided", sparse_by_head=True), "not of strided: leave it out"),
        (dict(sparse="other"), "model.sparse must be 'fixed' | 'strided'"),
    ],
    ids=str,
)
def test_what_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        complete(from_dict(configs.Config, dict(model=model)), name="test")


@pytest.mark.parametrize("sparse", ["fixed", "strided", "longformer", "bigbird"])
def test_every_layout_has_a_name(sparse):
    values = dict(model=dict(sparse=sparse), training=dict(sequence_tokens=4096))
    config = complete(from_dict(configs.Config, values), name="test")
    config = placement.place(config, dict(dataclasses.asdict(configs.Mesh(data=1))))
    assert set(config.model.kinds()) == {"sparse"}
