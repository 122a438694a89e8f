"""The trainer's step, compiled for CPU devices, sends what the formulas say."""

import dataclasses

import pytest
from jax.sharding import AxisType

from ulysses_jax import config as configs
from ulysses_jax import placement
from ulysses_jax.attention import select
from ulysses_jax.attention.reference import reference_attention
from ulysses_jax.complete import complete
from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.costs.traffic import attention_bytes
from ulysses_jax.mesh import make_mesh
from ulysses_jax.plan.compile import analyse, compile_on


def tiny(*, accumulation_steps=1, memory=None, strategy="auto", model=None, **degrees):
    config = configs.Config(
        model=configs.Model(
            vocab_size=96,
            width=64,
            num_layers=3,
            num_heads=8,
            num_kv_heads=4,
            head_size=8,
            feed_forward_width=96,
            strategy=strategy,
            # CPU devices send bfloat16 as float32.
            compute_dtype="float32",
            **model or {},
        ),
        data=configs.Data(mask_documents=False),
        training=configs.Training(
            batch_size=4,
            sequence_tokens=64,
            accumulation_steps=accumulation_steps,
        ),
        mesh=configs.Mesh(**degrees),
        memory=configs.Memory(**(memory or {})),
    )
    config = complete(config, name="tiny")
    return placement.place(config, dataclasses.asdict(config.mesh))


def analysed(config):
    mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
    return analyse(
        compile_on(config, mesh),
        TARGETS["h100"],
        gpus_per_host=8,
    )


def row(result, collective, axis):
    rows = [r for r in result["traffic"] if r["collective"] == collective]
    return next(r for r in rows if r["axis"] == axis)


@pytest.mark.parametrize(
    "changes",
    [
        dict(fsdp=2, seq=4),
        pytest.param(
            dict(data=2, seq=2, tensor=2, accumulation_steps=2), marks=pytest.mark.slow
        ),
        dict(seq=8),  # more devices than KV heads
    ],
    ids=str,
)
def test_exchange_bytes(changes):
    result = analysed(tiny(strategy="ulysses", **changes))
    exchange = row(result, "all-to-all", "seq")
    assert exchange["ratio"] == pytest.approx(1, abs=0.01)
    assert exchange["link"] == "within a host"
    assert result["kernels"] == {"blockwise": ["forward", "backward"]}
    # By hand, per pass and layer: q and out of N heads, k and v of max(K, P) heads.
    seq, tensor = changes["seq"], changes.get("tensor", 1)
    rows_local = 4 // (changes.get("data", 1) * changes.get("fsdp", 1))
    heads = 2 * 8 // tensor + 2 * max(4 // tensor, seq)
    sent = rows_local * 64 // seq * heads * 8 * 4 * (seq - 1) / seq
    assert exchange["bytes"] == pytest.approx(3 * 3 * sent)
    assert set(exchange["phases"]) == {"forward", "recompute", "backward"}
    matmul = 3 * 2 * 64 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 96)  # one layer pass a token: x4
    tokens = 4 * 64 / 8
    assert result["matmul_flops"] > 3 * matmul * tokens


