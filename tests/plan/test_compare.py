"""The strategies side by side: same model, length and batch, each on its own mesh."""

import dataclasses
import math

import pytest

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.complete import complete
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.costs.traffic import attention_bytes, formula_bytes
from ulysses_jax.mesh import AXES
from ulysses_jax.plan import compare as compare_module
from ulysses_jax.plan.compare import compare
from ulysses_jax.plan.plan import Cluster

H100 = TARGETS["h100"]


def run(*, batch_size=4, steps=1, num_heads=8, **degrees):
    config = configs.Config(
        model=configs.Model(
            vocab_size=512,
            width=64 * num_heads,
            num_layers=2,
            num_heads=num_heads,
            feed_forward_width=512,
        ),
        data=configs.Data(mask_documents=False),
        training=configs.Training(
            batch_size=batch_size, sequence_tokens=1024, accumulation_steps=steps
        ),
        mesh=configs.Mesh(**degrees),
    )
    return complete(config, name="run")


@pytest.fixture
def compiled(monkeypatch):
    """Plants plans whose figures name their mesh; returns the configs compiled."""
    runs = []

    def fake(config, cluster):
        runs.append(config)
        seq = config.mesh.seq
        return {
            "mesh": {"fsdp": config.mesh.fsdp, "seq": seq},
            "fits": seq > 1,
            "memory": {"device_bytes": 100 * seq, "estimated_bytes": seq},
            "traffic": [
                {**row, "formula_bytes": formula_bytes(config, *list(row.values())[:2])}
                for row in (
                    {"collective": "all-to-all", "axis": "seq", "bytes": 5 * seq},
                    {"collective": "all-to-all", "axis": "fsdp", "bytes": 7},
                    {"collective": "all-gather", "axis": "seq", "bytes": 11},
                )
            ],
            "predicted": {"step_seconds": 1 / seq, "mfu": seq / 100},
        }

    monkeypatch.setattr(compare_module, "make_plan", fake)
    return runs


def sorted_axes(degrees):
    return {axis: degrees[axis] for axis in AXES if axis in degrees}


def meshes(runs):
    return [{axis: n for axis, n in vars(each.mesh).items() if n > 1} for each in runs]


@pytest.mark.parametrize(
    ("config", "gpus", "unsharded", "ulysses"),
    [
        (run(fsdp=2, seq=4), (1, 8), dict(fsdp=8), dict(fsdp=2, seq=4)),
        (run(fsdp=-1, seq=8), (4, 8), dict(fsdp=32), dict(fsdp=4, seq=8)),
        # Where the config has no seq: as much of a host as heads divide over.
        (run(fsdp=-1), (2, 8), dict(fsdp=16), dict(fsdp=2, seq=8)),
        (run(data=-1), (2, 8), dict(data=16), dict(data=2, seq=8)),
        (run(fsdp=-1, num_heads=12), (1, 8), dict(fsdp=8), dict(fsdp=2, seq=4)),
        (
            run(fsdp=-1, tensor=2),
            (2, 8),
            dict(fsdp=8, tensor=2),
            dict(fsdp=2, seq=4, tensor=2),
        ),
    ],
    ids=str,
)
def test_strategies_on_the_same_batch(compiled, config, gpus, unsharded, ulysses):
    rows = compare(config, Cluster(H100, *gpus))
    names = ["unsharded", "ulysses", "ring", "hybrid", "all_gather", "megatron"]
    assert [row["strategy"] for row in rows] == names
    shards = ulysses["seq"]
    others = {axis: n for axis, n in ulysses.items() if axis != "seq"}
    hosts = max(shards * others.get("tensor", 1) // gpus[1], 2)
    assert meshes(compiled) == [
        unsharded,
        ulysses,
        sorted_axes(others | dict(ring=shards)),
        sorted_axes(others | dict(ring=hosts, seq=shards // hosts)),
        ulysses,
        ulysses,
    ]
    first, *rest = (
        dataclasses.replace(each.training, accumulation_steps=None) for each in compiled
    )
    assert first.sequence_tokens == 1024
    assert all(each == first for each in rest)
    for name, each in zip(names, compiled, strict=True):
        chosen = "ulysses" if name == "unsharded" else name
        zigzag = name in ("ring", "hybrid", "all_gather")
        assert each.model == dataclasses.replace(
            config.model, strategy=chosen, zigzag=zigzag
        )
        # One sequence of each (data, fsdp) at a time, whole parts of the batch.
        degrees = vars(each.mesh)
        placed = placement.place(each, degrees).training
        assert placed.accumulation_steps
        rows_a_part = degrees["data"] * degrees["fsdp"]
        assert placed.batch_size == placed.accumulation_steps * rows_a_part


def test_the_batch_grows_no_more_than_it_must(compiled):
    compare(run(fsdp=2, seq=4, batch_size=12), Cluster(H100, 1, 8))
    assert {each.training.batch_size for each in compiled} == {math.lcm(12, 8)}


def test_rows(compiled):
    _, row, _, _, gathered, _ = compare(run(fsdp=2, seq=4), Cluster(H100, 1, 8))
    assert row["mesh"] == {"fsdp": 2, "seq": 4}
    assert row["fits"] and row["total_bytes"] == 404
    assert row["sent_bytes"] == 20 + 7 + 11
    assert row["exchange_bytes"] == 20  # over seq, and only all-to-alls
    assert gathered["exchange_bytes"] == 11  # parameters go over fsdp+seq
    assert row["step_seconds"] == 0.25 and row["mfu"] == 0.04
    assert row["plan"]["memory"]["device_bytes"] == 400


def test_what_a_strategy_lacks_leaves_it_out(compiled):
    config = run(fsdp=2, seq=4)
    config = dataclasses.replace(
        config, memory=configs.Memory(head_chunks=2, remat="none")
    )
    names = [row["strategy"] for row in compare(config, Cluster(H100, 1, 8))]
    assert names == ["unsharded", "ulysses", "ring", "hybrid"]


def test_a_gather_is_told_from_that_of_parameters(compiled):
    """Both over seq: by the formulas' shares."""
    row = compare(run(seq=8), Cluster(H100, 1, 8))[-2]
    config = compiled[-2]
    share = attention_bytes(config)["all-gather", "seq"]
    share /= formula_bytes(config, "all-gather", "seq")
    assert 0 < share < 1
    assert row["exchange_bytes"] == pytest.approx(11 * share)


def test_a_cluster_that_does_not_match(compiled):
    with pytest.raises(ValueError, match="on h100:1x6.*this works: --mesh"):
        compare(run(fsdp=2, seq=4), Cluster(H100, 1, 6))
    assert compiled == []


@pytest.mark.plan
def test_on_gpus():
    rows = compare(run(seq=8), Cluster(H100, 1, 8))
    unsharded, ulysses, *_ = rows
    assert unsharded["mesh"]["fsdp"] == ulysses["mesh"]["seq"] == 8
    assert unsharded["exchange_bytes"] == 0 < ulysses["exchange_bytes"]
    plans = [row["plan"] for row in rows]
    assert plans[0]["batch_size"] == plans[1]["batch_size"] == 8
    # The same FLOPs; a sequence is spread, so its activations are smaller.
    assert plans[0]["matmul_flops"] == plans[1]["matmul_flops"]
    assert plans[0]["attention_flops"] == plans[1]["attention_flops"]
    assert ulysses["total_bytes"] < unsharded["total_bytes"]
    for row, plan in zip(rows, plans, strict=True):
        assert row["fits"] and plan["warnings"] == []
        assert row["sent_bytes"] >= row["exchange_bytes"]
