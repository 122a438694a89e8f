"""The strategies' reckoning: bytes by formula, links by where the devices are."""

import dataclasses

import pytest

from ulysses_jax.complete import complete_model
from ulysses_jax.config import Config, Mesh, Model, Training
from ulysses_jax.costs.reckoning import meshes, reckon
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.placement import place

T, D, N, K, H = 65536, 4096, 32, 8, 128


def placed(strategy="auto", *, changes=None, **degrees):
    model = Model(width=D, num_heads=N, num_kv_heads=K, num_layers=2, strategy=strategy)
    model = dataclasses.replace(model, head_size=H, compute_dtype="bfloat16")
    config = Config(
        model=complete_model(dataclasses.replace(model, **changes or {})),
        training=Training(sequence_tokens=T, batch_size=1),
    )
    degrees = dataclasses.asdict(Mesh()) | {"data": 1} | degrees
    return place(config, degrees)


def rows_of(config, gpus_per_host=8):
    rows = reckon(config, TARGETS["h100"], gpus_per_host)
    return {row["strategy"]: row for row in rows}


def test_one_host():
    rows = rows_of(placed(seq=8))
    assert rows["ulysses"]["bytes"] == 2 * 2 * (N + K) * H * T // 8 * 7 // 8 * 2
    assert rows["all_gather"]["bytes"] == 2 * K * H * T * 7 // 8 * (2 + 4)
    assert rows["megatron"]["bytes"] == 2 * 4 * T * D * 7 // 8 * 2
    assert (rows["hybrid"]["ring"], rows["hybrid"]["seq"]) == (2, 4)
    assert not any(row["between_hosts_bytes"] for row in rows.values())
    assert [name for name in rows if rows[name]["is_taken"]] == ["ulysses"]
    target = TARGETS["h100"]
    rate = target.nvlink_bytes_per_second * target.nvlink_efficiency
    for row in rows.values():
        assert row["link_seconds"] == pytest.approx(row["bytes"] / rate)


def test_windows_of_some_layers():
    """Of two layers, the mean: a window of a block takes one hop of a ring's seven,
    where tokens lie in their own order."""
    mix = dict(pattern=("window", "full"), window=T // 8 + 1)
    one, seven = 2 * K * H * T // 8 * (0 + 4), 2 * K * H * T // 8 * (6 * 2 + 7 * 4)
    one, seven = one + 2 * K * H * T // 8 * 2, seven + 2 * K * H * T // 8 * 7 * 2
    config = placed(changes=mix | dict(zigzag=False), ring=8)
    assert rows_of(config)["ring"]["bytes"] == (one + seven) / 2
    assert rows_of(config)["ulysses"] == rows_of(placed(ring=8))["ulysses"]


def test_two_hosts():
    """An exchange over 16 sends 8 of 15 parts out of the host; a ring's hops wait for
    the one that leaves it; in a hybrid the exchange stays inside."""
    rows = rows_of(placed(ring=2, seq=8))
    outside = {name: row["between_hosts_bytes"] for name, row in rows.items()}
    assert outside["ulysses"] == pytest.approx(rows["ulysses"]["bytes"] * 8 / 15)
    assert outside["ring"] == rows["ring"]["bytes"]
    assert outside["all_gather"] == rows["all_gather"]["bytes"] / 8
    hop = 2 * (K // 8) * H * T // 2
    assert outside["hybrid"] == hop * (2 + 4) < rows["hybrid"]["bytes"]
    assert rows["hybrid"]["is_taken"]
    least = min(rows.values(), key=lambda row: row["link_seconds"])
    assert least["strategy"] == "hybrid"


def test_tensor_puts_members_further_apart():
    apart = rows_of(placed(seq=4, tensor=4, fsdp=1))["ulysses"]
    assert apart["between_hosts_bytes"] == pytest.approx(apart["bytes"] * 2 / 3)


def test_every_mesh_is_of_all_devices():
    assert meshes(1, 1, 8) == {}
    for shards in (2, 3, 6, 8, 64):
        for ring, seq in meshes(shards, 1, 8).values():
            assert ring * seq == shards
