"""A layer over chunks of tokens is the layer: results, gradients, memory, refusals."""

import math
import re

import jax
import jax.numpy as jnp
import mosaic_stand_in
import numpy as np
import pytest
from memory_cases import (
    MESHES,
    B,
    assert_same,
    compiled,
    loss_and_gradients,
    make_batch,
    make_config,
    mesh_of,
    plain,
)
from slow import slow_but_for

from ulysses_jax.attention import mosaic
from ulysses_jax.attention.select import PARTS
from ulysses_jax.training.state import abstract_state
from ulysses_jax.training.step import abstract_batch, make_train_step
from ulysses_jax.weights.gathered import Gathered
from ulysses_jax.weights.products import project

# Chunks of a device's tokens: 56, 7, 14 and 28 of them.
CHUNKS = dict(zip(MESHES, (8, 1, 7, 4), strict=True))
ALL = dict(
    remat="attention",
    offload=("inputs", "attention", "keys"),
    loss_tile_tokens=9,
    mlp_tile_tokens=9,  # of the 14 tokens of a chunk's two rows
)


@pytest.mark.parametrize(
    ("family", "mesh_name", "packed"),
    [
        ("llama", "one device", True),
        pytest.param("llama", "seq 8", True, marks=pytest.mark.slow),
        pytest.param("llama", "data 2, seq 4", True, marks=pytest.mark.slow),
        pytest.param("llama", "fsdp 2, seq 2, tensor 2", True, marks=pytest.mark.slow),
        ("llama", "seq 8", False),
        pytest.param("gpt", "one device", False, marks=pytest.mark.slow),
        pytest.param("gpt", "fsdp 2, seq 2, tensor 2", True, marks=pytest.mark.slow),
    ],
)
def test_same_loss_and_gradients(family, mesh_name, packed):
    chunk = CHUNKS[mesh_name]
    config = make_config(family, MESHES[mesh_name], sequence_chunk_tokens=chunk)
    want = plain(family, mesh_name, packed=packed)
    assert_same(loss_and_gradients(config, packed=packed), want)


@pytest.mark.parametrize(
    "options",
    slow_but_for([ALL], [dict(remat="none"), dict(remat="attention"), ALL]),
)
@pytest.mark.parametrize("mesh_name", ["data 2, seq 4"])
def test_with_every_rematerialisation(mesh_name, options):
    chunk = CHUNKS[mesh_name]
    options = dict(sequence_chunk_tokens=chunk, **options)
    config = make_config("llama", MESHES[mesh_name], **options)
    assert_same(loss_and_gradients(config), plain("llama", mesh_name))


@pytest.mark.parametrize("window", slow_but_for([8], [7, 8, 20]))
def test_a_window(window):
    """Of a chunk, one more, many."""
    model, mesh, chunk = dict(window=window), dict(seq=2), 7
    config = make_config("llama", mesh, model=model, sequence_chunk_tokens=chunk)
    want = loss_and_gradients(make_config("llama", mesh, model=model, remat="none"))
    assert_same(loss_and_gradients(config), want)


@pytest.mark.parametrize(
    "degrees", slow_but_for([dict(seq=4)], [dict(seq=4), dict(seq=4, tensor=2)])
)
def test_more_devices_than_key_heads(degrees):
    """Keys are repeated, queries are padded to 8 slots."""
    model = dict(num_heads=6, num_kv_heads=2)
    config = make_config("llama", degrees, model=model, sequence_chunk_tokens=7)
    want = loss_and_gradients(make_config("llama", model=model, remat="none"))
    assert_same(loss_and_gradients(config), want)


