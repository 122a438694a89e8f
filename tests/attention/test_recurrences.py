"""Chunked recurrences on one device: equal to float64, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import DOCUMENTS, ONE, H, assert_close, exact, inputs, results
from slow import slow_but_for

from ulysses_jax.attention import delta, linear
from ulysses_jax.attention.chunks import decays_of
from ulysses_jax.attention.convolution import convolve
from ulysses_jax.attention.delta import delta_shard, unit_length
from ulysses_jax.attention.linear import linear_shard


def begins_of(documents):
    changes = documents[:, 1:] != documents[:, :-1]
    return jnp.asarray(np.pad(changes, [(0, 0), (1, 0)]))


def function_of(kind, documents, chunk_tokens):
    if kind == "convolution":

        def convolution(x, weights):
            pad = [(0, 0), (3, 0)]
            x = jnp.pad(x, [*pad, (0, 0), (0, 0)])
            return convolve(x, weights, jnp.pad(documents, pad, constant_values=-1))

        return convolution
    rule = {"linear": linear_shard, "delta": delta_shard}[kind]
    begins = begins_of(documents)

    def alone(**given):
        shard = rule(
            begins=begins,
            scale=H**-0.5,
            chunk_tokens=chunk_tokens,
            is_alone=True,
            **given,
        )
        return shard.out.astype(given["v"].dtype)

    return alone


QUICK = [("linear", 8, "several"), ("delta", 5, "several")]


@pytest.mark.parametrize(
    "kind, chunk_tokens, documents",
    [
        *slow_but_for(QUICK, ["linear", "delta"], [1, 5, 8, 64], ["one", "several"]),
        ("convolution", None, "several"),
    ],
)
def test_equals_float64(kind, chunk_tokens, documents):
    documents = DOCUMENTS if documents == "several" else ONE
    given = inputs(kind)
    got = results(function_of(kind, documents, chunk_tokens), kind, given)
    assert_close(got, exact(kind, given, documents))


@pytest.mark.parametrize("strong", [-4000, -1e9, np.finfo(np.float32).min])
def test_a_strong_decay_leaves_the_digits_of_weak_ones(strong):
    """After one of e^-4000 float32 sums are multiples of 0.0002."""
    weak = np.full(64, -1e-3, np.float32)
    log_decay = np.concatenate([weak[:8], [strong], weak])
    begins = jnp.zeros((1, len(log_decay)), bool)
    decays = decays_of(jnp.asarray(log_decay, jnp.float32)[None, None, None], begins)
    exact = np.exp(np.cumsum(weak.astype(np.float64)))
    np.testing.assert_allclose(decays.pairs[0, 0, 0, 9:, 8], exact, rtol=1e-6)
    assert decays.pairs[0, 0, 0, 9, 7] == 0 and decays.pairs[0, 0, 0, 7, 8] == 0


@pytest.mark.parametrize("kind", slow_but_for(["delta"], ["linear", "delta"]))
def test_shards_one_after_the_other(kind):
    """Reads, changes and states of two shards are those of one; so is what the second
    makes of the state that it is given."""
    rule = {"linear": linear_shard, "delta": delta_shard}[kind]
    apply = {"linear": linear.apply, "delta": delta.apply}[kind]
    given = inputs(kind) | {"begins": begins_of(DOCUMENTS)}

    def run(part, **changes):
        cut = {name: x[:, part] for name, x in given.items()} | changes
        return jax.jit(functools.partial(rule, scale=1.0, chunk_tokens=3))(**cut)

    whole, close = (
        run(slice(None)),
        functools.partial(np.testing.assert_allclose, atol=2e-5),
    )
    for size in (16, 18):  # at a document's first token, and inside of it
        first, second = run(slice(size)), run(slice(size, None))
        read = jnp.einsum("BTNH,BNHV->BTNV", second.reads, first.state)
        close(np.concatenate((first.out, second.out + read), axis=1), whole.out)
        close(second.state + apply(second.change, first.state), whole.state)
        close(apply(second.change, first.change), whole.change)
        started = run(slice(size, None), start=first.state)
        close(started.out, whole.out[:, size:])
        close(started.state, whole.state)
        unread = run(slice(size, None), q=None)
        assert (unread.out, unread.reads) == (None, None)
        close(unread.change, second.change)
        close(unread.state, second.state)
        of_row_0 = np.abs(second.change[0]).max(), np.abs(second.change[1]).max()
        assert (of_row_0[0] > 0, of_row_0[1] > 0) == (False, size == 18)


def test_unit_length():
    x = jnp.asarray([[[[3.0, 4.0], [0.0, 0.0]]]], jnp.bfloat16)
    got = unit_length(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0, 0], [[0.6, 0.8], [0, 0]], atol=2**-8)
