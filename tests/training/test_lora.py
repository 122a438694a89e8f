"""Adapters beside merged weights, wherever they lie; what a step does not compute."""

import dataclasses

import jax
import numpy as np
import pytest
from lora_cases import (
    first_parameters,
    loss_and_gradients,
    make_config,
    mesh_of,
    oracle,
)

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Lora, Model
from ulysses_jax.costs.flops import matmul_flops
from ulysses_jax.costs.hlo import parse
from ulysses_jax.costs.predict import step_flops
from ulysses_jax.lora import adapted, adapter_elements
from ulysses_jax.models.adapter import joined, split
from ulysses_jax.training.state import (
    abstract_state,
    host_bytes,
    init_state,
    shard_bytes,
)
from ulysses_jax.training.step import abstract_batch, make_train_step

TOLERANCE = 2e-5
MEGATRON = dict(strategy="megatron")
slow = pytest.mark.slow


def case(degrees, *, marks=(), **options):
    names = [f"{axis} {n}" for axis, n in degrees.items()] or ["one device"]
    for name, value in options.items():
        value = value["strategy"] if name == "model" else value
        names.append(f"{name} {value}")
    return pytest.param(degrees, options, id=", ".join(names), marks=marks)


@pytest.mark.parametrize(
    "degrees, options",
    [
        case({}, remat="none", marks=slow),
        case(dict(fsdp=2, seq=2, tensor=2)),
        case(
            dict(fsdp=2, seq=2, tensor=2),
            model=MEGATRON,
            mlp_tile_tokens=4,
            marks=slow,
        ),
        case(
            dict(fsdp=2, seq=2),
            sequence_chunk_tokens=8,
            mlp_tile_tokens=4,
            marks=slow,
        ),
        case(dict(fsdp=2, seq=4), marks=slow),
        case(dict(ring=2, seq=2), marks=slow),
        case(dict(fsdp=2, seq=2, tensor=2), model=MEGATRON, marks=slow),
        case(dict(seq=2), remat="attention", marks=slow),
        case(dict(seq=2), remat="products", marks=slow),
        case(dict(fsdp=2, seq=2, tensor=2), mlp_tile_tokens=8, marks=slow),
        case(
            dict(fsdp=2, seq=2, tensor=2),
            sequence_chunk_tokens=8,
            mlp_tile_tokens=4,
            marks=slow,
        ),
        case(dict(seq=2), sequence_chunk_tokens=8, head_chunks=2, marks=slow),
        case(
            dict(fsdp=2, seq=2),
            offload=["inputs", "optimizer", "parameters"],
            marks=slow,
        ),
        case(dict(fsdp=2, seq=2), stage=1, marks=slow),
        case(dict(fsdp=2, seq=2), stage=2, marks=slow),
        case(dict(fsdp=2, seq=2), stage=2, sequence_chunk_tokens=8, marks=slow),
        case(dict(fsdp=2, seq=2), targets=("q", "down"), marks=slow),
    ],
)
def test_gradients_are_those_of_merged_weights(degrees, options):
    config = make_config(degrees, **options)
    one = make_config({}, targets=config.model.lora.targets)
    (loss, got), (want_loss, want) = loss_and_gradients(config), oracle(one)
    np.testing.assert_allclose(loss, want_loss, TOLERANCE)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(y).max())


@slow
@pytest.mark.parametrize(
    "degrees, options",
    [
        case({}),
        case(dict(fsdp=2, seq=2), sequence_chunk_tokens=8, mlp_tile_tokens=4),
        case(dict(fsdp=2, seq=2, tensor=2), model=MEGATRON),
    ],
)
def test_in_bfloat16_they_go_the_same_way(degrees, options):
    config = make_config(degrees, dtype="bfloat16", **options)
    (loss, got), (want_loss, want) = loss_and_gradients(config), oracle(make_config({}))
    np.testing.assert_allclose(loss, want_loss, 1e-2)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == np.float32
        along = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert along > 0.99 and 0.95 < np.linalg.norm(x) / np.linalg.norm(y) < 1.05


