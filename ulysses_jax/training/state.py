"""What a run carries from step to step, described abstractly, then made sharded."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Int

from ulysses_jax.config import Config, attended_features
from ulysses_jax.memory.offload import HOST, to_host
from ulysses_jax.models.adapter import joined, part_like, split
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import at_stage
from ulysses_jax.tensors.expected import Expected
from ulysses_jax.tensors.files import Tensors
from ulysses_jax.tensors.reading import Described, read_parameters
from ulysses_jax.training.arrays import on_devices
from ulysses_jax.training.load import Before
from ulysses_jax.training.model import (
    MakeModel,
    abstract_model,
    are_matrices,
    decayed,
    made,
    matrices,
)
from ulysses_jax.training.optimizer import make_optimizer
from ulysses_jax.training.update import LAYERS


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class TrainState:
    """Float32 parameters and optimizer moments; `lay` says where they lie.

    Attributes:
      parameters: those that are trained: all, or the adapters of `model.lora`.
      frozen: the others, which are read and never written; their matrices in the
        compute dtype, to which a product casts them.
    """

    step: Int[Array, ""]
    parameters: dict[str, Any]
    optimizer: optax.OptState
    frozen: dict[str, Any] = field(default_factory=dict)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[str, ...]]:
        """Without `frozen` where nothing is: Orbax keeps an empty dict, which older
        checkpoints have not."""
        names = ("step", "parameters", "optimizer")
        if self.frozen != {}:
            names += ("frozen",)
        keys = tuple(
            (jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names
        )
        return keys, names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> "TrainState":
        return cls(**dict(zip(names, children, strict=True)))

    def all_parameters(self) -> dict[str, Any]:
        """Of the model, as one tree."""
        return joined(self.parameters, self.frozen)

    def without_frozen(self) -> "TrainState":
        """What a checkpoint has."""
        return dataclasses.replace(self, frozen={})


def init_state(config: Config, make_model: MakeModel = Transformer) -> TrainState:
    """Draws the parameters from `run.seed`; call it inside `jax.jit` or `eval_shape`.

    The mesh is the one set with `jax.set_mesh`: under jit every array is made as its
    shards, so no device ever holds the whole; what `memory.offload` names leaves the
    device as it is made.
    """
    return state_of(config, make_model, *_drawn(config, make_model))


def _drawn(
    config: Config, make_model: MakeModel
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, and what is frozen."""
    drawn = nnx.to_pure_dict(nnx.state(made(config, make_model)))
    parameters, frozen = split(config.model, drawn)
    in_use = jnp.dtype(config.model.compute_dtype)
    is_cast = split(config.model, are_matrices(config, make_model))[1]
    frozen = jax.tree.map(
        lambda x, cast: x.astype(in_use) if cast else x, frozen, is_cast
    )
    return parameters, frozen


def state_of(
    config: Config,
    make_model: MakeModel,
    parameters: dict[str, Any],
    frozen: dict[str, Any],
) -> TrainState:
    """The state before the first step; call it inside `jax.jit` or `eval_shape`."""
    moments_like = lay("moments", parameters, config, make_model)
    optimizer = optimizer_of(config, make_model)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=lay("parameters", parameters, config, make_model),
        optimizer=optimizer.init(moments_like),
        frozen=lay("parameters", frozen, config, make_model),
    )
    return _offloaded(config, state, to_host)


def first_state(
    config: Config,
    make_model: MakeModel = Transformer,
    source: tuple[Tensors, list[Expected]] | None = None,
    before: Before | None = None,
) -> TrainState:
    """Drawn by `init_state`, or read, on the mesh that is set with `jax.set_mesh`.

    Args:
      source: of `open_source`, where the parameters are read; with adapters, those
        that are not trained.
      before: of `open_run`, where those that are trained are read.
    """
    begin = jax.jit(partial(state_of, config, make_model), donate_argnums=0)
    if before is not None:
        shapes = abstract_state(config, make_model).parameters
        state = begin(before.read(jax.tree.map(on_devices, shapes)), {})
    elif source is not None and config.model.lora is None:
        return begin(read_from(config, make_model, source), {})
    elif source is not None:
        state = jax.jit(lambda: init_state(config, make_model).without_frozen())()
    else:
        return jax.jit(partial(init_state, config, make_model))()
    if source is None:
        return state
    frozen = read_from(config, make_model, source)
    return dataclasses.replace(state, frozen=frozen)


