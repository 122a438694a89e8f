"""Attention over two sets of keys, from that over each: exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Statistics = tuple[Float[Array, "B T N H"], Float[Array, "2 B N T"]]


def join(a: Statistics, b: Statistics) -> Statistics:
    """(out, logsumexp) over the keys of both, from those over each; float32.

    Each logsumexp is two arrays that add up to it: float32 knows 1,000 to 6e-5 alone,
    and weights made of it would be off by as much. The weights are made of the
    difference, so that they add up to 1.

    Source: the online softmax, arXiv 1805.02867.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    ahead = (lse_a - lse_b).sum(axis=0)

    def weigh(out, ahead):
        weight = jax.nn.sigmoid(ahead).transpose(0, 2, 1)[..., None]
        return out.astype(jnp.float32) * weight

    def grown(lse, ahead):
        return lse.at[1].add(jax.nn.softplus(-ahead))

    out = weigh(out_a, ahead) + weigh(out_b, -ahead)
    return out, jnp.where(ahead > 0, grown(lse_a, ahead), grown(lse_b, -ahead))
