"""Modules as a Flax user holds them: built, called, looked at, changed, refused."""

import dataclasses
import functools
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import slow_but_for

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.config import Memory
from ulysses_jax.memory.saving import Saving
from ulysses_jax.models import (
    Attention,
    FeedForward,
    Layer,
    Norm,
    make_stack,
)
from ulysses_jax.models.kinds import KINDS
from ulysses_jax.models.stack import run_layer
from ulysses_jax.training.loss import cross_entropy
from ulysses_jax.weights.parameter import is_matrix

MODEL = Model(
    vocab_size=32,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    feed_forward_width=24,
    pattern=("window", "full"),
    window=5,
    compute_dtype="float32",
)
B, T = 4, 16
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 32, (B, T)))
POSITIONS = jnp.asarray(np.tile(np.arange(T) % 9, (B, 1)))
SEGMENTS = jnp.asarray(np.tile(np.arange(T) // 9, (B, 1)))
X = jnp.asarray(RNG.standard_normal((B, T, 16)), jnp.float32)


def on_seq(kind):
    return Mesh(np.array(jax.devices()[:4]), ("seq",), axis_types=(kind,))


MESHES = {
    "none": lambda: None,
    "auto": lambda: make_mesh(data=2, seq=4),
    "explicit": lambda: make_mesh(data=2, seq=4, axis_type=AxisType.Explicit),
    "auto, tensor": lambda: make_mesh(fsdp=2, seq=2, tensor=2),
    "explicit, tensor": lambda: make_mesh(
        fsdp=2, seq=2, tensor=2, axis_type=AxisType.Explicit
    ),
    "explicit, ring": lambda: make_mesh(
        data=2, ring=2, seq=2, axis_type=AxisType.Explicit
    ),
    "auto, seq alone": lambda: on_seq(AxisType.Auto),
    "explicit, seq alone": lambda: on_seq(AxisType.Explicit),
}


def set_mesh(name):
    mesh = MESHES[name]()
    # Without one, those of JAX's own: `jax.set_mesh` wants a mesh.
    return jax.set_mesh(mesh if mesh else Mesh(np.empty((), object), ()))


def transformer(**options):
    return Transformer(MODEL, rngs=nnx.Rngs(0), **options)


def loss(model, tokens):
    logits = model(tokens, positions=POSITIONS, segment_ids=SEGMENTS)
    return jnp.square(logits).mean()


@functools.cache
def plain():
    """Logits and gradients on one device."""
    model = transformer()
    gradients = nnx.jit(nnx.grad(loss))(model, TOKENS)
    return model(TOKENS), jax.tree.leaves(nnx.to_pure_dict(gradients))


def assert_close(got, want):
    scale = max(float(np.abs(want).max()), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(
    "mesh",
    slow_but_for(["auto, tensor"], MESHES),
)
def test_a_transformer_on_every_mesh(mesh):
    """Without jit and under it, forward and every gradient."""
    want, want_gradients = plain()
    with set_mesh(mesh):
        model = transformer()
        logits = model(TOKENS)
        assert logits.shape == (B, T, 32) and logits.dtype == jnp.float32
        assert_close(logits, want)
        assert_close(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS), want)
        gradients = nnx.jit(nnx.grad(nnx.remat(loss)))(model, TOKENS)
    gradients = jax.tree.leaves(nnx.to_pure_dict(gradients))
    for got, wanted in zip(gradients, want_gradients, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(
    "mesh", slow_but_for(["explicit, tensor", "auto, seq alone"], MESHES)
)
def test_a_layer_and_its_parts_on_every_mesh(mesh):
    """One layer is an ordinary module, called on global [B, T, D]."""

    def parts(run=lambda f: f):
        rngs = nnx.Rngs(0)
        for module in (
            Layer(MODEL, rngs=rngs),
            Attention(MODEL, rngs=rngs),
            FeedForward(MODEL, rngs=rngs),
            Norm(MODEL, rngs=rngs),
        ):
            yield run(lambda module, x: module(x))(module, X)

    want = list(parts())
    with set_mesh(mesh):
        for got, wanted in zip(parts(nnx.jit), want, strict=True):
            assert got.shape == X.shape and got.dtype == X.dtype
            assert_close(got, wanted)
        if mesh == "explicit, tensor":
            # Lies as x, so that the two may be added, and eagerly too.
            x = jax.device_put(X, NamedSharding(MESHES[mesh](), P("fsdp", "seq")))
            layer = Layer(MODEL, rngs=nnx.Rngs(0))
            y = x + layer(x, positions=POSITIONS, segment_ids=SEGMENTS)
            assert y.sharding.is_equivalent_to(x.sharding, 3)


def test_the_kind_of_a_layer():
    """The first of the pattern, or the one that is asked for."""
    window, full = (
        Layer(MODEL, rngs=nnx.Rngs(0), kind=kind)(X) for kind in (None, "full")
    )
    assert_close(window[:, :5], full[:, :5])
    assert float(jnp.abs(window - full)[:, 5:].max()) > 1e-3


def test_a_second_call_compiles_nothing():
    model = transformer()
    model(TOKENS, segment_ids=SEGMENTS)
    with jax.log_compiles():
        counts = Counter()
        logger = __import__("logging").getLogger("jax")
        handler = __import__("logging").Handler()
        handler.emit = lambda record: counts.update(["compiled"])
        logger.addHandler(handler)
        try:
            model(TOKENS, segment_ids=SEGMENTS)
        finally:
            logger.removeHandler(handler)
    assert not counts


def test_features_and_head_are_what_the_tiled_loss_takes():
    """Of a scaled vocabulary, beside the loss of whole logits."""
    model, labels = transformer(), jnp.roll(TOKENS, -1, axis=1)
    x = model.features(TOKENS)
    got = cross_entropy(x, model.head, labels, tile_tokens=7)
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(model(TOKENS)), labels[..., None], -1
    )
    np.testing.assert_allclose(float(got), -float(chosen.sum()), rtol=1e-5)


def test_memory_acts_from_outside():
    model = transformer()
    saving = Saving(
        Memory(remat="full", sequence_chunk_tokens=4, head_chunks=2, mlp_tile_tokens=3)
    )
    assert_close(model.features(TOKENS, run=saving), model.features(TOKENS))
    plain, saved = (
        str(jax.make_jaxpr(lambda: model.features(TOKENS, run=run))())  # noqa: B023
        for run in (run_layer, saving)
    )
    assert saved.count("scan[") > plain.count("scan[") + 3


def test_print_and_tabulate():
    model = transformer()
    assert "DNH" in str(model) and "Attention" in str(model)
    table = nnx.tabulate(model, TOKENS)
    assert "Transformer" in table and "layers" in table


def test_state_has_a_leading_dim_in_stacks_alone():
    state = nnx.to_pure_dict(nnx.state(transformer()))
    assert state["layers"][0]["attention"]["q"].shape == (1, 16, 4, 4)
    assert state["rest"][0]["attention"]["q"].shape == (16, 4, 4)
    layer = nnx.to_pure_dict(nnx.state(Layer(MODEL, rngs=nnx.Rngs(0))))
    assert layer["attention"]["q"].shape == (16, 4, 4)
    assert [layer.kind for layer in transformer().layers] == ["window", "full"]


def test_an_optimizer_of_flax_trains_it():
    model = transformer()
    optimizer = nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)
    labels = jnp.roll(TOKENS, -1, axis=1)

    @nnx.jit
    def step(model, optimizer):
        def objective(model):
            x = model.features(TOKENS)
            return cross_entropy(x, model.head, labels, tile_tokens=16) / labels.size

        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("mesh", ["explicit, tensor"])
def test_orbax_saves_and_restores_its_state(mesh, tmp_path):
    with set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        model = transformer()
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        other = Transformer(MODEL, rngs=nnx.Rngs(1))
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            nnx.state(other),
        )
        nnx.update(other, checkpointer.restore(tmp_path / "model", target))
        assert_close(other(TOKENS), model(TOKENS))


