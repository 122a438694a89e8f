"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ulysses_jax.attention.mask import Mask

DTYPES = (jnp.bfloat16, jnp.float16)


def cudnn_lacks(q: Array, k: Array, mask: Mask) -> str | None:
    """What cuDNN through jax.nn has no attention for, or no gradient; None where it has
    both."""
    if (lacks := cudnn_lacks_forward(q, k, mask)) is not None:
        return lacks
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"a gradient from {q.shape[1]} queries to {k.shape[1]} keys"
    return None


def cudnn_lacks_forward(q: Array, k: Array, mask: Mask) -> str | None:
    """What it has no attention for."""
    if q.dtype not in DTYPES:
        return f"products in {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head size {q.shape[-1]}"
    if mask.q_segment_ids is not None:
        return "documents in a row"
    if mask.q_positions is not None:
        return "positions"
    if mask.layout is not None:
        return "a layout of blocks"
    if mask.window is not None and not mask.causal:
        return "a window on both sides"
    if mask.window is not None and q.shape[1] > k.shape[1]:
        return "a window with more queries than keys"
    return None


def check_cudnn(q: Array, k: Array, mask: Mask) -> None:
    """Raises ValueError where it has no such attention."""
    if (lacks := cudnn_lacks_forward(q, k, mask)) is not None:
        cast = (
            "cast q, k and v to bfloat16 (model.compute_dtype), or "
            if q.dtype not in DTYPES
            else ""
        )
        raise ValueError(
            f"cuDNN through jax.nn has no attention for {lacks}: {cast}use attention "
            "auto (of the function: None), or blockwise"
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

    Keeps out and logsumexp for the backward pass under the names "attention_out" and
    "attention_logsumexp", as `blockwise_attention` does.

    Args: as `reference_attention`'s; bfloat16 or float16.

    Raises:
      ValueError: what `cudnn_lacks_forward` names, such as float32 or documents in a
        row; for a gradient, an odd number of queries or keys.
    """
    return _attend(_through_cudnn(q, k, mask, scale), q, k, v)


def cudnn_attention_with_logsumexp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`cudnn_attention`, and the float32 logsumexp; has no gradient of its own."""
    # jax.nn's own return_residual rounds the logsumexp to out's dtype.
    out, pullback = _vjp(_through_cudnn(q, k, mask, scale), q, k, v)
    return out, _logsumexp(pullback)


def cudnn_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    logsumexp: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv of these keys, given out and logsumexp over all keys of a query."""
    own, pullback = _vjp(_through_cudnn(q, k, mask, scale), q, k, v)
    # What these keys alone gave is replaced, and so is never computed.
    return _with_statistics(own, pullback, out, logsumexp)(dout)


def _through_cudnn(q, k, mask, scale):
    """`f(q, k, v)`; raises where cuDNN has no such attention."""
    mask.check(q, k)
    check_cudnn(q, k, mask)
    return partial(through_jax_nn, mask=mask, scale=scale, implementation="cudnn")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(attention, q: Array, k: Array, v: Array) -> Array:
    return attention(q, k, v)


def _forward(attention, q, k, v):
    # jax.nn names nothing that it keeps: its pullback is taken apart here, and what it
    # holds beside its inputs is named.
    out, pullback = _vjp(attention, q, k, v)
    named = checkpoint_name(out, "attention_out")
    logsumexp = checkpoint_name(_logsumexp(pullback), "attention_logsumexp")
    return named, _with_statistics(out, pullback, named, logsumexp)


def _backward(attention, pullback, dout):
    return pullback(dout)


_attend.defvjp(_forward, _backward)


def _vjp(attention, q: Array, k: Array, v: Array):
    """`jax.vjp`; raises where cuDNN has no gradient."""
    if q.shape[1] % 2 or k.shape[1] % 2:
        raise ValueError(
            f"cuDNN has no gradient of attention from {q.shape[1]} queries to "
            f"{k.shape[1]} keys, as a number is odd: let a device attend to even ones "
            "at a time (training.sequence_tokens, memory.sequence_chunk_tokens), or "
            "use blockwise_attention (model.attention auto or blockwise)"
        )
    return jax.vjp(attention, q, k, v)


def _logsumexp(pullback) -> Float[Array, "B N T"]:
    """Among what a pullback keeps, all else being in the compute dtype."""
    (logsumexp,) = (x for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32)
    return logsumexp


def _with_statistics(own, pullback, out, logsumexp):
    """The pullback with another out and logsumexp in place of its own."""
    leaves, treedef = jax.tree.flatten(pullback)
    (i,) = (i for i, x in enumerate(leaves) if x is own)
    (j,) = (j for j, x in enumerate(leaves) if x.dtype == jnp.float32)
    leaves[i], leaves[j] = out, logsumexp.reshape(leaves[j].shape)
    return jax.tree.unflatten(treedef, leaves)


def through_jax_nn(q, k, v, *, mask: Mask, scale, implementation) -> Array:
    """`jax.nn.dot_product_attention` with a mask by index, given as data.

    Its causal mask and window compare indices that both count from 0, as `Mask` does
    where T != S. A query past the last key's window averages all values there, where
    `Mask` says 0.
    """
    assert mask.is_by_index
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
