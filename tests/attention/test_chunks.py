"""The loop over chunks, beside a plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ulysses_jax.attention.chunks import over_chunks
from ulysses_jax.attention.delta import delta_shard


@pytest.mark.parametrize("num", [1, 4, 11])
def test_it_is_a_scan(num):
    """However many chunks are left over from whole groups."""
    inputs = jnp.asarray(np.random.default_rng(num).normal(size=(num, 3)), jnp.float32)

    def one(carry, x):
        carry = jnp.sin(carry + x["a"])
        return carry, (carry * x["b"], x["b"].sum())

    def result(a, b, loop):
        carry, (out, sums) = loop(one, jnp.ones(3), {"a": a, "b": b})
        return (carry * out.sum(0)).sum() + (sums**2).sum(), (carry, out, sums)

    def all_of(loop):
        with_gradients = jax.value_and_grad(partial(result, loop=loop), (0, 1), True)
        return with_gradients(inputs, 2 * inputs)

    want, got = all_of(lax.scan), all_of(over_chunks)
    jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), got[1], want[1])


def test_few_states_are_kept():
    """Of 256 chunks, 16 before groups and 16 within one; a state is 8 KiB."""
    q, k, v = (jnp.ones((1, 1024, 1, size)) for size in (32, 32, 64))
    ones = jnp.ones((1, 1024, 1))

    def total(q, k, v):
        begins = jnp.zeros((1, 1024), bool)
        options = dict(scale=1.0, chunk_tokens=4, is_alone=True)
        return delta_shard(q, k, v, -ones, ones, begins, **options).out.sum()

    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile()
    states = 256 * 32 * 64 * 4
    assert program.memory_analysis().temp_size_in_bytes < states
