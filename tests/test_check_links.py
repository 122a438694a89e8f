"""What links are timed with, and what a plan says of them."""

import json
import re

import jax
import pytest

from ulysses_jax import check_links
from ulysses_jax.check_links import KINDS, MIB, _hosts, _program, main
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.mesh import make_mesh

DEVICES = {"data": 2, "seq": 4}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("links") / "links.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(check_links, "target_of", lambda _: TARGETS["h100"])
        patched.setattr(check_links, "devices_per_host", lambda: 4)
        main(
            ["--mesh.data=2", "--mesh.seq=4", "--mib=1", "--rounds=1", f"--json={file}"]
        )
    return json.loads(file.read_text())


def test_rows_are_of_each_axis_and_kind(found):
    assert [(r["axis"], r["devices"], r["kind"]) for r in found] == [
        (axis, devices, kind) for axis, devices in DEVICES.items() for kind in KINDS
    ]
    for row in found:
        sent = row["bytes_per_second"] * row["seconds"]
        whole = row["kind"] == "collective-permute"
        part = 1 if whole else (row["devices"] - 1) / row["devices"]
        assert sent == pytest.approx(MIB * part)


def test_the_plan_s_seconds(found):
    """seq=4 is one host's NVLink; data=2 is the network, or its adapters' share."""
    h100 = TARGETS["h100"]
    inside = h100.nvlink_bytes_per_second * h100.nvlink_efficiency
    between = h100.network_bytes_per_second * h100.network_efficiency
    want = {
        ("seq", "all-to-all"): MIB * 3 / 4 / inside,
        ("seq", "all-gather"): MIB * 3 / 4 / inside,
        ("seq", "collective-permute"): MIB / inside,
        ("data", "all-to-all"): MIB / 2 / between,
        ("data", "all-gather"): MIB / 2 / between,
        ("data", "collective-permute"): MIB / between,
    }
    assert {(r["axis"], r["kind"]): r["planned_seconds"] for r in found} == (
        pytest.approx(want)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_sends_what_it_says(kind):
    mesh = make_mesh(data=2, seq=4)
    call, _ = _program(mesh, "seq", kind, 4096)
    text = call.func.as_text()
    assert f" {kind}(" in text or f" {kind}-start(" in text
    assert not [k for k in KINDS if k != kind and f" {k}(" in text]
    assert jax.numpy.all(call() == 1)


def test_what_is_sent_is_made_where_it_lies():
    """On one device it would be of the whole cluster's size."""
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        _program(make_mesh(data=2, seq=4), "seq", KINDS[0], 4096)


def test_hosts_of_a_group():
    mesh = make_mesh(data=2, seq=4)
    assert [_hosts(mesh, "seq", n) for n in (8, 4, 2, 1)] == [1, 1, 2, 4]
    assert [_hosts(mesh, "data", n) for n in (8, 4, 2)] == [1, 2, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mesh.seq=8", "--mib=0"], "--mib and --rounds: give 1 or more"),
        (["--mesh.seq=8", "--json=no/such/x.json"], "no/such"),
    ],
)
def test_what_cannot_be(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
