"""The optimizer's seconds: traffic of each by hand, and Muon's products."""

import dataclasses

import pytest
from test_predict import GPU, run

from ulysses_jax.costs.optimizer import muon_bytes, muon_flops, optimizer_seconds


def with_optimizer(name, **options):
    config = run(**options)
    training = dataclasses.replace(config.training, optimizer=name)
    return dataclasses.replace(config, training=training)


def seconds(name, state_bytes):
    return optimizer_seconds(with_optimizer(name), GPU, state_bytes)


# q and out 256 x 512, k and v 256 x 256, gate, up and down 256 x 512.
ELEMENTS = 5 * 256 * 512 + 2 * 256 * 256
FLOPS = 5 * (5 * (4 * 256**2 * 512 + 2 * 256**3) + 2 * 6 * 256**3)


def test_traffic_of_a_step():
    """Reads parameter, gradient and moments, writes but the gradient."""
    assert seconds("adamw", 8000) == pytest.approx((5 * 4000 + 2 * 4000) / 1e9)
    assert seconds("lion", 4000) == pytest.approx(5 * 4000 / 1e9)
    assert seconds("sgd", 4000) == pytest.approx(5 * 4000 / 1e9)
    parameters = 4 * (2 * ELEMENTS + 2 * 512 * 256) / 8
    assert seconds("adafactor", 16) == pytest.approx((3 * parameters + 32) / 1e9)
    moved, products = (3 * parameters + 2 * 100) / 1e9, FLOPS / (1e12 / 2 * 0.5)
    assert seconds("muon", 100) == pytest.approx(moved + products)


@pytest.mark.parametrize(
    "options, layers",
    [
        ({}, 1),  # 2 layers over 8
        (dict(num_layers=17), 3),
        (dict(num_layers=17, pattern=("full", "window"), window=8), 2 * 1 + 1),
        (dict(num_layers=8, mesh=dict(data=4, tensor=2)), 4),
        (dict(num_layers=8, memory=dict(offload=("optimizer",))), 8),
    ],
    ids=str,
)
def test_layers_that_a_gpu_makes_orthogonal(options, layers):
    assert muon_flops(with_optimizer("muon", **options)) == layers * FLOPS


def test_bytes_of_megatron():
    """D lies over fsdp, the other side over seq and tensor."""
    config = with_optimizer(
        "muon", mesh=dict(fsdp=2, seq=2, tensor=2), strategy="megatron"
    )
    layer = 2 * 4 * ELEMENTS
    assert muon_bytes(config, "all-to-all", "fsdp") == layer / 2
    assert muon_bytes(config, "all-to-all", "seq+tensor") == layer * 3 / 4
    assert muon_bytes(config, "all-to-all", "seq") is None
    assert muon_bytes(config, "all-gather", "fsdp") is None
