"""Meshes: degrees, what is left, errors whose remedy works, hosts kept together."""

import importlib
import re
import socket
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ulysses_jax import mesh as meshes
from ulysses_jax.mesh import (
    AXES,
    devices_per_host,
    make_mesh,
    platform_of,
    resolve_degrees,
    start_distributed,
)


@pytest.mark.parametrize(
    "given, shape",
    [
        (dict(data=8), (8, 1, 1, 1, 1)),
        (dict(data=2, seq=4), (2, 1, 1, 4, 1)),
        (dict(seq=-1), (1, 1, 1, 8, 1)),
        (dict(data=-1, seq=2, tensor=2), (2, 1, 1, 2, 2)),
        (dict(fsdp=2, ring=2, seq=2, tensor=-1), (1, 2, 2, 2, 1)),
    ],
    ids=str,
)
def test_degrees(given, shape):
    mesh = make_mesh(**given)
    assert mesh.axis_names == AXES == ("data", "fsdp", "ring", "seq", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}
    explicit = make_mesh(**given, axis_type=AxisType.Explicit)
    assert set(explicit.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    "given",
    [
        dict(seq=4),
        dict(seq=2, tensor=2),
        dict(data=4, seq=4),
        dict(data=16),
        dict(data=3, seq=2),
    ],
    ids=str,
)
def test_a_wrong_product_names_a_remedy_that_works(given):
    with pytest.raises(ValueError) as error:
        make_mesh(**given)
    message = str(error.value)
    product = np.prod(list(given.values()))
    assert f"takes {product} devices, but there are 8" in message
    for axis, degree in re.findall(r"(\w+)=(-?\d+)", message.split(": ")[-1]):
        assert make_mesh(**given | {axis: int(degree)}).size == 8
    assert len(re.findall(r"data=", message.split(": ")[-1])) == 2


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(seq=3), "choose degrees whose product is 8"),
        (dict(data=2, seq=8), "data=1 or data=-1"),
        (dict(data=-1, seq=3), "or a multiple, .*whose product divides 8"),
        (dict(data=-1, seq=16), "or a multiple, .*whose product divides 8"),
        (dict(data=-1, seq=-1), "one may be -1"),
        (dict(data=2**40, seq=2**40), "whose product is 8"),
        (dict(seq=0), "every degree is a positive number"),
        (dict(seq=-2), "every degree is a positive number"),
        (dict(seq=4), r"or data=-1; or, .*devices=jax.devices\(\)\[:4\]\)$"),
        (dict(data=2, sequence=4), "no axis sequence: its axes are data, fsdp, ring"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**given)


def test_degrees_are_known_without_a_device():
    degrees = dict(data=-1, fsdp=4, ring=1, seq=16, tensor=1)
    assert resolve_degrees(degrees, 1024) == degrees | {"data": 16}


