"""Starts `jax.distributed`: this process as one of a pod's."""

import os
import socket
import time

import jax

from ulysses_jax.launcher import find_launcher, own_devices

# How long a name may be unknown, as a new pod's is, and process 0 not be there: that
# long JAX waits too, and ends the process then.
_UNKNOWN_SECONDS, _ABSENT_SECONDS = 20, 300


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
