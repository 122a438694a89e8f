"""Recurrences, and attention to mixtures of keys, compiled for 8 and 64 H100: what
crosses the shards is the formula; and steps of models that have them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but_for
from test_gpu_plan import plan, tiny

from ulysses_jax import (
    gated_delta_rule,
    linear_attention,
    low_rank_attention,
    make_mesh,
)
from ulysses_jax.complete import complete
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.parallel.bytes import low_rank_bytes, state_bytes
from ulysses_jax.plan.compile import cluster_devices

pytestmark = pytest.mark.plan

NUM_HEADS, NUM_KEY_HEADS, SIZE, RANK = 32, 16, 128, 64


def delta(q, k, v, gates, **options):
    return gated_delta_rule(q, k, v, log_decay=gates, beta=-gates, **options)


def linear(q, k, v, gates, **options):
    return linear_attention(q, k, v, log_decay=gates, **options)


def low_rank(q, k, v, projection, **options):
    return low_rank_attention(v, q, k, projection=projection, **options)


def sent(rule, tokens, hosts):
    """By a GPU, forward and backward, by kind of collective."""
    devices = cluster_devices(TARGETS["h100"], hosts, 8)
    mesh = make_mesh(ring=hosts, seq=8, devices=devices)

    def shaped(dtype, *dims):
        layout = NamedSharding(mesh, P(None, ("ring", "seq")))
        return jax.ShapeDtypeStruct((1, tokens, *dims), dtype, sharding=layout)

    q = shaped(jnp.bfloat16, NUM_KEY_HEADS, SIZE)
    v = shaped(jnp.bfloat16, NUM_HEADS, SIZE)
    by_token = [NUM_KEY_HEADS, RANK] if rule is low_rank else [NUM_HEADS]

    def both_ways(q, k, v, by_token, upstream):
        out, pull = jax.vjp(functools.partial(rule, mesh=mesh), q, k, v, by_token)
        return out, pull(upstream)

    traced = jax.jit(both_ways).trace(q, q, v, shaped(jnp.float32, *by_token), v)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    found = {}
    for each in find_collectives(parse(text), dict(mesh.shape), 8):
        total = found.get(each.kind, 0) + each.count * each.sent_bytes
        found[each.kind] = total
    return found


@pytest.mark.parametrize(
    "rule, hosts",
    slow_but_for([(delta, 1), (low_rank, 1)], [linear, delta, low_rank], [1, 8]),
)
def test_bytes_are_the_formula_whatever_the_tokens(rule, hosts):
    shards = 8 * hosts
    if rule is low_rank:
        each_way = low_rank_bytes(
            shards=shards,
            num_kv_heads=NUM_KEY_HEADS,
            rank=RANK,
            mixture_size=2 * SIZE + 1,
        )
        want = {"all-reduce": sum(each_way.values())}
    else:
        each_way = state_bytes(
            shards=shards,
            num_heads=NUM_HEADS,
            state_size=SIZE * SIZE,
            change_size=SIZE * SIZE if rule is delta else 1,
        )
        want = {"collective-permute": 2 * sum(each_way.values())}
    for tokens in (65536, 131072):
        assert sent(rule, tokens, hosts) == want


def test_a_step_of_a_hybrid():
    """Each recurrence has a row of its own, and sends its formula."""
    plain = tiny(fsdp=2, seq=4)
    layers = dict(num_layers=3, pattern=("delta", "linear", "full"))
    model = dataclasses.replace(plain.model, **layers)
    config = complete(dataclasses.replace(plain, model=model), name="hybrid")
    result = plan(config)
    assert result["warnings"] == []
    (states,) = (
        each for each in result["traffic"] if each["collective"] == "collective-permute"
    )
    names = "gated_delta_rule", "linear_attention", "short_convolution"
    found = {each["what"]: each["ratio"] for each in states["parts"]}
    assert found == dict.fromkeys(names, 1.0)
