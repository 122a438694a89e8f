"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ulysses_jax.attention.mask import Mask

DTYPES = (jnp.bfloat16, jnp.float16)


def cudnn_can(q: Array, mask: Mask) -> bool:
    """Whether cuDNN through jax.nn has this dtype, head size and mask."""
    return (
        q.dtype in DTYPES
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and mask.is_by_index
        and (mask.window is None or mask.causal)
    )


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Flash attention by cuDNN, forward and backward, O(T) memory.

    Args: as `reference_attention`'s; bfloat16 or float16.

    Raises:
      ValueError: float32; segments or positions, which cuDNN through jax.nn does not
        have: it would attend across packed documents.
    """
    mask.check(q, k)
    if q.dtype not in DTYPES:
        raise ValueError(
            f"cuDNN attends in bfloat16 or float16, not {q.dtype}: cast q, k and v, or "
            "use blockwise_attention"
        )
    return through_jax_nn(q, k, v, mask=mask, scale=scale, implementation="cudnn")


def through_jax_nn(q, k, v, *, mask: Mask, scale, implementation) -> Array:
    """`jax.nn.dot_product_attention` with a mask given as data."""
    if not mask.is_by_index:
        raise ValueError(
            "cuDNN through jax.nn has neither segment ids nor positions: use "
            "blockwise_attention, or one document a sequence"
        )
    window = None
    if mask.window is not None:  # jax.nn counts the neighbours on either side
        window = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation=implementation,
    )