def compiled(config):
    with jax.set_mesh(mesh_of()):
        step = jax.jit(make_train_step(config), donate_argnums=0)
        return step.lower(abstract_state(config), abstract_batch(config)).compile()


def flops_of(program):
    module = parse(program.as_text())
    entry = module.computations[module.entry]
    return sum(matmul_flops(module, entry, each) for each in entry.instructions)


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(dict(remat="none"), id="plain"),
        pytest.param(
            dict(sequence_chunk_tokens=8, mlp_tile_tokens=4), id="pieces", marks=slow
        ),
        pytest.param(dict(mlp_tile_tokens=4), id="tiles", marks=slow),
    ],
)
def test_no_gradient_of_a_frozen_weight_is_computed(memory):
    """A product for each weight less than in a step that trains all, and three for
    each of A and B: read off the compiled programs."""
    targets = ("q", "up")
    lora, full = (make_config({}, targets=t, **memory) for t in (targets, None))
    done = [flops_of(compiled(config)) for config in (lora, full)]
    tokens = lora.training.batch_size * lora.padded_tokens()
    formulas = [step_flops(config, config.padded_tokens()) for config in (lora, full)]
    adapters = lora.model.num_layers * adapter_elements(lora.model)
    weights = formulas[1]["matmul"] / 6 / tokens
    assert formulas[0]["matmul"] == tokens * (4 * weights + 6 * adapters)
    again = (
        adapters if "mlp_tile_tokens" in memory else 0
    )  # A and B, in a recomputation
    saved = done[1] - done[0]
    most = 2 * tokens * weights - 6 * tokens * adapters
    if "sequence_chunk_tokens" in memory:  # and A of the queries, for each chunk
        model = lora.model
        again += model.num_layers * model.lora.rank * model.width
    assert most - 2 * tokens * again <= saved <= most


def test_a_state_has_moments_and_gradients_of_adapters_alone():
    config = make_config({}, dtype="bfloat16")
    with jax.set_mesh(mesh_of()):
        state = abstract_state(config)
        offloaded = dataclasses.replace(
            config, memory=dataclasses.replace(config.memory, offload=("parameters",))
        )
        in_host = host_bytes(offloaded, abstract_state(offloaded))
    adapters = config.model.num_layers * adapter_elements(config.model)
    assert shard_bytes(state.parameters) == 4 * adapters
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert shard_bytes(moments) == 2 * 4 * adapters
    frozen = jax.tree.leaves(state.frozen)
    assert {str(x.dtype) for x in frozen if x.ndim > 2} == {"bfloat16"}
    assert {str(x.dtype) for x in frozen if x.ndim == 1} == {"float32"}
    assert in_host["gradients"] == 4 * adapters
    assert in_host["parameters"] == 4 * adapters + shard_bytes(state.frozen)


def test_b_starts_at_zero_and_a_does_not():
    config = make_config({})
    with jax.set_mesh(mesh_of()):
        state = jax.jit(lambda: init_state(config))()
    for path, x in jax.tree_util.tree_leaves_with_path(state.parameters):
        assert (np.abs(x).max() == 0) == (path[-1].key == "b")
    whole = first_parameters(config)
    assert jax.tree.structure(joined(*split(config.model, whole))) == (
        jax.tree.structure(whole)
    )


@pytest.mark.parametrize(
    "targets, names",
    [
        (("all",), "q k v out gate up down"),
        (("[qv]",), "q v"),
        (("down", "q"), "q down"),
        (("*",), "q k v out gate up down"),
    ],
)
def test_targets_are_names_or_globs(targets, names):
    model = Model(width=32, num_heads=4, lora=Lora(rank=4, targets=targets))
    model = complete(Config(model=model), name="x").model
    assert adapted(model) == tuple(names.split())
