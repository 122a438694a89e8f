"""Who started this process, by variables alone, and which GPUs are its own."""

import pytest

from ulysses_jax.launcher import find_launcher, own_devices

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8",
    "SLURM_GPUS_ON_NODE": "8",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TORCHRUN = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}


@pytest.fixture
def find(monkeypatch, no_launcher):
    def set_and_find(env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return find_launcher()

    return set_and_find


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NODELIST": "n0"},  # sbatch
        STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1 --pty bash
        {"SLURM_STEP_NODELIST": "n0", "SLURM_NTASKS": ""},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"WORLD_SIZE": "8"},
        {"RANK": "first", "WORLD_SIZE": "many"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=str,
)
def test_alone(find, env):
    assert find(env) is None


@pytest.mark.parametrize(
    "env, name, size, rank",
    [
        (STEP, "SLURM", 8, 3),
        (STEP | {"SLURM_NTASKS": "", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM", 8, 3),
        (STEP | {"SLURM_PROCID": ""}, "SLURM", 8, None),
        (OPEN_MPI, "Open MPI", 16, 9),
        (TORCHRUN, "torchrun", 8, 3),
        ({"PMI_SIZE": "8", "PMI_RANK": "3"}, "MPICH", 8, 3),
        # mpirun and torchrun in a step of SLURM, one a node, are what counts there.
        (STEP | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"} | OPEN_MPI,)
        + ("Open MPI", 16, 9),
        (
            STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"} | TORCHRUN,
            "torchrun",
            8,
            3,
        ),
        # The same numbers twice: set from SLURM's in the job's script, or by srun.
        (STEP | TORCHRUN, "SLURM", 8, 3),
        (STEP | {"PMI_SIZE": "8", "PMI_RANK": "3"}, "SLURM", 8, 3),
        (
            {"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "3"} | TORCHRUN,
            "Kubernetes",
            None,
            3,
        ),
    ],
)
def test_one_of_many(find, env, name, size, rank):
    found = find(env)
    assert found is not None
    assert (found.name, found.size, found.rank) == (name, size, rank)


@pytest.mark.parametrize(
    "env, devices",
    [
        (STEP, [3]),
        # --gpus-per-task=1: task 3 sees one GPU, and it is number 0.
        (STEP | {"CUDA_VISIBLE_DEVICES": "3"}, [0]),
        (STEP | {"CUDA_VISIBLE_DEVICES": "6,7", "SLURM_STEP_TASKS_PER_NODE": "4"},)
        + ([0, 1],),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [6, 7]),
        # One task a node: all GPUs, or those that the user left visible.
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, [*range(8)]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "CUDA_VISIBLE_DEVICES": "0,1"},)
        + ([0, 1],),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2),1", "SLURM_NODEID": "2"},)
        + ([*range(8)],),
        (OPEN_MPI, [1]),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "5"}, [0]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),  # all that it sees
        (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [3]),
        ({"PMI_SIZE": "8", "PMI_RANK": "3"}, None),
        (STEP | {"JAX_LOCAL_DEVICE_IDS": "5"}, None),
    ],
)
def test_a_process_takes_its_own_gpus(find, env, devices):
    assert own_devices(find(env)) == devices


def test_gpus_that_cannot_be_shared_equally_are_refused(find):
    launcher = find(STEP | {"SLURM_STEP_TASKS_PER_NODE": "3"})
    with pytest.raises(ValueError, match="3 processes of this host see 8 GPUs"):
        own_devices(launcher)
