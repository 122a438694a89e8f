"""Layer inputs in host memory: the same results, and no silence where it fails."""

import dataclasses

import jax
import pytest
from memory_cases import (
    MESHES,
    assert_same,
    loss_and_gradients,
    make_config,
    mesh_of,
    plain,
)
from slow import slow_but_for

from ulysses_jax.memory.offload import check_host_memory
from ulysses_jax.training.state import abstract_state
from ulysses_jax.training.step import abstract_batch, make_train_step


@pytest.mark.parametrize(
    "mesh_name, remat",
    slow_but_for(
        [("data 2, seq 4", "attention")],
        ["one device", "data 2, seq 4"],
        ["full", "attention"],
    ),
)
def test_same_loss_and_gradients(mesh_name, remat):
    options = dict(offload=("inputs",), remat=remat, mlp_tile_tokens=9)
    config = make_config("llama", MESHES[mesh_name], **options)
    assert_same(loss_and_gradients(config), plain("llama", mesh_name))


@pytest.mark.parametrize("remat", slow_but_for(["full"], ["full", "attention"]))
def test_a_fraction_of_the_inputs(remat):
    """12 of 16 features are moved; the trace shows both stacks."""
    degrees = MESHES["data 2, seq 4"]
    options = dict(offload=("inputs",), offload_fraction=0.75, remat=remat)
    config = make_config("llama", degrees, **options)
    assert_same(loss_and_gradients(config), plain("llama", "data 2, seq 4"))
    assert "f32<host>[2,4@(data,fsdp),56@(ring,seq),12]" in traced(config)


def traced(config):
    with jax.set_mesh(mesh_of(**dataclasses.asdict(config.mesh))):
        step = jax.jit(make_train_step(config))
        return str(step.trace(abstract_state(config), abstract_batch(config)).jaxpr)


def test_the_program_asks_for_host_memory():
    """The inputs of both layers, stacked; JAX's lowering for CPU devices drops this.

    They have one memory. tests/plan reads the bytes off a program for GPUs.
    """
    degrees = MESHES["data 2, seq 4"]
    stacked = "f32<host>[2,4@(data,fsdp),56@(ring,seq),16]"
    assert stacked in traced(make_config("llama", degrees, offload=("inputs",)))
    assert "<host>" not in traced(make_config("llama", degrees))


def test_nothing_to_offload():
    with pytest.raises(ValueError, match="remat none keeps everything: use"):
        make_config("llama", offload=("inputs",), remat="none")


def test_a_device_without_host_memory_is_refused():
    class Memory:
        kind = "hbm"

    class Device:
        platform = "abacus"

        def addressable_memories(self):
            return [Memory()]

    message = "offload inputs moves to pinned_host, but a device of abacus has hbm"
    with pytest.raises(ValueError, match=message):
        check_host_memory(("inputs",), Device())
    check_host_memory((), Device())
    check_host_memory(("inputs",), jax.devices()[0])