class Doubled(FeedForward):
    def __call__(self, x):
        return 2 * super().__call__(x)


class DoubledLayer(Layer):
    def __init__(self, model, *, rngs, kind=None):
        super().__init__(model, rngs=rngs, kind=kind)
        self.feed_forward = Doubled(model, rngs=rngs)


class Squared(nnx.Module):
    """Of another library: no letters, no products of this one."""

    def __init__(self, rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.square(self.up(x)))


@pytest.mark.parametrize("mesh", ["explicit, tensor", "none"])
def test_another_feed_forward(mesh):
    """By subclassing, and by putting a stack of one's own in its place, tiled too."""
    with set_mesh(mesh):
        plain, doubled = transformer(), transformer(make_layer=DoubledLayer)
        for layer in (*plain.layers, *plain.rest):
            layer.feed_forward.down[...] = 2 * layer.feed_forward.down[...]
        for mine, other in zip(doubled.layers, plain.layers, strict=True):
            mine.feed_forward.down[...] = other.feed_forward.down[...] / 2
            mine.feed_forward.up[...] = other.feed_forward.up[...]
            mine.feed_forward.gate[...] = other.feed_forward.gate[...]
            mine.attention = other.attention
        doubled.rest[0].feed_forward = plain.rest[0].feed_forward
        doubled.rest[0].attention = plain.rest[0].attention
        doubled.embedding, doubled.unembedding = plain.embedding, plain.unembedding
        assert_close(doubled(TOKENS), plain(TOKENS))

        changed = transformer()
        for layer in changed.layers:
            layer.feed_forward = make_stack(Squared, 1, nnx.Rngs(3))
        changed.rest[0].feed_forward = Squared(nnx.Rngs(4))

        got, want = (
            jax.tree.leaves(
                nnx.jit(
                    nnx.grad(
                        lambda model, run=run: (
                            model.features(TOKENS, run=run) * X
                        ).sum()
                    )
                )(changed)
            )
            for run in (
                Saving(Memory(remat="full", mlp_tile_tokens=3)),
                Saving(Memory(remat="none")),
            )
        )
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)


