"""Each optimizer on each mesh: what plain Optax makes of each layer's own matrices."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizer_cases import (
    OPTIMIZERS,
    VARIANTS,
    assert_same_matrices,
    begun,
    config_of,
    grown,
    matrices_of,
    put_like,
    take_plain_steps,
    tree_of,
)
from run_cases import NUM_VALID, compiled, mesh_of, put_batch
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax.costs.collectives import find_collectives
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.optimizer import muon_bytes
from ulysses_jax.training.matrix import matrix_of
from ulysses_jax.training.state import abstract_state, lay, optimizer_of, shard_bytes
from ulysses_jax.training.step import make_validation_step
from ulysses_jax.training.update import update

NUM_STEPS = 3
LAYER = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 160
ON_HOST = dict(offload=["optimizer", "parameters"])
CASES = {
    "one device": ({}, {}),
    "fsdp, seq, many stacks": (dict(fsdp=2, seq=4), dict(variant="stacks")),
    "fsdp, seq, tensor": (dict(fsdp=2, seq=2, tensor=2), {}),
    "megatron": (
        dict(fsdp=2, seq=2, tensor=2),
        dict(model=dict(strategy="megatron")),
    ),
    "data, ring, on the host": (dict(data=2, ring=4), dict(memory=ON_HOST)),
    "many stacks on the host": (
        dict(fsdp=2, seq=2, tensor=2),
        dict(variant="stacks", memory=ON_HOST),
    ),
    "adapters": (dict(fsdp=2, seq=2, tensor=2), dict(variant="adapters")),
    "moments on the host": (
        dict(fsdp=4, tensor=2),
        dict(memory=dict(offload=["optimizer"])),
    ),
}
QUICK = [
    ("muon", "fsdp, seq, tensor"),
    ("adafactor", "fsdp, seq, tensor"),
    ("sgd", "fsdp, seq, tensor"),
    ("muon", "data, ring, on the host"),
    ("adafactor", "data, ring, on the host"),
]


def gradients_of(step, tree):
    """Some are cut by the norm of all, some are not."""
    rng = np.random.default_rng(step)
    size = 1.0 if step % 2 else 0.002
    return jax.tree.map(lambda x: np.float32(size * rng.standard_normal(x.shape)), tree)


def config_and_variant(name, case):
    degrees, options = CASES[case]
    options = dict(options)
    variant = options.pop("variant", None)
    if variant:
        options["model"] = VARIANTS[variant]
    return config_of(degrees, optimizer=name, **options), variant


@functools.cache
def want(name, variant):
    training = config_of({}, optimizer=name).training
    before = grown(variant)

    def gradients(step, matrices):
        del matrices
        return matrices_of(gradients_of(step, before))

    return take_plain_steps(training, matrices_of(before), gradients, NUM_STEPS)


@functools.cache
def compiled_update(name, case):
    """From gradients, parameters and state, each where the run has it."""
    config, _ = config_and_variant(name, case)
    with jax.set_mesh(mesh_of(**CASES[case][0])):
        optimizer, shapes = optimizer_of(config), abstract_state(config)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(gradients, parameters, state):
            gradients = lay("moments", gradients, config)
            parameters = lay("moments", parameters, config)
            tokens = jnp.float32(1)
            return update(optimizer, gradients, tokens, parameters, state)[:2]

        traced = step.trace(shapes.parameters, shapes.parameters, shapes.optimizer)
        return config, shapes, traced.lower().compile()


@pytest.mark.parametrize("name, case", slow_but_for(QUICK, OPTIMIZERS, CASES))
def test_steps_are_those_of_plain_optax(name, case):
    _, variant = config_and_variant(name, case)
    before = grown(variant)
    config, shapes, step = compiled_update(name, case)
    mesh = mesh_of(**CASES[case][0])
    with jax.set_mesh(mesh):
        state = begun(config, mesh, before)
        parameters, state = state.parameters, state.optimizer
        for i in range(NUM_STEPS):
            gradients = put_like(shapes.parameters, mesh, gradients_of(i, before))
            parameters, state = step(gradients, parameters, state)

    def same(x, like):
        assert x.shape == like.shape
        if like.sharding is not None:
            assert x.sharding.spec == like.sharding.spec
            assert x.sharding.memory_kind == (like.sharding.memory_kind or "device")

    jax.tree.map(same, state, shapes.optimizer)
    assert_same_matrices(parameters, want(name, variant), 1e-5)


def sent_by_muon(case):
    config, _, step = compiled_update("muon", case)
    degrees = vars(configs.Mesh(**CASES[case][0]))
    sent = collections.Counter()
    for each in find_collectives(parse(step.as_text()), degrees, gpus_per_host=8):
        sent[each.kind, each.axes] += each.count * each.sent_bytes
    return config, sent


def test_muon_exchanges_matrices_and_gathers_none():
    """Each device has a whole matrix of one of 2 layers, padded to 8: over fsdp x seq
    it sends three quarters of as much there, over tensor half; and as much back."""
    config, sent = sent_by_muon("fsdp, seq, tensor")
    for axes, share in (("fsdp+seq", 3 / 4), ("tensor", 1 / 2)):
        exchanged = sent["all-to-all", axes]
        assert exchanged == 2 * 4 * LAYER * share
        assert exchanged == muon_bytes(config, "all-to-all", axes)
    assert {kind for kind, _ in sent} <= {"all-to-all", "all-reduce"}
    assert sum(sent[key] for key in sent if key[0] == "all-reduce") < 100


def test_on_the_host_muon_gathers_each_layer_once():
    config, sent = sent_by_muon("data, ring, on the host")
    gathered = sent["all-gather", "ring"]
    assert gathered == 4 * 2 * LAYER * 3 / 4
    assert gathered == muon_bytes(config, "all-gather", "ring")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_part_of_the_parameters_is_enough(name):
    """On no mesh, too."""
    with jax.set_mesh(mesh_of()):
        optimizer = optimizer_of(config_of({}, optimizer=name))
    attention = grown()["layers"][0]["attention"]
    part = dict(layers={0: dict(attention=dict(q=attention["q"]))})
    state = jax.eval_shape(optimizer.init, part)
    updates, after = jax.eval_shape(optimizer.update, part, state, part)
    assert updates["layers"][0]["attention"]["q"].shape == attention["q"].shape
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_alone_have_a_state(name):
    config = config_of(dict(fsdp=2, seq=4), optimizer=name, model=VARIANTS["adapters"])
    with jax.set_mesh(mesh_of(fsdp=2, seq=4)):
        state = abstract_state(config)
    trained = sum(x.size for x in jax.tree.leaves(state.parameters))
    kept = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    most = dict(adamw=2, adafactor=1.1).get(name, 1)
    assert 0 < kept <= most * trained


def moments_bytes(name, degrees):
    config = config_of(degrees, optimizer=name)
    with jax.set_mesh(mesh_of(**degrees)):
        state = abstract_state(config)
    return shard_bytes([x for x in jax.tree.leaves(state.optimizer) if x.ndim])


def test_bytes_of_moments():
    """Of `MODEL`: of one device, and of one of eight, cut as ZeRO cuts AdamW's."""
    matrices, tables, vectors = 2 * LAYER, 2 * 24 * 128, 5 * 128
    cut = dict(fsdp=2, seq=2, tensor=2)
    for degrees, share in (({}, 1), (cut, 8)):
        one = 4 * (matrices + tables) // share + 4 * vectors
        assert moments_bytes("adamw", degrees) == 2 * one
        assert moments_bytes("lion", degrees) == one
        assert moments_bytes("sgd", degrees) == one
        others = 4 * tables // share + 4 * vectors
        assert moments_bytes("muon", degrees) == one + others
    # Rows and columns of q, out, gate, up, down; k, v, tables and vectors are whole.
    factored = 2 * (2 * 256 + 3 * 288)
    whole = 2 * 2 * 128 * 64 + tables + vectors
    found = moments_bytes("adafactor", {}) // 4 - factored - whole
    assert 0 < found < 50  # of each that is not there, Optax keeps one number


