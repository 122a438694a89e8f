"""Every kind of attention beside the exact ones, by one set of tests: its function over
shards, and its layers in a model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recurrences import DOCUMENTS, FUNCTIONS, ONE, B, T, assert_close, exact, inputs
from recurrences import results as results_of
from slow import slow_but_for

from ulysses_jax import Model, Transformer, make_mesh
from ulysses_jax.config import Memory
from ulysses_jax.memory.saving import Saving
from ulysses_jax.models.kinds import make_kind
from ulysses_jax.models.layer import Layer
from ulysses_jax.weights.whole import unbind

KINDS = tuple(FUNCTIONS)
IDS = {"one": None, "several": DOCUMENTS}
EXPLICIT = dict(axis_type=AxisType.Explicit)


def mesh_of(axis_type=AxisType.Auto, **degrees):
    num = int(np.prod(list(degrees.values()), dtype=int))
    return make_mesh(**degrees, devices=jax.devices()[:num], axis_type=axis_type)


def two_of_each(names):
    """A mesh that has these axes alone."""
    devices = jax.devices()[: 2 ** len(names)]
    return jax.make_mesh((2,) * len(names), names, devices=devices)


def ids_of(kind, documents):
    return {} if kind == "low_rank" else dict(segment_ids=documents)


class TestFunctions:
    MESHES = [
        dict(),
        dict(seq=2),
        dict(seq=4),
        dict(seq=8),
        dict(ring=2, seq=4),
        dict(ring=4, seq=2),
        dict(data=2, ring=2, tensor=2),
        dict(fsdp=2, seq=2, tensor=2),
    ]
    QUICK = [
        ("linear", "several", dict(seq=8)),
        ("delta", "several", dict(ring=4, seq=2)),
        ("convolution", "several", dict(ring=2, seq=4)),
        ("low_rank", "several", dict(ring=2, seq=4)),
    ]

    CASES = [
        each
        for each in slow_but_for(QUICK, KINDS, IDS, MESHES)
        if each.values[:2] != ("low_rank", "one")  # it has no documents
    ]

    @pytest.mark.parametrize("kind, documents, degrees", CASES)
    def test_equals_float64(self, kind, documents, degrees):
        """The output and all gradients."""
        got = results_of(self.spread(kind, documents, **degrees), kind, inputs(kind))
        assert_close(got, self.oracle(kind, documents))

    @staticmethod
    def spread(kind, documents="several", **degrees):
        options = ids_of(kind, IDS[documents])
        return functools.partial(FUNCTIONS[kind], mesh=mesh_of(**degrees), **options)

    @staticmethod
    @functools.cache
    def oracle(kind, documents="several", dtype=jnp.float32):
        ids = ONE if IDS[documents] is None else IDS[documents]
        return exact(kind, inputs(kind, dtype), ids)

    @pytest.mark.parametrize("kind", slow_but_for(["delta"], KINDS))
    def test_bfloat16(self, kind):
        given = inputs(kind, jnp.bfloat16)
        got = results_of(self.spread(kind, ring=2, seq=4), kind, given)
        assert_close(got, self.oracle(kind, dtype=jnp.bfloat16), 2**-6)

    @pytest.mark.parametrize(
        "kind, is_moved", slow_but_for([("linear", True)], KINDS, [False, True])
    )
    def test_layers_computed_again(self, kind, is_moved):
        """Under scan and checkpoint, on Explicit axes: two layers of a residual stream,
        whose inputs are kept on the device, or moved to the host."""
        first = {"convolution": "x", "low_rank": "q"}.get(kind, "v")
        policy = None
        if is_moved:
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["input"],
                offload_src="device",
                offload_dst="pinned_host",
            )

        def layers(function, given):
            def layer(x, _):
                x = checkpoint_name(x, "input")
                y = function(**given | {first: x})
                return x + y[..., : x.shape[-1]], None

            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
            return jax.lax.scan(layer, given[first], None, length=2)[0]

        def gradients(function):
            def loss(given):
                return jnp.sum(jnp.sin(layers(function, given)))

            run = jax.jit(jax.grad(loss)).trace(inputs(kind))
            assert ("<host>" in str(run.jaxpr)) == is_moved
            return run.lower().compile()(inputs(kind))

        none = jax.sharding.get_abstract_mesh()
        want = gradients(functools.partial(FUNCTIONS[kind], mesh=none))
        with jax.set_mesh(mesh_of(data=2, ring=2, tensor=2, **EXPLICIT)):
            got = gradients(FUNCTIONS[kind])
        assert_close(*(jax.tree.map(np.asarray, x) for x in (got, want)))

    @pytest.mark.parametrize("kind", slow_but_for(["delta"], KINDS))
    def test_inside_a_shard_map_over_another_axis(self, kind):
        def inside(**given):
            def local(given, ids):
                return FUNCTIONS[kind](**given, **ids_of(kind, ids))

            specs = {n: P() if n == "weights" else P("data") for n in given}
            return jax.shard_map(
                local,
                in_specs=(specs, P("data")),
                out_specs=P("data"),
                axis_names={"data"},
            )(given, jnp.asarray(DOCUMENTS))

        with jax.set_mesh(mesh_of(data=2, ring=2, tensor=2)):
            got = results_of(inside, kind, inputs(kind))
        assert_close(got, self.oracle(kind))

    @pytest.mark.parametrize(
        "kind",
        slow_but_for(["delta", "convolution"], ["linear", "delta", "convolution"]),
    )
    def test_no_bit_of_a_document_depends_on_another(self, kind):
        """Nor of the state before it, which was handed on over shards."""
        given, run = inputs(kind), self.spread(kind, ring=2, seq=4)
        before = results_of(run, kind, given)
        after = results_of(run, kind, jax.tree.map(changed, given))
        for name in before:
            if name == "weights":
                continue
            differs = (before[name] != after[name]).reshape(B, T, -1).any(-1)
            assert not differs[~CHANGED].any(), name
            assert name == "x" or differs[CHANGED].all(), name  # of x all is linear

    @pytest.mark.parametrize(
        "kind, names",
        slow_but_for(
            [(kind, ("data",)) for kind in KINDS],
            KINDS,
            [("data",), ("tensor", "data")],
        ),
    )
    def test_no_kind_needs_an_axis(self, kind, names):
        """Of the mesh's it takes those that there are."""
        mesh = two_of_each(names)
        run = functools.partial(FUNCTIONS[kind], mesh=mesh, **ids_of(kind, DOCUMENTS))
        got = jax.jit(run)(**inputs(kind))
        want = self.oracle(kind)["out"]
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


