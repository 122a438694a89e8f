"""The mesh: its axes by name, in one order, with the fastest links innermost."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "ring", "seq", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    ring: int = 1,
    seq: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """Makes a mesh with the axes data, fsdp, ring, seq, tensor, outermost first.

    Devices are taken host by host, so that the innermost axes, `tensor` and `seq`,
    stay inside a host wherever their degrees fit in it.

    Args:
      data, fsdp, ring, seq, tensor: the degree of each axis. One of them may be -1:
        what the others leave.
      devices: the devices to use; None is all of them.
      axis_type: of every axis. `AxisType.Auto` lets any model run unchanged; the trainer
        takes `AxisType.Explicit`, where every array's type says how it is sharded.

    Returns:
      A `jax.sharding.Mesh` over all of `devices`.

    Raises:
      ValueError: the degrees do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    degrees = resolve_degrees(
        dict(data=data, fsdp=fsdp, ring=ring, seq=seq, tensor=tensor), len(devices)
    )
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    array = np.asarray(by_host, dtype=object).reshape(tuple(degrees.values()))
    return Mesh(array, AXES, axis_types=(axis_type,) * len(AXES))


def resolve_degrees(degrees: dict[str, int], num_devices: int) -> dict[str, int]:
    """Replaces the one degree of -1 by what is left; checks the product.

    Raises:
      ValueError: two degrees are -1, one is not positive, or the product is not
        `num_devices`.
    """
    text = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in degrees.values()):
        raise ValueError(
            f"mesh {text}: every degree is a positive number, and one may be -1 "
            "(what the others leave)"
        )
    fixed = int(np.prod([degree for degree in degrees.values() if degree != -1]))
    if num_devices % fixed or (not free and fixed != num_devices):
        axis = free[0] if free else "data"
        others = fixed if free else fixed // degrees[axis]
        remedy = (
            f"set {axis}={num_devices // others} or {axis}=-1"
            if num_devices % others == 0
            else f"choose degrees whose product divides {num_devices}"
        )
        raise ValueError(
            f"mesh {text} takes {fixed} devices{' or a multiple' if free else ''}, "
            f"but there are {num_devices}: {remedy}"
        )
    return degrees | {axis: num_devices // fixed for axis in free}


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices, e.g. "cpu" or "gpu"; known without a device."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