@pytest.mark.slow
def test_norms_everywhere_and_a_scale():
    """As in Gemma 3: chunks, and groups of heads, of layers of two kinds."""
    model = dict(
        num_kv_heads=4,
        norm="zero_centered_rms",
        post_norms=True,
        query_key_norm=True,
        feed_forward="geglu",
        attention_biases="inputs",
        attention_scale=0.3,
        embedding_scale=4.0,
        pattern=["window", "full"],
        window=8,
        rope=dict(scaling="linear", factor=4.0, window_base=50.0, fraction=0.5),
    )
    degrees = MESHES["fsdp 2, seq 2, tensor 2"]
    want = loss_and_gradients(make_config("llama", {}, model=model, remat="none"))
    options = dict(sequence_chunk_tokens=7, head_chunks=2)
    config = make_config("llama", degrees, model=model, **options)
    assert_same(loss_and_gradients(config), want)


@pytest.mark.slow
def test_a_chunk_longer_than_a_device_has():
    config = make_config("llama", MESHES["seq 8"], sequence_chunk_tokens=1000)
    assert_same(loss_and_gradients(config), plain("llama", "seq 8"))


@pytest.mark.slow
def test_in_bfloat16():
    """Root mean squares of errors, which for whole layers are 0.04 at most, too."""
    model = dict(compute_dtype="bfloat16")
    config = make_config("llama", model=model, sequence_chunk_tokens=8)
    got, want = loss_and_gradients(config), plain("llama", "one device")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.square(a - b).mean() < np.square(0.05 * b).mean()


