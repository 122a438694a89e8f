"""The whole model against a dense one written here: activations and all gradients."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax import make_mesh, placement
from ulysses_jax.complete import complete
from ulysses_jax.config_file import from_dict
from ulysses_jax.models import transformer
from ulysses_jax.models.stack import run_stacks
from ulysses_jax.sharding import activation, parameter
from ulysses_jax.training.loss import cross_entropy
from ulysses_jax.training.model import features_and_head, model_of
from ulysses_jax.training.state import abstract_state, init_state
from ulysses_jax.training.step import abstract_batch, make_train_step
from ulysses_jax.weights.products import project
from ulysses_jax.weights.rows import embed

# No two dims are alike, and heads x head size is not the width.
SHAPE = dict(
    vocab_size=28,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    feed_forward_width=20,
    max_positions=18,
    compute_dtype="float32",
)
GPT = dict(
    norm="layer",
    feed_forward="gelu",
    positions="learned",
    biases=True,
    tied_embeddings=True,
    num_kv_heads=4,
)
FAMILIES = {
    "llama": {},
    # Twice around the pattern, and a layer is left.
    "llama, tied, pattern, biases, sinks": dict(
        tied_embeddings=True,
        num_layers=5,
        pattern=("window", "full"),
        window=3,
        biases=True,
        sinks=True,
    ),
    "gpt": GPT,
}
MESHES = {"one device": {}, "fsdp x seq x tensor": dict(fsdp=2, seq=2, tensor=2)}
B, T = 4, 16
TOLERANCE = 2e-5


def mesh_of(**degrees):
    num = math.prod(degrees.values())
    devices = jax.devices()[:num]
    return make_mesh(**degrees, devices=devices, axis_type=AxisType.Explicit)


@contextlib.contextmanager
def on_mesh(**degrees):
    mesh = mesh_of(**degrees)
    with jax.set_mesh(mesh):
        yield mesh


def make_config(family, degrees=None, **memory):
    values = dict(
        # Batches here lie in the sequence's own order.
        model=SHAPE | FAMILIES[family] | dict(zigzag=False),
        training=dict(num_steps=5, warmup_steps=1, batch_size=B, sequence_tokens=T),
        memory=dict(loss_tile_tokens=5) | memory,
    )
    config = complete(from_dict(configs.Config, values), name="test")
    return placement.place(config, dict(mesh_of(**(degrees or {})).shape))


def make_batch():
    """Packed documents whose bounds differ by row; positions restart in each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab_size"], (B, T))
    first = rng.random((B, T)) < 0.2
    first[0] = False  # one document
    first[:, 0] = True
    starts = np.maximum.accumulate(np.where(first, np.arange(T), 0), axis=1)
    labels = np.where(rng.random((B, T)) < 0.3, -1, np.roll(tokens, -1, axis=1))
    batch = dict(
        tokens=tokens,
        labels=labels,
        positions=np.arange(T) - starts,
        segment_ids=np.cumsum(first, axis=1),
    )
    return {name: values.astype(np.int32) for name, values in batch.items()}


