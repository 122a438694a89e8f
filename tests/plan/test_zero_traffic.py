"""What a step sends and keeps at each stage of ZeRO, in programs for CPU devices."""

import dataclasses
import functools

import pytest
from slow import slow_but_for
from test_step_traffic import analysed, tiny

# By hand: elements of the matrices of three layers and two tables, and of the norms.
MATRICES = 3 * (64 * (2 * 8 * 8 + 2 * 4 * 8) + 3 * 64 * 96) + 2 * 96 * 64
NUM_MATRICES = 7 + 2  # of all layers together
VECTORS = (2 * 3 + 1) * 64


def at_stage(stage, **changes):
    config = tiny(**changes)
    training = dataclasses.replace(config.training, zero_stage=stage)
    return analysed_once(dataclasses.replace(config, training=training))


analysed_once = functools.cache(analysed)


def rows(result, collective):
    return [row for row in result["traffic"] if row["collective"] == collective]


def sums(result):
    """Float32 bytes of gradients that a device sends to sum them."""
    phases = [row["phases"] for row in rows(result, "all-reduce")]
    return sum(sum(each.values()) for each in phases)


@pytest.mark.parametrize("stage, steps", slow_but_for([(1, 2), (2, 1)], [1, 2], [1, 2]))
def test_parameters_are_gathered_once_a_step(stage, steps):
    result = at_stage(stage, fsdp=2, seq=4, accumulation_steps=steps)
    (gather,) = rows(result, "all-gather")
    assert gather["axis"] == "fsdp+seq" and set(gather["phases"]) == {"update"}
    assert gather["count"] == NUM_MATRICES
    assert gather["bytes"] == MATRICES * 4 * 7 / 8
    assert gather["ratio"] == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_stage_3_gathers_parameters_in_every_layer(steps):
    result = at_stage(3, fsdp=2, seq=4, accumulation_steps=steps)
    (gather,) = rows(result, "all-gather")
    assert {"forward", "backward"} <= set(gather["phases"])
    assert "update" not in gather["phases"]
    # Seven matrices of three layers, forward and backward; CPU devices need no third
    # pass: what the recomputation gathers is kept for the backward pass of the layer.
    assert gather["count"] >= steps * 7 * 3 * 2
    assert 0.6 < gather["ratio"] <= 1


def test_stage_1_sums_whole_gradients():
    """CPU devices sum over one axis after another, GPUs over both at once."""
    result = at_stage(1, fsdp=2, seq=4)
    assert rows(result, "reduce-scatter") == []
    whole = 4 * (MATRICES + VECTORS)
    assert 2 * whole * 7 / 8 * 0.99 < sums(result)
    assert sums(result) < 2 * whole * (3 / 4 + 1 / 2) * 1.01


@pytest.mark.parametrize("stage", slow_but_for([2], [2, 3]))
def test_stages_2_and_3_scatter_gradients(stage):
    """In chunks all gradients are scattered by name, on CPU devices too."""
    memory = dict(sequence_chunk_tokens=8, mlp_tile_tokens=8)
    result = at_stage(stage, fsdp=2, seq=4, memory=memory)
    (scatter,) = rows(result, "reduce-scatter")
    assert scatter["axis"] == "fsdp+seq" and scatter["ratio"] == 1
    assert scatter["bytes"] == 4 * MATRICES * 7 / 8
    assert sums(result) < 0.05 * scatter["bytes"]  # of vectors and of scalars


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "degrees",
    [
        dict(fsdp=2, seq=4),
        pytest.param(dict(fsdp=2, ring=2, seq=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_of_each_stage(degrees, stage):
    memory = at_stage(stage, **degrees)["memory"]
    whole, cut = 4 * (MATRICES + VECTORS), 4 * (MATRICES // 8 + VECTORS)
    assert memory["parameters_bytes"] == (cut if stage == 3 else whole)
    assert memory["gradients_bytes"] == (whole if stage == 1 else cut)
    assert memory["optimizer_bytes"] == pytest.approx(2 * cut, abs=16)
    assert memory["batch_bytes"] == pytest.approx(3 * 4 * 4 * 64 / 8, abs=256)