class PostNorm(Layer):
    """Its own order of parts, which pieces do not know."""

    def __call__(self, x, positions=None, segment_ids=None, *, angles=None):
        x = x + self.attention_norm(
            self.attention(x, positions, segment_ids, angles=angles)
        )
        return x + self.feed_forward_norm(self.feed_forward(x))


def test_a_layer_with_a_call_of_its_own_is_not_taken_apart():
    model = transformer(make_layer=PostNorm)
    groups = Saving(Memory(remat="full", head_chunks=2, mlp_tile_tokens=3))
    assert_close(model.features(TOKENS, run=groups), model.features(TOKENS))
    with pytest.raises(ValueError, match="PostNorm with Attention is no"):
        model.features(TOKENS, run=Saving(Memory(sequence_chunk_tokens=4)))


def test_what_does_not_fit_into_a_stack_is_refused():
    model = transformer()
    model.layers[0].feed_forward = make_stack(Squared, 2, nnx.Rngs(3))
    with pytest.raises(ValueError, match="feed_forward.* a leading dim of 2"):
        model(TOKENS)
    layer = Layer(MODEL, rngs=nnx.Rngs(0))
    layer.feed_forward = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = transformer()
    model.rest[0] = layer
    with pytest.raises(ValueError, match="RngCount|RngKey|RngState"):
        model(TOKENS)


class RunningMean(nnx.Module):
    """A kind: each token takes the mean of all before it."""

    def __init__(self, model, *, rngs):
        self.scale = nnx.Param(jnp.ones(model.width))

    def __call__(self, x, positions=None, segment_ids=None, *, angles=None):
        count = jnp.arange(1, x.shape[1] + 1)[None, :, None]
        return jnp.cumsum(x, axis=1) / count * self.scale[...]


def test_a_kind_of_ones_own(monkeypatch):
    """One entry in one dict."""
    monkeypatch.setitem(KINDS, "mean", RunningMean)
    size = Model(
        vocab_size=32,
        width=16,
        num_layers=4,
        num_heads=4,
        pattern=("mean", "full"),
        compute_dtype="float32",
    )
    model = Transformer(size, rngs=nnx.Rngs(0))
    logits = model(TOKENS)
    assert model.layers[0].attention.scale[...].shape == (2, 16)
    assert not is_matrix(model.layers[0].attention.scale)  # it has a leading dim
    with set_mesh("explicit, tensor"):
        other = Transformer(size, rngs=nnx.Rngs(0))
        assert_close(other(TOKENS), logits)
    # Causal: what comes after changes nothing.
    later = model(TOKENS.at[:, 9:].set(0))
    assert_close(later[:, :9], logits[:, :9])
    with pytest.raises(ValueError, match="sequence_chunk_tokens 4 takes layers apart"):
        model.features(TOKENS, run=Saving(Memory(sequence_chunk_tokens=4)))


def test_zigzag_order_is_the_same_model():
    """On a ring, tokens in zigzag order: the same logits, in that order."""
    from dataclasses import replace

    from ulysses_jax.parallel.zigzag import zigzag_order

    want = transformer()(TOKENS)
    order = zigzag_order(T, 2)
    with set_mesh("explicit, ring"):
        model = Transformer(replace(MODEL, zigzag=True), rngs=nnx.Rngs(0))
        assert_close(model(TOKENS[:, order]), want[:, order])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda model: model(TOKENS[:, :15]),
            "15 tokens do not divide over ring 1 x seq",
        ),
        (lambda model: model(TOKENS[:3]), "3 rows do not divide over data 2 x fsdp 1"),
        (lambda model: model(TOKENS[0]), "tokens are \\[B, T\\]"),
        (lambda model: model(X[..., 0]), "tokens are integers, not float32"),
        (lambda model: model(TOKENS, POSITIONS[:, :3]), "positions has shape"),
        (lambda model: model(np.full((B, T), 2**40)), "tokens .* exceed int32"),
    ],
)
def test_calls_that_cannot_work(call, message):
    with set_mesh("auto"), pytest.raises(ValueError, match=message):
        call(on_auto())


