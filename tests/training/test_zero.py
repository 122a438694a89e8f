"""ZeRO stages 1, 2 and 3: the same steps, other places for what a step keeps."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from run_cases import (
    NUM_VALID,
    assert_same,
    compiled,
    first_state,
    make_config,
    mesh_of,
    on_one_device,
    put_batch,
    put_state,
    train,
)

from ulysses_jax import config as configs
from ulysses_jax.config_file import from_dict
from ulysses_jax.memory.auto import rungs
from ulysses_jax.memory.offload import HOST
from ulysses_jax.training.checkpoint import Checkpointer
from ulysses_jax.training.state import abstract_gradients, abstract_state
from ulysses_jax.training.step import make_validation_step

RING = dict(fsdp=2, ring=2, seq=2)
# In chunks, with all that may wait in host memory while parameters are whole.
OFFLOAD = dict(
    sequence_chunk_tokens=4,
    mlp_tile_tokens=4,
    remat="attention",
    offload=["inputs", "attention", "keys", "optimizer"],
)
CASES = {
    "ring and seq": (RING, {}),
    "tiles of a gpt, accumulation": (
        dict(data=2, seq=2, tensor=2),
        dict(family="gpt", accumulation_steps=2, memory=dict(mlp_tile_tokens=5)),
    ),
    "chunks and groups of heads": (
        dict(data=2, fsdp=2, seq=2),
        dict(
            family="gpt",
            memory=dict(sequence_chunk_tokens=8, mlp_tile_tokens=4, head_chunks=2),
        ),
    ),
    "megatron, tiles": (
        dict(fsdp=2, seq=2, tensor=2),
        dict(model=dict(strategy="megatron"), memory=dict(mlp_tile_tokens=20)),
    ),
    "offloaded, in chunks": (dict(fsdp=2, seq=4), dict(memory=OFFLOAD)),
}
# Stage 3 alone is what other tests train.
QUICK = [
    ("ring and seq", 1),
    ("chunks and groups of heads", 2),
]
MORE_CASES = {
    "data, fsdp, seq": (dict(data=2, fsdp=2, seq=2), {}),
    "fsdp, tensor": (dict(fsdp=4, tensor=2), {}),
    "gpt, fsdp, seq, tensor": (dict(fsdp=2, seq=2, tensor=2), dict(family="gpt")),
    "groups of heads alone": (
        dict(data=2, fsdp=2, seq=2),
        dict(memory=dict(head_chunks=2)),
    ),
    "groups of heads over a ring": (RING, dict(memory=dict(head_chunks=2))),
    "ring, tiles, accumulation": (
        dict(data=2, ring=4),
        dict(accumulation_steps=2, memory=dict(mlp_tile_tokens=5)),
    ),
    "offloaded over a ring, accumulation": (
        RING,
        dict(
            family="gpt",
            accumulation_steps=4,
            memory=dict(offload=["inputs", "optimizer"]),
        ),
    ),
    "all_gather": (dict(fsdp=2, seq=4), dict(model=dict(strategy="all_gather"))),
    "all_gather, offloaded": (
        dict(fsdp=2, seq=4),
        dict(model=dict(strategy="all_gather"), memory=dict(offload=["optimizer"])),
    ),
    "megatron of a gpt, accumulation": (
        dict(data=2, seq=4),
        dict(family="gpt", accumulation_steps=2, model=dict(strategy="megatron")),
    ),
    "megatron, offloaded": (
        dict(fsdp=4, seq=2),
        dict(
            model=dict(strategy="megatron"),
            memory=dict(remat="none", offload=["optimizer"]),
        ),
    ),
}


def all_cases():
    for name, case in (CASES | MORE_CASES).items():
        for stage in (1, 2, 3):
            marks = [] if (name, stage) in QUICK else [pytest.mark.slow]
            yield pytest.param(*case, stage, id=f"{name}, {stage}", marks=marks)


@pytest.mark.parametrize("degrees, options, stage", list(all_cases()))
def test_three_steps_are_those_of_one_device(degrees, options, stage):
    got = train(degrees, zero_stage=stage, **options)
    want = on_one_device(options.get("family", "llama"))
    assert_same(got, want, 1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got.state.parameters),
        jax.tree.leaves(want.state.parameters),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        # AdamW makes steps of one size, here 0.01, from gradients of any: where one is
        # near 0, a hundredth of that is rounding. Without RoPE k_bias has no other
        # gradient, since softmax ignores it.
        if "k_bias" not in name:
            np.testing.assert_allclose(a, b, 1e-5, 1e-4, err_msg=name)


def bytes_a_device(tree):
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.ndim
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "degrees, strategy",
    [
        (RING, "auto"),
        (dict(fsdp=2, seq=4), "auto"),
        (dict(ring=8), "auto"),
        (dict(data=2, ring=2, tensor=2), "auto"),
        (dict(data=8), "auto"),
        (dict(fsdp=2, seq=2, tensor=2), "megatron"),
    ],
    ids=str,
)
def test_bytes_of_a_device(degrees, strategy, stage):
    """Psi float32 matrices over tensor; stage s divides s of the three by Z.

    Megatron's own cut of the layers over seq is one of parts, at every stage.
    """
    seq, tensor = degrees.get("seq", 1), degrees.get("tensor", 1)
    zero = degrees.get("fsdp", 1) * degrees.get("ring", 1) * seq
    parts = seq if strategy == "megatron" else 1
    vectors = 4 * (2 * 2 + 1) * 16  # of norms: whole on every device
    layers, tables = 4 * 2 * (4 * 16 * 32 + 3 * 16 * 64), 4 * 2 * 24 * 16
    cut = (layers + tables) // tensor // zero + vectors
    whole = (layers // parts + tables) // tensor + vectors
    config = make_config(degrees, model=dict(strategy=strategy), zero_stage=stage)
    with jax.set_mesh(mesh_of(**degrees)):
        state = abstract_state(config)
        gradients = abstract_gradients(config, state)
    assert bytes_a_device(state.optimizer) == 2 * cut
    assert bytes_a_device(gradients) == (whole if stage == 1 else cut)
    assert bytes_a_device(state.parameters) == (cut if stage == 3 else whole)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_program_takes_and_gives_just_these(stage):
    degrees, options = CASES["ring and seq"]
    config = make_config(degrees, zero_stage=stage, **options)
    step = compiled(config)
    with jax.set_mesh(mesh_of(**degrees)):
        state = abstract_state(config)
    state_bytes = bytes_a_device(state) + 3 * 4  # the step, and two counts
    batch_bytes = 4 * 4 * (8 // 2) * (32 // 4)
    analysis = step.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes == state_bytes + batch_bytes
    assert analysis.alias_size_in_bytes == state_bytes

    def same(sharding, leaf):
        if leaf.ndim:
            assert sharding.spec == leaf.sharding.spec

    jax.tree.map(same, step.output_shardings[0], state)


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


SLOW_PAIRS = [pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 3), (3, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 1), *SLOW_PAIRS])
def test_a_checkpoint_of_one_stage_restores_at_another(before, after, tmp_path):
    degrees, options = CASES["ring and seq"]
    mesh = mesh_of(**degrees)
    saved = train(degrees, zero_stage=before, **options).state
    with jax.set_mesh(mesh), Checkpointer(tmp_path, interval_steps=1) as checkpointer:
        checkpointer.save(3, saved, {})
        checkpointer.wait()
        wanted = abstract_state(make_config(degrees, zero_stage=after, **options))
        found = checkpointer.restore(wanted)
    assert found is not None
    _, state, _ = found
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.ndim == 0 or x.sharding.spec == like.sharding.spec
    want = train(degrees, zero_stage=before, state=saved, **options)
    got = train(degrees, zero_stage=after, state=state, **options)
    np.testing.assert_allclose(got.losses, want.losses, 1e-5)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_validation_gathers_nothing(stage):
    degrees = dict(fsdp=2, seq=4)
    mesh = mesh_of(**degrees)
    config = make_config(degrees, zero_stage=stage)
    with jax.set_mesh(mesh):
        parameters = put_state(first_state("llama"), config, mesh).parameters
        batch = put_batch(mesh, config)
        step = jax.jit(make_validation_step(config))
        program = step.lower(parameters, batch).compile()
        total, count = program(parameters, batch)
    text = program.as_text()
    assert text is not None
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert all(" f32" not in line for line in gathered)  # segment ids are integers
    assert int(count) == NUM_VALID
    mean = on_one_device().losses[0]
    np.testing.assert_allclose(float(total) / NUM_VALID, mean, 2e-6)


def test_there_is_no_stage_4():
    with pytest.raises(ValueError, match="zero_stage"):
        from_dict(configs.Config, dict(training=dict(zero_stage=4)))


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_that_are_whole_do_not_wait_in_host_memory(stage):
    message = f"zero_stage {stage} keeps all parameters on every device: use .*stage 3"
    memory = dict(offload=["optimizer", "parameters"])
    with pytest.raises(ValueError, match=message):
        make_config(RING, zero_stage=stage, memory=memory)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto_offers_what_a_stage_may_offload(stage):
    config = make_config(dict(seq=8), zero_stage=stage, memory=dict(auto=True))
    offloads = [memory.offload for _, memory in rungs(config)]
    assert any("optimizer" in offload for offload in offloads)
    assert any("parameters" in offload for offload in offloads) == (stage == 3)


@pytest.mark.parametrize("stage", [1, 2])
def test_offloaded_moments_lie_in_host_memory(stage):
    """And parameters do not, whole or not."""
    config = make_config(RING, zero_stage=stage, memory=dict(offload=["optimizer"]))
    with jax.set_mesh(mesh_of(**RING)):
        state = abstract_state(config)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer) if x.ndim}
    assert kinds == {HOST}
    assert all(
        x.sharding.memory_kind != HOST for x in jax.tree.leaves(state.parameters)
    )
