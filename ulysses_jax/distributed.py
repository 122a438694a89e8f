"""Starts `jax.distributed`: this process as one of a pod's."""

import os
import socket

import jax

from ulysses_jax import roll_call
from ulysses_jax.launcher import find_launcher, own_devices


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
        if num_processes > 1:
            _call_the_roll(coordinator, num_processes, process_id)
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
            remedy = "set JAX_COORDINATOR_PORT=PORT for all processes"
            _listen(int(port), remedy).close()
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


def _call_the_roll(coordinator: str, num_processes: int, process_id: int) -> None:
    """Words for what ends the processes without them, at once or after five minutes.

    Raises:
      ValueError: no such host or port, nobody there, or they are not one run's.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not _is_port(port):
        raise ValueError(
            f"distributed.coordinator {coordinator!r} is not host:port, such as "
            "host0:1234, with a port of 1 to 65535"
        )
    address = host.strip("[]"), int(port)
    if process_id:
        roll_call.answer(address, process_id, num_processes)
    else:
        remedy = (
            "use another one in --distributed.coordinator; or, where another process "
            "has --distributed.process-id 0 too, give each its own"
        )
        roll_call.hold(_listen(int(port), remedy), address, num_processes)


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


def _listen(port: int, remedy: str) -> socket.socket:
    """Of process 0: JAX's own service would crash where it cannot listen."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{port}")
    host, _, port_there = bind.rpartition(":")
    host = host.strip("[]")
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
