"""Parameters and moments in host memory: the same steps, the same checkpoints.

CPU devices have one memory, so here the program moves nothing; that the bytes leave a
GPU is read off programs for GPUs in tests/plan/test_gpu_offload.py.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from memory_cases import (
    MESHES,
    TOLERANCE,
    assert_same,
    first_parameters,
    loss_and_gradients,
    make_batch,
    make_config,
    mesh_of,
    plain,
)
from slow import slow_but_for

from ulysses_jax.config import Mesh
from ulysses_jax.memory.offload import HOST, check_offload
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.state import abstract_state, host_bytes, init_state
from ulysses_jax.training.step import abstract_batch, batch_spec, make_train_step

NUM_STEPS = 3
OFFLOADS = {
    "optimizer": ("optimizer",),
    "optimizer, parameters": ("optimizer", "parameters"),
    "all": ("inputs", "optimizer", "parameters"),
}
OFFLOAD_PARAMS = [
    "optimizer",
    pytest.param("optimizer, parameters", marks=pytest.mark.slow),
    "all",
]


def with_training(config, **changes):
    training = dataclasses.replace(config.training, **changes)
    return dataclasses.replace(config, training=training)


def make_run(family, mesh_name, steps=1, **memory):
    """A clip norm that cuts, and rates that move every parameter."""
    config = make_config(family, MESHES[mesh_name], **memory)
    return with_training(
        config,
        learning_rate=0.01,
        warmup_steps=1,
        clip_norm=0.5,
        accumulation_steps=steps,
    )


def first_state(config, mesh):
    """The same values for each mesh and memory, where the config says they lie."""
    plain_config = dataclasses.replace(config, mesh=Mesh())
    values = first_parameters(plain_config)
    shapes = abstract_state(config)
    state = jax.jit(functools.partial(init_state, config))()

    def put(x, shape):
        kind = shape.sharding.memory_kind
        sharding = NamedSharding(mesh, shape.sharding.spec, memory_kind=kind)
        return jax.device_put(x, sharding)

    parameters = jax.tree.map(put, values, shapes.parameters)
    return dataclasses.replace(state, parameters=parameters)


def put_batch(config, mesh):
    batch = make_batch(config.padded_tokens(), packed=False)
    steps = config.training.accumulation_steps
    sharding = NamedSharding(mesh, batch_spec(mesh))
    return {
        name: jax.device_put(x.reshape(steps, -1, x.shape[-1]), sharding)
        for name, x in batch.items()
    }


@functools.cache
def train(config):
    """Metrics of each step, and the last state as NumPy arrays."""
    mesh = mesh_of(**dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(config), donate_argnums=0)
        traced = step.trace(abstract_state(config), abstract_batch(config))
        step = traced.lower().compile()
        state, batch, rows = first_state(config, mesh), put_batch(config, mesh), []
        kinds = jax.tree.map(lambda x: x.sharding.memory_kind, state)
        for _ in range(NUM_STEPS):
            state, metrics = step(state, batch)
            rows.append({name: float(value) for name, value in metrics.items()})
        assert jax.tree.map(lambda x: x.sharding.memory_kind, state) == kinds
    return rows, jax.tree.map(np.asarray, state)


def assert_same_training(got, want):
    for row, wanted in zip(got[0], want[0], strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], wanted[name], 1e-5, err_msg=name)
    leaves = jax.tree.leaves_with_path(want[1])
    for (path, b), a in zip(leaves, jax.tree.leaves(got[1]), strict=True):
        name = jax.tree_util.keystr(path)
        if "k_bias" in name:
            continue  # its gradient is rounding, of which AdamW makes whole steps
        scale = float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize(
    "mesh_name, offload",
    slow_but_for([("seq 8", "all")], MESHES, OFFLOADS),
)
def test_same_steps(mesh_name, offload):
    want = train(make_run("llama", mesh_name))
    got = train(make_run("llama", mesh_name, offload=OFFLOADS[offload]))
    assert_same_training(got, want)
    assert want[0][0]["gradient_norm"] > 1  # it is clipped


@pytest.mark.parametrize(
    "family, steps, options",
    [
        # Tied embeddings, biases.
        pytest.param("gpt", 1, {}, marks=pytest.mark.slow),
        pytest.param("llama", 2, {}, marks=pytest.mark.slow),
        pytest.param("gpt", 2, dict(remat="attention"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_steps_of_other_runs(family, steps, options):
    """Tied embeddings are fetched twice; parts of a step are summed in host memory."""
    mesh_name = "data 2, seq 4"
    want = train(make_run(family, mesh_name, steps, **options))
    got = train(make_run(family, mesh_name, steps, offload=OFFLOADS["all"], **options))
    assert_same_training(got, want)


@pytest.mark.parametrize("mesh_name", slow_but_for(["data 2, seq 4"], MESHES))
def test_same_loss_and_gradients(mesh_name):
    config = make_config("llama", MESHES[mesh_name], offload=OFFLOADS["all"])
    assert_same(loss_and_gradients(config), plain("llama", mesh_name))


def traced(config):
    with jax.set_mesh(mesh_of(**dataclasses.asdict(config.mesh))):
        step = jax.jit(make_train_step(config))
        trace = step.trace(abstract_state(config), abstract_batch(config))
        return trace.jaxpr


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("offload", OFFLOAD_PARAMS)
def test_nothing_is_computed_in_host_memory(offload, steps):
    """Only cuts, writes and moves: XLA would run anything else on the CPU."""
    config = make_run("llama", "seq 8", steps, offload=OFFLOADS[offload])
    names = set()

    def visit(jaxpr):
        for each in jaxpr.eqns:
            inner = list(jaxprs_in_params(each.params))
            for one in inner:
                visit(one)
            host = any(
                getattr(v.aval, "memory_space", None) == jax.memory.Space.Host
                for v in (*each.invars, *each.outvars)
            )
            if host and not inner:
                names.add(each.primitive.name)

    visit(traced(config).jaxpr)
    moves = {"device_put", "dynamic_slice", "dynamic_update_slice"}
    free = {"squeeze", "broadcast_in_dim", "reshape", "optimization_barrier"}
    assert moves <= names <= moves | free


@pytest.mark.parametrize("offload", OFFLOAD_PARAMS)
def test_made_saved_and_restored_in_host_memory(offload, tmp_path):
    """Saved from host memory, changed in place at once; restored there, on any mesh."""
    config = make_run("llama", "data 2, seq 4", offload=OFFLOADS[offload])
    mesh = mesh_of(**MESHES["data 2, seq 4"])
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, config))()
        shapes = abstract_state(config)
        for name in ("parameters", "optimizer"):
            kinds = {
                x.sharding.memory_kind
                for x in jax.tree.leaves(getattr(state, name))
                if x.ndim
            }
            assert kinds == {HOST if name in config.memory.offload else "device"}
        step = jax.jit(make_train_step(config), donate_argnums=0)
        step = step.trace(shapes, abstract_batch(config)).lower().compile()
        before = jax.tree.map(np.array, state)
        with Checkpointer(tmp_path, interval_steps=1) as checkpointer:
            checkpointer.save(0, state, {})
            state, _ = step(state, put_batch(config, mesh))
        restored = Checkpointer(tmp_path, interval_steps=1).restore(shapes)
        assert restored is not None
        jax.tree.map(np.testing.assert_array_equal, restored[1], before)
        for x, shape in zip(
            jax.tree.leaves(restored[1]), jax.tree.leaves(shapes), strict=True
        ):
            kind = getattr(shape.sharding, "memory_kind", None)
            assert x.sharding.memory_kind == (kind or "device")
        step(restored[1], put_batch(config, mesh))
    # And where nothing is offloaded.
    other = make_run("llama", "seq 8")
    with jax.set_mesh(mesh_of(**MESHES["seq 8"])):
        restored = Checkpointer(tmp_path, interval_steps=1).restore(
            abstract_state(other)
        )
        assert restored is not None
        jax.tree.map(np.testing.assert_array_equal, restored[1], before)


def test_bytes_that_should_be_in_host_memory():
    """Of one of 8 devices: 56 tokens, 4 rows, 2 layers of width 16, float32."""
    config = make_run("llama", "seq 8", offload=OFFLOADS["all"])
    with jax.set_mesh(mesh_of(**MESHES["seq 8"])):
        state = abstract_state(config)
    # A layer: q, out 16x32 and k, v 16x16, gate, up, down 16x20; embedding, head 28x16.
    layers = 2 * (2 * 512 + 2 * 256 + 3 * 320) // 8 + 2 * 2 * 16
    others = 2 * 28 * 16 // 8 + 16
    found = host_bytes(config, state)
    assert found["parameters"] == 4 * (layers + others)
    assert found["optimizer"] == 2 * found["parameters"]
    assert found["gradients"] == 4 * (layers - others)
    assert found["inputs"] == 2 * 4 * 7 * 16 * 4
    assert host_bytes(make_run("llama", "seq 8"), state) == {}


def test_an_offload_that_is_not_all_there_is_refused():
    expected = dict(optimizer=60, parameters=30)
    stats = dict(host_argument_size=60, host_temp_size=29)
    with pytest.raises(ValueError, match="optimizer 60, parameters 30 .* has 89 bytes"):
        check_offload(expected, stats, "gpu")
    check_offload(expected, stats, "cpu")
    check_offload(expected, stats | dict(host_temp_size=30), "gpu")


def test_parameters_need_rematerialisation():
    with pytest.raises(ValueError, match="offload parameters .*remat none keeps"):
        make_config("llama", offload=("parameters",), remat="none")
