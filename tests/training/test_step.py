"""The train step gives one curve, whatever the mesh, the parts and the memory plan."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cases
from run_cases import (
    BATCH,
    NUM_VALID,
    B,
    T,
    V,
    compiled,
    first_state,
    mesh_of,
    put_batch,
    put_state,
)
from slow import slow_but_for

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.training.loss import IGNORED
from ulysses_jax.training.state import abstract_state, init_state
from ulysses_jax.training.step import (
    abstract_batch,
    make_train_step,
    make_validation_step,
    xla_options,
)

NUM_STEPS = 5
FAMILIES = ("grouped", "gpt")
ONE = {}
MESHES = {
    "data 8": dict(data=8),
    "seq 8": dict(seq=8),
    "data 2, seq 4": dict(data=2, seq=4),
    "fsdp 2, seq 4": dict(fsdp=2, seq=4),
    "data 2, seq 2, tensor 2": dict(data=2, seq=2, tensor=2),
    "ring 8": dict(ring=8),
    "ring 4, seq 2": dict(ring=4, seq=2),
    "fsdp 2, ring 2, seq 2": dict(fsdp=2, ring=2, seq=2),
    "data 2, ring 2, tensor 2": dict(data=2, ring=2, tensor=2),
}
SHARDED = MESHES["fsdp 2, seq 4"]
TOLERANCE = 1e-5


def make_config(family, degrees, *, dtype="float32", model=(), memory=(), **training):
    return run_cases.make_config(
        degrees,
        family=family,
        dtype=dtype,
        model=dict(model),
        memory=dict(memory),
        num_steps=NUM_STEPS,
        **training,
    )


def norm_of(tree):
    squares = [
        (np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)
    ]
    return math.sqrt(sum(squares))


@functools.cache
def _train(family, degrees, options):
    config = make_config(family, dict(degrees), **dict(options))
    step, mesh = compiled(config), mesh_of(**dict(degrees))
    with jax.set_mesh(mesh):
        state = put_state(first_state(family), config, mesh)
        batch = put_batch(mesh, config)
        rows, moments = [], []
        for _ in range(NUM_STEPS):
            state, metrics = step(state, batch)
            rows.append({name: float(value) for name, value in metrics.items()})
            moments.append(norm_of(state.optimizer[1][0].mu))
    curves = {name: [row[name] for row in rows] for name in rows[0]}
    return curves, moments[0], state


def train(family, degrees, **options):
    return _train(family, tuple(degrees.items()), tuple(options.items()))


def assert_same_curves(got, want):
    for name in ("loss", "learning_rate"):
        np.testing.assert_allclose(got[name], want[name], TOLERANCE, err_msg=name)
    # The first two have the same parameters. Later ones differ more than their losses:
    # AdamW makes steps of one size from gradients of any, rounding errors too.
    norms, want_norms = got["gradient_norm"], want["gradient_norm"]
    np.testing.assert_allclose(norms[:2], want_norms[:2], 2e-6)
    np.testing.assert_allclose(norms, want_norms, 1e-4)


# All factorisations, of a llama, are in test_factorisations.
@pytest.mark.parametrize(
    "family, mesh_name",
    slow_but_for(
        [
            ("gpt", "data 2, seq 2, tensor 2"),
        ],
        FAMILIES,
        MESHES,
    ),
)
def test_same_curve_on_every_mesh(family, mesh_name):
    got, first_moment, _ = train(family, MESHES[mesh_name])
    want, want_first_moment, _ = train(family, ONE)
    assert_same_curves(got, want)
    # Clipped to 1 by the norm of the whole gradient: beta1 = 0.9 leaves a tenth of it.
    assert want["gradient_norm"][0] > 1.2
    for moment in (first_moment, want_first_moment):
        np.testing.assert_allclose(moment, 0.1, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_curve_is_one_that_a_fault_would_change(family):
    """It falls by far more than the tolerance."""
    curves, _, state = train(family, ONE)
    losses = curves["loss"]
    assert losses[0] == losses[1]  # the rate of step 0 is 0
    assert losses[1] > losses[2] > losses[3] > losses[4]
    assert losses[4] < 0.95 * losses[1]
    assert int(state.step) == NUM_STEPS


@pytest.mark.parametrize(
    "options",
    [
        dict(accumulation_steps=4),
        pytest.param(dict(memory=(("remat", "none"),)), marks=pytest.mark.slow),
        pytest.param(dict(memory=(("head_chunks", 2),)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_curve_however_it_is_computed(options):
    """The four parts of a batch hold unequal numbers of labels: no mean of means."""
    by_part = (BATCH["labels"] != IGNORED).reshape(4, -1).sum(axis=1)
    assert by_part.max() > 2 * by_part.min()
    got, _, _ = train("grouped", SHARDED, **options)
    assert_same_curves(got, train("grouped", SHARDED)[0])


OTHER_OBJECTIVE = dict(label_smoothing=0.2, z_loss=0.01)


@pytest.mark.parametrize(
    "mesh_name",
    slow_but_for(
        ["data 2, seq 2, tensor 2"], ["fsdp 2, seq 4", "data 2, seq 2, tensor 2"]
    ),
)
def test_another_objective_reports_the_plain_loss_too(mesh_name):
    got, _, _ = train(
        "grouped", MESHES[mesh_name], accumulation_steps=2, **OTHER_OBJECTIVE
    )
    want, _, _ = train("grouped", ONE, **OTHER_OBJECTIVE)
    assert_same_curves(got, want)
    np.testing.assert_allclose(got["objective"], want["objective"], TOLERANCE)
    plain, _, _ = train("grouped", ONE)
    assert "objective" not in plain
    # The first two steps have the same parameters; what they minimise is another.
    np.testing.assert_allclose(got["loss"][:2], plain["loss"][:2], 2e-6)
    assert abs(got["objective"][0] / got["loss"][0] - 1) > 0.01
    assert abs(got["gradient_norm"][0] / plain["gradient_norm"][0] - 1) > 0.01
    assert got["objective"][4] < got["objective"][1]


@pytest.mark.parametrize(
    "degrees, model",
    [
        (dict(fsdp=2, seq=4), (("strategy", "all_gather"),)),
        pytest.param(
            dict(data=2, seq=4),
            (("strategy", "all_gather"), ("zigzag", False)),
            marks=pytest.mark.slow,
        ),
        (dict(data=2, seq=2, tensor=2), (("strategy", "megatron"),)),
        pytest.param(
            dict(fsdp=2, ring=4), (("zigzag", False),), marks=pytest.mark.slow
        ),
        (dict(fsdp=2, ring=2, seq=2), (("window", 12),)),
    ],
    ids=str,
)
def test_same_curve_by_every_strategy(degrees, model):
    got, _, _ = train("grouped", degrees, model=model)
    window = tuple(each for each in model if each[0] == "window")
    assert_same_curves(got, train("grouped", ONE, model=window)[0])


@pytest.mark.slow
def test_tokens_in_the_wrong_order_are_seen(monkeypatch):
    config = configs.Config
    want, _, _ = train("grouped", ONE)
    _train.cache_clear()
    monkeypatch.setattr(config, "zigzag_members", lambda self: 1)
    got, _, _ = train("grouped", MESHES["ring 4, seq 2"])
    _train.cache_clear()
    assert abs(got["loss"][0] / want["loss"][0] - 1) > 20 * TOLERANCE


def test_bfloat16_follows_float32():
    """Losses within 1 %, the first gradients within 3 %; the state stays float32."""
    got, _, state = train("grouped", SHARDED, dtype="bfloat16")
    want, _, _ = train("grouped", SHARDED)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=0.01)
    norms, want_norms = got["gradient_norm"], want["gradient_norm"]
    np.testing.assert_allclose(norms[:2], want_norms[:2], rtol=0.03)
    assert got["loss"] != want["loss"]
    for leaf in jax.tree.leaves((state.parameters, state.optimizer)):
        assert leaf.dtype == (jnp.int32 if leaf.ndim == 0 else jnp.float32)


def test_learning_rates_are_those_of_the_schedule():
    """Warmup of one step from 0, then a cosine from 0.01 to 3e-5 at step 5."""
    rates = train("grouped", ONE)[0]["learning_rate"]
    low = 3e-5
    cosine = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    want = [0.0, *(low + (0.01 - low) * part for part in cosine)]
    np.testing.assert_allclose(rates, want, rtol=1e-5)


def test_a_batch_without_labels_changes_nothing_but_the_step():
    config, mesh = make_config("grouped", SHARDED), mesh_of(**SHARDED)
    step = compiled(config)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, config)
        batch["labels"] = jnp.full_like(batch["labels"], IGNORED)
        state, metrics = step(put_state(first_state("grouped"), config, mesh), batch)
    assert int(metrics["counted_tokens"]) == float(metrics["gradient_norm"]) == 0
    before = first_state("grouped").parameters
    jax.tree.map(np.testing.assert_array_equal, state.parameters, before)
    assert int(state.step) == 1


def test_answers_alone_weigh_the_same_on_every_mesh():
    """One answer a row, a token long or half a row: of 4 shards most have none."""
    labels = np.full((B, T), IGNORED, np.int32)
    for row, length in enumerate((1, 1, 1, 2, 3, 7, 11, 16)):
        labels[row, row : row + length] = BATCH["tokens"][row, row : row + length]
    found = []
    for degrees in (ONE, MESHES["data 2, seq 4"]):
        config, mesh = make_config("grouped", degrees), mesh_of(**degrees)
        with jax.set_mesh(mesh):
            batch = put_batch(mesh, config)
            batch["labels"] = jax.device_put(
                labels.reshape(batch["labels"].shape), batch["labels"].sharding
            )
            state = put_state(first_state("grouped"), config, mesh)
            _, metrics = compiled(config)(state, batch)
        found.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
    assert found[0][1] > 0.1
    np.testing.assert_allclose(found[1], found[0], rtol=2e-6)


@pytest.mark.parametrize(
    "mesh_name",
    slow_but_for(["fsdp 2, seq 4"], ["fsdp 2, seq 4", "data 2, seq 2, tensor 2"]),
)
def test_compiled_from_shapes_for_real_state_and_batch(mesh_name):
    """The program takes and gives arrays where a made state and a batch lie."""
    degrees = MESHES[mesh_name]
    config, mesh = make_config("grouped", degrees), mesh_of(**degrees)
    step = compiled(config)
    with jax.set_mesh(mesh):
        init = jax.jit(functools.partial(init_state, config))
        state, batch = init(), put_batch(mesh, config)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_batch_on(config, mesh))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), batch)

    def same(sharding, array):
        assert sharding.is_equivalent_to(array.sharding, array.ndim)
        assert sharding.mesh == mesh

    arguments, keywords = step.input_shardings
    assert not keywords
    jax.tree.map(same, tuple(arguments), (state, batch))
    jax.tree.map(same, step.output_shardings[0], state)
    assert all(s.is_fully_replicated for s in step.output_shardings[1].values())


def abstract_batch_on(config, mesh):
    with jax.set_mesh(mesh):
        return abstract_batch(config)


def test_batch_without_segment_ids():
    config = make_config("grouped", ONE)
    config = dataclasses.replace(config, data=configs.Data(mask_documents=False))
    names = set(abstract_batch_on(config, mesh_of()))
    assert names == {"tokens", "labels", "positions"}


@pytest.mark.parametrize("options", [{}, OTHER_OBJECTIVE], ids=str)
@pytest.mark.parametrize("degrees", [ONE, SHARDED], ids=str)
def test_validation_gives_a_plain_sum_and_a_count(degrees, options):
    mesh = mesh_of(**degrees)
    config = make_config("grouped", degrees, **options)
    with jax.set_mesh(mesh):
        parameters = put_state(first_state("grouped"), config, mesh).parameters
        step = jax.jit(make_validation_step(config))
        total, count = step(parameters, put_batch(mesh, config))
    assert count.dtype == jnp.int32 and int(count) == NUM_VALID
    mean = train("grouped", ONE)[0]["loss"][0]
    np.testing.assert_allclose(float(total), mean * NUM_VALID, rtol=2e-6)


@pytest.mark.slow
def test_remat_keeps_only_the_inputs_of_layers():
    """More layers take far less more memory than when everything is kept."""

    def temporary_bytes(remat, num_layers):
        config = complete(
            configs.Config(
                model=configs.Model(
                    vocab_size=V, width=32, num_layers=num_layers, num_heads=4
                ),
                training=configs.Training(batch_size=1, sequence_tokens=256),
                memory=configs.Memory(remat=remat),
            ),
            name="remat",
        )
        config = placement.place(config, dict(mesh_of(data=1).shape))
        with jax.set_mesh(mesh_of(data=1)):
            step = jax.jit(make_train_step(config), donate_argnums=0)
            traced = step.trace(abstract_state(config), abstract_batch(config))
            program = traced.lower().compile()
            return program.memory_analysis().temp_size_in_bytes

    growth = {
        remat: temporary_bytes(remat, 8) - temporary_bytes(remat, 2)
        for remat in ("none", "full")
    }
    assert growth["full"] < growth["none"] / 2


def test_xla_options(monkeypatch):
    """On GPUs alone, but for chunks of the sequence; XLA knows them; XLA_FLAGS win."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    config = make_config("grouped", ONE)
    options = xla_options(config, "gpu")
    assert len(options) == 2 and xla_options(config, "cuda") == options
    assert xla_options(config, "cpu") == {}
    jax.jit(lambda x: x, compiler_options=options)(1.0)
    name, value = options.popitem()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x, compiler_options={f"{name}_not": value})(1.0)
    memory = configs.Memory(sequence_chunk_tokens=8)
    assert xla_options(dataclasses.replace(config, memory=memory), "gpu") == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=1")
    assert xla_options(config, "gpu") == options
