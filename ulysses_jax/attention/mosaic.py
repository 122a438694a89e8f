"""Flash attention on Hopper GPUs by tokamax's Mosaic kernels: any range of keys."""

import importlib.metadata
import importlib.util
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ulysses_jax.attention.by_layout import gradients_by_layout, statistics_by_layout
from ulysses_jax.attention.by_tiles import gradients_by_tiles
from ulysses_jax.attention.mask import Mask
from ulysses_jax.attention.ranges import key_ranges
from ulysses_jax.attention.tiling import HIDDEN
from ulysses_jax.mesh import Device

DTYPES = (jnp.bfloat16, jnp.float16)
# Tiles of the backward pass: small ones compute fewer hidden pairs, and together they
# keep all cores of a GPU at work.
BLOCK_TOKENS, TILES_AT_ONCE = 1024, 16
BLOCK_STEP = 64  # of the blocks of a layout
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
TOKAMAX, LEAST_JAX = "0.0.17", (0, 11)


def mosaic_lacks(device: Device, q: Array, mask: Mask) -> str | None:
    """What there is no such kernel for; None where there is one."""
    if not any(name in device.kind for name in HOPPER):
        return f"a GPU that is no Hopper ({device.kind})"
    if q.dtype not in DTYPES:
        return f"products in {q.dtype}"
    if q.shape[-1] > 256:
        return f"head size {q.shape[-1]}"
    if mask.layout is not None and mask.layout.block_tokens % BLOCK_STEP:
        return f"a layout's blocks of {mask.layout.block_tokens} tokens"
    return None


@cache
def tokamax_lacks() -> str | None:
    """Why its kernels cannot be called here, as what follows their name; None where
    they can.

    It is imported, and its kernels, which are private, are traced on a few tokens.
    """
    if importlib.util.find_spec("tokamax") is None:
        return "is not installed"
    if jax.__version_info__ < LEAST_JAX:
        least = ".".join(map(str, LEAST_JAX))
        return f"needs jax {least} or newer, and this is jax {jax.__version__}"

    def shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    q, row = shape(128, 1, 64), shape(1, 128, dtype=jnp.float32)
    ids = shape(128, dtype=jnp.int32)
    try:
        jax.eval_shape(partial(_forward, scale=1.0), q, q, q, ids, ids)
        jax.eval_shape(partial(_backward, scale=1.0), q, q, q, q, row, q, ids, ids)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        found = importlib.metadata.version("tokamax")
        return (
            f"calls kernels as tokamax {TOKAMAX} has them, and this is tokamax {found} "
            f"({type(error).__name__}: {error})"
        )
    return None


def mosaic_statistics(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "2 B N T"]]:
    """Attention and its logsumexp, as two that add up to it; O(T) memory.

    The kernel passes over blocks of keys that no query of a block sees.

    Args: as `reference_attention`'s; bfloat16 or float16.

    Returns:
      out in q's dtype; a query that sees no key gives 0 and `HIDDEN`. A row whose keys
      do not lie in order (`ranges.key_ranges`) gives NaN.
    """
    if mask.layout is not None:
        return statistics_by_layout(
            lambda q, k, v, mask: mosaic_statistics(q, k, v, mask=mask, scale=scale),
            q,
            k,
            v,
            mask,
            tokens_at_once=BLOCK_TOKENS * TILES_AT_ONCE,
        )
    mask.check(q, k)
    ranges = key_ranges(mask, len(q), q.shape[1], k.shape[1])
    out, highest, total = jax.vmap(partial(_forward, scale=_scale(q, scale)))(
        q, k, v, ranges.start, ranges.stop
    )
    is_blind = (ranges.start == ranges.stop)[:, None]
    logsumexp = jnp.stack(
        (
            jnp.where(is_blind, HIDDEN, highest),
            jnp.where(is_blind, 0, jnp.log(jnp.where(is_blind, 1, total))),
        )
    )
    poison = jnp.where(ranges.in_order, 0, jnp.nan)[:, None, None, None]
    return out + poison.astype(out.dtype), logsumexp


def mosaic_gradients(
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
    """Float32 dq, dk, dv of these keys, given out and logsumexp over all of a query.

    The kernel hides pairs, and computes what it hides: it is called on tiles.
    """
    pull = jax.vmap(partial(_backward, scale=_scale(q, scale)))
    if mask.layout is not None:

        def pull_tile(q, k, v, out, dout, rows, mask):
            ranges = key_ranges(mask, len(q), q.shape[1], k.shape[1])
            (logsumexp,) = rows
            return pull(q, k, v, out, logsumexp, dout, ranges.start, ranges.stop)

        return gradients_by_layout(
            pull_tile,
            q,
            k,
            v,
            out,
            dout,
            (logsumexp,),
            mask,
            tokens_at_once=BLOCK_TOKENS * TILES_AT_ONCE,
        )
    return gradients_by_tiles(
        pull,
        q,
        k,
        v,
        out,
        logsumexp,
        dout,
        key_ranges(mask, len(q), q.shape[1], k.shape[1]),
        block_tokens=BLOCK_TOKENS,
        tiles_at_once=TILES_AT_ONCE,
    )


def _scale(q: Array, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _forward(q, k, v, start, stop, *, scale: float):
    """out, greatest logit and sum of exponentials, of one row."""
    from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports]
        pallas_mosaic_gpu_kernel_sm90 as kernel,
    )

    wide = q.shape[-1] > 128  # else shared memory does not hold two stages
    config = kernel.Config(block_q=64, block_kv=64 if wide else 128)
    k, v = (_pad_tokens(x, config.block_kv) for x in (k, v))
    num_q = len(q)  # a core reads the ranges of two blocks of queries
    q, start, stop = (_pad_tokens(x, 2 * config.block_q) for x in (q, start, stop))
    out, (highest, total) = kernel.flash_attention_kernel(
        q,
        k,
        v,
        None,
        None,
        start[None],
        stop[None],
        is_causal=False,
        logits_soft_cap=None,
        logits_scale=scale,
        out_dtype=q.dtype,
        normalize_output=True,
        return_residuals=True,
        use_stable_softmax=True,
        rescale_threshold=1.0,
        config=config,
    )
    return out[:num_q], highest[:, :num_q], total[:, :num_q]


def _backward(q, k, v, out, logsumexp, dout, start, stop, *, scale: float):
    """dq, dk, dv of one row."""
    from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports]
        pallas_mosaic_gpu_vjp_kernel_sm90 as kernel,
    )

    config = kernel.Config(
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
        num_stages=1 if q.shape[-1] > 128 else 2,
    )
    return kernel.flash_attention_vjp_kernel(
        q,
        k,
        v,
        (logsumexp, jnp.ones_like(logsumexp)),
        out,
        dout,
        None,
        None,
        start[None],
        stop[None],
        logits_scale=scale,
        logits_soft_cap=None,
        is_causal=False,
        ds_dtype=None,
        config=config,
    )[:3]


def _pad_tokens(x: Shaped[Array, "S ..."], block: int) -> Shaped[Array, "s ..."]:
    padding = -len(x) % block
    return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) if padding else x
