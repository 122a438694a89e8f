"""The benchmark of several lengths: what its formulas say."""

import dataclasses

import pytest
from files import module_of

from ulysses_jax.complete import complete
from ulysses_jax.config import Config, Mesh, Model, Training
from ulysses_jax.placement import place

benchmark = module_of("benchmarks/decomposition.py")


def test_a_step_has_the_same_products_and_attention_by_its_length():
    config = complete(
        Config(
            model=Model(width=32, num_layers=2, num_heads=4),
            training=Training(batch_size=4, sequence_tokens=2048),
        ),
        name="x",
    )
    config = place(config, dataclasses.asdict(Mesh()))
    short, long = (benchmark.parts_of(config, length) for length in (256, 2048))
    assert short[0] == long[0]
    assert long[1] / short[1] == pytest.approx(8, rel=0.01)
    assert benchmark.flops_of(config, 2048, 0.5) == long[0] + long[1] / 2
