"""An attention over some keys at a time: parts joined exactly, and pulled back so."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ulysses_jax.attention.blockwise import (
    blockwise_attention_with_logsumexp,
    blockwise_gradients,
)
from ulysses_jax.attention.cudnn import (
    cudnn_attention_with_logsumexp,
    cudnn_can,
    cudnn_gradients,
)
from ulysses_jax.attention.mask import Mask


def join(
    a: tuple[Float[Array, "B T N H"], Float[Array, "B N T"]],
    b: tuple[Float[Array, "B T N H"], Float[Array, "B N T"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """(out, logsumexp) over the keys of both, from those over each; float32.

    Source: the online softmax, arXiv 1805.02867.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    logsumexp = jnp.logaddexp(lse_a, lse_b)

    def weigh(out, lse):
        weight = jnp.exp(lse - logsumexp).transpose(0, 2, 1)[..., None]
        return out.astype(jnp.float32) * weight

    return weigh(out_a, lse_a) + weigh(out_b, lse_b), logsumexp


class Parts(NamedTuple):
    """A flash attention taken apart.

    forward: `f(q, k, v, mask=, scale=) -> (out, logsumexp)`, out in q's dtype,
      logsumexp float32 `[B, N, T]`, over the keys that it is given.
    gradients: `f(q, k, v, out, logsumexp, dout, mask=, scale=) -> (dq, dk, dv)`. Given
      the out and logsumexp of a query over *all* its keys, it returns these keys' part
      of dq, and their dk and dv.
    join: `f((out, logsumexp), (out, logsumexp)) -> (out, logsumexp)` of two sets of
      keys, in float32.
    """

    forward: Callable[..., tuple[Array, Array]]
    gradients: Callable[..., tuple[Array, Array, Array]]
    join: Callable[..., tuple[Array, Array]] = join


PARTS = {
    "blockwise": Parts(blockwise_attention_with_logsumexp, blockwise_gradients),
    "cudnn": Parts(cudnn_attention_with_logsumexp, cudnn_gradients),
}


def attention_parts(name: str, platform: str, q: Array, k: Array, mask: Mask) -> Parts:
    """By a config's name; "auto" is the fastest for these shapes, mask and devices.

    Raises:
      ValueError: the dense reference, which has no parts.
    """
    if name == "auto":
        is_gpu = platform in ("gpu", "cuda")
        name = "cudnn" if is_gpu and cudnn_can(q, k, mask) else "blockwise"
    if name not in PARTS:
        raise ValueError(
            f"model.attention {name} cannot attend to some keys at a time: use auto, "
            + " or ".join(PARTS)
        )
    return PARTS[name]
