"""cuDNN's kernels in plain JAX: what jax.nn keeps and asks for, on devices without."""

import types

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused


def use(monkeypatch) -> None:
    """Puts plain functions in the kernels' place.

    All else is jax.nn's own: its checks, its custom_vjp, and so what a pullback keeps.
    The backward kernel reads the out and the logsumexp that it is given, as cuDNN does.
    """
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused, "check_is_flash_attention", lambda *_, **__: None)
    for name, kernel in (("fwd", _forward), ("bwd", _backward)):
        stand_in = types.SimpleNamespace(bind=kernel)
        monkeypatch.setattr(fused, f"_dot_product_attention_{name}_p_wrapper", stand_in)


def _forward(q, k, v, *_, scale, mask_type, sliding_window_length, **__):
    logits = _logits(q, k, scale, mask_type, sliding_window_length)
    highest = logits.max(axis=-1)
    weights = jnp.exp(logits - highest[..., None])
    total = weights.sum(axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights / total[..., None], v)
    stat = (highest + jnp.log(total)).reshape(q.shape[0], q.shape[2], q.shape[1])
    return out.reshape(q.shape).astype(q.dtype), stat


def _backward(q, k, v, *others, scale, mask_type, sliding_window_length, **_):
    stat, out, dout = others[7:10]
    logits = _logits(q, k, scale, mask_type, sliding_window_length)
    weights = jnp.exp(logits - stat.reshape(logits.shape[:-1])[..., None])
    shared = _grouped(dout, k) * _grouped(out, k)
    shared = shared.sum(axis=-1).transpose(0, 2, 3, 1)[..., None]
    dweights = jnp.einsum("BTKGH,BSKH->BKGTS", _grouped(dout, k), v)
    dlogits = weights * (dweights - shared) * scale
    dq = jnp.einsum("BKGTS,BSKH->BTKGH", dlogits, k).reshape(q.shape)
    dk = jnp.einsum("BKGTS,BTKGH->BSKH", dlogits, _grouped(q, k))
    dv = jnp.einsum("BKGTS,BTKGH->BSKH", weights, _grouped(dout, k))
    return tuple(x.astype(q.dtype) for x in (dq, dk, dv))


def _grouped(x, k):
    """`[B, T, N, H] -> [B, T, K, G, H]`, float32."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).astype(jnp.float32)


def _logits(q, k, scale, mask_type, window):
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", _grouped(q, k), k) * scale
    apart = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    if mask_type == fused.MaskType.NO_MASK:
        assert window is None
        return logits
    assert mask_type == fused.MaskType.CAUSAL
    seen = apart >= 0 if window is None else (apart >= 0) & (apart < window)
    return jnp.where(seen, logits, -1e30)