CHANGED = np.zeros((B, T), bool)
CHANGED[0, 5:19] = True  # from one shard's second token to another's
CHANGED[1, 8:16] = True  # whole shards


def changed(x):
    """In whole documents."""
    if x.shape[:2] != (B, T):
        return x
    where = CHANGED.reshape(B, T, *[1] * (x.ndim - 2))
    return jnp.where(where, x * 0.5 - 0.25, x)


class TestLayers:
    PATTERNS = ("linear",), ("delta",), ("delta", "linear", "full")
    # By what each is run with.
    MEMORIES = {
        "full": Memory(remat="full"),
        "attention": Memory(remat="attention", mlp_tile_tokens=8),
        "products": Memory(remat="products"),
        "moved": Memory(remat="attention", offload=("inputs", "attention")),
        "pieces": Memory(remat="none", sequence_chunk_tokens=4),
        "pieces and tiles": Memory(sequence_chunk_tokens=8, mlp_tile_tokens=6),
        "moved pieces": Memory(
            remat="attention", sequence_chunk_tokens=4, offload=("inputs",)
        ),
    }
    MESHES = [
        ("full", dict(data=2, ring=2, seq=2)),
        ("attention", dict(fsdp=2, seq=2, tensor=2)),
        ("products", dict(ring=2, tensor=2, **EXPLICIT)),
        ("moved", dict(ring=2, seq=4, **EXPLICIT)),
        ("pieces", dict()),
        ("pieces", dict(seq=8)),
        ("pieces", dict(ring=2, seq=2, data=2)),
        ("pieces and tiles", dict(fsdp=2, seq=2, tensor=2, **EXPLICIT)),
        ("moved pieces", dict(seq=4, **EXPLICIT)),
    ]

    CASES = [
        pytest.param(pattern, *each, id=f"{'-'.join(pattern)}-{each[0]}-{each[1]}")
        for pattern, each in itertools.product(PATTERNS, MESHES)
        if not ("full" in pattern and "pieces" in each[0] and "ring" in each[1])
    ]

    @pytest.mark.parametrize("pattern, memory, degrees", CASES)
    @pytest.mark.slow
    def test_a_model_on_every_mesh(self, pattern, memory, degrees):
        with jax.set_mesh(mesh_of(**degrees)):
            got = loss_and_gradients(pattern, self.MEMORIES[memory])
        for name, want in self.plain(pattern).items():
            np.testing.assert_allclose(
                got[name], want, atol=3e-5 * np.abs(want).max(), err_msg=name
            )

    @staticmethod
    @functools.cache
    def plain(pattern):
        return loss_and_gradients(pattern, Memory(remat="none"))

    @pytest.mark.slow
    @pytest.mark.parametrize("memory", ["full", "pieces"])
    @pytest.mark.parametrize("pattern", PATTERNS[:2], ids="-".join)
    def test_in_bfloat16(self, pattern, memory):
        """Root mean squares of errors, which of two layers are 0.041 at most."""
        with jax.set_mesh(mesh_of(ring=2, seq=2, **EXPLICIT)):
            got = loss_and_gradients(
                pattern, self.MEMORIES[memory], compute_dtype="bfloat16"
            )
        for name, want in self.plain(pattern).items():
            error = np.square(got[name] - want).mean()
            assert error <= np.square(0.05 * want).mean(), name  # 0: of the head

    @pytest.mark.slow
    @pytest.mark.parametrize("piece", [None, 4])
    @pytest.mark.parametrize("kind", ["linear", "delta"])
    def test_no_bit_of_a_document_depends_on_another(self, kind, piece):
        """Of what a layer gives, and of its input's gradient."""
        x = jax.random.normal(jax.random.key(0), (B, T, 16))
        run = Saving(Memory(sequence_chunk_tokens=piece))
        with jax.set_mesh(mesh_of(ring=2, seq=2)):
            layer, values = unbind(Layer(size((kind,)), rngs=nnx.Rngs(0)))
            values = stirred(values)

            @jax.jit
            def both(x):
                tokens = None, jnp.asarray(DOCUMENTS)
                out, pull = jax.vjp(
                    lambda x: run(layer, values, x, *tokens, angles=None, in_loop=0), x
                )
                return out, pull(jnp.cos(out))[0]

            before, after = both(x), both(changed(x))
        for one, other in zip(before, after, strict=True):
            differs = (np.asarray(one) != np.asarray(other)).any(-1)
            np.testing.assert_array_equal(differs, CHANGED)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["linear", "delta"])
    def test_no_kind_needs_an_axis(self, kind):
        x = jax.random.normal(jax.random.key(0), (B, T, 16))

        def out(names):
            with jax.set_mesh(two_of_each(names)):
                layer = functools.partial(make_kind, kind, size((kind,)))
                return jax.jit(lambda x: layer(rngs=nnx.Rngs(0))(x))(x)

        got, want = out(("data",)), out(("data", "seq"))
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["linear", "delta"])
    def test_nothing_is_before_the_first_piece(self, kind):
        """Of a norm with a bias, which makes something of zeros; on one device, and
        over four."""
        x = jax.random.normal(jax.random.key(0), (B, T, 16))

        def both(piece, **degrees):
            run = Saving(Memory(sequence_chunk_tokens=piece))
            with jax.set_mesh(mesh_of(**degrees)):
                layer = Layer(size((kind,), norm="layer"), rngs=nnx.Rngs(0))
                layer, values = unbind(layer)

                @jax.jit
                def both(x, values):
                    options = dict(angles=None, in_loop=0)
                    out, pull = jax.vjp(
                        lambda x: run(layer, values, x, None, None, **options), x
                    )
                    return out, pull(jnp.cos(out))[0]

                return jax.tree.map(np.asarray, both(x, stirred(values)))

        whole = both(None)
        for found in (both(8), both(4, seq=4)):
            for got, want in zip(found, whole, strict=True):
                np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())

    @pytest.mark.parametrize(
        "kind, piece, message",
        [
            ("linear", 5, "5 does not divide the 16 tokens of a device: use 4"),
            ("delta", 9, "9 does not divide the 16 tokens of a device: use 8"),
            ("delta", 2, "2 is less than the 3 tokens before .*: use 4"),
        ],
    )
    def test_pieces_that_do_not_fit(self, kind, piece, message):
        """They do not divide, or are fewer than the 3 that a convolution reads."""
        run = Saving(Memory(sequence_chunk_tokens=piece))

        def features(tokens):
            model = Transformer(size((kind,)), rngs=nnx.Rngs(0))
            return model.features(tokens, run=run)

        with jax.set_mesh(mesh_of(seq=2)):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(features, jnp.zeros((B, T), int))


