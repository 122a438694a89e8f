"""The loss against a float64 oracle: values and both gradients on each mesh."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from slow import slow_but_for

from ulysses_jax import make_mesh
from ulysses_jax.sharding import activation, parameter
from ulysses_jax.training.loss import (
    IGNORED,
    cross_entropy,
    num_valid,
    training_loss,
)

B, T, D, V = 8, 24, 16, 20
TILE = 5  # divides no device's tokens on any of the meshes
UPSTREAM = -2.5
MESHES = {
    "one device": {},
    "data": dict(data=8),
    "seq": dict(seq=8),
    "seq x tensor": dict(seq=4, tensor=2),
    "fsdp x ring x seq": dict(fsdp=2, ring=2, seq=2),
}
PLAIN = (0.0, 0.0)
OPTIONS = [(0.3, 0.0), (0.0, 0.05), (0.1, 0.02)]  # label smoothing, z-loss


def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


def make_labels(case):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, V, (B, T)).astype(np.int32)
    labels[rng.random((B, T)) < 0.3] = IGNORED
    if case == "tiles":  # rows of T tokens: tiles 2 to 6 of the first device
        labels.reshape(-1)[TILE : 7 * TILE] = IGNORED
    if case == "shards":  # of the batch, of the tokens
        labels[: B // 2] = IGNORED
        labels[:, T // 2 :] = IGNORED
    if case == "all":
        labels[:] = IGNORED
    return labels


CASES = ["some", "tiles", "shards", "all"]


@functools.cache
def inputs(dtype=jnp.float32, size=1.0):
    """Logits of a few nats (times size); values that the dtype holds exactly."""
    draws = jax.random.split(jax.random.key(0))
    x = size * jax.random.normal(draws[0], (B, T, D), dtype)
    head = jax.random.normal(draws[1], (V, D), dtype)
    return np.asarray(x, np.float64), np.asarray(head, np.float64)


def oracle(x, head, labels, options=PLAIN):
    """The sum over valid tokens; its gradients times UPSTREAM; float64."""
    smoothing, z_loss = options
    logits = np.einsum("BTD,VD->BTV", x, head)
    highest = logits.max(-1, keepdims=True)
    logsumexp = highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    log_softmax = logits - logsumexp
    one_hot = (labels[..., None] == np.arange(V)).astype(np.float64)
    valid = one_hot.sum(-1, keepdims=True)
    target = valid * ((1 - smoothing) * one_hot + smoothing / V)
    loss = -(target * log_softmax).sum() + z_loss * (valid * logsumexp**2).sum()
    softmax = valid * np.exp(log_softmax)
    dlogits = UPSTREAM * (softmax * (1 + 2 * z_loss * logsumexp) - target)
    dx = np.einsum("BTV,VD->BTD", dlogits, head)
    dhead = np.einsum("BTV,BTD->VD", dlogits, x)
    return loss, dx, dhead


def put(mesh, x, head, labels, dtype=jnp.float32):
    """Sharded as the model has them: float32 head, V over tensor, D over ZeRO axes."""
    axes = mesh.shape
    specs = activation("BTD", axes), parameter("VD", head.shape, axes)
    arrays = jnp.asarray(x, dtype), jnp.asarray(head, jnp.float32), labels
    return jax.device_put(
        arrays,
        tuple(NamedSharding(mesh, spec) for spec in (*specs, activation("BT", axes))),
    )


@functools.cache
def compiled(tile_tokens, options=PLAIN):
    def loss(x, head, labels):
        if options == PLAIN:
            return cross_entropy(x, head, labels, tile_tokens)
        return training_loss(x, head, labels, tile_tokens, *options)[0]

    def scaled(x, head, labels):
        return UPSTREAM * loss(x, head, labels)

    return jax.jit(loss), jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))


def check(
    degrees, labels, *, options=PLAIN, tile_tokens=TILE, size=1.0, tolerance=2e-6
):
    x, head = inputs(size=size)
    mesh = mesh_of(**degrees)
    evaluate, differentiate = compiled(tile_tokens, options)
    with jax.set_mesh(mesh):
        arguments = put(mesh, x, head, labels)
        alone = evaluate(*arguments)
        scaled, gradients = differentiate(*arguments)
        valid = jax.jit(num_valid, static_argnums=1)(arguments[2], V)
    want, *want_gradients = oracle(x, head, labels, options)
    assert valid.dtype == jnp.int32 and int(valid) == (labels != IGNORED).sum()
    np.testing.assert_allclose(float(alone), want, rtol=tolerance, err_msg="loss")
    np.testing.assert_allclose(float(scaled), UPSTREAM * want, rtol=tolerance)
    for name, argument, got, b in zip(
        ("dx", "dhead"), arguments, gradients, want_gradients, strict=False
    ):
        assert got.sharding == argument.sharding and got.dtype == argument.dtype
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(got), b, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(
    "mesh_name, case",
    slow_but_for(
        [
            *itertools.product(["one device", "seq x tensor"], CASES),
            ("data", "shards"),
            ("seq", "shards"),
            ("fsdp x ring x seq", "some"),
        ],
        MESHES,
        CASES,
    ),
)
def test_loss_and_gradients(mesh_name, case):
    check(MESHES[mesh_name], make_labels(case))


@pytest.mark.parametrize(
    "mesh_name, options, case",
    slow_but_for(
        [
            *itertools.product(["seq x tensor"], OPTIONS, ["some", "shards"]),
            ("one device", OPTIONS[-1], "tiles"),
            ("fsdp x ring x seq", OPTIONS[-1], "all"),
        ],
        MESHES,
        OPTIONS,
        CASES,
    ),
)
def test_smoothing_and_z_loss(mesh_name, options, case):
    check(MESHES[mesh_name], make_labels(case), options=options)


@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_the_plain_loss_comes_along(mesh_name):
    """Beside the objective, the cross-entropy that it is not; without a gradient."""
    x, head = inputs()
    labels = make_labels("some")
    options = OPTIONS[-1]

    def both(x, head, labels):
        objective, plain = training_loss(x, head, labels, TILE, *options)
        return objective + 3 * plain, (objective, plain)

    with jax.set_mesh(mesh_of(**MESHES[mesh_name])):
        arguments = put(mesh_of(**MESHES[mesh_name]), x, head, labels)
        differentiate = jax.jit(jax.value_and_grad(both, argnums=(0, 1), has_aux=True))
        (_, (objective, plain)), (dx, dhead) = differentiate(*arguments)
    want_plain, *_ = oracle(x, head, labels)
    want, want_dx, want_dhead = oracle(x, head, labels, options)
    assert abs(want / want_plain - 1) > 0.1
    np.testing.assert_allclose(float(plain), want_plain, rtol=2e-6)
    np.testing.assert_allclose(float(objective), want, rtol=2e-6)
    for got, b in ((dx, want_dx), (dhead, want_dhead)):
        b = b / UPSTREAM
        atol = 2e-6 * np.abs(b).max()
        np.testing.assert_allclose(np.asarray(got), b, rtol=0, atol=atol)


@pytest.mark.parametrize("tile_tokens", [1, B * T, 10 * B * T])
def test_tiles_of_one_token_and_of_all(tile_tokens):
    check(MESHES["one device"], make_labels("some"), tile_tokens=tile_tokens)


@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_labels_that_are_no_tokens_do_not_count(mesh_name):
    """Traced, they are as IGNORED: loss, gradients, and the number to divide by."""
    labels = make_labels("some")
    clean = np.where(labels % 5 == 0, IGNORED, labels)
    dirty = np.where(labels % 5 == 0, np.tile([-100, V, 2**31 - 1, -2], 6), labels)
    x, head = inputs()
    mesh = mesh_of(**MESHES[mesh_name])
    with jax.set_mesh(mesh):
        found = []
        for each in (clean, dirty.astype(np.int32)):
            arguments = put(mesh, x, head, each)
            count = jax.jit(num_valid, static_argnums=1)(arguments[2], V)
            found.append((count, compiled(TILE, OPTIONS[-1])[1](*arguments)))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("wrong", [-100, V])
def test_labels_that_are_no_tokens_are_refused_where_they_are_seen(wrong):
    labels = make_labels("some")
    labels[0, :3] = wrong
    x, head = inputs()
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        arguments = put(mesh, x, head, labels)
        low, high = min(wrong, -1), max(wrong, V - 1)
        message = f"3 labels are neither tokens, 0 to 19, nor -1.* {low} to {high}: set"
        for refuses in (
            lambda: cross_entropy(*arguments, TILE),
            lambda: num_valid(arguments[2], V),
            lambda: num_valid(labels, V),
        ):
            with pytest.raises(ValueError, match=message):
                refuses()


def test_no_label_leaves_exact_zeros():
    x, head = inputs()
    mesh = mesh_of(**MESHES["fsdp x ring x seq"])
    with jax.set_mesh(mesh):
        arguments = put(mesh, x, head, make_labels("all"))
        loss, gradients = compiled(TILE)[1](*arguments)
    for values in (loss, *gradients):
        np.testing.assert_array_equal(np.asarray(values), 0)


@pytest.mark.parametrize("options", [PLAIN, OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_logits_of_a_thousand_nats(mesh_name, options):
    x, head = inputs(size=100.0)
    assert np.abs(np.einsum("BTD,VD->BTV", x, head)).max() > 1000
    labels = make_labels("some")
    check(MESHES[mesh_name], labels, options=options, size=100.0, tolerance=2e-5)


@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_bfloat16(mesh_name):
    """Logits and sums are float32: only dlogits and dx are rounded, to 8 bits each."""
    x, head = inputs(jnp.bfloat16)
    labels = make_labels("some")
    mesh = mesh_of(**MESHES[mesh_name])
    with jax.set_mesh(mesh):
        arguments = put(mesh, x, head, labels, jnp.bfloat16)
        loss, (dx, dhead) = compiled(TILE)[1](*arguments)
    want, want_dx, want_dhead = oracle(x, head, labels)
    assert (loss.dtype, dx.dtype, dhead.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_allclose(float(loss), UPSTREAM * want, rtol=2e-6)
    for got, b in ((dx, want_dx), (dhead, want_dhead)):
        error = np.abs(np.asarray(got, np.float64) - b).max() / np.abs(b).max()
        assert error < 2**-7


def test_a_mean_of_means_would_be_seen():
    """Rows with unequal numbers of labels: the mean of their means is another."""
    x, head = inputs()
    labels = make_labels("some")
    labels[0, 0], labels[0, 1:] = 3, IGNORED

    def mean(rows):
        return oracle(x[rows], head, labels[rows])[0] / (labels[rows] != IGNORED).sum()

    mesh = mesh_of(**MESHES["data"])
    with jax.set_mesh(mesh):
        arguments = put(mesh, x, head, labels)
        loss = float(compiled(TILE)[0](*arguments)) / int(num_valid(arguments[2], V))
    np.testing.assert_allclose(loss, mean(slice(None)), rtol=2e-6)
    of_means = np.mean([mean(slice(row, row + 1)) for row in range(B)])
    assert abs(of_means / loss - 1) > 0.01


def largest_array(function, degrees, tokens, width, vocab):
    """The most elements of any array of a device's compiled program."""
    mesh = mesh_of(**degrees)
    with jax.set_mesh(mesh):
        labels = np.zeros((4, tokens // 4), np.int32)
        x, head = np.zeros((*labels.shape, width)), np.zeros((vocab, width))
        arguments = put(mesh, x, head, labels)
        text = jax.jit(jax.grad(function, argnums=(0, 1))).lower(*arguments)
        text = text.compile().as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_logits_of_all_tokens_never_exist(mesh_name):
    degrees = MESHES[mesh_name]
    tokens, width, vocab, tile = 2048, 8, 512, 64
    local_tokens = tokens // degrees.get("seq", 1)
    local_vocab = vocab // degrees.get("tensor", 1)

    def tiled(x, head, labels):
        return cross_entropy(x, head, labels, tile)

    got = largest_array(tiled, degrees, tokens, width, vocab)
    assert got == max(tile * local_vocab, local_tokens * width)
    assert got * 8 <= local_tokens * local_vocab


@pytest.mark.parametrize("mesh_name", ["one device", "seq x tensor"])
def test_no_copy_of_the_activations_is_padded(mesh_name):
    """Where the tile divides no device's tokens, nothing is larger than x."""
    degrees = MESHES[mesh_name]
    tokens, width, vocab, tile = 2048, 64, 64, 60
    local_tokens = tokens // degrees.get("seq", 1)

    def tiled(x, head, labels):
        return cross_entropy(x, head, labels, tile)

    got = largest_array(tiled, degrees, tokens, width, vocab)
    assert local_tokens % tile and got == local_tokens * width


def test_logits_of_all_tokens_would_be_seen():
    def whole(x, head, labels):
        logits = jnp.einsum("BTD,VD->BTV", x, head)
        return jax.nn.logsumexp(logits, axis=-1).sum()

    assert largest_array(whole, {}, 2048, 8, 512) >= 2048 * 512
