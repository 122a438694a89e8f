"""Job files: run for real, with two processes here for a cluster's."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from ulysses_jax.config_file import load_from_command_line

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "launch").glob("*.sh"))
RUN = {
    "run": {"simulated_cpu_devices": 2},
    "model": {"vocab_size": 264, "width": 16, "num_layers": 1, "num_heads": 4},
    "data": {"files": str(ROOT / "docs" / "*.md")},
    "training": {
        "num_steps": 2,
        "batch_size": 2,
        "sequence_tokens": 64,
        "validation_batches": 0,
    },
    "mesh": {"seq": -1},
}
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$OUT/srun"; shift; done
[[ -n ${SAVES:-} ]] && mkdir -p "$SAVES"
[[ -n ${ENDS:-} ]] && exit $ENDS
export SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit $?
wait $!
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$OUT/scontrol"\n'
SSH = """#!/bin/bash
[[ $1 == -tt ]] || exit 9
echo "$2" >> "$OUT/ssh"
exec bash -c "$3"
"""


@pytest.fixture
def cluster(tmp_path):
    """Its commands, before all others; what they were called with lies in OUT."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ssh": SSH}.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return outside | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(port),
        "PORT": str(port),
        "SLURM_JOB_ID": "4242",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def launched(file, environment, *arguments):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / file), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "a config.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_bash_reads_them(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(file)], check=True, cwd=ROOT)


SLURM_FILES = pytest.mark.parametrize("file", ["slurm.sh", "slurm_container.sh"])


@pytest.fixture
def job(cluster, tmp_path):
    """What a job's file does after its processes ended with a code; what it says."""
    for path in ("launch", "submitted"):
        (tmp_path / path).mkdir()
    (tmp_path / "submitted" / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "bin" / "srun").write_text(SRUN)
    steps = iter(range(4, 1000, 4))

    def ends(file, code, *, saves=False, run="runs/a b", arguments=None):
        folder = tmp_path / "submitted" / run / "checkpoints"
        new = str(folder / str(next(steps))) if saves else ""
        arguments = ("--run.folder", run) if arguments is None else arguments
        named = {"ENDS": str(code), "IMAGE": "here", "SHARED": "/s", "SAVES": new}
        named["SLURM_SUBMIT_DIR"] = str(tmp_path / "submitted")
        ended = launched(file, cluster | named, *arguments)
        assert ended.returncode == code, ended.stderr
        asked = tmp_path / "scontrol"
        is_asked = asked.exists() and asked.read_text() == "requeue 4242\n"
        asked.unlink(missing_ok=True)
        return is_asked, ended.stderr

    return ends


@SLURM_FILES
@pytest.mark.parametrize("code", [0, 1, 2, 75, 130, 134, 137, 139])
def test_a_job_goes_back_into_the_queue(job, tmp_path, file, code):
    """After what the same command goes on from, and after nothing else."""
    assert job(file, code)[0] == (code in (75, 130, 134, 137, 139))
    if "container" in file:
        assert "--container-image=here" in (tmp_path / "srun").read_text()


@SLURM_FILES
@pytest.mark.parametrize(
    "arguments",
    [("--run.folder", "runs/a b"), ("--run.folder=runs/a b",), ("--quiet",)],
    ids=["two words", "one word", "none: any run"],
)
def test_a_job_that_gets_nowhere_leaves_the_queue(job, file, arguments):
    """Three times lost without a new checkpoint; told to stop it goes on for ever."""
    for code in (75, 137):
        assert job(file, code, arguments=arguments)[0]
    assert job(file, 75, saves=True, arguments=arguments)[0]  # counts anew
    for _ in range(5):
        assert job(file, 130, arguments=arguments)[0]
    for code in (75, 75):
        assert job(file, code, arguments=arguments)[0]
    is_asked, said = job(file, 75, arguments=arguments)
    assert not is_asked and "3 attempts in a row lost a process" in said
    assert job(file, 75, arguments=arguments)[0]  # put back by hand


