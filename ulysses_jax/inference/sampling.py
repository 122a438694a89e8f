"""The next token of each row, of its logits: the likeliest, or drawn."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ulysses_jax import layout


@partial(jax.jit, static_argnames="greedy")
def next_tokens(
    logits: Float[Array, "B V"],
    seed: Int[Array, ""],
    step: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    greedy: bool,
) -> Int[Array, "B"]:
    """A token a row.

    Args:
      logits: global, float32.
      seed, step: with a row's number they say what is drawn for it, so that no other
        row has a part in it.
      temperature: by which logits are divided.
      top_p: tokens are drawn from the likeliest ones, the fewest whose probabilities
        add up to this.
      greedy: the likeliest, whatever the other numbers.

    Returns:
      Whole on every device.

    Cost: the logits are gathered.

    Source: top-p is nucleus sampling, arXiv 1904.09751.
    """

    def local(logits: Array, seed: Array, step: Array, temperature: Array, p: Array):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        key = jax.random.fold_in(jax.random.key(seed), step)

        def draw(row: Array, logits: Array) -> Array:
            logits = _likeliest(logits / temperature, p)
            return jax.random.categorical(jax.random.fold_in(key, row), logits)

        rows = jnp.arange(len(logits))
        return jax.vmap(draw)(rows, logits).astype(jnp.int32)

    arguments = logits, seed, step, temperature, top_p
    return layout.over_devices(local, (P(),) * 5, P())(*arguments)


def _likeliest(logits: Float[Array, "V"], top_p: Array) -> Float[Array, "V"]:
    """Minus infinity for all but the likeliest that add up to `top_p`."""
    order = jnp.argsort(-logits)
    sums = jnp.cumsum(jax.nn.softmax(logits[order]))
    before = jnp.concatenate((jnp.zeros(1), sums[:-1]))
    kept = jnp.zeros(len(logits), bool).at[order].set((before < top_p) | (top_p >= 1))
    return jnp.where(kept, logits, -jnp.inf)