@functools.cache
def plain_run(name):
    """Gradients of one device's model, and plain Optax."""
    config = config_of({}, optimizer=name)
    with jax.set_mesh(mesh_of()):
        batch, validate = put_batch(mesh_of(), config), make_validation_step(config)
        gradients = jax.jit(jax.grad(lambda p: validate(p, batch)[0] / NUM_VALID))

    def of(step, matrices):
        del step
        with jax.set_mesh(mesh_of()):
            return matrices_of(gradients(tree_of(matrices, grown())))

    return take_plain_steps(config.training, matrices_of(grown()), of, NUM_STEPS)


RUNS = {
    "fsdp, seq, tensor": (dict(fsdp=2, seq=2, tensor=2), {}),
    "ring, seq": (dict(fsdp=2, ring=2, seq=2), {}),
    "megatron": (dict(data=2, seq=4), dict(model=dict(strategy="megatron"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", RUNS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_takes_these_steps_at_each_stage(name, stage, mesh_name):
    degrees, options = RUNS[mesh_name]
    config = config_of(degrees, optimizer=name, zero_stage=stage, **options)
    mesh, step = mesh_of(**degrees), compiled(config)
    with jax.set_mesh(mesh):
        state, batch = begun(config, mesh, grown()), put_batch(mesh, config)
        for _ in range(NUM_STEPS):
            state, _ = step(state, batch)
    got, before = matrices_of(state.parameters), matrices_of(grown())
    # A sign or a quotient of gradients near 0 is rounding: of few elements.
    tolerance = 0.05 if name == "lion" else 1e-3
    for key, x in plain_run(name).items():
        moved = np.linalg.norm(x - before[key])
        assert np.linalg.norm(got[key] - x) < tolerance * moved + 1e-7, key


@pytest.mark.parametrize(
    "letters, rows", [("DNH", 1), ("NHD", 2), ("DNU", 1), ("NUD", 2), ("DN", 1)]
)
def test_heads_and_their_features_are_one_side(letters, rows):
    """U, too, a value's size in layers of the delta rule."""
    matrix = matrix_of(letters, (4, 2, 3)[: len(letters)], in_stack=False)
    assert matrix.num_row_dims == rows
