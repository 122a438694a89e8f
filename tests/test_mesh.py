"""Meshes: degrees, what is left, errors whose remedy works, hosts kept together."""

import re
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