@pytest.mark.parametrize(
    "text, run",
    [
        ("# the folder: x\nrun:\n  folder: there/a b  # and so\n", "there/a b"),
        ("run: {folder: 'there/a b', simulated_cpu_devices: 2}\n", "there/a b"),
        ("run: {simulated_cpu_devices: 2, folder: ~/a}\n", "home/a"),
        ("run: {folder: before/it/was/moved}\n", "there/x"),
    ],
    ids=["a line", "in brackets", "at home", "a run's own config"],
)
def test_a_folder_that_the_config_names(job, cluster, tmp_path, text, run):
    """Its new checkpoints are seen, so that the job may be lost again and again."""
    submitted = tmp_path / "submitted"
    cluster["HOME"] = str(submitted / "home")
    file = "a config.yaml"
    if run == "there/x":
        file = f"{run}/config.yaml"
        (submitted / run / "checkpoints").mkdir(parents=True)
    (submitted / file).write_text(text)
    for _ in range(4):
        assert job("slurm.sh", 75, saves=True, run=run, arguments=("--config", file))[0]


def test_a_container_needs_an_image(cluster):
    ended = launched("slurm_container.sh", cluster)
    assert ended.returncode and "IMAGE: the image" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", ["slurm.sh", "ssh.sh"])
def test_two_processes_of_a_job(cluster, tmp_path, config_file, file):
    hosts = {"HOSTS": "127.0.0.1 localhost"}
    arguments = "--config", config_file, "--run.folder", tmp_path / "a run"
    ended = launched(file, cluster | hosts, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "mesh seq=4" in ended.stdout
    assert (tmp_path / "a run" / "checkpoints" / "2").is_dir()
    if file == "ssh.sh":
        assert set((tmp_path / "ssh").read_text().split()) == set(
            hosts["HOSTS"].split()
        )


TERMINAL = """#!{python}
import os, pty, sys
there = ["env", "--default-signal=INT", "bash", "-c", sys.argv[3]]
sys.exit(os.waitstatus_to_exitcode(pty.spawn(there)))
"""
RUNS = """#!/bin/bash
trap 'echo "told $8"; sleep 1; exit 130' INT
echo "runs $8"
while :; do sleep 0.1; done
"""


@pytest.mark.slow  # a stand-in with a terminal: once in many runs, under load, it hung
def test_ctrl_c_here_is_ctrl_c_there(cluster, tmp_path):
    """A terminal sends it to the script and to all that it started."""
    for name, text in {
        "ssh": TERMINAL.format(python=sys.executable),
        "runs": RUNS,
    }.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    with subprocess.Popen(
        # A background job's children ignore it, and bash traps nothing that is ignored.
        ["env", "--default-signal=INT", "bash", str(ROOT / "launch" / "ssh.sh")],
        env=cluster | {"HOSTS": "a b", "PYTHON": str(tmp_path / "bin" / "runs")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            assert script.stdout is not None
            assert {script.stdout.readline().strip() for _ in range(2)} == {
                "runs 0",
                "runs 1",
            }
            os.killpg(script.pid, signal.SIGINT)
            said, _ = script.communicate(timeout=10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert script.returncode == 130 and "told 0" in said and "told 1" in said


@pytest.fixture(scope="module")
def job_set():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def test_the_job_set(job_set):
    """Names and numbers that must fit each other."""
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 8
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert not {75, 130} & set(rule["onExitCodes"]["values"])
    assert {m["name"] for m in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }
    script = container["command"][2]
    first = f"{job_set['metadata']['name']}-{job['name']}-0-0"
    words = shlex.split(script)
    coordinator = words[words.index("--distributed.coordinator") + 1]
    assert coordinator == f"{first}.{job_set['metadata']['name']}:1234"
    assert words[words.index("--distributed.num-processes") + 1] == "8"


def test_the_job_set_s_command_is_one(job_set, monkeypatch):
    (job,) = job_set["spec"]["replicatedJobs"]
    command = job["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    subprocess.run(["bash", "-n", "-c", command[2]], check=True)
    words = shlex.split(command[2].replace("$JOB_COMPLETION_INDEX", "3"))
    monkeypatch.chdir(ROOT)
    (config,) = load_from_command_line(words[words.index("--quiet") :], program="x")
    assert config.distributed.process_id == 3 and config.quiet