def make_parameters(config):
    """Large enough that every part of the model matters; none at its initial value."""
    with on_mesh():
        shapes = abstract_state(config).parameters
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = 0.4 * rng.standard_normal(leaf.shape)
        return (values + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def dense(model, parameters, batch):
    """The model as textbooks have it, a loop over layers: loss sum, activations."""

    def norm(x, p):
        if model.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon)
        return x * p["scale"] + (p["bias"] if model.norm == "layer" else 0)

    def linear(equation, x, p, name):
        y = jnp.einsum(equation, x, p[name])
        return y + p[f"{name}_bias"] if model.biases else y

    def turn(x):
        half = model.head_size // 2
        angles = batch["positions"][:, :, None, None] * np.array(
            [model.rope.base ** (-2 * i / model.head_size) for i in range(half)]
        )
        a, b = x[..., :half], x[..., half:]
        c, s = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * c - b * s, a * s + b * c], axis=-1)

    t = np.arange(T)
    segments = batch["segment_ids"]
    causal = t[:, None] >= t[None, :]
    causal = causal[None] & (segments[:, :, None] == segments[:, None, :])
    narrow = causal & (t[:, None] - t[None, :] < (model.window or T))

    def attention(x, p, sees):
        q = linear("BTD,DNH->BTNH", x, p, "q")
        k = linear("BTD,DNH->BTNH", x, p, "k")
        v = linear("BTD,DNH->BTNH", x, p, "v")
        if model.positions == "rope":
            q, k = turn(q), turn(k)
        group = model.num_heads // model.num_kv_heads
        heads = []
        for n in range(model.num_heads):
            keys, values = k[:, :, n // group], v[:, :, n // group]
            logits = jnp.einsum("BTH,BSH->BTS", q[:, :, n], keys)
            logits = jnp.where(sees, logits / math.sqrt(model.head_size), -jnp.inf)
            if model.sinks:
                column = jnp.broadcast_to(p["sinks"][n], (B, T, 1))
                logits = jnp.concatenate((logits, column), axis=-1)
            weights = jax.nn.softmax(logits)[..., :T]
            heads.append(jnp.einsum("BTS,BSH->BTH", weights, values))
        return linear("BTNH,NHD->BTD", jnp.stack(heads, axis=2), p, "out")

    def feed_forward(x, p):
        up = linear("BTD,DF->BTF", x, p, "up")
        if model.feed_forward == "swiglu":
            gate = linear("BTD,DF->BTF", x, p, "gate")
            hidden = gate / (1 + jnp.exp(-gate)) * up
        else:
            cubic = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
            hidden = 0.5 * up * (1 + jnp.tanh(cubic))
        return linear("BTF,FD->BTD", hidden, p, "down")

    x = parameters["embedding"][batch["tokens"]]
    if model.positions == "learned":
        x = x + parameters["position_table"][batch["positions"]]
    for index in range(model.num_layers):
        again, place = divmod(index, len(model.pattern))
        if again < model.num_layers // len(model.pattern):
            stack = parameters["layers"][place]
            p = jax.tree.map(lambda leaf, i=again: leaf[i], stack)
        else:
            p = parameters["rest"][place]
        sees = narrow if model.pattern[place] == "window" else causal
        x = x + attention(norm(x, p["attention_norm"]), p["attention"], sees)
        x = x + feed_forward(norm(x, p["feed_forward_norm"]), p["feed_forward"])
    x = norm(x, parameters["norm"])

    head = parameters["embedding" if model.tied_embeddings else "unembedding"]
    logits = jnp.einsum("BTD,VD->BTV", x, head)
    labels = batch["labels"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.where(labels >= 0, chosen[..., 0], 0).sum(), x


@functools.cache
def oracle(family):
    """Loss, activations, gradients in float64."""
    config = make_config(family)
    parameters = make_parameters(config)
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), parameters)
        function = functools.partial(dense, config.model)
        grad = jax.jit(jax.value_and_grad(function, has_aux=True))
        (loss, x), gradients = jax.device_get(grad(parameters, make_batch()))
    assert x.dtype == np.float64
    return loss, x, gradients


def sharded_batch(mesh, num_tokens=T):
    sharding = NamedSharding(mesh, activation("BT", mesh.shape))
    return {
        name: jax.device_put(values[:, :num_tokens], sharding)
        for name, values in make_batch().items()
    }


def sharded_parameters(config, mesh):
    return jax.tree.map(
        lambda value, leaf: jax.device_put(
            value, NamedSharding(mesh, leaf.sharding.spec)
        ),
        make_parameters(config),
        abstract_state(config).parameters,
    )


@functools.cache
def library(family, mesh_name, remat="full", num_tokens=T):
    config = make_config(family, MESHES[mesh_name], remat=remat)
    mesh = mesh_of(**MESHES[mesh_name])

    def function(parameters, batch):
        model = model_of(config, parameters)
        x, head = features_and_head(model, batch, config.memory)
        return cross_entropy(x, head, batch["labels"], 5), x

    with jax.set_mesh(mesh):
        parameters = sharded_parameters(config, mesh)
        grad = jax.jit(jax.value_and_grad(function, has_aux=True))
        (loss, x), gradients = grad(parameters, sharded_batch(mesh, num_tokens))
    return loss, x, gradients, parameters


