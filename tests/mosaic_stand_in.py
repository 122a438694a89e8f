"""Tokamax's Hopper kernels in plain JAX: what they take and give, on any device."""

import jax.numpy as jnp

from ulysses_jax.attention import mosaic, select
from ulysses_jax.mesh import Device

H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
A100 = Device("gpu", "NVIDIA A100-SXM4-40GB")


def use(monkeypatch, device=H100) -> None:
    """Puts plain functions in the kernels' place, and calls every mesh's devices so."""
    monkeypatch.setattr(mosaic, "_forward", _forward)
    monkeypatch.setattr(mosaic, "_backward", _backward)
    monkeypatch.setattr(select, "tokamax_lacks", lambda: None)
    for module in ("attend", "memory.take_apart"):
        monkeypatch.setattr(f"ulysses_jax.{module}.device_of", lambda mesh: device)


def _forward(q, k, v, start, stop, *, scale):
    logits = _logits(q, k, start, stop, scale)
    highest = logits.max(axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isinf(highest), 0, highest)[..., None])
    total = weights.sum(axis=-1)
    out = jnp.einsum("KGTS,SKH->TKGH", weights, v.astype(jnp.float32))
    tiny = jnp.finfo(jnp.float32).tiny
    out = out.reshape(q.shape) / (total.reshape(-1, len(q)).T[..., None] + tiny)
    return out.astype(q.dtype), *(x.reshape(-1, len(q)) for x in (highest, total))


def _backward(q, k, v, out, logsumexp, dout, start, stop, *, scale):
    logits = _logits(q, k, start, stop, scale)
    weights = jnp.exp(logits - logsumexp.reshape(logits.shape[:-1])[..., None])
    weights = jnp.where(jnp.isinf(logits), 0, weights)
    shared = (_grouped(dout, k) * _grouped(out, k)).sum(-1).transpose(1, 2, 0)
    dweights = jnp.einsum("TKGH,SKH->KGTS", _grouped(dout, k), v.astype(jnp.float32))
    dlogits = weights * (dweights - shared[..., None]) * scale
    dq = jnp.einsum("KGTS,SKH->TKGH", dlogits, k.astype(jnp.float32)).reshape(q.shape)
    dk = jnp.einsum("KGTS,TKGH->SKH", dlogits, _grouped(q, k))
    dv = jnp.einsum("KGTS,TKGH->SKH", weights, _grouped(dout, k))
    return tuple(x.astype(q.dtype) for x in (dq, dk, dv))


def _grouped(x, k):
    """`[T, N, H] -> [T, K, G, H]`, float32."""
    return x.reshape(len(x), k.shape[1], -1, x.shape[2]).astype(jnp.float32)


def _logits(q, k, start, stop, scale):
    """As the kernel hides: by comparing with a query's range, and nothing else."""
    logits = jnp.einsum("TKGH,SKH->KGTS", _grouped(q, k), k.astype(jnp.float32)) * scale
    key = jnp.arange(len(k))
    seen = (key >= start[:, None]) & (key < stop[:, None])
    return jnp.where(seen, logits, -jnp.inf)