@functools.cache
def on_auto():
    return transformer()


def test_arrays_on_another_mesh_are_refused():
    with set_mesh("explicit, tensor"):
        model = transformer()
    with pytest.raises(ValueError, match="no mesh is set: call jax.set_mesh"):
        model(TOKENS)
    with set_mesh("explicit"), pytest.raises(ValueError, match="fsdp=2.*data=2"):
        model(TOKENS)
    with (
        set_mesh("auto, seq alone"),
        pytest.raises(ValueError, match="the mesh that is"),
    ):
        model(TOKENS)
    with set_mesh("auto, tensor"):
        layer = Layer(MODEL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no mesh is set"):
        layer(X)


@pytest.mark.parametrize(
    "mesh",
    slow_but_for(["auto"], ["auto", "explicit", "auto, seq alone", "explicit, tensor"]),
)
def test_what_was_made_before_a_mesh_is_laid_on_it(mesh, request):
    """Without jit: tokens and activations under modules of the mesh, and modules."""
    size = dataclasses.replace(MODEL, num_layers=1, pattern=("window",))
    model, part = (
        Transformer(size, rngs=nnx.Rngs(0)),
        FeedForward(size, rngs=nnx.Rngs(0)),
    )
    want, want_part = model(TOKENS), part(X)
    with set_mesh(mesh):
        assert_close(part(X), want_part)
        assert_close(FeedForward(size, rngs=nnx.Rngs(0))(X), want_part)
        assert_close(model(TOKENS), want)
        made = Transformer(size, rngs=nnx.Rngs(0))
        assert_close(made.features(TOKENS) @ made.head.T, want)
        if request.node.get_closest_marker("slow"):
            assert_close(model.features(TOKENS) @ model.head.T, want)
            modules = [Layer(size, rngs=nnx.Rngs(0))]
            for module in modules + [part] * ("auto" in mesh):
                dx = jax.grad(lambda x, f=module: f(x).sum())(X)
                assert dx.shape == X.shape
            gradients = nnx.jit(nnx.grad(loss))(model, TOKENS)
            assert jax.tree.leaves(nnx.to_pure_dict(gradients))


def test_what_is_bound_to_one_device_is_refused_on_a_mesh():
    x = jax.device_put(X, jax.devices()[0])
    model, ids = transformer(), jax.device_put(TOKENS, jax.devices()[0])
    message = r"shape \(4, 16.* is bound to one device, but the mesh .* is data=2"
    with set_mesh("auto"):
        for call in (Norm(MODEL), FeedForward(MODEL, rngs=nnx.Rngs(0))):
            with pytest.raises(ValueError, match=message):
                call(x)
        for call in (model, model.features):
            with pytest.raises(ValueError, match=message):
                call(ids)


def test_a_module_of_auto_axes_is_refused_under_explicit_ones():
    with set_mesh("auto"):
        modules = [each(MODEL, rngs=nnx.Rngs(0)) for each in (Layer, Norm, FeedForward)]
    for module in modules:
        with (
            set_mesh("explicit"),
            pytest.raises(ValueError, match="lies on a mesh with Auto axes, but the"),
        ):
            module(X)
        with (
            set_mesh("auto, tensor"),
            pytest.raises(ValueError, match="data=2.*but the mesh that is set is"),
        ):
            module(X)


@pytest.mark.parametrize("make", [Layer, Attention, FeedForward, Norm])
def test_what_is_no_activation_is_refused(make):
    module = make(MODEL, rngs=nnx.Rngs(0))
    for x, said in (
        (X[0], r"float32 \(16, 16\)"),
        (X[..., :8], r"float32 \(4, 16, 8\)"),
        (TOKENS, r"int\d+ \(4, 16\)"),
        (TOKENS[..., None] + jnp.zeros(16, int), r"int\d+ \(4, 16, 16\)"),
        ([[1, 2]], "list"),
    ):
        message = f"{make.__name__} takes .*B, T, D.* a width D of 16, not {said}"
        with pytest.raises(ValueError, match=message):
            module(x)


def test_a_stack_is_not_called():
    model = transformer()
    for each in (model.layers[0], model.layers[0].attention):
        name = type(each).__name__
        with pytest.raises(ValueError, match=f"this {name} is a stack of 1 layers, wh"):
            each(X)
    graph, state = nnx.split(model.layers[1].feed_forward)  # as the message says
    alone = nnx.merge(graph, jax.tree.map(lambda w: w[0], state))
    assert alone(X).shape == X.shape


def test_ids_of_no_row_are_refused_where_they_are_known():
    learned = Model(
        vocab_size=32, width=16, num_heads=4, positions="learned", max_positions=20
    )
    model = Transformer(learned, rngs=nnx.Rngs(0))
    for wrong in (TOKENS.at[0, 0].set(32), np.asarray(TOKENS.at[0, 0].set(32))):
        for call in (model, model.features):
            with pytest.raises(
                ValueError, match="to 32, but model.vocab_size is 32: u"
            ):
                call(wrong)
    with pytest.raises(ValueError, match="tokens are -1 to"):
        model(TOKENS.at[0, 0].set(-1))
    with pytest.raises(ValueError, match="positions are 4 to 19, but model.max_p"):
        Transformer(dataclasses.replace(learned, max_positions=19), rngs=nnx.Rngs(0))(
            TOKENS, jnp.broadcast_to(4 + jnp.arange(T), (B, T))
        )
    # Traced ones take a row of zeros.
    jax.eval_shape(model.features, TOKENS + 40)


def test_tokens_as_lists():
    model = transformer()
    assert_close(model(TOKENS.tolist()), model(TOKENS))
    with pytest.raises(ValueError, match="tokens are rows of different lengths: pad"):
        model([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"tokens are \[B, T\], and have shape \(2,\)"):
        model([1, 2])


@pytest.mark.parametrize("rngs", [0, jax.random.key(0)], ids=["seed", "key"])
def test_a_seed_is_no_rngs(rngs):
    makes = [partial(each, MODEL) for each in (Transformer, Layer, FeedForward)]
    for make in (*makes, lambda rngs: make_stack(Squared, 2, rngs)):
        with pytest.raises(ValueError, match=r"rngs is a flax.nnx.Rngs, not .*Rngs\(0"):
            make(rngs=rngs)


def test_a_kind_that_attention_has_not():
    for make in (Layer, Attention):
        with pytest.raises(ValueError, match=r"does not say .* Model\(window=\.\.\.\)"):
            make(Model(width=32, num_heads=4), rngs=nnx.Rngs(0), kind="window")
    with pytest.raises(ValueError, match="kind 'windows' is none of Attention: use"):
        Attention(MODEL, rngs=nnx.Rngs(0), kind="windows")


def test_modules_that_cannot_be():
    with pytest.raises(ValueError, match="size is a ulysses_jax.config.Model, not the"):
        Transformer({"width": 32}, rngs=nnx.Rngs(0))  # pyright: ignore
    with pytest.raises(
        ValueError, match="'memory', which is no kind.*'full', 'window'"
    ):
        Transformer(Model(pattern=("memory",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'low_rank'.* is causal: use 'linear' or"):
        Transformer(Model(pattern=("low_rank",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width 16 does not divide"):
        Layer(Model(width=16, num_heads=3), rngs=nnx.Rngs(0))
    with (
        set_mesh("explicit, tensor"),
        pytest.raises(ValueError, match="3, does not div"),
    ):
        Layer(Model(num_heads=3, head_size=4), rngs=nnx.Rngs(0))
    learned = Model(width=16, num_heads=4, positions="learned", max_positions=8)
    with pytest.raises(ValueError, match="16 tokens, but model.max_positions is 8"):
        Transformer(learned, rngs=nnx.Rngs(0))(TOKENS)


def test_a_kind_that_returns_another_shape(monkeypatch):
    class Half(RunningMean):
        def __call__(self, x, *args, **options):
            return x[..., :8]

    monkeypatch.setitem(KINDS, "half", Half)
    layer = Layer(MODEL, rngs=nnx.Rngs(0), kind="half")
    with pytest.raises(ValueError, match=r"'half' returned float32 \(4, 16, 8\)"):
        layer(X)


def test_a_layer_inside_a_shard_map_is_refused():
    with set_mesh("auto"):
        layer = FeedForward(MODEL, rngs=nnx.Rngs(0))
        run = jax.shard_map(
            layer, in_specs=P("data", "seq"), out_specs=P("data", "seq")
        )
        with pytest.raises(ValueError, match="called inside a shard_map over"):
            run(X)