def num_attended(size, shares):
    """Pairs of a block of queries and one of keys, from the first that holds a key of a
    document of theirs to their own, in any row of a device's, over these shares of the
    batch."""
    ids = make_batch(56, packed=True)["segment_ids"]
    holds = (ids[:, :, None] == ids[:, None]).reshape(shares, -1, 56, 56).any(axis=1)
    holds = holds.reshape(shares, 56 // size, size, 56 // size, size).any(axis=(2, 4))
    return (1 + np.arange(56 // size) - holds.argmax(axis=2)).sum()


@pytest.mark.parametrize(
    "degrees, options, window",
    [
        (dict(data=2, seq=4), {}, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({}, {}, None),
                (dict(seq=2, tensor=2), dict(head_chunks=2), None),
                (dict(seq=2), dict(remat="attention"), 8),
            )
        ),
    ],
    ids=str,
)
def test_documents_through_hoppers_kernels(monkeypatch, degrees, options, window):
    """With plain functions in their place; blocks that hold none of the documents of a
    block of queries are passed over."""
    model = dict(window=window)
    want = plain("llama", "data 2, seq 4")
    if window:
        want = loss_and_gradients(make_config("llama", model=model, remat="none"))
    mosaic_stand_in.use(monkeypatch)
    monkeypatch.setattr(mosaic, "DTYPES", (jnp.float32,))
    monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(mosaic, "TILES_AT_ONCE", 2)
    kernel, calls = PARTS["mosaic"], []

    def gradients(*arrays, mask, scale):
        jax.debug.callback(lambda x: calls.append(x), arrays[0][0, 0, 0, 0])
        return kernel.gradients(*arrays, mask=mask, scale=scale)

    monkeypatch.setitem(PARTS, "mosaic", kernel._replace(gradients=gradients))
    options = dict(sequence_chunk_tokens=7, **options)
    config = make_config("llama", degrees, model=model, **options)
    assert_same(loss_and_gradients(config), want)
    jax.effects_barrier()
    if not window:
        shares = degrees.get("data", 1)
        attended = num_attended(7, shares)
        assert attended < shares * 8 * 9 / 2
        devices = math.prod(degrees.values())
        times = devices // shares * options.get("head_chunks", 1)
        assert len(calls) == 2 * times * attended  # in two layers


def wide(tokens, kind="full", **memory):
    """The program of a model with many heads and a wide feed-forward."""
    model = dict(num_heads=16, head_size=16, feed_forward_width=512, num_kv_heads=1)
    model["pattern"] = (kind,)
    memory = dict(loss_tile_tokens=64) | memory
    return compiled(
        make_config("llama", dict(seq=4), tokens=tokens, model=model, **memory)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_memory_of_a_chunk(kind):
    """What is as wide as the heads or the feed-forward exists of a chunk alone."""

    def bytes_a_token(**memory):
        short, long = (wide(n, kind, **memory).stats["temp_size"] for n in (4096, 8192))
        return (long - short) / 1024  # of a device

    assert (
        bytes_a_token(sequence_chunk_tokens=64) < bytes_a_token(mlp_tile_tokens=64) / 3
    )


@pytest.mark.slow
def test_attention_is_not_computed_again_where_it_is_kept():
    again, kept = (
        wide(4096, remat=remat, sequence_chunk_tokens=64).text.count(" while(")
        for remat in ("full", "attention")
    )
    assert again > kept


def test_chunks_that_do_not_divide():
    message = (
        r"sequence_chunk_tokens 6 does not divide the 14 tokens of a device .*"
        r"sequence_tokens 56 over mesh.ring x mesh.seq 4\): use sequence_tokens 48 or "
        r"72, or a chunk of 2"
    )
    with pytest.raises(ValueError, match=message):
        make_config("llama", dict(seq=4), sequence_chunk_tokens=6)


def test_keys_need_chunks():
    with pytest.raises(
        ValueError, match="offload keys .*: set memory.sequence_chunk_tokens"
    ):
        make_config("llama", offload=("keys",))


def test_kept_attention_needs_remat():
    with pytest.raises(ValueError, match="offload attention .* memory.remat attention"):
        make_config("llama", offload=("attention",))


def test_the_dense_reference_has_no_parts():
    model = dict(attention="reference")
    with pytest.raises(ValueError, match="reference cannot attend to some keys"):
        make_config("llama", model=model, sequence_chunk_tokens=8)


@pytest.mark.parametrize(
    ("tile", "options", "most"),
    [
        (64, dict(tokens=2062, head_chunks=2), 64),  # no divisor of a row is near
        (64, dict(tokens=2062, sequence_chunk_tokens=1031), 64),
        (3, dict(sequence_chunk_tokens=8), 3),  # fewer than there are rows
        (None, dict(sequence_chunk_tokens=8), B * 8),
    ],
    ids=str,
)
def test_hidden_activations_are_a_tile(tile, options, most):
    """In the program as traced, forward and backward."""
    width = 136
    model = dict(feed_forward_width=width)
    config = make_config("llama", model=model, mlp_tile_tokens=tile, **options)
    with jax.set_mesh(mesh_of()):
        arguments = abstract_state(config), abstract_batch(config)
        text = str(jax.make_jaxpr(make_train_step(config))(*arguments))
    found = re.findall(rf"[a-z]+\d+\[([\d,]+),{width}\]", text)
    dims = [tuple(map(int, each.split(","))) for each in found]
    # Of weights the last dim before is D.
    assert max(math.prod(d) for d in dims if d[-1] != config.model.width) == most


def test_weight_gradients_are_float32():
    """4,097 tokens of ones: a sum that bfloat16 does not hold."""
    ones = jnp.ones((1, 4097, 2), jnp.bfloat16)
    weight = Gathered(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.float32))
    with jax.set_mesh(mesh_of()):

        def local(x, weight):
            _, pull = jax.vjp(lambda w: project("BTD,DF->BTF", x, w), weight)
            (gradient,) = pull(jnp.ones((1, 4097, 3), jnp.bfloat16))
            return gradient.gradient

        whole = jax.sharding.PartitionSpec()
        gradient = jax.shard_map(
            local, in_specs=(whole, whole), out_specs=whole, check_vma=False
        )(ones, weight)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 4097)


def test_a_fraction_of_nothing():
    with pytest.raises(ValueError, match="moves nothing: it is of the 16 features"):
        make_config("llama", offload_fraction=0.5)
    with pytest.raises(ValueError, match="moves nothing"):
        make_config("llama", offload=("inputs",), offload_fraction=1e-6)
