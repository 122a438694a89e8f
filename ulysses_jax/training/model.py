"""The model of a run: this library's transformer, or a module of the user's own."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ulysses_jax import layout
from ulysses_jax.config import Config, Memory, Run
from ulysses_jax.memory.offload import to_device
from ulysses_jax.memory.saving import Saving
from ulysses_jax.mesh import AXES, make_mesh
from ulysses_jax.models.adapter import split
from ulysses_jax.models.kinds import KINDS
from ulysses_jax.models.transformer import Transformer
from ulysses_jax.sharding import ZERO, activation
from ulysses_jax.training.matrix import matrix_of
from ulysses_jax.training.preflight import architecture
from ulysses_jax.training.update import LAYERS
from ulysses_jax.weights.gathered import Weight
from ulysses_jax.weights.parameter import is_matrix, said_spec
from ulysses_jax.weights.whole import unbind

MakeModel = Callable[..., Any]
"""`f(config.model, rngs=...)`, a module whose state is parameters alone, float32, with

features: `f(tokens, positions, segment_ids) -> [B, T, D]`; segment_ids may be None.
head: float32 `[model.vocab_size, D]`, a parameter, or an array made of one."""


def abstract_model(config: Config, make_model: MakeModel) -> Any:
    """The module, whose parameters are shapes and, on a mesh that is set, shardings."""
    if isinstance(make_model, nnx.Module) or not callable(make_model):
        name = type(make_model).__name__
        raise ValueError(
            "make_model is called, make_model(config.model, rngs=...), and makes the "
            f"module: give a class or a function, not a {name} that is made"
        )
    of = Config(model=config.model, run=Run(seed=config.run.seed))
    kinds = tuple(KINDS.items())
    graph, state = _abstract(of, make_model, kinds, get_abstract_mesh())
    return nnx.merge(graph, jax.tree.map(lambda x: x, state))


@functools.lru_cache(maxsize=16)  # a step asks for it ten times
def _abstract(config: Config, make_model: MakeModel, *_: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(partial(made, config, make_model)))


def made(config: Config, make_model: MakeModel) -> Any:
    """The module, drawn from `run.seed`; of another library's parameters, those lie as
    they say that say so (`nnx.with_partitioning`).

    Raises:
      ValueError: a parameter names an axis that a run's mesh has not.
    """
    # Flax itself would lay them out on Auto axes alone.
    with nnx.use_eager_sharding(False):
        model = make_model(config.model, rngs=nnx.Rngs(config.run.seed))
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, jax.Array):
                raise ValueError(
                    f"{where_of(model, *path, name)} is an array by itself, neither "
                    "trained nor saved: make it an nnx.Param, or a NumPy array where "
                    "it is constant"
                )
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        said = variable.get_metadata().get("out_sharding")
        if said is not None:
            _check_axes(where_of(model, *path), said)
            spec = said_spec(variable)
            variable.set_metadata(out_sharding=tuple(spec))
            variable.set_value(layout.lay(variable.get_value(), spec))
    return model


def where_of(model: Any, *path: Any) -> str:
    return ".".join(map(str, (type(model).__name__, *path)))


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
    with no_mesh():
        model = abstract_model(config, make_model)
    return None if isinstance(model, Transformer) else type(model).__name__


def identity(config: Config, make_model: MakeModel) -> dict[str, Any]:
    """What a checkpoint's parameters depend on, for its meta."""
    own = own_name(config, make_model)
    if own is None:
        return architecture(config.model)
    return {"class": own, "vocab_size": config.model.vocab_size}


def no_mesh() -> Any:
    """A caller of a run may have set any mesh, which is not the run's."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def are_matrices(config: Config, make_model: MakeModel) -> dict[str, Any]:
    """A tree like all parameters: whether each is a matrix."""
    state = nnx.state(abstract_model(config, make_model))
    return nnx.to_pure_dict(state, extract_fn=is_matrix)


def matrices(config: Config, make_model: MakeModel) -> dict[str, Any]:
    """A tree like those that are trained: the `Matrix` of each.

    A user's own parameters, which have no letters, are one each, stacked or not.
    """
    model = abstract_model(config, make_model)
    has_stacks = isinstance(model, Transformer)
    found = flax.traverse_util.unflatten_dict(
        {
            path: matrix_of(
                variable.get_metadata().get("letters"),
                variable.shape,
                in_stack=has_stacks and path[0] == LAYERS,
            )
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }
    )
    return split(config.model, found)[0]


def decayed(config: Config, make_model: MakeModel) -> dict[str, Any]:
    """A tree like those that are trained: whether each is a matrix, and so decayed."""
    return split(config.model, are_matrices(config, make_model))[0]


def model_of(
    config: Config, parameters: dict[str, Any], make_model: MakeModel = Transformer
) -> Any:
    """The model with these parameters; from host memory the layers fetch their own,
    one after another, and the others are fetched here."""
    others = {name: x for name, x in parameters.items() if name != LAYERS}
    parameters = parameters | to_device(others)
    graph, state = nnx.split(abstract_model(config, make_model))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def padding_apart(segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"] | None:
    """A run's padding, whose id is 0, as segments of a token each: ids that rise, below
    all others. So a kernel that passes over hidden keys has one pair a token of it."""
    if segment_ids is None:
        return None
    place = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    place = layout.lay(place, activation("BT", layout.axes()))
    return jnp.where(segment_ids == 0, jnp.iinfo(jnp.int32).min + place, segment_ids)


def features_and_head(
    model: Any, batch: dict[str, Array], memory: Memory
) -> tuple[Float[Array, "B T D"], Weight]:
    """What the loss is of.

    A user's module runs as if the mesh had Auto axes: any code does, and XLA gathers
    what its products need.
    """
    ids = batch["tokens"], batch["positions"], batch.get("segment_ids")
    if isinstance(model, Transformer):
        tokens, positions, segment_ids = ids
        segment_ids = padding_apart(segment_ids)
        x = model.features(tokens, positions, segment_ids, run=Saving(memory))
        return x, model.head
    module, values = unbind(model)
    head = head_of(model)

    def features(values: Any, *ids: Any) -> Array:
        x = module.bind(values).features(*ids)
        want = (*ids[0].shape, head.shape[1])
        if getattr(x, "shape", None) != want:
            raise ValueError(
                f"features returned {getattr(x, 'shape', type(x).__name__)} for tokens "
                f"of {want[:2]} and a head of {head.shape}: it must return {want}"
            )
        return x

    # The loss gathers D over the axes of ZeRO alone.
    axes = layout.axes()
    cut = layout.spec_of(head, P(None, None))[1]
    keeps = cut is not None and {*((cut,) if isinstance(cut, str) else cut)} <= {*ZERO}
    head = layout.lay(head, P(activation("V", axes)[0], cut if keeps else None))
    run: Any = jax.sharding.auto_axes(features, out_sharding=activation("BTD", axes))
    return run(values, *ids), head


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

    parameters = jax.tree.map(move, parameters)
    return model_of(for_calls(config), parameters, make_model)


def for_calls(config: Config) -> Config:
    """How a model is computed is a question of the devices and the mesh that are there,
    and tokens that a caller gives lie in the sequence's order."""
    here = dict(strategy="auto", attention="auto", zigzag=False)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **here))


def head_of(model: Any) -> Any:
    head = model.head
    return head.get_value() if isinstance(head, nnx.Variable) else head