def assert_close(got, want):
    """Relative to the largest value of each array: float32 against float64."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        a, b = np.asarray(a, np.float64), np.asarray(b)
        # A key's bias without RoPE has no gradient: softmax ignores it.
        scale = max(float(np.abs(b).max()), 0.5)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize(
    "family, mesh_name",
    slow_but_for(
        [
            ("llama", "one device"),
            ("llama, tied, pattern, biases, sinks", "fsdp x seq x tensor"),
            ("gpt", "fsdp x seq x tensor"),
        ],
        FAMILIES,
        MESHES,
    ),
)
def test_is_the_dense_model(family, mesh_name):
    loss, x, gradients, parameters = library(family, mesh_name)
    want_loss, want_x, want_gradients = oracle(family)
    np.testing.assert_allclose(float(loss), want_loss, rtol=TOLERANCE)
    assert_close(x, want_x)
    assert jax.tree.structure(gradients) == jax.tree.structure(want_gradients)
    assert_close(gradients, want_gradients)
    same = jax.tree.map(lambda g, p: g.sharding == p.sharding, gradients, parameters)
    assert all(jax.tree.leaves(same)), same


def test_every_parameter_has_a_gradient_that_a_fault_would_change():
    """All but the bias of keys without RoPE: else the comparison would see nothing."""
    for family in FAMILIES:
        for path, g in jax.tree_util.tree_leaves_with_path(oracle(family)[2]):
            name = jax.tree_util.keystr(path)
            if not (family == "gpt" and "k_bias" in name):
                assert np.abs(g).max() > 0.1, (family, name)


def test_without_segments_a_row_is_one_document():
    """Row 0 of the batch is one: it comes out alike with and without segment ids."""
    config = make_config("llama")
    with on_mesh() as mesh:
        batch = sharded_batch(mesh)
        model = model_of(config, sharded_parameters(config, mesh))
        run = jax.jit(lambda: model.features(batch["tokens"], batch["positions"]))
        x = run()
    want = oracle("llama")[1]
    assert_close(x[0], want[0])
    assert np.abs(np.asarray(x) - want)[1:].max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_do_not_depend_on_the_mesh(family):
    """A checkpoint fits on every mesh."""
    shapes = []
    for degrees in MESHES.values():
        with on_mesh(**degrees):
            state = abstract_state(make_config(family, degrees))
        shapes.append(jax.tree.map(lambda x: (x.shape, x.dtype), state))
    assert shapes[0] == shapes[1]


def test_positions_are_not_padded_to_the_mesh():
    """18 rows over tensor=4: `placement.place` refuses it, and so does the model."""
    with on_mesh(tensor=4), pytest.raises(ValueError, match="divi"):
        abstract_state(make_config("gpt"))


def test_the_program_does_not_grow_with_the_layers():
    def lines(num_layers):
        config = make_config("llama", dict(fsdp=2, seq=4))
        model = dataclasses.replace(config.model, num_layers=num_layers)
        config = dataclasses.replace(config, model=model)
        with on_mesh(fsdp=2, seq=4):
            traced = jax.jit(make_train_step(config)).trace(
                abstract_state(config), abstract_batch(config)
            )
        return str(traced.jaxpr).count("\n"), traced.lower().as_text().count("\n")

    few, many = lines(2), lines(8)
    assert few == many
    assert min(few) > 100


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_abstract_state_lies_as_the_made_one(family):
    degrees = MESHES["fsdp x seq x tensor"]
    config = make_config(family, degrees)
    with on_mesh(**degrees) as mesh:
        abstract = abstract_state(config)
        state = jax.jit(functools.partial(init_state, config))()

    def described(leaf):
        spec = P() if leaf.sharding is None else leaf.sharding.spec  # a number has none
        return leaf.shape, leaf.dtype, spec

    assert jax.tree.map(described, abstract) == jax.tree.map(described, state)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    parameters = state.parameters
    assert parameters["embedding"].sharding.spec == P("tensor", ZERO)
    attention = parameters["layers"][0]["attention"]
    assert attention["q"].sharding.spec == P(None, ZERO, "tensor", None)
    assert attention["out"].sharding.spec == P(None, "tensor", None, ZERO)
    moments = state.optimizer[1][0]
    for moment in (moments.mu, moments.nu):
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, moment, parameters)
        assert all(jax.tree.leaves(same))


ZERO = ("fsdp", "ring", "seq")
WIDE = dict(SHAPE, width=256, vocab_size=2048, feed_forward_width=1024, head_size=64)


def test_no_device_ever_holds_the_whole_state():
    degrees = MESHES["fsdp x seq x tensor"]
    values = dict(model=WIDE, training=dict(batch_size=B, sequence_tokens=T))
    config = complete(from_dict(configs.Config, values), name="test")
    with on_mesh(**degrees) as mesh:
        config = placement.place(config, dict(mesh.shape))
        state = abstract_state(config)
        compiled = jax.jit(functools.partial(init_state, config)).lower().compile()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state))
    memory = compiled.memory_analysis()
    # Norms are whole on every device. Temporary: the bits that normal draws come from,
    # 64 a parameter, of some of them at a time.
    assert memory.output_size_in_bytes < 1.02 * whole / 8
    assert memory.temp_size_in_bytes < 2 / 3 * whole / 8
    sizes = hlo_sizes(compiled.as_text())
    matrices = [x.size for x in jax.tree.leaves(state.parameters) if x.size > 10_000]
    assert len(matrices) == 9
    assert max(sizes) <= max(matrices) / 8


def hlo_sizes(text):
    """The number of elements of every array of a compiled program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    return {math.prod(map(int, dims.split(","))) for dims in shapes}


