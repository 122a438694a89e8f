"""What is drawn, of logits that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulysses_jax.inference.sampling import next_tokens

P = np.array([0.05, 0.4, 0.25, 0.3])


def drawn(logits, *, temperature=1.0, top_p=1.0, seed=0, greedy=False):
    """Of many rows alike: the share of each token."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4096, len(logits)))
    options = dict(seed=seed, step=1, temperature=temperature, top_p=top_p)
    new = next_tokens(rows, **options, greedy=greedy)
    return np.bincount(new, minlength=len(logits)) / len(rows)


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, P),
        (dict(temperature=0.5), P**2 / (P**2).sum()),
        (dict(top_p=0.39), [0, 1, 0, 0]),  # the fewest that reach it: one
        (dict(top_p=0.41), np.array([0, 4, 0, 3]) / 7),
        (dict(top_p=0.71), np.array([0, 8, 5, 6]) / 19),
        (dict(greedy=True), [0, 1, 0, 0]),
        # Of probabilities after the temperature: 0.57, 0.32 and less.
        (dict(temperature=0.5, top_p=0.6), np.array([0, 16, 0, 9]) / 25),
    ],
    ids=str,
)
def test_shares(options, want):
    """4,096 draws: within four standard deviations."""
    np.testing.assert_allclose(drawn(np.log(P), **options), want, atol=0.032)


def test_a_seed_and_a_step_and_a_row_say_what_is_drawn():
    def of(seed, step):
        logits = jnp.zeros((8, 1000))
        return next_tokens(logits, seed, step, 1.0, 1.0, greedy=False).tolist()

    first = of(0, 0)
    assert first == of(0, 0) and len(set(first)) == 8
    assert not {*zip(first, range(8), strict=True)} & {
        *zip(of(0, 1), range(8), strict=True),
        *zip(of(1, 0), range(8), strict=True),
    }
    logits = jnp.zeros((3, 1000)).at[1:].set(jax.random.normal(jax.random.key(0)))
    assert int(next_tokens(logits, 0, 0, 1.0, 1.0, greedy=False)[0]) == first[0]
