"""What leaves a GPU when it is offloaded, read off programs for GPUs.

Needs the CUDA plugin.
"""

import dataclasses
from functools import cache

import jax
import pytest

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.costs.predict import predict
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan.compile import analyse, compile_step

pytestmark = pytest.mark.plan

H100 = TARGETS["h100"]
L, D, F, V = 8, 256, 512, 512


def make_config(*, tokens=32768, batch_size=1, steps=1, seq=8, **memory):
    config = configs.Config(
        model=configs.Model(
            vocab_size=V,
            width=D,
            num_layers=L,
            num_heads=8,
            num_kv_heads=4,
            head_size=64,
            feed_forward_width=F,
        ),
        data=configs.Data(mask_documents=False),
        training=configs.Training(
            batch_size=batch_size, sequence_tokens=tokens, accumulation_steps=steps
        ),
        mesh=configs.Mesh(seq=seq),
        memory=configs.Memory(**memory),
    )
    return complete(config, name="tiny")


@cache
def plan(config):
    program = compile_step(config, H100, 1, config.mesh.seq)
    return analyse(program, H100, config.mesh.seq)


# Parameters a layer, and of embedding and head, of one of 8 GPUs: matrices are cut.
LAYER = (D * 512 * 2 + D * 256 * 2 + 3 * D * F) // 8 + 2 * D
OTHERS = 2 * V * D // 8 + D


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_offloaded_inputs_lie_in_host_memory(remat):
    """8 inputs of [1, 4096, 256] in bfloat16 leave the device, and only they."""
    kept = plan(make_config(remat=remat))["memory"]
    offloaded = plan(make_config(remat=remat, offload=("inputs",)))["memory"]
    inputs = L * 4096 * D * 2
    assert kept["host_bytes_per_device"] == 0
    assert offloaded["host_bytes_per_device"] == pytest.approx(inputs, rel=0.01)
    saved = kept["device_bytes"] - offloaded["device_bytes"]
    assert 0.6 * inputs < saved <= inputs  # two of them wait on the device at a time


@pytest.mark.parametrize("num_steps", [1, 2])
def test_moments_lie_in_host_memory(num_steps):
    """8 bytes a parameter leave the device, but for those of a layer at a time."""
    options = dict(tokens=1024, batch_size=num_steps, steps=num_steps)
    kept = plan(make_config(**options))
    moved = plan(make_config(**options, offload=("optimizer",)))
    parameters = L * LAYER + OTHERS
    assert moved["memory"]["host_optimizer_bytes"] == 8 * parameters
    assert moved["memory"]["host_parameters_bytes"] == 0
    assert moved["memory"]["host_bytes_per_device"] == 8 * parameters
    assert moved["memory"]["optimizer_bytes"] == 12  # the step and two counts
    saved = kept["memory"]["device_bytes"] - moved["memory"]["device_bytes"]
    at_once = 8 * (3 * LAYER + OTHERS)
    assert 8 * parameters - at_once < saved < 8 * parameters
    # Both moments, there and back.
    for way in ("to_device_bytes", "to_host_bytes"):
        assert moved["host_moves"][way] == 8 * parameters


@pytest.mark.parametrize("stage", [1, 2])
def test_moments_lie_in_host_memory_where_parameters_are_whole(stage):
    """Each GPU's part of them, as at ZeRO's stage 3."""
    config = make_config(tokens=1024, batch_size=1, steps=1, offload=("optimizer",))
    training = dataclasses.replace(config.training, zero_stage=stage)
    moved = plan(dataclasses.replace(config, training=training))
    parameters = L * LAYER + OTHERS
    assert moved["memory"]["host_bytes_per_device"] == 8 * parameters
    assert moved["memory"]["optimizer_bytes"] == 12
    for way in ("to_device_bytes", "to_host_bytes"):
        assert moved["host_moves"][way] == 8 * parameters
    assert moved["warnings"] == []


@pytest.mark.parametrize("num_steps", [1, 2])
def test_parameters_and_gradients_lie_in_host_memory(num_steps):
    """4 bytes each a parameter; the layers' gradients, and those of a part of a step.

    XLA may put a gradient in place of the embedding, which is read by then.
    """
    options = dict(tokens=1024, batch_size=num_steps, steps=num_steps)
    kept = plan(make_config(**options))
    moved = plan(make_config(**options, offload=("optimizer", "parameters")))
    parameters = L * LAYER + OTHERS
    memory = moved["memory"]
    assert memory["host_parameters_bytes"] == 4 * parameters
    assert memory["host_optimizer_bytes"] == 8 * parameters
    assert memory["parameters_bytes"] == memory["gradients_bytes"] == 0
    temporary = memory["host_temporaries_bytes"]
    assert num_steps * 4 * (L * LAYER - OTHERS) <= temporary
    assert temporary <= num_steps * 4 * parameters
    saved = kept["memory"]["device_bytes"] - memory["device_bytes"]
    state = (16 if num_steps == 1 else 20) * parameters
    at_once = 16 * (3 * LAYER + 2 * OTHERS)
    assert state - at_once < saved
    # The layers' parameters come forward and backward, the others' once a part; for
    # the update gradients twice (those of no layer's twice only where they are sums)
    # and all else once; of parts, sums and new gradients.
    layers, parts = L * LAYER, num_steps if num_steps > 1 else 0
    fetched = (5 + 2 * num_steps + 2 * parts) * layers
    fetched += (4 + num_steps + (1 + 2 * parts if parts else 0)) * OTHERS
    # Parameters and moments go back, the gradients each part; sums too, and as zeros.
    # Nothing is copied within host memory.
    written = (3 + num_steps + (parts + 1 if parts else 0)) * parameters
    assert moved["host_moves"]["to_device_bytes"] == 4 * fetched
    assert moved["host_moves"]["to_host_bytes"] == 4 * written


def test_all_of_it_trains_on_one_gpu_as_on_eight():
    config = make_config(
        tokens=1024, seq=1, offload=("inputs", "optimizer", "parameters")
    )
    result = plan(config)
    config = placement.place(config, result["mesh"])
    predicted = predict(config, H100, result)
    assert 0 < predicted["exposed_host_seconds"] < predicted["host_seconds"]
    moves = result["host_moves"]
    pcie = H100.pcie_bytes_per_second * H100.pcie_efficiency
    seconds = (moves["to_device_bytes"] + moves["to_host_bytes"]) / pcie
    assert predicted["host_seconds"] == pytest.approx(seconds)


def test_an_offload_that_does_nothing_is_refused(monkeypatch):
    def nothing(**_):
        return jax.checkpoint_policies.nothing_saveable

    policies = jax.checkpoint_policies
    monkeypatch.setattr(policies, "save_and_offload_only_these_names", nothing)
    for words in (("inputs",), ("inputs", "optimizer", "parameters")):
        with pytest.raises(ValueError, match="XLA left the rest on the cuda device"):
            compile_step(make_config(offload=words), H100, 1, 8)


def test_state_described_on_the_device_is_refused(monkeypatch):
    monkeypatch.setattr("ulysses_jax.training.state.HOST", "device")
    config = make_config(tokens=1024, offload=("optimizer",))
    with pytest.raises(ValueError, match="optimizer .* has 0 bytes there"):
        compile_step(config, H100, 1, 8)
