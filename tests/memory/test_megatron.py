"""Megatron's sequence parallelism is the plain model, under every memory option."""

import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from memory_cases import assert_same, loss_and_gradients, make_config, mesh_of
from slow import slow_but_for

from ulysses_jax import layout
from ulysses_jax.sharding import MEGATRON, activation, parameter
from ulysses_jax.training.state import abstract_state
from ulysses_jax.weights import gathered_tokens, whole

# 24 features: of eight devices each has three.
LLAMA, GPT = dict(num_kv_heads=8), {}
FEW_HEADS = dict(num_kv_heads=4)


def of_family(family, degrees, model, **memory):
    model = dict(feed_forward_width=24, **model)
    if degrees:
        model["strategy"] = "megatron"
    return make_config(family, degrees, model=model, **memory)


@functools.cache
def plain(family, kv_heads, packed):
    model = dict(num_kv_heads=kv_heads) if kv_heads else {}
    config = of_family(family, {}, model, remat="none")
    return loss_and_gradients(config, packed=packed)


def assert_plain(family, degrees, model, *, packed=True, **memory):
    got = loss_and_gradients(of_family(family, degrees, model, **memory), packed=packed)
    assert_same(got, plain(family, model.get("num_kv_heads"), packed))


@pytest.mark.parametrize(
    "degrees, model, packed, memory",
    [
        (dict(fsdp=2, seq=2, tensor=2), FEW_HEADS, True, dict(remat="attention")),
        (dict(fsdp=2, seq=4), FEW_HEADS, True, dict(mlp_tile_tokens=9)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (dict(seq=2), FEW_HEADS, False, dict(remat="none")),
                (dict(data=2, seq=4), FEW_HEADS, True, dict(remat="full")),
                (dict(seq=8), LLAMA, True, dict(remat="none")),
            )
        ),
    ],
    ids=str,
)
def test_llama(degrees, model, packed, memory):
    assert_plain("llama", degrees, model, packed=packed, **memory)


@pytest.mark.parametrize(
    "degrees, packed, memory",
    [
        (dict(data=2, seq=2, tensor=2), True, dict(remat="none")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (dict(seq=8), False, dict(remat="full")),
                (dict(fsdp=2, seq=2, tensor=2), True, dict(mlp_tile_tokens=9)),
            )
        ),
    ],
    ids=str,
)
def test_gpt(degrees, packed, memory):
    assert_plain("gpt", degrees, GPT, packed=packed, **memory)


def own(x, axis, dim):
    """A scatter that forgets the other devices' products."""
    size = x.shape[dim] // jax.lax.axis_size(axis)
    start = jax.lax.axis_index(axis) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, dim)


def misplaced(x, axis, dim):
    """A scatter whose shards are one device too far."""
    x = layout.psum_scatter(x, axis, dim)
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


@pytest.mark.parametrize(
    "fault", slow_but_for([own], [own, misplaced, "a gradient summed over seq"])
)
def test_faults_are_seen(monkeypatch, fault):
    if callable(fault):
        faulty = types.SimpleNamespace(**vars(layout) | {"psum_scatter": fault})
        monkeypatch.setattr(gathered_tokens, "layout", faulty)
    else:
        summed = whole.sum_gradient
        monkeypatch.setattr(
            whole,
            "sum_gradient",
            lambda gradient, spec: jax.lax.psum(summed(gradient, spec), "seq"),
        )
    with pytest.raises(AssertionError):
        assert_plain("llama", dict(data=2, seq=4), FEW_HEADS, mlp_tile_tokens=9)


def test_where_parameters_lie():
    axes = dict(data=1, fsdp=2, ring=1, seq=2, tensor=2)
    of = functools.partial(parameter, axes=axes, table=MEGATRON)
    heads = "tensor", "seq"
    assert of("LDNH", (2, 16, 8, 4)) == P(None, ("fsdp", "ring"), heads, None)
    assert of("LFD", (2, 24, 16)) == P(None, heads, ("fsdp", "ring"))
    assert of("LKH", (2, 8, 4)) == P(None, heads, None)
    assert of("VD", (28, 16)) == parameter("VD", (28, 16), axes)
    rows = "data", "fsdp"
    assert activation("BTD", axes, MEGATRON) == activation("BTD", axes)
    assert activation("BTNH", axes, MEGATRON) == P(rows, ("ring",), heads, None)
    with jax.set_mesh(mesh_of(**axes)):
        state = abstract_state(of_family("llama", dict(axes), FEW_HEADS))
    attention = state.parameters["layers"][0]["attention"]
    assert attention["k"].sharding.spec == of("LDKH", (2, 16, 4, 4))
    assert attention["out"].sharding.shard_shape((2, 8, 4, 16)) == (2, 2, 4, 8)
    shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(attention)]
    matrices = 2 * 16 * 4 * (8 + 4 + 4 + 8)
    assert sum(map(np.prod, shards)) == matrices / 8
