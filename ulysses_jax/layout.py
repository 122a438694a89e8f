"""Arrays on the mesh that is set, whichever it is: none, with Auto or Explicit axes.

On Explicit axes an array's type says how it lies, and these functions change the type;
on Auto axes they tell XLA; without a mesh there is one device, and nothing to say.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ulysses_jax.mesh import AXES


def axes() -> dict[str, int]:
    """The degrees of this library's axes, of those that the mesh has; {}: no mesh."""
    shape = get_abstract_mesh().shape
    return {axis: shape[axis] for axis in AXES if axis in shape}


def degree(*names: str) -> int:
    """Of these axes together; an axis that the mesh lacks has degree 1."""
    return math.prod(axes().get(name, 1) for name in names)


def inside_shard_map() -> bool:
    """Whether arrays are local here."""
    return bool(get_abstract_mesh().manual_axes)


def is_explicit() -> bool:
    """Whether types say how arrays lie.

    Raises:
      ValueError: some axes are Explicit and some are Auto.
    """
    kinds = set(get_abstract_mesh().axis_types)
    if len(kinds) > 1 and AxisType.Manual not in kinds:
        raise ValueError(
            "the mesh has axes of type Auto and of type Explicit: give all of them one "
            "type, as make_mesh(..., axis_type=...) does"
        )
    return kinds == {AxisType.Explicit}


def lay(x: Array, spec: P) -> Array:
    """The same global array, lying as the spec says.

    Raises:
      ValueError: it lies on another mesh than the one that is set; a dim that does not
        divide.
    """
    check_mesh(x)
    if get_abstract_mesh().empty:
        return x
    check_divides(x.shape, spec)
    if is_explicit():
        return jax.sharding.reshard(x, spec)
    return _constrained(x, spec)


# Without a jit it would refuse what lies on no mesh yet.
@partial(jax.jit, static_argnums=1, inline=True)
def _constrained(x: Array, spec: P) -> Array:
    return lax.with_sharding_constraint(x, spec)


def lay_like(x: Array, like: Array) -> Array:
    """On Explicit axes with the type of `like`, so that the two may be added."""
    sharding = jax.typeof(like).sharding
    if not is_explicit() or sharding.mesh.empty:
        return x
    return lay(x, sharding.spec)


def spec_of(x: Any, otherwise: P) -> P:
    """How a global array lies, by its type; `otherwise` where types do not say: on
    Auto axes, and of what was made on no mesh."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if is_explicit() and not sharding.mesh.empty else otherwise


def einsum(equation: str, a: Array, b: Array, spec: P, **options: Any) -> Array:
    """A product of global arrays that lies as the spec says."""
    if is_explicit():
        return jnp.einsum(equation, a, b, out_sharding=spec, **options)
    return lay(jnp.einsum(equation, a, b, **options), spec)


def over_devices(
    local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`local` on every device's shards; of all arrays where there is no mesh.

    Arguments that do not lie as their specs say are laid so.
    """
    if get_abstract_mesh().empty:
        return local
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if not is_explicit():
        return run

    def laid(spec: P | None, tree: Any) -> Any:
        return tree if spec is None else jax.tree.map(lambda x: lay(x, spec), tree)

    def call(*args: Any) -> Any:
        return run(*jax.tree.map(laid, in_specs, args, is_leaf=_is_spec))

    return call


def _is_spec(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, P)


def present(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those axes that the mesh has."""
    return tuple(name for name in names if name in axes())


def psum(x: Any, names: tuple[str, ...]) -> Any:
    """Inside `over_devices`: the sum over those of the axes that there are."""
    return lax.psum(x, names) if (names := present(names)) else x


def pmax(x: Array, names: tuple[str, ...]) -> Array:
    """Inside `over_devices`: the greatest over those of the axes that there are."""
    return lax.pmax(x, names) if (names := present(names)) else x


def psum_scatter(x: Array, names: tuple[str, ...], dim: int) -> Array:
    """Inside `over_devices`: the sum, cut along `dim`."""
    if not (names := present(names)):
        return x
    return lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)


def all_gather(x: Array, names: tuple[str, ...], dim: int) -> Array:
    """Inside `over_devices`: the whole of `dim` from its shards, if it is cut."""
    if not (names := present(names)):
        return x
    return lax.all_gather(x, names, axis=dim, tiled=True)


def axis_index(name: str) -> Any:
    """Inside `over_devices`: this device's place on the axis, 0 where there is none."""
    return lax.axis_index(name) if present((name,)) else 0


def check_mesh(x: Any) -> None:
    """Refuses an array that lies on another mesh than the one that is set, or that is
    bound to one device while a mesh is set.

    Raises:
      ValueError: with both meshes.
    """
    sharding = jax.typeof(x).sharding
    is_here = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    if sharding.mesh.empty and is_here:
        sharding = x.sharding  # of Auto axes no type speaks
    ours = dict(get_abstract_mesh().shape)
    is_bound = is_here and x.committed and x.sharding.num_devices == 1
    if is_bound and get_abstract_mesh().size > 1:
        raise ValueError(
            f"an array of shape {x.shape} is bound to one device, but the mesh that is "
            f"set is {_text(ours)}: make it or load it under that mesh, or unbind it, "
            "jnp.asarray(np.asarray(x))"
        )
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size <= 1:
        return
    theirs = dict(sharding.mesh.shape)
    if theirs == ours:
        kinds = sharding.mesh.axis_types, get_abstract_mesh().axis_types
        if kinds[0] != kinds[1]:
            kind, other = (str(each[0]).removeprefix("AxisType.") for each in kinds)
            raise ValueError(
                f"an array of shape {x.shape} lies on a mesh with {kind} axes, but the "
                f"mesh that is set has {other} axes: set one with {kind} axes, "
                f"make_mesh(..., axis_type=jax.sharding.AxisType.{kind})"
            )
        return
    what = f"lies on a mesh of {_text(theirs)}"
    if not ours:
        raise ValueError(
            f"an array of shape {x.shape} {what}, and no mesh is set: call "
            "jax.set_mesh(mesh) with that mesh first"
        )
    raise ValueError(
        f"an array of shape {x.shape} {what}, but the mesh that is set is "
        f"{_text(ours)}: set the mesh that the model and its inputs were made under, "
        "or make them under this one"
    )


def _text(degrees: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in degrees.items())


def check_divides(shape: tuple[int, ...], spec: P) -> None:
    """Refuses a global shape that the axes of a spec do not divide.

    Raises:
      ValueError: with the numbers.
    """
    for dim, (size, names) in enumerate(zip(shape, spec, strict=False)):
        names = (names,) if isinstance(names, str) else names or ()
        over = math.prod(get_abstract_mesh().shape[name] for name in names)
        if size % over:
            degrees = {name: get_abstract_mesh().shape[name] for name in names}
            raise ValueError(
                f"dim {dim} of an array of shape {shape}, {size}, does not divide over "
                f"{_text(degrees)}: use a multiple of {over}, or a mesh whose degrees "
                f"multiply to {math.gcd(size, over)} there"
            )
