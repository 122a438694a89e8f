"""Generation with layers of a state: against the whole sequence computed anew."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from slow import slow_but_for
from test_generate import MESHES, NEW, PROMPTS, SIZES, made, mesh_of, traced

from ulysses_jax.complete import complete_model
from ulysses_jax.inference import generate
from ulysses_jax.inference.cache import cache_bytes
from ulysses_jax.inference.states import states_bytes

HYBRID = dataclasses.replace(
    SIZES,
    num_layers=5,
    pattern=("delta", "linear", "window", "full"),
    delta_heads=8,
    delta_key_heads=4,
    delta_key_size=4,
    delta_value_size=8,
)
PURE = dataclasses.replace(
    SIZES,
    pattern=("linear", "delta"),
    window=None,
    sinks=False,
    query_key_norm=False,
    attention_gate=False,
    positions="learned",
    max_positions=64,
)


@pytest.fixture(scope="module")
def alone():
    """Each prompt's continuation by whole forward passes."""
    found = {}
    for size in (HYBRID, PURE):
        model, found[size] = made(size), []
        for row in map(list, PROMPTS):
            for _ in range(NEW):
                padded = np.array([row + [0] * (64 - len(row))])
                row.append(int(jnp.argmax(model(padded)[0, len(row) - 1])))
            found[size].append(row[-NEW:])
    return found


@pytest.mark.parametrize(
    "degrees, kind",
    slow_but_for(
        [(MESHES[2], AxisType.Explicit)],
        [*MESHES, dict(seq=8)],
        [AxisType.Auto, AxisType.Explicit],
    ),
)
@pytest.mark.parametrize("size", [HYBRID, PURE], ids=["hybrid", "pure"])
def test_tokens_are_those_of_whole_forward_passes(alone, size, degrees, kind):
    """Rows of unequal lengths in one batch; one shorter than its convolutions reach."""
    with mesh_of(degrees, kind):
        assert generate(made(size), PROMPTS, max_tokens=NEW) == alone[size]


def test_the_cache_is_as_long_as_no_row():
    with mesh_of(dict(data=2, seq=2, tensor=2)):
        for tokens in (64, 128):
            prompt, token = traced(made(HYBRID), tokens, 128, rows=4)
            delta, linear, window, _, rest = prompt.out_info[1]
            assert linear.before == () and linear.state.shape == (1, 4, 4, 8, 8)
            assert delta.state.shape == (1, 4, 8, 4, 8)  # [L, B, N, H, V]
            local = delta.state.sharding.shard_shape(delta.state.shape)
            assert local == (1, 2, 4, 4, 8)
            assert [x.shape[2:] for x in delta.before] == [
                (3, 4, 4),
                (3, 4, 4),
                (3, 8, 8),
            ]
            assert rest.state.shape == (4, 8, 4, 8)
        program = token.lower().compile()
        model = complete_model(HYBRID)
        held = cache_bytes(model, 4, 128) + states_bytes(model, 4)
        kept = 2 * (8 * 4 * 8 + 3 * (2 * 4 * 4 + 8 * 8)) + 4 * 8 * 8
        assert states_bytes(model, 4) == 2 * 4 * kept // 2
    assert program.memory_analysis().alias_size_in_bytes == held
