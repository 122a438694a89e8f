"""benchmarks/paper.py: meshes, bytes beside a hand count, where a ladder ends."""

import pytest
from files import module_of
from matplotlib.image import imread

from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.plan.plan import Cluster

CLUSTER = Cluster(TARGETS["a100-40"], 4, 8)


@pytest.fixture
def benchmark():
    return module_of("benchmarks/paper.py")


@pytest.fixture
def planted(benchmark, monkeypatch):
    """Rows that fit 64K tokens of a GPU's share at once; fewer GPUs are faster."""

    def row(name, config, cluster):
        mesh, training = config.mesh, config.training
        group = training.batch_size // mesh.data // mesh.fsdp
        at_once = group // training.accumulation_steps * training.sequence_tokens
        return {
            "model": name,
            "strategy": config.model.strategy,
            "tokens": training.sequence_tokens,
            "seq": mesh.seq,
            "accumulation_steps": training.accumulation_steps,
            "fits": at_once <= 64 * 1024 and mesh.seq <= 16,
            "tflops_per_gpu": 100 / mesh.seq,
        }

    monkeypatch.setattr(benchmark, "row", row)


def test_a_ladder_takes_the_fewest_steps_and_ends_where_nothing_fits(
    benchmark, planted, tmp_path
):
    rows = benchmark.ladder("gpt_7b", "megatron", CLUSTER)
    assert [each["tokens"] // 1024 for each in rows] == [8, 16, 32, 64]
    assert {each["seq"] for each in rows} == {8}
    assert [each["accumulation_steps"] for each in rows] == [4, 4, 4, 4]
    assert [each["paper_tflops_per_gpu"] for each in rows] == [106, 143, 164, 165]
    rows += benchmark.ladder("gpt_30b", "ulysses", CLUSTER, 1)
    rows += [each | {"model": "gpt_30b", "strategy": "megatron"} for each in rows[-1:]]
    rows += [each | {"model": "gpt_7b"} for each in rows[-2:-1]]
    benchmark.plot(rows, tmp_path / "paper.png")
    assert imread(tmp_path / "paper.png").shape[0] > 300


@pytest.mark.parametrize("strategy, copies", [("ulysses", 1), ("megatron", 4)])
def test_megatron_alone_has_copies_of_its_parameters(benchmark, strategy, copies):
    config = benchmark.run("gpt_7b", strategy, CLUSTER, 8, 8192, 128)
    assert (config.mesh.data, config.mesh.fsdp) == (copies, 4 // copies)
    assert config.memory.offload == () and config.memory.remat == "full"


@pytest.mark.plan
@pytest.mark.parametrize(
    "strategy, passes",
    [
        # Of T D mu a layer. Four exchanges in three passes, each of a GPU's share.
        ("ulysses", 3 * 4 / 8),
        # Two gathers in three passes; two scatters, one of which is not recomputed.
        ("megatron", 3 * 2 + 5),
    ],
)
def test_a_row_sends_the_hand_count(benchmark, strategy, passes):
    config = benchmark.run("gpt_7b", strategy, CLUSTER, 8, 8192, 128)
    row = benchmark.row("gpt_7b", config, CLUSTER)
    assert row["fits"] and row["traffic_ratio"] == pytest.approx(1, abs=0.01)
    by_hand = passes * 32 * 32 * 8192 * 4096 * 7 / 8 * 2
    assert row["activation_bytes"] == pytest.approx(by_hand)
