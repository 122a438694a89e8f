"""docs/recipes.md: its own blocks, run one after another, against a dense softmax."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = {
    section.split("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")
}


def dense(q, k, v, seen, scale=8**-0.5, sinks=None):
    """softmax over the keys that `seen` [B or 1, T, S] shows, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    weights = np.exp(scale * np.einsum("BTNH,BSNH->BNTS", q, k))
    weights = weights * np.asarray(seen)[:, None]
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64))[:, None, None]
    weights = weights / np.where(total == 0, 1, total)
    return np.einsum("BNTS,BSNH->BTNH", weights, v)


QUERY, KEY = np.arange(16)[:, None], np.arange(16)
CAUSAL = (KEY <= QUERY)[None]
LENGTHS = np.array([16, 11])[:, None, None]


def causal_from_the_end(q, k, v):
    q_lengths = np.array([8, 5])[:, None, None]
    seen = KEY - LENGTHS <= QUERY[:8] - q_lengths
    return dense(q[:, :8], k, v, seen)


def in_any_order(q, k, v):
    order = np.asarray(jax.random.permutation(jax.random.key(1), 16))
    return dense(q, k, v, CAUSAL)[:, order]


def gradient_of_a_scale(q, k, v):
    def loss(log_scale):
        return (dense(q, k, v, CAUSAL, scale=np.exp(log_scale)) ** 2).sum()

    return (loss(-1 + 1e-4) - loss(-1 - 1e-4)) / 2e-4


ORACLES = {
    "Padding": lambda q, k, v: dense(
        q, k, v, CAUSAL & (QUERY < LENGTHS) & (KEY < LENGTHS)
    ),
    "Causal, counted from the end": causal_from_the_end,
    "A window to the left": lambda q, k, v: dense(q, k, v, CAUSAL & (QUERY - KEY <= 3)),
    "A window of two lengths": lambda q, k, v: dense(
        q, k, v, ((QUERY - KEY <= 4) & (KEY - QUERY <= 1))[None]
    ),
    "Tokens in any order": in_any_order,
    "Values with a head size of their own": lambda q, k, v: dense(
        q, k, v[..., :5], CAUSAL
    ),
    "One query, as in decoding": lambda q, k, v: dense(q[:, :1], k, v, KEY < LENGTHS),
    "A learned scale": gradient_of_a_scale,
    "Learned sinks": lambda q, k, v: dense(
        q, k, v, CAUSAL, sinks=[-1.0, 0.0, 1.0, 2.0]
    ),
    "An attention of your own": lambda q, k, v: dense(q, k, v, CAUSAL),
}


@pytest.fixture(scope="module")
def start():
    (block,) = RECIPES["# Recipes"]
    found = {}
    exec(block, found)
    return found


def test_every_recipe_has_an_oracle():
    assert list(RECIPES) == ["# Recipes", *ORACLES]


@pytest.mark.parametrize("recipe", ORACLES)
def test_a_recipe(start, recipe):
    found = dict(start)
    (block,) = RECIPES[recipe]
    exec(block, found)
    want = ORACLES[recipe](*(np.asarray(start[name]) for name in "qkv"))
    np.testing.assert_allclose(found["out"], want, rtol=2e-5, atol=2e-5)


def test_gradients_of_sinks(start):
    """Against differences of the dense softmax, along one direction of each."""
    found = dict(start)
    exec(RECIPES["Learned sinks"][0], found)
    q, k, v, sinks = (found[name] for name in ("q", "k", "v", "sinks"))
    weights, dq = (jax.random.normal(jax.random.key(i), q.shape) for i in (2, 3))
    dsinks = np.array([0.5, -1.0, 1.5, 1.0])

    def loss(q, sinks):
        return jnp.sum(found["with_sinks"](q, sinks) * weights)

    to_q, to_sinks = jax.jit(jax.grad(loss, argnums=(0, 1)))(q, sinks)

    def along(q_step, sink_step):
        moved = np.asarray(q, np.float64) + q_step * np.asarray(dq, np.float64)
        moved_sinks = np.asarray(sinks, np.float64) + sink_step * dsinks
        out = dense(moved, k, v, CAUSAL, sinks=moved_sinks)
        return (out * np.asarray(weights)).sum()

    for got, step in (
        (jnp.vdot(to_q, dq), (1e-5, 0)),
        (jnp.vdot(to_sinks, dsinks), (0, 1e-5)),
    ):
        want = (along(*step) - along(*(-each for each in step))) / 2e-5
        np.testing.assert_allclose(got, want, rtol=1e-4)
