"""The strategies side by side: same model, length and batch, each on its own mesh."""

import math

import pytest

from ulysses_jax import config as configs
from ulysses_jax.plan import compare as compare_module
from ulysses_jax.plan.compare import compare
from ulysses_jax.plan.plan import Cluster
from ulysses_jax.plan.targets import TARGETS

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
    return configs.complete(config, name="run")


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
                {"collective": "all-to-all", "axis": "seq", "bytes": 5 * seq},
                {"collective": "all-to-all", "axis": "fsdp", "bytes": 7},
                {"collective": "all-gather", "axis": "seq", "bytes": 11},
            ],
            "predicted": {"step_seconds": 1 / seq, "mfu": seq / 100},
        }

    monkeypatch.setattr(compare_module, "make_plan", fake)
    return runs


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
def test_both_strategies_on_the_same_batch(compiled, config, gpus, unsharded, ulysses):
    rows = compare(config, Cluster(H100, *gpus))
    assert [row["strategy"] for row in rows] == ["unsharded", "ulysses"]
    assert meshes(compiled) == [unsharded, ulysses]
    one, other = (each.training for each in compiled)
    assert one == other and one.sequence_tokens == 1024
    for each in compiled:
        assert each.model == config.model
        # One sequence of each (data, fsdp) at a time, whole parts of the batch.
        degrees = vars(each.mesh)
        placed = configs.place(each, degrees).training
        assert placed.accumulation_steps
        rows_a_part = degrees["data"] * degrees["fsdp"]
        assert placed.batch_size == placed.accumulation_steps * rows_a_part


def test_the_batch_grows_no_more_than_it_must(compiled):
    compare(run(fsdp=2, seq=4, batch_size=12), Cluster(H100, 1, 8))
    assert {each.training.batch_size for each in compiled} == {math.lcm(12, 8)}


def test_rows(compiled):
    _, row = compare(run(fsdp=2, seq=4), Cluster(H100, 1, 8))
    assert row["mesh"] == {"fsdp": 2, "seq": 4}
    assert row["fits"] and row["total_bytes"] == 404
    assert row["sent_bytes"] == 20 + 7 + 11
    assert row["exchange_bytes"] == 20  # over seq, and only all-to-alls
    assert row["step_seconds"] == 0.25 and row["mfu"] == 0.04
    assert row["plan"]["memory"]["device_bytes"] == 400


def test_a_cluster_that_does_not_match(compiled):
    with pytest.raises(ValueError, match="on h100:1x6.*this works: --mesh"):
        compare(run(fsdp=2, seq=4), Cluster(H100, 1, 6))
    assert compiled == []


@pytest.mark.plan
def test_on_gpus():
    unsharded, ulysses = compare(run(seq=8), Cluster(H100, 1, 8))
    assert unsharded["mesh"]["fsdp"] == ulysses["mesh"]["seq"] == 8
    assert unsharded["exchange_bytes"] == 0 < ulysses["exchange_bytes"]
    plans = [row["plan"] for row in (unsharded, ulysses)]
    assert plans[0]["batch_size"] == plans[1]["batch_size"] == 8
    # The same FLOPs; a sequence is spread, so its activations are smaller.
    assert plans[0]["matmul_flops"] == plans[1]["matmul_flops"]
    assert plans[0]["attention_flops"] == plans[1]["attention_flops"]
    assert ulysses["total_bytes"] < unsharded["total_bytes"]
    for row, plan in zip((unsharded, ulysses), plans, strict=True):
        assert row["fits"] and plan["warnings"] == []
        assert row["sent_bytes"] >= row["exchange_bytes"]
