"""The model of a run: this library's transformer, or a module of the user's own."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ulysses_jax import layout
from ulysses_jax.config import Config, Memory
from ulysses_jax.memory.offload import to_device
from ulysses_jax.memory.saving import Saving
from ulysses_jax.mesh import AXES, make_mesh
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import activation
from ulysses_jax.training.update import LAYERS
from ulysses_jax.weights.gathered import Weight
from ulysses_jax.weights.parameter import is_matrix
from ulysses_jax.weights.whole import unbind

MakeModel = Callable[..., Any]
"""`f(config.model, rngs=...)`, a module whose state is parameters alone, float32, with

features: `f(tokens, positions, segment_ids) -> [B, T, D]`; segment_ids may be None.
head: float32 `[model.vocab_size, D]`, a parameter or an array."""


def abstract_model(config: Config, make_model: MakeModel) -> Any:
    """The module, whose parameters are shapes and, on a mesh that is set, shardings."""
    return nnx.eval_shape(partial(made, config, make_model))


def made(config: Config, make_model: MakeModel) -> Any:
    """The module, drawn from `run.seed`; of another library's parameters, those lie as
    they say that say so (`nnx.with_partitioning`).

    Raises:
      ValueError: a parameter names an axis that a run's mesh has not.
    """
    # Flax itself would lay them out on Auto axes alone.
    with nnx.use_eager_sharding(False):
        model = make_model(config.model, rngs=nnx.Rngs(config.run.seed))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        said = variable.get_metadata().get("out_sharding")
        if said is not None:
            _check_axes(f"{type(model).__name__}.{'.'.join(map(str, path))}", said)
            variable.set_value(layout.lay(variable.get_value(), P(*said)))
    return model


def _check_axes(name: str, said: Any) -> None:
    names = [
        n for each in said for n in ((each,) if isinstance(each, str) else each or ())
    ]
    for axis in names:
        if axis not in AXES:
            raise ValueError(
                f"{name} lies over an axis {axis!r}, and the mesh of a run has "
                f"{', '.join(AXES)}: name one of these"
            )


def own_name(config: Config, make_model: MakeModel) -> str | None:
    """The class of a user's module, which `memory` and `strategy` do not act on; None:
    it is this library's."""
    model = abstract_model(config, make_model)
    return None if isinstance(model, Transformer) else type(model).__name__


def prepared(config: Config, make_model: MakeModel) -> Config:
    """The config for this model, before it is placed on a mesh.

    Raises:
      ValueError: a user's module that the step cannot train, or options of the config
        that only act on this library's layers.
    """
    model = abstract_model(config, make_model)
    if isinstance(model, Transformer):
        return config
    _check_module(model, config.model.vocab_size)
    memory, plain = config.memory, Memory()
    kept = dataclasses.replace(
        plain, loss_tile_tokens=memory.loss_tile_tokens, head_chunks=memory.head_chunks
    )
    for each in dataclasses.fields(memory):
        value = getattr(memory, each.name)
        if value != getattr(kept, each.name) and (each.name, value) != (
            "remat",
            "none",
        ):
            raise ValueError(
                f"memory.{each.name} {value} acts on the layers of "
                f"ulysses_jax.Transformer, and {type(model).__name__} is none: leave it "
                "out, and use nnx.remat or jax.checkpoint in its features"
            )
    if config.training.zero_stage == 2:
        raise ValueError(
            "training.zero_stage 2 cuts the gradients of ulysses_jax.Transformer, and "
            f"{type(model).__name__} is none: use 3, where parameters and gradients lie "
            "as its own parameters say, or 1"
        )
    if config.model.zigzag is None:
        # Its attention is its own: tokens lie in the sequence's order.
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, zigzag=False)
        )
    return config


def _check_module(model: Any, vocab_size: int) -> None:
    name = type(model).__name__
    for part, what in (
        ("features", "features(tokens, positions, segment_ids) -> [B, T, D]"),
        ("head", "head, float32 [vocab_size, D]"),
    ):
        if not hasattr(model, part):
            raise ValueError(f"{name} has no {part}: a model to train has {what}")
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        where = ".".join(map(str, path))
        if not isinstance(variable, nnx.Param):
            raise ValueError(
                f"{name}.{where} is a {type(variable).__name__}, and the trainer keeps "
                "parameters alone: make the module without it (dropout 0, no batch "
                "statistics)"
            )
        if variable.dtype != jnp.float32:
            raise ValueError(
                f"{name}.{where} is {variable.dtype}: parameters are float32; give the "
                "products another dtype (in flax.nnx dtype=, and param_dtype float32)"
            )
    shape = _head(model).shape
    if len(shape) != 2 or shape[0] != vocab_size:
        raise ValueError(
            f"{name}.head has shape {shape}, and model.vocab_size is {vocab_size}: "
            "head is [vocab_size, D], the transpose of a Linear's kernel"
        )


def decayed(config: Config, make_model: MakeModel) -> dict[str, Any]:
    """A tree like the parameters: whether each is a matrix, which weight decay is of."""
    state = nnx.state(abstract_model(config, make_model))
    return nnx.to_pure_dict(state, extract_fn=is_matrix)


def bind(
    config: Config, parameters: dict[str, Any], make_model: MakeModel = Transformer
) -> Any:
    """The model with these parameters; from host memory the layers fetch their own,
    one after another, and the others are fetched here."""
    others = {name: x for name, x in parameters.items() if name != LAYERS}
    parameters = parameters | to_device(others)
    graph, state = nnx.split(abstract_model(config, make_model))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def features_and_head(
    model: Any, batch: dict[str, Array], memory: Memory
) -> tuple[Float[Array, "B T D"], Weight]:
    """What the loss is of.

    A user's module runs as if the mesh had Auto axes: any code does, and XLA gathers
    what its products need.
    """
    ids = batch["tokens"], batch["positions"], batch.get("segment_ids")
    if isinstance(model, Transformer):
        return model.features(*ids, run=Saving(memory)), model.head
    module, values = unbind(model)

    def features(values: Any, *ids: Any) -> Array:
        x = module.bind(values).features(*ids)
        want = ids[0].shape
        if getattr(x, "ndim", 0) != 3 or x.shape[:2] != want:
            raise ValueError(
                f"features returned {getattr(x, 'shape', type(x).__name__)} for tokens "
                f"of {want}: it must return [B, T, D]"
            )
        return x

    spec = activation("BTD", layout.axes())
    return jax.sharding.auto_axes(features, out_sharding=spec)(values, *ids), _head(
        model
    )


def handed_over(
    config: Config, parameters: dict[str, Any], make_model: MakeModel
) -> Any:
    """The trained module, for who calls it next: on a mesh of the same devices whose
    axes are Auto, in the devices' memory; nothing is copied that lies there."""
    mesh = jax.sharding.get_mesh()
    auto = make_mesh(**dict(mesh.shape), devices=list(mesh.devices.flat))

    def move(x: Array) -> Array:
        spec = x.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
        return jax.device_put(x, NamedSharding(auto, spec, memory_kind="device"))

    return bind(config, jax.tree.map(move, parameters), make_model)


def _head(model: Any) -> Any:
    head = model.head
    return head.get_value() if isinstance(head, nnx.Variable) else head