@pytest.mark.parametrize(
    "changes, remat, forwards",
    [
        (dict(ring=2, seq=4), "full", {"all-to-all": 2, "collective-permute": 2}),
        (dict(ring=4, fsdp=2), "attention", {"collective-permute": 1 + 1 / 3}),
        pytest.param(
            dict(ring=4, fsdp=2),
            "none",
            {"collective-permute": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_bytes_of_a_ring(changes, remat, forwards):
    """By hand: blocks of K and V hop, and their gradients; what is kept, not again."""
    result = analysed(tiny(memory=dict(remat=remat), **changes))
    ring, seq = changes["ring"], changes.get("seq", 1)
    rows = 4 // (changes.get("data", 1) * changes.get("fsdp", 1))
    block = rows * 2 * 64 // ring * max(4, seq) // seq * 8 * 4
    hops = forwards["collective-permute"] * (ring - 1) + (ring - 2) + (ring - 1)
    permute = row(result, "collective-permute", "ring")
    assert permute["bytes"] == pytest.approx(3 * hops * block)
    for kind in forwards:
        axis = "seq" if kind == "all-to-all" else "ring"
        assert row(result, kind, axis)["ratio"] == pytest.approx(1)
    assert result["warnings"] == []


def test_bytes_of_a_ring_under_a_window():
    """Half-blocks of 8: the members on both sides alone, 2 of 3; with attention kept,
    one hop of the second round."""
    memory = dict(remat="attention")
    config = tiny(memory=memory, model=dict(window=9), ring=4, fsdp=2)
    result = analysed(config)
    block = 2 * 2 * 64 // 4 * 4 * 8 * 4
    permute = row(result, "collective-permute", "ring")
    assert permute["bytes"] == pytest.approx(3 * (2 + 1 + 1 + 2) * block)
    assert permute["ratio"] == pytest.approx(1)
    assert result["warnings"] == []


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_each_layer_s_own_window_counts(remat):
    """Of full, window, full: of a ring's hops, and of those of a second round."""

    def sent(**model):
        config = tiny(memory=dict(remat=remat), model=model, ring=4, fsdp=2)
        ((_, total),) = attention_bytes(config).items()
        return total

    full, narrow = sent(), sent(window=9)
    assert sent(pattern=("full", "window"), window=9) == (2 * full + narrow) / 3
    assert narrow < full


def test_bytes_of_a_gather():
    """Apart from parameters (fsdp x seq), and with them where the axis is the same."""
    result = analysed(tiny(strategy="all_gather", fsdp=4, seq=2))
    gathered = 2 * 64 * 4 * 8 / 2 * 4  # K and V of the other half, of one row
    assert row(result, "all-gather", "seq")["bytes"] == pytest.approx(3 * 2 * gathered)
    assert row(result, "reduce-scatter", "seq")["bytes"] == pytest.approx(3 * gathered)
    memory = dict(remat="none")
    alone = analysed(tiny(strategy="all_gather", seq=8, memory=memory))
    assert row(alone, "all-gather", "seq")["ratio"] == pytest.approx(1)
    assert result["warnings"] == alone["warnings"] == []


@pytest.mark.parametrize(
    "changes, memory, units",
    [
        # Of gathers, of scatters: forward, recomputation, backward.
        (dict(fsdp=4, seq=2), dict(), (2 + 2 + 2, 2 + 1 + 2)),
        pytest.param(
            dict(fsdp=2, seq=4),
            dict(remat="none"),
            (2 + 2, 2 + 2),
            marks=pytest.mark.slow,
        ),
        # A feed-forward in tiles keeps its input alone.
        (dict(fsdp=2, seq=4), dict(mlp_tile_tokens=16), (2 + 1 + 3, 2 + 1 + 2)),
    ],
    ids=str,
)
def test_bytes_of_megatron(changes, memory, units):
    """By hand: each gather or scatter is of all tokens' activations, and little else
    is sent over seq."""
    result = analysed(tiny(strategy="megatron", memory=memory, **changes))
    assert result["warnings"] == []
    seq, width, layers = changes["seq"], 64, 3
    unit = layers * 4 // changes["fsdp"] * 64 * width * 4 * (seq - 1) / seq
    for kind, count in zip(("all-gather", "reduce-scatter"), units, strict=True):
        each = row(result, kind, "seq")
        assert each["ratio"] == pytest.approx(1, abs=0.01)
        assert each["bytes"] == pytest.approx(count * unit, rel=0.01)
    over = [r for r in result["traffic"] if "seq" in r["axis"]]
    assert {r["collective"] for r in over} == {
        "all-gather",
        "reduce-scatter",
        "all-reduce",  # of norms' scales, and of the loss
    }
    total = sum(r["bytes"] for r in over)
    assert sum(r["bytes"] for r in over if r["formula_bytes"] is None) < total / 50


def test_weights_are_gathered_once_a_pass_and_not_once_a_tile():
    """32 tokens a device, in tiles of 5."""
    memory = dict(remat="none", mlp_tile_tokens=5)
    result = analysed(tiny(fsdp=2, seq=4, memory=memory))
    assert row(result, "all-gather", "fsdp+seq")["ratio"] == pytest.approx(1)
    # CPU devices scatter only these: three matrices of three layers, and two tables.
    assert row(result, "reduce-scatter", "fsdp+seq")["count"] == 3 * 3 + 2


def test_memory_of_the_state():
    result = analysed(tiny(fsdp=2, seq=4))
    memory = result["memory"]
    layers = 3 * (64 * (2 * 8 * 8 + 2 * 4 * 8) + 3 * 64 * 96)
    matrices = layers + 2 * 96 * 64
    vectors = (2 * 3 + 1) * 64  # whole on every device
    parameters = 4 * (matrices // 8 + vectors)
    assert memory["parameters_bytes"] == parameters
    assert memory["optimizer_bytes"] == pytest.approx(2 * parameters, abs=16)
    assert memory["batch_bytes"] == pytest.approx(3 * 4 * 4 * 64 / 8, abs=256)
    parts = ("parameters", "optimizer", "batch", "gradients", "activations", "output")
    total = sum(memory[f"{part}_bytes"] for part in parts)
    assert memory["device_bytes"] == total
    assert memory["fits"]


def test_a_needless_all_gather_is_reported(plant_needless_gather):
    config = tiny(fsdp=2, seq=4, memory=dict(remat="none"))
    clean = analysed(config)
    assert not [w for w in clean["warnings"] if "all-gather" in w]
    assert row(clean, "all-gather", "fsdp+seq")["ratio"] == pytest.approx(1)

    plant_needless_gather()
    faulty = analysed(config)
    (warning,) = [w for w in faulty["warnings"] if "all-gather over fsdp+seq" in w]
    assert "times what the formula says" in warning
    before = row(clean, "all-gather", "fsdp+seq")["bytes"]
    after = row(faulty, "all-gather", "fsdp+seq")["bytes"]
    assert after - before == pytest.approx(96 * 64 * 4 * 7 / 8)


def test_an_attention_that_is_not_the_chosen_one_is_reported(monkeypatch):
    monkeypatch.setitem(select.ATTENTIONS, "blockwise", reference_attention)
    other = analysed(tiny(fsdp=2, seq=4, memory=dict(remat="none")))
    assert [row["kernel"] for row in other["attention"]] == ["blockwise"]
    assert other["kernels"] == {}
    found = [each for each in other["warnings"] if "attention" in each]
    for said, way in zip(found, ("backward", "forward"), strict=True):
        assert f"has not blockwise {way}, which was chosen: its predicted" in said
