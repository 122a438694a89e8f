"""Each optimizer on each mesh: what plain Optax makes of each layer's own matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from optimizer_cases import (
    OPTIMIZERS,
    assert_same_matrices,
    config_of,
    grown,
    matrices_of,
    take_plain_steps,
)
from run_cases import mesh_of
from slow import slow_but_for

from ulysses_jax.models import Transformer
from ulysses_jax.training.state import abstract_state, lay, optimizer_of, state_of
from ulysses_jax.training.update import update

NUM_STEPS = 3
ON_HOST = dict(offload=["optimizer", "parameters"])
CASES = {
    "one device": ({}, {}),
    "fsdp, seq": (dict(fsdp=2, seq=4), {}),
    "fsdp, seq, tensor": (dict(fsdp=2, seq=2, tensor=2), {}),
    "megatron": (
        dict(fsdp=2, seq=2, tensor=2),
        dict(model=dict(strategy="megatron")),
    ),
    "data, ring, on the host": (dict(data=2, ring=4), dict(memory=ON_HOST)),
    "fsdp, tensor, moments on the host": (
        dict(fsdp=4, tensor=2),
        dict(memory=dict(offload=["optimizer"])),
    ),
}
QUICK = [
    *[(name, "fsdp, seq, tensor") for name in OPTIMIZERS],
    ("muon", "data, ring, on the host"),
    ("adafactor", "data, ring, on the host"),
]


def gradients_of(step, tree):
    """Some are cut by the norm of all, some are not."""
    rng = np.random.default_rng(step)
    size = 1.0 if step % 2 else 0.002
    return jax.tree.map(lambda x: np.float32(size * rng.standard_normal(x.shape)), tree)


@functools.cache
def want(name):
    training = config_of({}, optimizer=name).training

    def gradients(step, matrices):
        del matrices
        return matrices_of(gradients_of(step, grown()))

    return take_plain_steps(training, matrices_of(grown()), gradients, NUM_STEPS)


@pytest.mark.parametrize("name, case", slow_but_for(QUICK, OPTIMIZERS, CASES))
def test_steps_are_those_of_plain_optax(name, case):
    degrees, options = CASES[case]
    config = config_of(degrees, optimizer=name, **options)
    mesh = mesh_of(**degrees)
    with jax.set_mesh(mesh):
        optimizer, shapes = optimizer_of(config), abstract_state(config)

        def put(x, like):
            sharding = like.sharding
            kind = sharding.memory_kind
            on = NamedSharding(mesh, sharding.spec, memory_kind=kind)
            return jax.device_put(x, on)

        @jax.jit
        def step(gradients, parameters, state):
            gradients = lay("moments", gradients, config)
            parameters = lay("moments", parameters, config)
            tokens = jnp.float32(1)
            return update(optimizer, gradients, tokens, parameters, state)[:2]

        parameters = jax.tree.map(put, grown(), shapes.parameters)
        begin = functools.partial(state_of, config, Transformer)
        state = jax.jit(begin)(parameters).optimizer
        for i in range(NUM_STEPS):
            gradients = jax.tree.map(put, gradients_of(i, grown()), shapes.parameters)
            parameters, state = step(gradients, parameters, state)

        def same(x, like):
            assert x.shape == like.shape
            if like.sharding is not None:
                assert x.sharding.spec == like.sharding.spec
                kind = like.sharding.memory_kind or "device"
                assert x.sharding.memory_kind == kind

        jax.tree.map(same, state, shapes.optimizer)
    assert_same_matrices(parameters, want(name), 1e-5)