# Ones: their sum, 2056, is no bfloat16, nor are its parts on 4 token shards, and adding
# up in bfloat16 would stop at 256.
TOKENS = dict(data=2, seq=2, tensor=2)


def test_project_sums_the_weight_gradient_in_float32():
    x_shape, w_shape, y_shape = (4, 514, 8), (8, 2, 4), (4, 514, 2, 4)
    with on_mesh(**TOKENS) as mesh:

        def put(value, spec):
            return jax.device_put(value, NamedSharding(mesh, spec))

        axes = mesh.shape
        x = put(jnp.ones(x_shape, jnp.bfloat16), activation("BTD", axes))
        dy = put(jnp.ones(y_shape, jnp.bfloat16), activation("BTNH", axes))
        w = put(jnp.ones(w_shape, jnp.float32), parameter("DNH", w_shape, axes))

        def backward(x, w, dy):
            y, pull = jax.vjp(functools.partial(project, "BTD,DNH->BTNH"), x, w)
            return (y, *pull(dy))

        y, dx, dw = jax.jit(backward)(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert y.sharding.spec == activation("BTNH", axes) and dx.sharding == x.sharding
    assert dw.sharding == w.sharding
    np.testing.assert_array_equal(np.asarray(y, np.float32), 8)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), 8)
    np.testing.assert_array_equal(np.asarray(dw), 2056)
    assert float(jnp.bfloat16(2056)) != 2056 and float(jnp.bfloat16(514)) != 514


def test_embed_sums_the_table_gradient_in_float32():
    with on_mesh(**TOKENS) as mesh:
        axes = mesh.shape
        ids = np.full((4, 514), 5, np.int32)
        values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
        spec = parameter("VD", values.shape, axes)
        table = jax.device_put(values, NamedSharding(mesh, spec))
        ids = jax.device_put(ids, NamedSharding(mesh, activation("BT", axes)))

        def backward(table, ids):
            x, pull = jax.vjp(lambda t: embed(t, ids, jnp.bfloat16), table)
            return x, *pull(jnp.ones_like(x))

        x, gradient = jax.jit(backward)(table, ids)
    assert (x.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
    assert x.sharding.spec == activation("BTD", axes)
    assert gradient.sharding == table.sharding
    rows = np.broadcast_to(values[5], x.shape)
    np.testing.assert_array_equal(np.asarray(x, np.float32), rows)
    want = np.zeros_like(values)
    want[5] = 2056
    np.testing.assert_array_equal(np.asarray(gradient), want)


@pytest.mark.parametrize(
    "num_tokens, over_tensor",
    [(T, True), pytest.param(14, False, marks=pytest.mark.slow)],
)
def test_the_residual_stream_lies_over_tensor_too(num_tokens, over_tensor, monkeypatch):
    """Where tensor divides a device's tokens: 8, not 7."""
    seen = []

    def spy(stacks, rest, x, *others):
        seen.append(jax.typeof(x).sharding.spec[1])
        return run_stacks(stacks, rest, x, *others)

    monkeypatch.setattr(transformer, "run_stacks", spy)
    loss, x, gradients, _ = library.__wrapped__(
        "llama", "fsdp x seq x tensor", num_tokens=num_tokens
    )
    tokens = ("ring", "seq", "tensor") if over_tensor else ("ring", "seq")
    assert set(seen) == {tokens}
    want = library("llama", "one device", num_tokens=num_tokens)
    np.testing.assert_allclose(float(loss), float(want[0]), rtol=TOLERANCE)
    assert_close((x, gradients), want[1:3])