def test_seq_and_tensor_stay_inside_a_host():
    """Devices in any order, 4 on each of 4 hosts."""

    @dataclass(frozen=True)
    class Device:
        id: int
        process_index: int

    devices = [Device(i, i // 4) for i in range(16)]
    shuffled = list(np.random.default_rng(0).permutation(np.array(devices)))
    degrees = resolve_degrees(
        dict(data=2, fsdp=2, ring=1, seq=2, tensor=2), len(devices)
    )
    assert list(degrees.values()) == [2, 2, 1, 2, 2]
    mesh = make_mesh(**degrees, devices=shuffled)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    inner = hosts.reshape(4, -1)  # data and fsdp; ring, seq and tensor
    assert (inner == inner[:, :1]).all()
    assert sorted(inner[:, 0]) == [0, 1, 2, 3]
    # A seq axis of two hosts fills the one before it takes from the other.
    hosts = np.vectorize(lambda device: device.process_index)(
        make_mesh(data=2, seq=8, devices=shuffled).devices
    )
    assert hosts.reshape(2, 8).tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]


def test_platform():
    mesh = make_mesh(seq=8)
    assert platform_of(mesh) == platform_of(mesh.abstract_mesh) == "cpu"
    with jax.set_mesh(mesh):
        assert platform_of(jax.sharding.get_abstract_mesh()) == "cpu"


@pytest.mark.parametrize(
    "names, counts, least",
    [([7, 7, 9, 9], [1, 1, 1, 1], 2), ([7, 9], [8, 8], 8), ([7, 9, 9], [4, 1, 1], 2)],
    ids=str,
)
def test_devices_of_a_host_over_its_processes(names, counts, least, monkeypatch):
    def gathered(_):
        return np.asarray([*zip(names, counts, strict=True)], np.uint32)

    monkeypatch.setattr(jax, "process_count", lambda: len(names))
    monkeypatch.setattr(meshes.multihost_utils, "process_allgather", gathered)
    assert devices_per_host() == least


def test_one_process_has_all_devices_of_its_host():
    assert devices_per_host() == 8


def test_no_device_of_jax_platforms_is_said_in_words(monkeypatch):
    """JAX_PLATFORMS=cuda without the plugin: JAX's own words are a bare assertion."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS.*the extra \[gpu\].*=cpu"):
        make_mesh(seq=8)


@pytest.fixture
def started(monkeypatch, no_launcher):
    """What `jax.distributed.initialize` is called with; nothing starts."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    return calls


@pytest.fixture
def port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def port_in_use():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_flags_start_this_process(started, port):
    start_distributed(f"localhost:{port}", 2, 0)
    ((positional, named),) = started
    assert positional == (f"localhost:{port}", 2, 0)
    assert named["local_device_ids"] is None
    start_distributed("nobody looks", 1, 0)
    assert len(started) == 1


def test_flags_under_a_launcher_take_its_share_of_the_gpus(
    started, port_in_use, monkeypatch
):
    """As with Open MPI 5, which does not say where process 0 is."""
    for name, value in dict(SIZE=8, RANK=3, LOCAL_SIZE=8, LOCAL_RANK=3).items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    start_distributed(f"127.0.0.1:{port_in_use}", 8, 3)  # process 0 listens
    assert started[0][1]["local_device_ids"] == [3]


@pytest.mark.parametrize(
    "coordinator, message",
    [
        ("localhost", "is not host:port, such as host0:1234"),
        ("localhost:port", "is not host:port"),
        ("localhost:0", "with a port of 1 to 65535"),
        ("localhost:65536", "with a port of 1 to 65535"),
        (":1234", "is not host:port"),
        ("", "is not host:port"),
        ("no-such-host.invalid:1234", "'no-such-host.invalid' is not known"),
        ("a..b:1234", "'a..b' is not known"),
    ],
)
@pytest.mark.parametrize("process_id", [0, 1])
def test_a_coordinator_that_cannot_be(
    started, monkeypatch, coordinator, message, process_id
):
    monkeypatch.setattr(meshes, "_UNKNOWN_SECONDS", 0)
    with pytest.raises(ValueError, match=f"distributed.coordinator.*{message}"):
        start_distributed(coordinator, 2, process_id)
    assert not started


def test_nobody_at_the_coordinators_port(started, monkeypatch, port):
    monkeypatch.setattr(meshes, "_ABSENT_SECONDS", 0)
    with pytest.raises(ValueError, match="process 0 is not there after 0 s"):
        start_distributed(f"127.0.0.1:{port}", 2, 1)
    assert not started


def test_a_port_in_use(started, monkeypatch, port_in_use):
    """JAX's own service crashes there."""
    with pytest.raises(ValueError, match=f"port {port_in_use} of this host.*another"):
        start_distributed(f"127.0.0.1:{port_in_use}", 2, 0)
    step = dict(SLURM_STEP_NODELIST="n0", SLURM_NTASKS="2", SLURM_PROCID="0")
    for name, value in (step | dict(JAX_COORDINATOR_PORT=str(port_in_use))).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set JAX_COORDINATOR_PORT"):
        start_distributed()
    assert not started


@pytest.mark.parametrize("port", ["", "any", "0", "70000"])
def test_no_port_for_jax(started, monkeypatch, port):
    step = dict(SLURM_STEP_NODELIST="n0", SLURM_NTASKS="2", SLURM_PROCID="0")
    for name, value in (step | dict(JAX_COORDINATOR_PORT=port)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_PORT is '{port}', not a"):
        start_distributed()
    assert not started


def test_the_port_that_jax_takes_under_slurm_is_in_use(started, monkeypatch):
    """As by another step of the same job: the port follows from the job's number."""
    first = 2**16 - 2**12
    with socket.socket() as server:
        for port in range(first, 2**16):
            try:
                server.bind(("127.0.0.1", port))
                break
            except OSError:
                continue
        server.listen()
        step = dict(STEP_NODELIST="n0", NTASKS="2", PROCID="0", LOCALID="0")
        for name, value in (step | dict(JOB_ID=f"{2**20 + port - first}")).items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        with pytest.raises(ValueError, match=f"port {port} of this host"):
            start_distributed()
    start_distributed()  # free again
    assert len(started) == 1
    jax_takes = importlib.import_module("jax._src.clusters").SlurmCluster
    assert jax_takes.get_coordinator_address(1, None) == f"n0:{port}"


@pytest.mark.parametrize(
    "env, message",
    [
        (
            dict(SLURM_STEP_NODELIST="n0", SLURM_NTASKS="8"),
            "SLURM_PROCID is not set.*with srun.*--distributed.*unset SLURM_STEP_NODEL",
        ),
        (
            dict(WORLD_SIZE="8", RANK="3", MASTER_ADDR="h", MASTER_PORT="1"),
            r"\(WORLD_SIZE=8\) torchrun.*one of 8.*num-processes 8 --distributed."
            "process-id 3.*unset WORLD_SIZE",
        ),
        (dict(PMI_SIZE="8", PMI_RANK="3"), "MPICH.*one of 8 .*unset PMI_SIZE"),
    ],
    ids=["no SLURM_PROCID", "torchrun", "MPICH"],
)
def test_a_launcher_that_says_too_little(started, monkeypatch, env, message):
    """Else each would train alone, without a word."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        start_distributed()
    # The last remedy works.
    monkeypatch.delenv(re.findall(r"unset (\w+)", str(error.value))[0])
    start_distributed()
    assert not started


def test_what_jax_cannot_read_of_a_launcher_is_said_in_words(monkeypatch, no_launcher):
    for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="from Open MPI's .*--distributed.coordinator"):
        start_distributed()
