"""The cluster that a user names."""

import pytest

from ulysses_jax.costs.targets import TARGETS, parse_gpus


def test_parse_gpus():
    assert parse_gpus("h100:1x8") == (TARGETS["h100"], 1, 8)
    assert parse_gpus(" A100-40:128x4 ") == (TARGETS["a100-40"], 128, 4)
    assert set(TARGETS) == {"a100-40", "a100-80", "h100", "h200", "b200"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1000:1x8", "did you mean 'h100'"),
        ("a100:1x8", "did you mean 'a100-40'"),
        ("tpu:1x8", "valid are a100-40, a100-80, h100, h200, b200"),
        ("h100", "e.g. h100:1x8"),
        ("h100:8", "e.g. h100:1x8"),
        ("h100:0x8", "e.g. h100:1x8"),
        ("h100:1x8x2", "e.g. h100:1x8"),
        ("", "e.g. h100:1x8"),
    ],
)
def test_bad_gpus(text, message):
    with pytest.raises(ValueError, match=message):
        parse_gpus(text)


def test_figures_are_of_one_gpu_and_one_direction():
    """A sum of both directions, or a sparse peak, would be twice these."""
    h100 = TARGETS["h100"]
    assert h100.bf16_flops_per_second == 989.4e12
    assert h100.nvlink_bytes_per_second == 450e9
    assert h100.network_bytes_per_second == 50e9
    for target in TARGETS.values():
        assert target.network_bytes_per_second < target.nvlink_bytes_per_second
        assert target.nvlink_bytes_per_second < target.memory_bytes_per_second
        assert 39 * 2**30 < target.memory_bytes < 192e9
