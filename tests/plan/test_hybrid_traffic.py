"""Steps of layers of states, compiled for CPU devices, send what formulas say."""

import dataclasses

import pytest
from jax.sharding import AxisType
from test_step_traffic import analysed, row, tiny

from ulysses_jax.costs.targets import TARGETS
from ulysses_jax.costs.traffic import unexpected
from ulysses_jax.mesh import make_mesh
from ulysses_jax.plan.compile import analyse, compile_on


def by_part(row):
    return {each["what"]: each for each in row["parts"]}


def test_states_are_made_again_and_products_are_not():
    """Under remat products, three layers of one kind in a loop. By hand: two hops of a
    state and one of a change of 8 heads, another of the state, 3 rows of a halo of 16
    heads; forward, again and backward."""
    memory = dict(remat="products")
    model = dict(pattern=("delta",))
    config = tiny(model=model, memory=memory, fsdp=2, seq=4)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), axis_type=AxisType.Explicit)
    program = compile_on(config, mesh)
    assert "rematted_computation/" in program.text
    assert "rematted_computation/BTD,D" not in program.text
    result = analyse(program, TARGETS["h100"], gpus_per_host=8)
    states = row(result, "collective-permute", "seq")
    one = 4 * (8 * (3 + 1) * 8 * 8 + 3 * 16 * 8)
    assert states["bytes"] == 3 * 2 * 3 * one
    assert states["ratio"] == 1
    halo = by_part(states)["short_convolution"]
    assert halo["bytes"] == 3 * 2 * 3 * 4 * 3 * 16 * 8
    assert halo["count"] == 3 * 3 * 3 and halo["ratio"] == 1  # of q, k and v
    rule = by_part(states)["gated_delta_rule"]
    assert rule["bytes"] == states["bytes"] - halo["bytes"] and rule["ratio"] == 1
    other = states | {"parts": [rule, halo | {"ratio": 2.0}]}  # sums may hide it
    (line,) = unexpected([other])
    said = "collective-permute over seq of short_convolution sends 2.00 times"
    assert line.startswith(said)
    # Matrices forward and backward: those of beta and decay have 8 columns.
    matrices = 3 * 64 * (3 * 64 + 2 * 32 + 2 * 8 + 3 * 96)
    gathered = row(result, "all-gather", "fsdp+seq")
    assert gathered["bytes"] == pytest.approx((2 * matrices + 2 * 96 * 64) * 4 * 7 / 8)
    assert gathered["ratio"] == pytest.approx(1)
    assert (result["attention"], result["kernels"]) == ([], {})
    assert result["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, remat, axes",
    [
        (dict(fsdp=2, seq=4), "full", ["seq"]),
        (dict(ring=2, seq=4), "none", ["ring", "ring+seq"]),
        (dict(seq=4, tensor=2), "attention", ["seq"]),
    ],
    ids=str,
)
def test_bytes_of_a_hybrid(changes, remat, axes):
    """And of one layer's exchange."""
    model = dict(pattern=("delta", "linear", "full"))
    result = analysed(tiny(model=model, memory=dict(remat=remat), **changes))
    assert result["warnings"] == []
    for axis in axes:
        found = row(result, "collective-permute", axis)
        of_all = {"gated_delta_rule", "linear_attention"}
        # A shard's neighbour has the tokens before; of a ring, keys hop along it.
        of_all |= {"attention"} if axis == "ring" else {"short_convolution"}
        assert set(by_part(found)) == of_all
        assert found["ratio"] == 1
        assert all(each["ratio"] == 1 for each in found["parts"])
    assert row(result, "all-to-all", "seq")["parts"] == []
    assert row(result, "all-to-all", "seq")["ratio"] == pytest.approx(1)
    assert [each["kind"] for each in result["attention"]] == ["full"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, changes, axes",
    [
        (("delta",), dict(fsdp=2, seq=4), ["seq"]),
        (("delta",), dict(ring=2, seq=4), ["ring", "ring+seq"]),
        (("linear",), dict(ring=4, seq=2), ["ring", "ring+seq"]),
        (("delta", "linear", "full"), dict(seq=4, tensor=2), ["seq"]),
    ],
    ids=str,
)
def test_bytes_in_pieces(pattern, changes, axes):
    """States are exchanged once a pass, not once a piece, and the last tokens of x."""
    memory = dict(remat="full", sequence_chunk_tokens=4)
    result = analysed(tiny(model=dict(pattern=pattern), memory=memory, **changes))
    assert result["warnings"] == []
    for axis in axes:
        assert row(result, "collective-permute", axis)["ratio"] == 1
    if "full" in pattern:
        assert row(result, "all-to-all", "seq")["ratio"] == pytest.approx(1)
    else:  # a loop, in which XLA merges no gathers
        zero = "+".join(axis for axis in ("fsdp", "ring", "seq") if axis in changes)
        assert row(result, "all-gather", zero)["ratio"] == pytest.approx(1)
