"""Starts `jax.distributed`: this process as one of a pod's."""

import os
import socket

import jax
from jax._src.clusters import ClusterEnv  # it has no public door

from ulysses_jax import roll_call
from ulysses_jax.aborts import lost_at_abort
from ulysses_jax.launcher import find_launcher, own_devices

# For what Kubernetes says of its pods.
_DETECTION_SECONDS = 300


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: float = 300.0,
) -> None:
    """Starts `jax.distributed` where this is one process of many; else does nothing.

    Under SLURM (`srun`), Open MPI (`mpirun`) and Kubernetes (an Indexed Job) the
    arguments are found by JAX. Everywhere else give all three. Call it before JAX has
    devices. One process a host takes all the GPUs that it sees; several share them.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      num_processes: of the run.
      process_id: of this process, 0 to num_processes - 1.
      wait_seconds: for a process that is not there.

    Raises:
      Absent: of `roll_call`, a ValueError: a process that did not come.
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
    if not wait_seconds > 0:
        raise ValueError(f"distributed.wait_seconds {wait_seconds}: give more than 0")
    launcher = find_launcher()
    # JAX's own handler would keep SIGTERM from Python's: `training.together` agrees.
    jax.config.update("jax_enable_preemption_service", False)
    if not missing:
        assert coordinator is not None
        assert num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"distributed.process_id {process_id} is not one of 0 to "
                f"{num_processes - 1}"
            )
        remedy = (
            "use another one in --distributed.coordinator; or, where another process "
            "has --distributed.process-id 0 too, give each its own"
        )
        devices = None if launcher is None else own_devices(launcher)
        _start(coordinator, num_processes, process_id, devices, remedy, wait_seconds)
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
    port = os.environ.get("JAX_COORDINATOR_PORT")
    if port is not None and not _is_port(port):
        raise ValueError(
            f"JAX_COORDINATOR_PORT is {port!r}, not a port of 1 to 65535: set it for "
            "all processes, or unset it"
        )
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            *(None, None, None, []), launcher.method, _DETECTION_SECONDS
        )
        address, size, rank, _ = found
        if address is None or size is None or rank is None:
            raise ValueError("it says not where process 0 is")
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"JAX could not read all that it needs from {launcher.name}'s variables "
            f"({error}): give {flags}"
        ) from None
    remedy = "set JAX_COORDINATOR_PORT=PORT for all processes"
    _start(address, size, rank, own_devices(launcher), remedy, wait_seconds)


def _start(
    coordinator: str,
    num_processes: int,
    process_id: int,
    local_device_ids: list[int] | None,
    remedy: str,
    wait_seconds: float,
) -> None:
    """Calls the roll, and starts JAX, which has no words where that fails.

    Args:
      remedy: of a port that is in use.

    Raises:
      Absent: a process that is not there.
      ValueError: no such host or port, or they are not one run's.
    """
    if num_processes == 1:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not _is_port(port):
        raise ValueError(
            f"distributed.coordinator {coordinator!r} is not host:port, such as "
            "host0:1234, with a port of 1 to 65535"
        )
    address = host.strip("[]"), int(port)
    if process_id:
        roll_call.answer(address, process_id, num_processes, wait_seconds)
    else:
        roll_call.find_host(address, wait_seconds)
        roll_call.hold(_listen(int(port), remedy), num_processes, wait_seconds)
    # All were there; JAX waits five minutes for one that is gone now, and aborts.
    gone = (
        "a process ended before all had started: the same command again, if its "
        "machine is there"
    )
    with lost_at_abort(lambda: gone):
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=local_device_ids,
            cluster_detection_method="deactivate",
        )


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


def _listen(port: int, remedy: str) -> socket.socket:
    """Of process 0: JAX's own service would crash where it cannot listen."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{port}")
    host, _, port_there = bind.rpartition(":")
    host = host.strip("[]")
    if not _is_port(port_there):
        raise ValueError(
            f"JAX_COORDINATOR_BIND_ADDRESS is {bind!r}, not host:port, such as "
            f"0.0.0.0:{port}: set it so for process 0, or unset it"
        )
    dual = socket.has_dualstack_ipv6() and host in ("", "::")
    is_6 = dual or ":" in host
    try:
        return socket.create_server(
            (host, int(port_there)),
            family=socket.AF_INET6 if is_6 else socket.AF_INET,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        raise ValueError(
            f"process 0 cannot be the coordinator on port {port} of this host: "
            f"{error.strerror}: {remedy}"
        ) from None
