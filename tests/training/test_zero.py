"""ZeRO stages 1, 2 and 3: the same steps, other places for what a step keeps."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from run_cases import assert_same, compiled, first_state, make_config, put_state, train
from test_step import NUM_VALID, QUICK, mesh_of, put_batch

from ulysses_jax import config as configs
from ulysses_jax.config_file import from_dict
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.state import abstract_state, lay
from ulysses_jax.training.step import make_validation_step

CASES = {
    "data, fsdp, seq": (dict(data=2, fsdp=2, seq=2), {}),
    "fsdp, tensor": (dict(fsdp=4, tensor=2), {}),
    "accumulation": (dict(data=2, seq=4), dict(accumulation_steps=2)),
    "gpt, fsdp, seq, tensor": (dict(fsdp=2, seq=2, tensor=2), dict(family="gpt")),
    "tiles of a gpt, accumulation": (
        dict(data=2, seq=2, tensor=2),
        dict(family="gpt", accumulation_steps=2, memory=dict(mlp_tile_tokens=5)),
    ),
    "chunks of a gpt": (
        dict(data=2, fsdp=2, seq=2),
        dict(family="gpt", memory=dict(sequence_chunk_tokens=8, mlp_tile_tokens=4)),
    ),
    "layers together": (dict(fsdp=2, seq=4), dict(memory=dict(remat_layers=2))),
}


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_stage_3(name):
    degrees, options = CASES[name]
    want = train(degrees, zero_stage=3, **options)
    for stage in (1, 2):
        got = train(degrees, zero_stage=stage, **options)
        assert_same(got, want, 1e-5)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got.state.parameters),
            jax.tree.leaves(want.state.parameters),
            strict=True,
        ):
            name = jax.tree_util.keystr(path)
            # Without RoPE it has no gradient (softmax ignores it), and AdamW makes
            # steps of one size from gradients of any, rounding errors too.
            if "k_bias" not in name:
                np.testing.assert_allclose(a, b, 1e-5, 2e-5, err_msg=name)


def bytes_a_device(tree):
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.ndim
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "degrees",
    [dict(fsdp=2, seq=4), dict(seq=8), dict(data=2, seq=2, tensor=2), dict(data=8)],
    ids=str,
)
def test_bytes_of_a_device(degrees, stage):
    """Psi float32 matrices over tensor; stage s divides s of the three by Z."""
    zero = degrees.get("fsdp", 1) * degrees.get("seq", 1)
    tensor = degrees.get("tensor", 1)
    vectors = 4 * (2 * 2 + 1) * 16  # of norms: whole on every device
    matrices = 4 * (2 * (4 * 16 * 32 + 3 * 16 * 64) + 2 * 24 * 16) // tensor
    cut, whole = matrices // zero + vectors, matrices + vectors
    config = make_config(degrees, zero_stage=stage)
    with jax.set_mesh(mesh_of(**degrees)):
        state = abstract_state(config)
        gradients = jax.eval_shape(
            lambda parameters: lay("gradients", parameters, config), state.parameters
        )
        step = compiled(config)
    assert bytes_a_device(state.optimizer) == 2 * cut
    assert bytes_a_device(gradients) == (whole if stage == 1 else cut)
    assert bytes_a_device(state.parameters) == (cut if stage == 3 else whole)
    # The program takes and gives just these.
    state_bytes = bytes_a_device(state) + 3 * 4  # the step, and two counts
    rows = 8 // degrees.get("data", 1) // degrees.get("fsdp", 1)
    batch_bytes = 4 * 4 * rows * 32 // degrees.get("seq", 1)
    analysis = step.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == state_bytes + batch_bytes
    assert analysis.alias_size_in_bytes == state_bytes

    def same(sharding, leaf):
        assert leaf.ndim == 0 or sharding.is_equivalent_to(leaf.sharding, leaf.ndim)

    jax.tree.map(same, step.output_shardings[0], put_like(state, degrees))


def put_like(state, degrees):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=x.sharding
            and jax.sharding.NamedSharding(mesh_of(**degrees), x.sharding.spec),
        ),
        state,
    )


def test_scattered_gradients_are_never_whole():
    """Summing over accumulation steps, stage 1 keeps two whole sets, stage 2 slices."""
    degrees = dict(seq=8)

    def temporary_bytes(stage):
        config = make_config(degrees, zero_stage=stage, accumulation_steps=2)
        model = dataclasses.replace(config.model, feed_forward_width=1024)
        config = dataclasses.replace(config, model=model)
        with jax.set_mesh(mesh_of(**degrees)):
            analysis = compiled(config).memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    matrices = 4 * 2 * 3 * 16 * 1024
    saved = temporary_bytes(1) - temporary_bytes(2)
    assert saved > 0.9 * matrices * 7 / 8


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 1)])
def test_a_checkpoint_of_one_stage_restores_at_another(before, after, tmp_path):
    degrees = dict(fsdp=2, seq=4)
    mesh = mesh_of(**degrees)
    saved = train(degrees, zero_stage=before).state
    with jax.set_mesh(mesh), Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        checkpointer.save(3, saved, {})
        checkpointer.wait()
        wanted = abstract_state(make_config(degrees, zero_stage=after))
        found = checkpointer.restore(wanted)
    assert found is not None
    _, state, _ = found
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.ndim == 0 or x.sharding.spec == like.sharding.spec
    want = train(degrees, zero_stage=before, state=saved)
    got = train(degrees, zero_stage=after, state=state)
    np.testing.assert_allclose(got.losses, want.losses, 1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_gathers_nothing(stage):
    degrees = dict(fsdp=2, seq=4)
    mesh = mesh_of(**degrees)
    config = make_config(degrees, zero_stage=stage)
    with jax.set_mesh(mesh):
        parameters = put_state(first_state("llama"), config, mesh).parameters
        batch = put_batch(mesh, config)
        step = jax.jit(make_validation_step(config))
        program = step.lower(parameters, batch).compile(QUICK)
        total, count = program(parameters, batch)
    text = program.as_text()
    assert text is not None
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert all(" f32" not in line for line in gathered)  # segment ids are integers
    assert int(count) == NUM_VALID
    mean = train(degrees).losses[0]
    np.testing.assert_allclose(float(total) / NUM_VALID, mean, 2e-6)


def test_there_is_no_stage_4():
    with pytest.raises(ValueError, match="zero_stage"):
        from_dict(configs.Config, dict(training=dict(zero_stage=4)))
