"""A bias, added in float32."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


def add_bias(y: Array, bias: nnx.Param | None) -> Array:
    """Its gradient is a sum over all tokens, which y's dtype would not hold."""
    if bias is None:
        return y
    return (y.astype(jnp.float32) + bias[...]).astype(y.dtype)
