"""The mesh: its axes by name, in one order, with the fastest links innermost."""

import os
import socket
import zlib
from collections.abc import Sequence
from typing import Any

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
      ValueError: the degrees do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    degrees = dict(data=data, fsdp=fsdp, ring=ring, seq=seq, tensor=tensor)
    try:
        degrees = resolve_degrees(degrees, len(devices))
    except ValueError as error:
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
    fixed = int(np.prod([degree for degree in degrees.values() if degree != -1]))
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


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """The platform of a mesh's devices, e.g. "cpu" or "gpu"; known without a device."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


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
    """
    if num_devices is None:
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_devices)


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Starts `jax.distributed` where this is one process of many; else does nothing.

    Under SLURM (`srun`), Open MPI (`mpirun`) and Kubernetes (an Indexed Job) the
    arguments are found by JAX. Everywhere else give all three. Call it before JAX has
    devices. One process a host takes all the host's GPUs, one process a GPU its own.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      num_processes: of the run.
      process_id: of this process, 0 to num_processes - 1.

    Raises:
      ValueError: some of the arguments are missing, or a launcher is there that does
        not say enough.
    """
    given = dict(
        coordinator=coordinator, num_processes=num_processes, process_id=process_id
    )
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        assert num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"distributed.process_id {process_id} is not one of 0 to "
                f"{num_processes - 1}"
            )
        if num_processes > 1:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method="deactivate",
            )
        return
    if len(missing) < len(given):
        raise ValueError(
            "distributed takes coordinator, num_processes and process_id together; "
            f"missing: {', '.join(missing)}"
        )
    launcher = _launcher()
    if launcher is not None:
        method, local_device_ids = launcher
        try:
            jax.distributed.initialize(
                cluster_detection_method=method, local_device_ids=local_device_ids
            )
        except ValueError as error:
            raise ValueError(
                f"jax.distributed could not read all that it needs from {method} "
                f"({error}): give --distributed.coordinator HOST:PORT "
                "--distributed.num-processes N --distributed.process-id I"
            ) from None


def _launcher() -> tuple[str, list[int] | None] | None:
    """The launcher of many processes, as JAX names it, and the devices to take.

    None for the devices leaves them to JAX: process i of a host takes GPU i, or on
    Kubernetes all of the pod's.
    """
    env = os.environ
    # SLURM_STEP_NODELIST: started by srun, not only inside an allocation.
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        tasks_a_node = env.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as "1(x4)"
        if tasks_a_node.split("(")[0] == "1" and "SLURM_GPUS_ON_NODE" in env:
            return "slurm", list(range(int(env["SLURM_GPUS_ON_NODE"])))
        return "slurm", None
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi", None
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "k8s", None
    return None
