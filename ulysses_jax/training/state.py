"""What a run carries from step to step, described abstractly, then made sharded."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from ulysses_jax.config import Config
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Float32 parameters and optimizer moments, each sharded as its parameter."""

    step: Int[Array, ""]
    parameters: dict[str, Any]
    optimizer: optax.OptState


def init_state(config: Config) -> TrainState:
    """Draws the parameters from `run.seed`; call it inside `jax.jit` or `eval_shape`.

    The mesh is the one set with `jax.set_mesh`: under jit every array is made as its
    shards, so no device ever holds the whole.
    """
    parameters = nnx.to_pure_dict(nnx.state(_model(config)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=make_optimizer(config.training).init(parameters),
    )


def abstract_state(config: Config) -> TrainState:
    """The state as shapes, dtypes and shardings on the mesh that is set.

    Numbers (the step, the optimizer's counts) have no sharding: whole on every device.
    """
    return jax.eval_shape(partial(init_state, config))


def bind(config: Config, parameters: dict[str, Any]) -> Transformer:
    """The model with these parameters."""
    graph, state = nnx.split(nnx.eval_shape(partial(_model, config)))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def _model(config: Config) -> Transformer:
    return Transformer(config.model, config.memory, nnx.Rngs(config.run.seed))
