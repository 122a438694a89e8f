"""The arrays of a state, as a checkpoint describes them, sets them aside and asks."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ulysses_jax.memory.offload import HOST


def aside(x: jax.Array) -> jax.Array:
    """A copy of what lies in host memory: Orbax writes from there, not from a copy, and
    while it does, the next step changes the array in place."""
    if x.sharding.memory_kind != HOST:
        return x
    # By way of the device, one array at a time, as a step moves them too.
    on_device = jax.device_put(x, x.sharding.with_memory_kind("device"))
    return jax.block_until_ready(jax.device_put(on_device, x.sharding))


def describe(state: Any) -> dict[str, list[Any]]:
    """The dtype and shape of each array, by its path in the pytree."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {
        jax.tree_util.keystr(path): [str(x.dtype), list(x.shape)] for path, x in leaves
    }


def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An array to restore, with a sharding that says its devices.

    Raises:
      ValueError: neither the sharding nor a mesh that is set says any.
    """
    # Given no devices, Orbax would take those of the run that saved, or fail midway.
    spec = P() if x.sharding is None else getattr(x.sharding, "spec", None)
    if spec is None or isinstance(getattr(x.sharding, "mesh", None), Mesh):
        return x
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise ValueError(
            "abstract_state says no devices and no mesh is set: call restore under "
            "jax.set_mesh(mesh), or give its leaves shardings on a mesh"
        )
    kind = getattr(x.sharding, "memory_kind", None)
    sharding = NamedSharding(mesh, spec, memory_kind=kind)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def refuse_others(saved: dict, wanted: dict, folder: Path) -> None:
    """Compares what `describe` says of a checkpoint with what a run wants.

    Raises:
      ValueError: they differ; the message has the first five.
    """
    # Orbax would cast a dtype in silence, and report a shape from a dying event loop.
    differ = [
        f"state{path} was {saved.get(path, 'absent')}, is {wanted.get(path, 'absent')}"
        for path in {**saved, **wanted}
        if saved.get(path) != wanted.get(path)
    ]
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(
            f"{folder} holds other arrays than this run ({'; '.join(differ[:5])}{more})"
            ": use another run.folder (--run.folder), or the config it was made with"
        )