def read_from(
    config: Config, make_model: MakeModel, source: tuple[Tensors, list[Expected]]
) -> dict[str, Any]:
    """A folder's parameters where a run has them: all, or what is frozen."""
    state = abstract_state(config, make_model)
    shapes = state.parameters if config.model.lora is None else state.frozen
    letters = nnx.to_pure_dict(
        nnx.state(abstract_model(config, make_model)),
        extract_fn=lambda variable: variable.get_metadata()["letters"],
    )

    def described(x: Any, its_letters: str) -> Described:
        return Described(x.shape, on_devices(x).sharding, its_letters, x.dtype)

    abstract = jax.tree.map(described, shapes, part_like(letters, shapes))
    return read_parameters(*source, abstract)


def optimizer_of(
    config: Config, make_model: MakeModel = Transformer
) -> optax.GradientTransformationExtraArgs:
    """Of a run: what decays, and what a matrix is, the model's parameters say."""
    of_model = decayed(config, make_model), matrices(config, make_model)
    return make_optimizer(config.training, *of_model)


def lay(
    what: Literal["parameters", "gradients", "moments"],
    tree: dict[str, Any],
    config: Config,
    make_model: MakeModel = Transformer,
) -> dict[str, Any]:
    """A tree like the parameters, or a part of them, moved to where `what` lies at
    training.zero_stage.

    Call it inside `jax.jit` or `eval_shape`. Costs an all-gather where D was cut and is
    whole after; to cut what is whole sends nothing.
    """

    def move(x, like):
        spec = at_stage(like.sharding.spec, what, config.training.zero_stage)
        return x if jax.typeof(x).sharding.spec == spec else reshard(x, spec)

    model = nnx.to_pure_dict(nnx.state(abstract_model(config, make_model)))
    return jax.tree.map(move, tree, part_like(model, tree))


def abstract_state(config: Config, make_model: MakeModel = Transformer) -> TrainState:
    """The state as shapes, dtypes and shardings on the mesh that is set.

    Numbers (the step, the optimizer's counts) have no sharding: whole on every device.
    Of what `memory.offload` names, the shardings say that it lies in host memory.
    """

    def in_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.sharding is None:
            return x
        sharding = x.sharding.with_memory_kind(HOST)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.eval_shape(partial(init_state, config, make_model))
    return _offloaded(config, state, partial(jax.tree.map, in_host))


def abstract_gradients(config: Config, state: TrainState) -> dict[str, Any]:
    """How sums of gradients lie, of a state that `abstract_state` describes."""
    if "parameters" in config.memory.offload:
        return state.parameters  # cut alike, and in host memory too
    return jax.eval_shape(
        lambda parameters: lay("gradients", parameters, config), state.parameters
    )


def host_bytes(config: Config, state: TrainState) -> dict[str, int]:
    """At least what a device should keep in host memory, by word of `memory.offload`.

    Args:
      config: placed.
      state: abstract, with shardings.

    Gradients and layer inputs are counted but for what XLA may put in place of
    parameters that are no layer's, once they are read.
    """
    offload, sizes = config.memory.offload, {}
    if "optimizer" in offload:
        sizes["optimizer"] = shard_bytes(_arrays(state.optimizer))
    if "parameters" in offload:
        layers, trained = (
            shard_bytes(each) for each in (state.parameters[LAYERS], state.parameters)
        )
        sizes["parameters"] = trained + shard_bytes(state.frozen)
        sizes["gradients"] = max(layers - (trained - layers), 0)
    model, mesh, training = config.model, config.mesh, config.training
    assert training.accumulation_steps and model.num_kv_heads and model.head_size
    rows = training.batch_size // training.accumulation_steps
    rows //= mesh.data * mesh.fsdp
    size = jnp.dtype(model.compute_dtype).itemsize
    # Of one feature of all tokens that a device has.
    feature = rows * config.padded_tokens() // (mesh.ring * mesh.seq) * size
    if "inputs" in offload:
        kept = config.memory.kept_features(model.width)
        inputs = rows * config.residual_tokens() * size
        sizes["inputs"] = model.num_layers * inputs * (model.width - kept)
    if "attention" in offload:
        features = attended_features(model, config.memory) // mesh.tensor
        sizes["attention"] = features * feature
    if "keys" in offload:
        heads = model.num_kv_heads // mesh.tensor * model.head_size
        sizes["keys"] = 2 * feature * heads
    return sizes


def shard_bytes(tree: Any) -> int:
    """Bytes that one device has of abstract arrays with shardings, in any memory."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if x.ndim]


def _offloaded(
    config: Config, state: TrainState, move: Callable[[Any], Any]
) -> TrainState:
    """The state, with what `memory.offload` names moved."""
    moved = {
        name: move(getattr(state, name))
        for word, names in (
            ("parameters", ("parameters", "frozen")),
            ("optimizer", ("optimizer",)),
        )
        if word in config.memory.offload
        for name in names
    }
    return dataclasses.replace(state, **moved)
