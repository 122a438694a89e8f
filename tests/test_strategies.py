"""The strategies by name, and meshes that they do not fit."""

import pytest

from ulysses_jax.parallel.bytes import received_bytes
from ulysses_jax.strategies import (
    STRATEGIES,
    check_strategy,
    num_members,
    strategy_of,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ring, seq", [(1, 1), (1, 4), (4, 1), (2, 4), (3, 5)])
def test_a_refusal_names_two_meshes_that_work(strategy, ring, seq):
    try:
        check_strategy(strategy, ring, seq)
    except ValueError as error:
        text = str(error)
    else:
        assert strategy in (strategy_of(ring, seq), "all_gather", "megatron")
        return
    assert f"strategy {strategy} " in text and f"ring={ring}, seq={seq}: use " in text
    words = text.split(": use ")[1].split(", or strategy ")[0].split(" or ")
    assert len(set(words)) == 2
    for words_of_mesh in words:
        r, s = (int(part.split("=")[1]) for part in words_of_mesh.split(", "))
        check_strategy(strategy, r, s)
        # Of the devices that are there, but where so few carry no two of them.
        assert ring * seq % (r * s) == 0 or ring * seq < 8 and r * s <= 8 * ring * seq


def test_members():
    found = {name: num_members(name, 2, 4) for name in STRATEGIES}
    assert found == {
        "ulysses": 1,
        "ring": 2,
        "hybrid": 2,
        "all_gather": 4,
        "megatron": 1,
    }


def test_names_of_no_strategy():
    sizes = dict(tokens=8, num_heads=2, num_kv_heads=2, head_size=4, itemsize=2)
    for call in (
        lambda name: check_strategy(name, 1, 2),
        lambda name: num_members(name, 1, 2),
        lambda name: received_bytes(name, **sizes, ring=1, seq=2),
    ):
        with pytest.raises(ValueError, match="no strategy 'Ring': use one of 'ulysses"):
            call("Ring")
