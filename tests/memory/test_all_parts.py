"""Every part of the memory stack at once, and heads in groups, are the plain path."""

import functools

import pytest
from memory_cases import MESHES, assert_same, loss_and_gradients, make_config
from slow import slow_but_for

HEADS = dict(num_heads=16, num_kv_heads=8)
# By degree of seq: chunks and tiles of a device's 56, 28, 14, 7 tokens of four rows.
CHUNKS = {1: 8, 2: 7, 4: 7, 8: 1}


@functools.cache
def plain(*, packed):
    config = make_config("llama", model=HEADS, remat="none")
    return loss_and_gradients(config, packed=packed)


@pytest.mark.parametrize(
    "seq, packed", slow_but_for([(4, True)], CHUNKS, [True, False])
)
def test_all_at_once(seq, packed):
    config = make_config(
        "llama",
        dict(seq=seq),
        model=HEADS,
        remat="attention",
        offload=("inputs", "attention", "keys", "optimizer", "parameters"),
        offload_fraction=0.5,
        loss_tile_tokens=9,
        mlp_tile_tokens=8,
        head_chunks=2,
        sequence_chunk_tokens=CHUNKS[seq],
    )
    got = loss_and_gradients(config, packed=packed)
    assert_same(got, plain(packed=packed))


@pytest.mark.parametrize(
    "mesh_name, remat",
    slow_but_for(
        [("fsdp 2, seq 2, tensor 2", "attention")],
        MESHES,
        ["full", "attention"],
    ),
)
def test_head_chunks_alone(mesh_name, remat):
    config = make_config(
        "llama", MESHES[mesh_name], model=HEADS, head_chunks=2, remat=remat
    )
    assert_same(loss_and_gradients(config), plain(packed=True))
