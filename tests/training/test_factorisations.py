"""Every way to lay 8 devices out on the mesh trains the same steps."""

import itertools
import math
import re

import numpy as np
import pytest
from run_cases import assert_same, make_config, on_one_device, train
from slow import slow_but_for

from ulysses_jax.mesh import AXES

NUM_DEVICES = 8


def factorisations():
    """All degrees of the axes whose product is the number of devices."""
    divisors = [n for n in range(1, NUM_DEVICES + 1) if NUM_DEVICES % n == 0]
    for degrees in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(degrees) == NUM_DEVICES:
            yield {axis: n for axis, n in zip(AXES, degrees, strict=True) if n > 1}


# Six heads, of two keys' and values', are cut over tensor in whole heads only.
EVEN = list(factorisations())
UNEVEN = [degrees for degrees in EVEN if degrees.get("tensor", 1) <= 2]
GATHERED = [
    degrees
    for degrees in UNEVEN
    if make_config(degrees, family="uneven").model.strategy == "all_gather"
]


# Each strategy, and every two of the axes that cut tokens and layers.
QUICK_ONES = [
    dict(seq=2, tensor=4),
    dict(ring=4, seq=2),
    dict(fsdp=2, ring=2, tensor=2),
    dict(data=2, ring=2, seq=2),
]


def test_there_are_as_many_as_there_should_be():
    """Three factors of 2 over the axes: stars and bars."""
    assert len(EVEN) == math.comb(3 + len(AXES) - 1, 3) == 35
    assert len({tuple(sorted(degrees.items())) for degrees in EVEN}) == len(EVEN)
    assert len(UNEVEN) == 30


def test_they_imply_every_strategy_and_zigzag_where_blocks_go_round():
    configs = [make_config(degrees) for degrees in EVEN]
    configs += [make_config(degrees, family="uneven") for degrees in UNEVEN]
    strategies = {config.model.strategy for config in configs}
    assert strategies == {"ulysses", "ring", "hybrid", "all_gather"}
    for config in configs:
        mesh, gathers = config.mesh, config.model.strategy == "all_gather"
        assert config.zigzag_members() == (mesh.seq if gathers else mesh.ring)


@pytest.mark.parametrize("degrees", slow_but_for(QUICK_ONES, EVEN))
def test_float32(degrees):
    assert_same(train(degrees), on_one_device(), 1e-5)


@pytest.mark.parametrize("degrees", slow_but_for([], UNEVEN))
def test_uneven_heads(degrees):
    assert_same(train(degrees, family="uneven"), on_one_device("uneven"), 1e-5)


@pytest.mark.parametrize("degrees", slow_but_for([dict(fsdp=2, seq=4)], GATHERED))
def test_uneven_heads_exchanged(degrees):
    """Where auto finds it cheaper to gather keys, the exchange is right too."""
    got = train(degrees, family="uneven", model=dict(strategy="ulysses"))
    assert_same(got, on_one_device("uneven"), 1e-5)


@pytest.mark.parametrize("degrees", [d for d in EVEN if d not in UNEVEN], ids=str)
def test_heads_that_do_not_divide_over_tensor_are_refused(degrees):
    tensor = degrees["tensor"]
    with pytest.raises(ValueError) as refusal:
        make_config(degrees, family="uneven")
    before, _, meshes = str(refusal.value).partition(": use ")
    assert before == f"model.num_heads 6 does not divide over mesh.tensor {tensor}"
    fits = re.findall(r"mesh.tensor (\d), mesh.fsdp (\d)", meshes)
    assert len(fits) == 2
    for fit in fits:
        changed = degrees | dict(zip(("tensor", "fsdp"), map(int, fit), strict=True))
        assert math.prod(changed.values()) == 8
        make_config(changed, family="uneven")


@pytest.mark.parametrize("degrees", slow_but_for([dict(fsdp=2, ring=2, seq=2)], EVEN))
def test_bfloat16(degrees):
    """Losses within 0.2 % of one device's: products round in another order."""
    got, want = train(degrees, dtype="bfloat16"), on_one_device(dtype="bfloat16")
    np.testing.assert_allclose(got.losses, want.losses, 2e-3)
    np.testing.assert_allclose(got.gradient_norms[:2], want.gradient_norms[:2], 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("degrees", EVEN, ids=str)
def test_other_stages_of_zero(degrees, stage):
    assert_same(train(degrees, zero_stage=stage), on_one_device(), 1e-5)