def size(pattern, norm="zero_centered_rms", **changes):
    return Model(
        vocab_size=32,
        width=16,
        num_layers=len(pattern) + 1,
        num_heads=4,
        num_kv_heads=2,
        head_size=4,
        feed_forward_width=16,
        norm=norm,
        attention_gate="full" in pattern,
        pattern=pattern,
        delta_heads=8,
        delta_key_size=3,
        delta_value_size=5,
        **{"compute_dtype": "float32"} | changes,
    )


def stirred(values):
    """Biases start as 0, and convolutions as the token itself."""
    return tuple(
        w + 0.1 * jnp.cos(jnp.arange(w.size) + 0.0).reshape(w.shape) for w in values
    )


def loss_and_gradients(pattern, memory, **changes):
    """Of a model made on the mesh that is set, of packed rows."""
    model = Transformer(size(pattern, **changes), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    # Convolutions start as the token itself.
    state = jax.tree_util.tree_map_with_path(
        lambda path, w: w * jnp.float32(0.5) + 0.5 if "taps" in str(path) else w, state
    )
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, 32)

    @jax.value_and_grad
    def loss(state):
        model, ids = nnx.merge(graph, state), jnp.asarray(DOCUMENTS)
        x = model.features(tokens, segment_ids=ids, run=Saving(memory))
        return jnp.sum(jnp.sin(x.astype(jnp.float32)))

    run = jax.jit(loss).trace(state)
    assert ("<host>" in str(run.jaxpr)) == bool(memory.offload)
    value, gradients = run.lower().compile()(state)
    leaves = {str(k): np.asarray(v[...]) for k, v in nnx.to_flat_state(gradients)}
    return leaves | {"loss": np.asarray(value)}
