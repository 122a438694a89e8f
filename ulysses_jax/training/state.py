"""What a run carries from step to step, described abstractly, then made sharded."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Int

from ulysses_jax.config import Config
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import at_stage
from ulysses_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Float32 parameters and optimizer moments; `lay` says where they lie."""

    step: Int[Array, ""]
    parameters: dict[str, Any]
    optimizer: optax.OptState


def init_state(config: Config) -> TrainState:
    """Draws the parameters from `run.seed`; call it inside `jax.jit` or `eval_shape`.

    The mesh is the one set with `jax.set_mesh`: under jit every array is made as its
    shards, so no device ever holds the whole.
    """
    made = nnx.to_pure_dict(nnx.state(_model(config)))
    moments_like = lay("moments", made, config)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=lay("parameters", made, config),
        optimizer=make_optimizer(config.training).init(moments_like),
    )


def lay(
    what: Literal["parameters", "gradients", "moments"],
    tree: dict[str, Any],
    config: Config,
) -> dict[str, Any]:
    """A tree like the parameters, moved to where `what` lies at training.zero_stage.

    Call it inside `jax.jit` or `eval_shape`. Costs an all-gather where D was cut and is
    whole after; to cut what is whole sends nothing.
    """

    def move(x, like):
        spec = at_stage(like.sharding.spec, what, config.training.zero_stage)
        return x if jax.typeof(x).sharding.spec == spec else reshard(x, spec)

    model = nnx.eval_shape(partial(_model, config))
    return jax.tree.map(move, tree, nnx.to_pure_dict(nnx.state(model)))


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
