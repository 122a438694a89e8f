"""What started this process as one of many, by the variables that launchers set."""

import os
import re
from typing import NamedTuple


class Launcher(NamedTuple):
    name: str
    method: str | None
    """As JAX names it; None: JAX does not know it."""
    size_name: str
    """The variable that holds `size`; so with `rank_name`."""
    size: int | None
    rank_name: str
    rank: int | None
    local_size: int | None
    """Processes on this host."""
    local_rank: int | None


# What runs inside a step of SLURM inherits its variables, so SLURM comes last.
_NAMES = {
    ("Open MPI", "ompi"): "OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK "
    "OMPI_COMM_WORLD_LOCAL_SIZE OMPI_COMM_WORLD_LOCAL_RANK",
    ("torchrun", None): "WORLD_SIZE RANK LOCAL_WORLD_SIZE LOCAL_RANK",
    ("MPICH", None): "PMI_SIZE PMI_RANK MPI_LOCALNRANKS MPI_LOCALRANKID",
    ("MVAPICH", None): "MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_RANK "
    "MV2_COMM_WORLD_LOCAL_SIZE MV2_COMM_WORLD_LOCAL_RANK",
    ("jsrun", None): "JSM_NAMESPACE_SIZE JSM_NAMESPACE_RANK "
    "JSM_NAMESPACE_LOCAL_SIZE JSM_NAMESPACE_LOCAL_RANK",
    ("Flux", None): "FLUX_JOB_SIZE FLUX_TASK_RANK FLUX_LOCAL_SIZE FLUX_TASK_LOCAL_ID",
}


def find_launcher() -> Launcher | None:
    """The launcher of many processes that this is one of; None: it is alone."""
    outer = _slurm() or _kubernetes()
    for (name, method), names in _NAMES.items():
        size, rank, local_size, local_rank = map(_number, names.split())
        if rank is None or (size or 1) < 2:
            continue
        # A job's script may set torchrun's from SLURM's, and srun sets MPICH's itself.
        if outer and outer.rank == rank and outer.size in (size, None):
            continue
        size_name, rank_name, *_ = names.split()
        return Launcher(
            name, method, size_name, size, rank_name, rank, local_size, local_rank
        )
    return outer


def own_devices(launcher: Launcher) -> list[int] | None:
    """The GPUs that this process takes, by their numbers among those that it sees.

    None leaves them to JAX; an empty list is all.

    Raises:
      ValueError: the processes of this host cannot share its GPUs equally.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # which JAX heeds
        return None
    size, rank = launcher.local_size, launcher.local_rank
    on_host = _number("SLURM_GPUS_ON_NODE") if launcher.method == "slurm" else None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    num = on_host if seen is None else len(seen.split(","))
    if num is None:
        return [] if size == 1 else None if rank is None else [rank]
    # Each task may see its own alone (--gpus-per-task, --gpu-bind), from 0 on.
    if size == 1 or num == 1 or (size and on_host and size * num <= on_host):
        return list(range(num))
    if size is None or rank is None:
        return None
    if num % size or rank >= size:
        raise ValueError(
            f"{size} processes of this host see {num} GPUs, which they cannot share "
            "equally: start one process a GPU, or one a host"
        )
    return list(range(rank * num // size, (rank + 1) * num // size))


def _slurm() -> Launcher | None:
    if "SLURM_STEP_NODELIST" not in os.environ:  # in an allocation, but not by srun
        return None
    size, rank = _number("SLURM_NTASKS"), _number("SLURM_PROCID")
    size = size or _number("SLURM_STEP_NUM_TASKS")
    if (size or 1) < 2 and not rank:
        return None
    groups = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as "8(x2),4"
    tasks = [
        int(each)
        for each, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", groups)
        for _ in range(int(times or 1))
    ]
    node = _number("SLURM_NODEID") or 0
    return Launcher(
        "SLURM",
        "slurm",
        "SLURM_NTASKS",
        size,
        "SLURM_PROCID",
        rank,
        tasks[node] if node < len(tasks) else None,
        _number("SLURM_LOCALID"),
    )


def _kubernetes() -> Launcher | None:
    rank = _number("JOB_COMPLETION_INDEX")
    if rank is None or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    names = "JOB_COMPLETIONS", None, "JOB_COMPLETION_INDEX"
    return Launcher("Kubernetes", "k8s", *names, rank, None, None)


def _number(name: str) -> int | None:
    """None where it is not set, or empty, as some shells leave it."""
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdecimal() else None
