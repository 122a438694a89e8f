"""The mesh: its axes by name, in one order, with the fastest links innermost."""

import math
import os
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from ulysses_jax.launcher import find_launcher, own_devices

AXES = ("data", "fsdp", "ring", "seq", "tensor")

# How long a name may be unknown, as a new pod's is, and process 0 not be there: that
# long JAX waits too, and ends the process then.
_UNKNOWN_SECONDS, _ABSENT_SECONDS = 20, 300


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


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Starts `jax.distributed` where this is one process of many; else does nothing.

    Under SLURM (`srun`), Open MPI (`mpirun`) and Kubernetes (an Indexed Job) the
    arguments are found by JAX. Everywhere else give all three. Call it before JAX has
    devices. One process a host takes all the GPUs that it sees; several share them.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      num_processes: of the run.
      process_id: of this process, 0 to num_processes - 1.

    Raises:
      ValueError: some of the arguments are missing or cannot be, or a launcher is there
        that does not say enough.
    """
    given = dict(
        coordinator=coordinator, num_processes=num_processes, process_id=process_id
    )
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            "distributed takes coordinator, num_processes and process_id together; "
            f"missing: {', '.join(missing)}"
        )
    launcher = find_launcher()
    if not missing:
        assert coordinator is not None
        assert num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"distributed.process_id {process_id} is not one of 0 to "
                f"{num_processes - 1}"
            )
        if num_processes > 1:
            _await_coordinator(coordinator, process_id)
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                local_device_ids=None if launcher is None else own_devices(launcher),
                cluster_detection_method="deactivate",
            )
        return
    if launcher is None:
        return
    flags = (
        "--distributed.coordinator HOST:PORT --distributed.num-processes "
        f"{launcher.size or 'N'} --distributed.process-id "
        f"{'I' if launcher.rank is None else launcher.rank} (for each its own)"
    )
    if launcher.method is None or launcher.rank is None:
        is_slurm = launcher.method == "slurm"
        lacks = (
            f"{launcher.rank_name} is not set, which says which of them it is: start "
            f"it with srun, or give {flags}"
            if is_slurm
            else f"not where process 0 is: give {flags}"
        )
        name = "SLURM_STEP_NODELIST" if is_slurm else launcher.size_name
        raise ValueError(
            f"by its variables ({launcher.size_name}={launcher.size}) {launcher.name} "
            f"started this as one of {launcher.size} processes, but {lacks}; or, to "
            f"train in this process alone, unset {name}"
        )
    if launcher.rank == 0:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        if launcher.method == "slurm" and port is None:  # as JAX chooses it
            port = int(os.environ.get("SLURM_JOB_ID", 0)) % 2**12 + 2**16 - 2**12
        if port is not None:
            if not _is_port(str(port)):
                raise ValueError(
                    f"JAX_COORDINATOR_PORT is {port!r}, not a port of 1 to 65535: set "
                    "it for all processes, or unset it"
                )
            _check_port(int(port), "set JAX_COORDINATOR_PORT=PORT for all processes")
    try:
        jax.distributed.initialize(
            cluster_detection_method=launcher.method,
            local_device_ids=own_devices(launcher),
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"jax.distributed could not read all that it needs from {launcher.name}'s "
            f"variables ({error}): give {flags}"
        ) from None


def _await_coordinator(coordinator: str, process_id: int) -> None:
    """Words for what ends the process without them, at once or after five minutes.

    Raises:
      ValueError: no such host or port, or nobody there.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not _is_port(port):
        raise ValueError(
            f"distributed.coordinator {coordinator!r} is not host:port, such as "
            "host0:1234, with a port of 1 to 65535"
        )
    address = host.strip("[]"), int(port)
    started = time.monotonic()
    while True:
        try:
            if process_id:
                socket.create_connection(address, timeout=10).close()
            else:
                socket.getaddrinfo(*address)
                _check_port(int(port), "use another one in --distributed.coordinator")
            return
        except (OSError, UnicodeError) as error:
            # UnicodeError: a label of the name is too long, or empty.
            if isinstance(error, socket.gaierror | UnicodeError):
                what, seconds = f"the host {host!r} is not known", _UNKNOWN_SECONDS
            else:
                what = f"process 0 is not there after {_ABSENT_SECONDS} s"
                seconds = _ABSENT_SECONDS
            if time.monotonic() - started >= seconds:
                why = getattr(error, "strerror", None) or error
                raise ValueError(
                    f"distributed.coordinator {coordinator}: {what} ({why}): give the "
                    "host's name or address as all processes know it, and a port that "
                    "they reach; process 0 must run there"
                ) from None
        time.sleep(min(1, seconds))


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


def _check_port(port: int, remedy: str) -> None:
    """Of process 0: JAX's own service would crash where it cannot listen."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot be the coordinator on port {port} of this host: "
                f"{error.strerror}: {remedy}"
            ) from None
