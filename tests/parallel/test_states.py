"""Recurrences over shards: states cross them exactly, and what else is promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from recurrences import (
    DOCUMENTS,
    FUNCTIONS,
    B,
    H,
    K,
    N,
    T,
    V,
    assert_close,
    exact,
    inputs,
)
from recurrences import results as results_of
from slow import slow_but_for
from strategy_cases import collectives, mesh_of, sent

from ulysses_jax import (
    gated_delta_rule,
    linear_attention,
    short_convolution,
    ulysses_attention,
)
from ulysses_jax.parallel.bytes import convolution_bytes, state_bytes


def spread(kind, **degrees):
    mesh = mesh_of(**degrees)
    return functools.partial(FUNCTIONS[kind], mesh=mesh, segment_ids=DOCUMENTS)


A_HEAD = tuple(np.linspace(0.5, 1, N).tolist())


@pytest.mark.parametrize(
    "decay, degrees",
    slow_but_for(
        [(A_HEAD, dict(ring=2, seq=2))], [0.7, A_HEAD], [{}, dict(ring=2, seq=2)]
    ),
)
def test_a_constant_decay_and_its_gradient(decay, degrees):
    given = inputs("linear")
    shape = np.broadcast_to(decay, (N,))
    log_decay = np.broadcast_to(np.log(shape), (B, T, N))
    want = exact("linear", given | {"log_decay": log_decay}, DOCUMENTS)
    want["decay"] = want.pop("log_decay").sum((0, 1)) / shape
    del given["log_decay"]
    run = spread("linear", **degrees)
    got = jax.jit(functools.partial(run, decay=decay))(**given)
    most = np.abs(want["out"]).max()
    np.testing.assert_allclose(got, want["out"], atol=2e-5 * most)
    assert_close(results_of(run, "linear", given | {"decay": jnp.asarray(shape)}), want)


def what_it_sends(kind, tokens, *, documents=False, **degrees):
    """Out and all gradients: bytes by kind and axes."""
    mesh = mesh_of(**degrees)

    def shaped(dtype, *shape):
        spec = P(None, ("ring", "seq"), *["tensor"][: len(shape) == 4])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    given = {
        name: x if name == "weights" else shaped(x.dtype, B, tokens, *x.shape[2:])
        for name, x in inputs(kind).items()
    }
    ids = shaped(jnp.int32, B, tokens) if documents else None

    def both_ways(given, ids, upstream):
        run = functools.partial(FUNCTIONS[kind], mesh=mesh, segment_ids=ids)
        out, pull = jax.vjp(lambda given: run(**given), given)
        return out, pull(upstream)

    like_out = given["x" if kind == "convolution" else "v"]
    return sent(collectives(both_ways, mesh, given, ids, like_out))


@pytest.mark.parametrize(
    "kind, degrees",
    slow_but_for(
        [("delta", dict(ring=2, seq=4))],
        ["linear", "delta"],
        [dict(seq=2), dict(seq=4), dict(seq=8), dict(ring=2, seq=4), dict(ring=4)],
    ),
)
def test_bytes_are_the_formula_whatever_the_tokens(kind, degrees):
    shards = degrees.get("ring", 1) * degrees.get("seq", 1)
    change = {"linear": 1, "delta": H * H}[kind]
    each_way = state_bytes(
        shards=shards, num_heads=N, state_size=H * V, change_size=change
    )
    want = 2 * sum(each_way.values())
    for tokens in (32, 64):
        found = what_it_sends(kind, tokens, **degrees)
        assert {name for name, _ in found} == {"collective-permute"}
        assert sum(found.values()) == B * want


def test_bytes_of_a_convolution_and_of_documents():
    """The gradient of the weights is summed over the shards."""
    width = len(inputs("convolution")["weights"])
    tokens = dict(convolution_tokens=width, features=N * H, itemsize=4)
    want = 2 * convolution_bytes(**tokens)
    summed = 2 * 3 / 4 * 4 * width * N * H
    for documents in (False, True):
        found = what_it_sends("convolution", 32, documents=documents, seq=4)
        ids = 4 * (width - 1) * documents
        assert found == {
            ("collective-permute", "seq"): B * (want + ids),
            ("all-reduce", "seq"): summed,
        }
    for kind in ("linear", "delta"):
        found, more = (
            what_it_sends(kind, 32, documents=documents, seq=4)
            for documents in (False, True)
        )
        (key,) = found
        assert more == {key: found[key] + B * 4}


def test_heads_of_tensor_are_handed_on_by_themselves():
    found = what_it_sends("delta", 32, seq=4, tensor=2)
    want = state_bytes(shards=4, num_heads=N // 2, state_size=H * V, change_size=H * H)
    both_ways = B * 2 * sum(want.values())
    assert found == {("collective-permute", "seq"): both_ways}


def test_few_states_are_kept():
    tokens, heads, size = 4096, 4, 32
    shape = jax.ShapeDtypeStruct((1, tokens, heads, size), jnp.float32)
    none = jax.sharding.get_abstract_mesh()

    def loss(q, k, v):
        beta = jnp.full(v.shape[:3], 0.5)
        return gated_delta_rule(q, k, v, beta=beta, mesh=none).sum()

    run = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    array = 4 * tokens * heads * size
    assert run.memory_analysis().temp_size_in_bytes < 12 * array  # of `size` states


# -1 and 0, and one that is 0.25, LOG / 0 has NaN.
LOG = jnp.zeros((B, T, N)).at[0, 0].set(-1.0).at[1, 3, 2].set(0.25)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("linear", dict(causal=False), "linear_attention is causal"),
        ("linear", dict(decay=0.0), r"decay is 0, and must be in \(0, 1\]"),
        ("linear", dict(decay=1.5), r"decay is 1.5, and must be in \(0, 1\]"),
        ("linear", dict(log_decay=LOG), "log_decay is -1 to 0.25, and must be finite"),
        ("linear", dict(log_decay=LOG / 0), "log_decay is nan, and must be finite"),
        ("delta", dict(log_decay=LOG), "log_decay is -1 to 0.25, and must be finite"),
        (
            "delta",
            dict(beta=2 * LOG + 2, unit_lengths=True),
            "beta is 0 to 2.5, and must be 0 to 2: ",
        ),
        (
            "delta",
            dict(beta=LOG),
            "beta is -1 to 0.25, and must be finite and not below",
        ),
        ("linear", dict(decay=[0.5, 1.5, 1, 1]), "decay is 0.5 to 1.5"),
        ("linear", dict(decay=[0.5, 0.5]), "one for each of the 4 heads of v"),
        ("linear", dict(decay=0.5, log_decay=0), "both given"),
        ("linear", dict(log_decay=jnp.zeros((B, T))), r"log_decay is a float .*2, 32"),
        (
            "linear",
            dict(v=jnp.ones((B, T, 3, V))),
            r"2 heads .* one of \[1, 3\] heads, or v 4",
        ),
        ("linear", dict(k=jnp.ones((B, T, K, V))), r"q and k are \[B, T, K, H\]"),
        ("linear", dict(q=jnp.ones((B, T, K, H), int)), "q is float32, bfloat16 or"),
        ("linear", dict(v=jnp.ones((B, T, N, V), jnp.bfloat16)), "differ in dtype"),
        ("linear", dict(chunk_tokens=0), "chunk_tokens is a number of tokens, 1 or"),
        ("linear", dict(scale=np.inf), "scale is a finite number"),
        ("linear", dict(segment_ids=DOCUMENTS[:1]), r"segment_ids has shape \(1, 32\)"),
        ("delta", dict(beta=jnp.ones((B, T))), r"beta is a float .* \(2, 32, 4\)"),
        ("delta", dict(causal=False), "gated_delta_rule is causal"),
        (
            "convolution",
            dict(weights=jnp.ones((6, N, H))),
            "reaches 5 tokens back, but",
        ),
        ("convolution", dict(weights=jnp.ones((4, N))), r"give \[W, N, H\]"),
    ],
)
def test_what_is_refused(kind, changes, message):
    given = inputs(kind)
    if "decay" in changes:
        given.pop("log_decay")
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[kind](**given | changes, mesh=mesh_of(seq=8))


def test_values_that_are_traced_are_not_looked_at():
    given = inputs("delta")
    outside = {"log_decay": LOG, "beta": 2 * LOG + 2}
    run = functools.partial(gated_delta_rule, mesh=mesh_of(seq=8))
    assert jax.jit(run)(**given | outside).shape == given["v"].shape
    given["beta"] = given["beta"].at[0, 0, 0].set(2.5)
    assert run(**given, unit_lengths=False).shape == given["v"].shape


def test_what_a_mesh_does_not_divide():
    given = inputs("linear")
    cut = {name: x[:, :30] for name, x in given.items()}
    with pytest.raises(ValueError, match="number of tokens, 30, .* pad it to 32"):
        linear_attention(**cut, mesh=mesh_of(seq=4))
    with pytest.raises(ValueError, match="number of heads, 2, .* tensor degree 4"):
        linear_attention(**given, mesh=mesh_of(tensor=4))

    def inside(given):
        return linear_attention(**given)

    spec = P(None, "seq")
    with jax.set_mesh(mesh_of(seq=8)):
        with pytest.raises(ValueError, match="inside a shard_map over 'seq'"):
            jax.shard_map(inside, in_specs=spec, out_specs=spec, axis_names={"seq"})(
                given
            )


def test_a_remedy_that_works():
    """Of a convolution wider than a shard."""
    x, weights = jnp.ones((1, 24, 1, 2)), jnp.ones((6, 1, 2))
    with pytest.raises(ValueError, match="use ring=1, seq=4, or sequences of 40 tok"):
        short_convolution(x, weights, mesh=mesh_of(seq=8))
    short_convolution(x, weights, mesh=mesh_of(seq=4))
    short_convolution(jnp.ones((1, 40, 1, 2)), weights, mesh=mesh_of(seq=8))


@pytest.mark.parametrize("tokens", [1, 2])
def test_fewer_tokens_than_a_convolution_reads(tokens):
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 3))
    weights = jax.random.normal(jax.random.key(1), (4, 2, 3))
    none = jax.sharding.get_abstract_mesh()
    for mesh in (none, mesh_of(data=1)):
        whole = short_convolution(x, weights, mesh=mesh)[:, :tokens]
        got = short_convolution(x[:, :tokens], weights, mesh=mesh)
        np.testing.assert_allclose(got, whole, atol=1e-6)


def test_other_remedies_work():
    """Of heads, of a decay, and of tokens that see what comes after them."""
    given, mesh = inputs("linear"), mesh_of(seq=8)

    def linear(**options):
        run = functools.partial(linear_attention, mesh=mesh, **options)
        return jax.eval_shape(lambda given: run(**given), given)

    del given["log_decay"]
    v = given.pop("v")
    with pytest.raises(ValueError, match=r"q and k one of \[1, 3\] heads, or v 4"):
        linear(v=v[:, :, :3])
    for heads in (1, 3):
        given |= {name: jnp.ones((B, T, heads, H)) for name in "qk"}
        linear(v=v[:, :, :3])
    given |= inputs("linear") | {"v": v}
    del given["log_decay"]
    linear()  # of 4
    with pytest.raises(ValueError, match=r"decay is 1.5, .*; for a rate r give exp"):
        linear(decay=1.5)
    linear(decay=np.exp(-1.5))
    with pytest.raises(ValueError, match="decay is 9.*e-41, .* from 1.2e-38 on"):
        linear(decay=1e-40)
    linear(decay=1.2e-38)
    with pytest.raises(ValueError, match=r"use ulysses_attention\(..., causal=False"):
        linear(causal=False)
    alike = {name: jnp.ones((B, T, N, H)) for name in "qkv"}
    run = functools.partial(ulysses_attention, mesh=mesh, causal=False)
    jax.eval_shape(lambda alike: run(**alike), alike)
