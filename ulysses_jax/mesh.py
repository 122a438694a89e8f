"""The mesh: its axes by name, in one order, with the fastest links innermost."""

import math
import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "ring", "seq", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    ring: int = 1,
    seq: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    axis_type: AxisType = AxisType.Auto,
    **others: Any,
) -> Mesh:
    """Makes a mesh with the axes data, fsdp, ring, seq, tensor, outermost first.

    Devices are taken host by host, so that the innermost axes, `tensor` and `seq`,
    stay inside a host wherever their degrees fit in it.

    Args:
      data, fsdp, ring, seq, tensor: the degree of each axis. One of them may be -1:
        what the others leave.
      devices: the `jax.Device`s to use; None is all of them.
      axis_type: of every axis. `AxisType.Auto` lets any model run unchanged; the
        trainer takes `AxisType.Explicit`, where an array's type says how it is sharded.

    Returns:
      A `jax.sharding.Mesh` over all of `devices`.

    Raises:
      ValueError: an axis of another name, a degree is no number, the degrees do not
        multiply to the number of devices, or JAX cannot start a device.
    """
    if others:
        raise ValueError(
            f"make_mesh has no axis {', '.join(others)}: its axes are "
            f"{', '.join(AXES)}, and it takes devices= and axis_type="
        )
    takes_all = devices is None
    if devices is None:
        try:
            devices = jax.devices()
        # JAX only asserts that one of JAX_PLATFORMS was found.
        except (RuntimeError, AssertionError) as error:
            platforms = os.environ.get("JAX_PLATFORMS")
            raise ValueError(
                f"JAX_PLATFORMS is {platforms!r}, and JAX cannot start its devices"
                f"{f' ({error})' if str(error) else ''}: GPUs need their driver and "
                "the extra [gpu]; without a GPU set JAX_PLATFORMS=cpu"
            ) from None
    degrees = dict(data=data, fsdp=fsdp, ring=ring, seq=seq, tensor=tensor)
    for axis, degree in degrees.items():
        if not isinstance(degree, Integral):
            raise ValueError(f"{axis} is a number of devices, not {degree!r}")
    try:
        degrees = resolve_degrees(degrees, len(devices))
    except ValueError as error:
        some = math.prod(degrees.values())
        if takes_all and 0 < some < len(devices):
            raise ValueError(
                f"{error}; or, in Python, make_mesh(..., devices=jax.devices()[:{some}]"
                ")"
            ) from None
        if len(devices) > 1 or devices[0].platform != "cpu":
            raise
        raise ValueError(
            f"{error}. JAX found no GPU, only the CPU: GPUs need the extra [gpu], and "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N simulates N devices"
        ) from None
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
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    if num_devices % fixed or (not free and fixed != num_devices):
        axis = free[0] if free else "data"
        others = fixed if free else fixed // degrees[axis]
        remedy = (
            f"set {axis}={num_devices // others} or {axis}=-1"
            if num_devices % others == 0
            else "choose degrees whose product "
            f"{'divides' if free else 'is'} {num_devices}"
        )
        raise ValueError(
            f"mesh {text} takes {fixed} devices{' or a multiple' if free else ''}, "
            f"but there are {num_devices}: {remedy}"
        )
    return degrees | {axis: num_devices // fixed for axis in free}


class Device(NamedTuple):
    """What a mesh is made of: "cpu" or "gpu", and the model, as JAX names them."""

    platform: str
    kind: str

    @property
    def is_gpu(self) -> bool:
        return self.platform in ("gpu", "cuda")


def device_of(mesh: Mesh | AbstractMesh) -> Device:
    """The devices of a mesh, all alike; known without one being there."""
    if isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
    else:
        device = mesh.abstract_device or jax.devices()[0]
    return Device(device.platform, device.device_kind)


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices, e.g. "cpu" or "gpu"; known without a device."""
    return device_of(mesh).platform


def devices_per_host() -> int:
    """Devices of a host, over all of its processes; the least of all hosts.

    Where there are many processes all must call it: each tells its host's name.
    """
    here = jax.local_device_count()
    if jax.process_count() == 1:
        return here
    name = zlib.crc32(socket.gethostname().encode())
    rows = multihost_utils.process_allgather(np.asarray([name, here], np.uint32))
    return int(min(rows[rows[:, 0] == name, 1].sum() for name in rows[:, 0]))


def simulate_cpu_devices(num_devices: int | None) -> None:
    """Makes JAX run on the CPU as this many devices; call it before JAX has devices.

    None leaves JAX as it is. A device count in XLA_FLAGS wins over `num_devices`. A
    compilation cache on disk is not used: XLA on the CPU (jax 0.10.2) runs collectives
    of a program from there in no fixed order, and devices wait for each other for ever.

    Raises:
      ValueError: JAX has other devices already.
    """
    if num_devices is None:
        return
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", num_devices)
        except RuntimeError:
            here = jax.local_device_count()
            raise ValueError(
                f"run.simulated_cpu_devices {num_devices} comes too late: this process "
                f"has used JAX, on {here} {jax.default_backend()} devices. Start a new "
                "process, with nothing of JAX before; or leave it out, and set mesh to "
                f"degrees whose product is {here}"
            ) from None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


@contextmanager
def allow_promotion() -> Iterator[None]:
    """Inside, `jax_numpy_rank_promotion=raise` and `jax_numpy_dtype_promotion=strict`
    do nothing.

    They find slips in code; a run's own broadcasts and promotes on purpose,
    and its values are the same.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
